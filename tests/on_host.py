"""Worlds on the device that MAML_RL_WARP_DEVICE names, spoken to as if they were on the CPU.

Unset, worlds are on the CPU and nothing comes between. Set to cpu, tensors are copied as they would
be to a GPU and back: so tests are rehearsed that are to run there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import mujoco
import torch
from torch import Tensor

from envs.family import DeviceWorlds, Floats, Transition
from envs.physics import Physics

if TYPE_CHECKING:
    from envs.warp import WarpPhysics

NAMED = os.environ.get("MAML_RL_WARP_DEVICE", "")
DEVICE = NAMED or "cpu"
"""Where warp's worlds are made."""


def numbered(device: str) -> torch.device:
    """Return a device as its tensors know it: cuda is cuda:0 there."""
    return torch.empty(0, device=device).device


def home(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, on which nothing that happens later shows."""
    return tensor.to("cpu", copy=True)


class PhysicsOnHost:
    """`Physics` whose tensors are copies on the CPU; `inner` is what simulates."""

    def __init__(self, inner: WarpPhysics) -> None:
        self.inner = inner
        self.model = inner.model
        self.count = inner.count
        self.device = inner.device

    @property
    def qpos(self) -> Tensor:
        return home(self.inner.qpos)

    @property
    def qvel(self) -> Tensor:
        return home(self.inner.qvel)

    @property
    def diverged(self) -> Tensor:
        return home(self.inner.diverged)

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, copy=True)

    def sensor(self, name: str) -> Tensor:
        return home(self.inner.sensor(name))

    def state(self, world: int) -> Mapping[str, Floats]:
        return self.inner.state(world)

    def data(self, world: int) -> mujoco.MjData:
        return self.inner.data(world)

    def set_state(self, qpos: Tensor, qvel: Tensor, where: Tensor | None = None) -> None:
        chosen = None if where is None else self._sent(where)
        self.inner.set_state(self._sent(qpos), self._sent(qvel), chosen)

    def step(self, ctrl: Tensor, substeps: int, where: Tensor | None = None) -> None:
        chosen = None if where is None else self._sent(where)
        self.inner.step(self._sent(ctrl), substeps, chosen)

    def trouble(self) -> str:
        return self.inner.trouble()

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        return self.inner.as_graph(body)


def physics_on_host(physics: WarpPhysics) -> Physics:
    """Return worlds as tests on the CPU can speak to them; themselves if no device is named."""
    # The protocol's tensors may be replaced, and those of a wrapper may not.
    return cast(Physics, PhysicsOnHost(physics)) if NAMED else physics


def live(physics: Physics) -> Physics:
    """Return what simulates, its tensors on its own device: for tests of the views themselves."""
    return cast(Physics, getattr(physics, "inner", physics))


class WorldsOnHost:
    """`DeviceWorlds` that are given and give tensors on the CPU."""

    def __init__(self, inner: DeviceWorlds) -> None:
        self.inner = inner
        self.count = inner.count
        self.device = inner.device

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, copy=True)

    def reset(self, tasks: Tensor, starts: Tensor, where: Tensor | None = None) -> Tensor:
        chosen = None if where is None else self._sent(where)
        return home(self.inner.reset(self._sent(tasks), self._sent(starts), chosen))

    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        chosen = None if where is None else self._sent(where)
        return Transition(*map(home, self.inner.step(self._sent(actions), chosen)))

    def state(self, world: int) -> Mapping[str, Floats]:
        return self.inner.state(world)

    def trouble(self) -> str:
        return self.inner.trouble()

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        return self.inner.as_graph(body)

    def close(self) -> None:
        self.inner.close()


def worlds_on_host(worlds: DeviceWorlds) -> DeviceWorlds:
    """Return worlds as tests on the CPU can speak to them; themselves if no device is named."""
    return WorldsOnHost(worlds) if NAMED else worlds
