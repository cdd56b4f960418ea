"""A batch of worlds of one MuJoCo model: what any backend offers, and the one on CPU threads.

The only module that touches `mujoco.batch`. Results are bit-identical to a plain
`mj_step` loop at any number of threads. `envs/warp.py` is the same on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Protocol

import mujoco
import torch
from torch import Tensor

from envs.family import Floats, as_mask

try:
    from mujoco.batch import Batch, SimulationError
except ImportError as missing:
    raise ImportError(
        f"mujoco {mujoco.__version__} has no mujoco.batch, which this package needs: "
        "pip install 'mujoco>=3.17'"
    ) from missing

_POOLS: weakref.WeakSet[CpuPhysics] = weakref.WeakSet()


def _after_fork() -> None:
    """Keep a child from waiting for its parent's threads, of which it has none.

    A batch's destructor would, so none is ever run; and so would the first of torch's products that
    is shared among threads.
    """
    for physics in list(_POOLS):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(physics._batch))
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)

STATE_FIELDS = ("time", "qpos", "qvel", "act", "qacc_warmstart", "ctrl")
"""What a world's future depends on."""


class Physics(Protocol):
    """N worlds of one model: positions, velocities and named sensors as live tensors.

    `where` is a bool mask (N,), or None for all; the worlds left out are not touched. Every tensor
    lies on `device`; positions, velocities and sensors have one floating-point type.

    Attributes:
        model: of every world.
        count: N.
        qpos: (N, nq), a live view: valid until the next call.
        qvel: (N, nv), likewise.
        diverged: (N,) bool: the simulation broke down in the last `step`. Such a world is reset, so
            what its state says is not what was simulated.
    """

    model: mujoco.MjModel
    count: int
    qpos: Tensor
    qvel: Tensor
    diverged: Tensor

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""

    def sensor(self, name: str) -> Tensor:
        """Return one sensor's readings of the present state, (N, size), a copy."""

    def state(self, world: int) -> Mapping[str, Floats]:
        """Return one world's qpos (nq,) and qvel (nv,), as they were set if that broke it."""

    def data(self, world: int) -> mujoco.MjData:
        """Return a copy of one world with its derived fields computed, for drawing it."""

    def set_state(self, qpos: Tensor, qvel: Tensor, where: Tensor | None = None) -> None:
        """Set positions (N, nq) and velocities (N, nv), and forget solver state and warnings.

        A state that the simulator cannot take counts as diverged in the next step.
        """

    def step(self, ctrl: Tensor, substeps: int, where: Tensor | None = None) -> None:
        """Apply controls (N, nu) for `substeps` steps of the model, and refresh the sensors."""

    def trouble(self) -> str:
        """Return what there was no room for since this was last asked, and which setting to raise.

        Empty if there was room for everything. Worlds that it befell count as diverged.
        """

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does what `body` does, in one launch where the device can.

        `body` steps these worlds and works on tensors of their device, always the same ones.
        """


class CpuPhysics:
    """`Physics` on CPU threads, in float64.

    Not picklable. A process forked after it was made notices, and goes on with threads of its own.
    """

    def __init__(self, model: mujoco.MjModel, count: int, *, threads: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.model = model
        self.count = count
        self._threads = threads
        # States that broke down when they were set, and that MuJoCo replaced by its default.
        self._not_taken: dict[int, tuple[Floats, Floats]] = {}
        self.diverged = torch.zeros(count, dtype=torch.bool)
        self._stage = (
            mujoco.mjtStage.mjSTAGE_VEL if model.nsensor else mujoco.mjtStage.mjSTAGE_NONE
        ).value
        self._start_threads()
        _POOLS.add(self)

    def _start_threads(self) -> None:
        """Make the batch and its views."""
        # A world of its own for every simulation lets a step continue from the sensors' stage.
        # Without sensors there is no such stage, and sharing worlds saves memory.
        self._process = os.getpid()
        self._batch = Batch(
            self.model, self.count, self._threads, persistent=self.model.nsensor > 0
        )
        self.qpos = torch.from_numpy(self._batch.bind("qpos"))
        self.qvel = torch.from_numpy(self._batch.bind("qvel"))
        self._ctrl = torch.from_numpy(self._batch.bind("ctrl"))
        # (N, kinds of warning): how often each was raised; the other entry is where. MuJoCo zeroes
        # them whenever it resets a world, so they are read and zeroed here, never compared.
        self._warnings = self._batch.warning[:, :, 1]
        self._sensors = self._batch.bind("sensordata")

    def _check_process(self) -> None:
        """After a fork, begin anew from the state of the parent's worlds.

        Only the thread that forked is alive in the child: a call on the inherited batch would
        wait for ever for threads that are not there.
        """
        if self._process == os.getpid():
            return
        inherited = self._batch
        self._start_threads()
        for field in STATE_FIELDS:
            self._batch.bind(field)[:] = inherited.bind(field)
        if self._stage:
            self._batch.forward(None, stage=self._stage)

    @property
    def threads(self) -> int:
        """Threads that step the worlds."""
        return int(self._batch.nthread)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def trouble(self) -> str:
        """Return "": MuJoCo takes the memory that it needs."""
        return ""

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        """Return `body`: there is nothing to launch."""
        return body

    def sensor(self, name: str) -> Tensor:
        """Return one sensor's readings of the present state, (N, size) float64, a copy."""
        sensor = self.model.sensor(name)
        start = int(sensor.adr[0])
        return torch.from_numpy(self._sensors[:, start : start + int(sensor.dim[0])].copy())

    def state(self, world: int) -> Mapping[str, Floats]:
        """Return one world's qpos (nq,) and qvel (nv,), as they were set if that broke it."""
        here = (self.qpos[world].numpy().copy(), self.qvel[world].numpy().copy())
        return dict(zip(("qpos", "qvel"), self._not_taken.get(world, here), strict=True))

    def data(self, world: int) -> mujoco.MjData:
        """Return a copy of one world with its derived fields computed, for drawing it."""
        self._check_process()
        data = self._batch.get_data(world)
        mujoco.mj_forward(self.model, data)
        return data

    def set_state(self, qpos: Tensor, qvel: Tensor, where: Tensor | None = None) -> None:
        """Set positions (N, nq) and velocities (N, nv), and forget solver state and warnings.

        A state that MuJoCo cannot take counts as diverged in the next step.
        """
        self._check_process()
        mask = None if where is None else where.numpy()
        self._batch.reset(mask, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        if where is None:
            self.qpos.copy_(qpos)
            self.qvel.copy_(qvel)
        else:
            self.qpos[where] = qpos[where]
            self.qvel[where] = qvel[where]
        self._warnings[slice(None) if mask is None else mask] = 0
        chosen = as_mask(where, self.count)
        self._not_taken = {w: s for w, s in self._not_taken.items() if not chosen[w]}
        if self._stage:
            self._batch.forward(mask, stage=self._stage)
            broken = torch.from_numpy(self._warnings.any(axis=1)) & chosen
            for world in broken.nonzero()[:, 0].tolist():
                self._not_taken[world] = (qpos[world].numpy().copy(), qvel[world].numpy().copy())
        # A new tensor: the old one may be in a caller's hands.
        self.diverged = self.diverged & ~chosen

    def step(self, ctrl: Tensor, substeps: int, where: Tensor | None = None) -> None:
        """Apply controls (N, nu) for `substeps` steps of the model, and refresh the sensors."""
        self._check_process()
        self._not_taken.clear()
        self._ctrl.copy_(ctrl)
        mask = None if where is None else where.numpy()
        failed = None
        try:
            self._batch.step(mask, nstep=substeps, stage=self._stage)
        except SimulationError as error:
            failed = error.ids
        warned = torch.from_numpy(self._warnings.any(axis=1))
        self._warnings[slice(None) if mask is None else mask] = 0
        finite = torch.isfinite(self.qpos).all(1) & torch.isfinite(self.qvel).all(1)
        self.diverged = (warned | ~finite) & as_mask(where, self.count)
        if failed is not None:
            self.diverged[torch.from_numpy(failed)] = True
