"""A second device on a machine that has only one, so that mistakes with devices are caught there.

Within `fake_device()` a tensor may lie on the device FAKE. It is computed by the same kernels as
one on the CPU, and so to the same bits; but as on a GPU an operation on tensors of both devices is
an error, only `to`, `cpu`, `copy_` and their like cross over, and the host has to wait for what it
asks of a tensor there. Crossings and waits are written down.

The device is called "meta", of which torch's autograd and vmap know that it needs no code of its
own. Memory that is pinned, streams and events are left out.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NoReturn, ParamSpec, TypeVar, cast

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from maml_rl.devices import Device

FAKE: Device = cast(Device, "meta")
"""The device's name. No experiment file may have it, but nothing that runs minds."""

TO_DEVICE, TO_HOST = "to the device", "to the host"

P = ParamSpec("P")
T = TypeVar("T")


class DeviceMixError(RuntimeError):
    """Tensors of both devices met, or one on the device is used as if it were on the CPU."""


class CaptureError(RuntimeError):
    """What was to be captured in a graph crosses over to the host, or waits for the device."""


@dataclass
class Ledger:
    """What has gone between the host and the device."""

    crossings: list[tuple[str, int]] = field(default_factory=list)
    """Direction and number of elements of every copy."""
    waits: list[str] = field(default_factory=list)
    """Operations, other than those, whose result the host cannot go on without."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def crossed(self, direction: str, tensor: Tensor) -> None:
        with self._lock:
            self.crossings.append((direction, tensor.numel()))

    def waited(self, name: str) -> None:
        with self._lock:
            self.waits.append(name)

    def clear(self) -> None:
        """Forget all."""
        self.crossings.clear()
        self.waits.clear()

    def events(self) -> int:
        """Return how often either has happened."""
        return len(self.crossings) + len(self.waits)


_ledgers: list[Ledger] = []


def ledger() -> Ledger:
    """Return what is written in now; outside of `fake_device()` nothing is kept."""
    return _ledgers[-1] if _ledgers else Ledger()


class DeviceTensor(Tensor):
    """A tensor on the device; `held` holds its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(FAKE),
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is no class method
        cls,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return perform(func, args, kwargs or {})

    def tolist(self) -> list[object]:
        """Return the numbers, which torch's own does for no subclass."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> NoReturn:
        raise DeviceMixError("a tensor on the device has no array: use cpu() first")

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy


def mapped(function: Callable[[Tensor], object], value: object) -> object:
    """Return arguments, or results, with a function applied to every tensor among them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([mapped(function, item) for item in value])
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return value


def tensors_in(value: object) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(found.append, value)
    return found


def called(
    func: OpOverload, args: object, kwargs: object, change: Callable[[Tensor], object]
) -> object:
    """Call an operation with its tensors changed."""
    return func(
        *cast(tuple[object, ...], mapped(change, args)),
        **cast(dict[str, object], mapped(change, kwargs)),
    )


aten = torch.ops.aten
WAITED_FOR = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2),
    *(aten.unique_dim, aten.repeat_interleave, aten.bincount),
}
"""Operations that give a number of Python's, or a tensor whose size depends on numbers."""
TAKES_OVER = {aten.where, aten.masked_fill, aten.masked_fill_}
"""Operations that copy a tensor without dimensions over from the CPU."""


def is_waited_for(func: OpOverload, args: Sequence[object]) -> bool:
    """Whether the host has to wait for the device to go on after an operation on tensors there."""
    packet = func.overloadpacket
    if packet not in (aten.index, aten.index_put, aten.index_put_):
        return packet in WAITED_FOR
    indices = tensors_in(args[1])
    masked = any(t.dtype in (torch.bool, torch.uint8) for t in indices)
    if packet is aten.index:
        return masked
    # One number is filled in where a mask says, without looking where that is.
    return masked and (len(indices) > 1 or cast(Tensor, args[2]).numel() > 1)


