"""Bodies stepped by MuJoCo alone, one world after another: what batches of worlds are held to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import mujoco
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Moment(NamedTuple):
    """One control step of one world: every field of the present state, and x before the step."""

    data: mujoco.MjData
    x_before: float
    action: list[float]


def moments(
    model: mujoco.MjModel, qpos: Floats, qvel: Floats, actions: Floats, substeps: int
) -> Iterator[Moment]:
    """The start, then every control step, by mj_step alone; derived fields from mj_forward."""
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = qpos, qvel
    for t in range(len(actions) + 1):
        x_before = float(data.qpos[0])
        action = (
            [0.0] * model.nu if t == 0 else [min(1.0, max(-1.0, float(a))) for a in actions[t - 1]]
        )
        data.ctrl[:] = action
        for _ in range(substeps if t else 0):
            mujoco.mj_step(model, data)
        now = copy.copy(data)
        mujoco.mj_forward(model, now)
        mujoco.mj_subtreeVel(model, now)
        yield Moment(now, x_before, action)


def velocity(protocol: str, moment: Moment) -> float:
    """x velocity, m/s: the centre of mass's now, or the root's over the control step."""
    if protocol == "paper":
        return float(moment.data.subtree_linvel[moment.data.body("torso").id, 0])
    return (float(moment.data.qpos[0]) - moment.x_before) / 0.05


def single(values: npt.ArrayLike) -> list[float]:
    """The values in float32, to be compared exactly."""
    rounded: list[float] = np.asarray(values, np.float32).tolist()
    return rounded