def perform(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Do one operation of torch's where its tensors are.

    Raises:
        DeviceMixError: if they are on both devices.
    """
    tensors = tensors_in((args, dict(kwargs)))
    owners = {id(t.held): t for t in tensors if isinstance(t, DeviceTensor)}
    if any(t.device.type == FAKE and not isinstance(t, DeviceTensor) for t in tensors):
        raise DeviceMixError(f"{func}: a tensor on the device that was made outside fake_device()")
    named = kwargs.get("device")
    there = bool(owners) if named is None else torch.device(cast(str, named)).type == FAKE
    if func is aten.copy_.default:
        there = isinstance(tensors[0], DeviceTensor)
    if func in (aten.copy_.default, aten._to_copy.default):
        # Of `copy_` the last is what is copied.
        if there != isinstance(tensors[-1], DeviceTensor):
            ledger().crossed(TO_DEVICE if there else TO_HOST, tensors[-1])
    elif owners:
        check_together(func, tensors)
        if is_waited_for(func, args):
            ledger().waited(str(func))

    def unwrapped(tensor: Tensor) -> Tensor:
        return tensor.held if isinstance(tensor, DeviceTensor) else tensor

    def wrapped(tensor: Tensor) -> Tensor:
        # What is changed in place is the tensor that it was.
        owner = owners.get(id(tensor))
        return DeviceTensor(tensor) if owner is None else owner

    here = {**kwargs, "device": torch.device("cpu")} if named is not None else dict(kwargs)
    result = called(func, args, here, unwrapped)
    if any(owner.held.shape != owner.shape for owner in owners.values()):
        raise NotImplementedError(f"{func} changes a shape in place")
    return mapped(wrapped, result) if there else result


def check_together(func: OpOverload, tensors: Sequence[Tensor]) -> None:
    """Raise DeviceMixError unless all tensors are on the device.

    One of the CPU without dimensions may be among them in operations on each number by itself.
    """
    takes_over = func.overloadpacket in TAKES_OVER
    for tensor in tensors:
        if isinstance(tensor, DeviceTensor):
            continue
        if tensor.ndim or not (takes_over or torch.Tag.pointwise in func.tags):
            places = [
                f"{tuple(t.shape)} on the {'device' if isinstance(t, DeviceTensor) else 'CPU'}"
                for t in tensors
            ]
            raise DeviceMixError(f"{func}: tensors of both devices: {', '.join(places)}")
        if takes_over:
            ledger().crossed(TO_DEVICE, tensor)


class DeviceMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Makes the device known to functions that make tensors, in one thread of Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return perform(func, args, kwargs or {})


class DeviceThreads(ThreadPoolExecutor):
    """A pool in whose threads the device is known too."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def known(*args: P.args, **kwargs: P.kwargs) -> T:
            with DeviceMode():
                return fn(*args, **kwargs)

        return super().submit(known, *args, **kwargs)


@contextmanager
def fake_device(free_bytes: int = 2**50) -> Iterator[Ledger]:
    """Have the device, with so much memory free; yields what crosses over and is waited for."""
    kept = Ledger()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("maml_rl.chunks.ThreadPoolExecutor", DeviceThreads)
        patch.setattr("maml_rl.maml.free_bytes", lambda device: free_bytes)
        # Of torch's Adam, which has a list of devices that its fused kernel is for.
        optimizer = importlib.import_module("torch.optim.optimizer")
        fused = "_get_fused_kernels_supported_devices"
        patch.setattr(optimizer, fused, lambda: [FAKE, "cpu"], raising=False)
        _ledgers.append(kept)
        stack.callback(_ledgers.remove, kept)
        stack.enter_context(DeviceMode())
        yield kept


class Capture(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Writes operations down as they are done."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.done: list[tuple[OpOverload, object, object, object]] = []

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, result))
        return result


def captured(body: Callable[[], None]) -> Callable[[], None]:
    """Run `body`, and return what does the same operations again on the same memory.

    As a CUDA graph does: nothing of Python's is looked at again.

    Raises:
        CaptureError: if `body` does what cannot be captured.
    """
    before = ledger().events()
    with Capture() as capture:
        body()
    if ledger().events() > before:
        kept = ledger()
        raise CaptureError(f"not to be captured: {kept.crossings[-1:]} {kept.waits[-1:]}")

    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs, results in capture.done:
                if func.is_view:
                    continue
                again = called(func, args, kwargs, lambda tensor: tensor)
                for old, new in zip(tensors_in(results), tensors_in(again), strict=True):
                    if old is not new:
                        old.copy_(new)

    return replay


def rehearsed(body: Callable[[], None]) -> Callable[[], None]:
    """Run `body` twice, capture it, and return the replay, as physics on a GPU does."""
    for _ in range(2):
        body()
    return captured(body)
