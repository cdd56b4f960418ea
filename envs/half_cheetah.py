"""A planar cheetah that is asked for a speed or a direction (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import mujoco
import numpy as np
import torch
from torch import Tensor

from envs.family import LARGEST, Column, Floats, check_range, decided
from envs.locomotion import (
    CENTER_OF_MASS,
    DirectionGoal,
    LocomotionFamily,
    SpeedGoal,
    View,
    add_sensors,
    load_asset,
)
from envs.physics import Physics

JOINTS = ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")


def paper_observation(physics: Physics) -> Tensor:
    """qpos without x, qvel, centre of mass: (N, 20)."""
    return torch.cat([physics.qpos[:, 1:], physics.qvel, physics.sensor(CENTER_OF_MASS)], 1)


def gymnasium_observation(physics: Physics) -> Tensor:
    """qpos without x, qvel: (N, 17), Gymnasium's HalfCheetah-v5."""
    return torch.cat([physics.qpos[:, 1:], physics.qvel], 1)


OBSERVATIONS: Mapping[str, Callable[[Physics], Tensor]] = {
    "paper": paper_observation,
    "gymnasium": gymnasium_observation,
}


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(LocomotionFamily):
    """The body both cheetah families share.

    Observation (index: name, unit); the last three only under the `paper` protocol:

    ======  =============================================  ========
    0       height of the root above its start              m
    1       pitch of the root                               rad
    2-7     joints bthigh bshin bfoot fthigh fshin ffoot    rad
    8-9     velocity of the root, x and z                   m/s
    10      pitch rate                                      rad/s
    11-16   joint rates, same order                         rad/s
    17-19   centre of mass x, y, z                          m
    ======  =============================================  ========

    Action 0-5: torque of each joint in the same order, -1 to 1, where 1 is the motor's bound
    (120, 90, 60, 120, 60, 30 N m). Measure: x velocity, m/s. An episode never ends early.
    """

    control_cost: float = 0.05
    """Price of the sum of squared actions (in units of the bound) a step."""
    total_mass: float = 14.0
    """Mass of the whole body, kg."""

    paper_sensors: ClassVar[tuple[str, ...]] = (CENTER_OF_MASS,)
    view: ClassVar[View] = View(3.2, -12.0, 0.55, 1.35)
    protocols: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {
            "frame_skip": 1,
            "timestep": 0.01,
            "velocity_of": "center-of-mass",
            "observation": "paper",
            "position_noise": 0.01,
            "position_noise_shape": "normal",
            "velocity_noise": 0.1,
            "horizon": 200,
        },
        "gymnasium": {
            "frame_skip": 5,
            "timestep": 0.01,
            "velocity_of": "root",
            "observation": "gymnasium",
            "position_noise": 0.1,
            "position_noise_shape": "uniform",
            "velocity_noise": 0.1,
            "horizon": 100,
        },
    }

    def __post_init__(self) -> None:
        """Check this body's numbers, then the shared ones."""
        check_range(self.name, "total_mass", self.total_mass, 1e-3, LARGEST)
        super().__post_init__()

    @property
    def observation_columns(self) -> tuple[Column, ...]:
        """The 17 or 20 numbers of an observation."""
        columns = (
            Column("rootz", "m", "height of the root above its start"),
            Column("rooty", "rad", "pitch of the root"),
            *(Column(j, "rad", "joint angle") for j in JOINTS),
            Column("rootx_velocity", "m/s"),
            Column("rootz_velocity", "m/s"),
            Column("rooty_velocity", "rad/s"),
            *(Column(f"{j}_velocity", "rad/s") for j in JOINTS),
        )
        extra = tuple(Column(f"center_of_mass_{a}", "m") for a in "xyz")
        return columns + {"paper": extra, "gymnasium": ()}[decided(self.observation)]

    @property
    def action_columns(self) -> tuple[Column, ...]:
        """Six torques in units of the motors' bounds."""
        return tuple(Column(j, "bound", "torque") for j in JOINTS)

    @property
    def state_sizes(self) -> tuple[int, int]:
        """(nq, nv)."""
        return 9, 9

    def build_model(self, sensors: tuple[str, ...]) -> mujoco.MjModel:
        """Compile Gymnasium's half_cheetah.xml with the wanted total mass."""
        # MuJoCo deprecates the file's settotalmass attribute; the two calls below do what it did.
        spec = mujoco.MjSpec.from_string(
            load_asset("half_cheetah.xml").replace('settotalmass="14"', "")
        )
        spec.option.timestep = decided(self.timestep)
        add_sensors(spec, sensors)
        model = spec.compile()
        mujoco.mj_setTotalmass(model, self.total_mass)
        mujoco.mj_setConst(model, mujoco.MjData(model))
        return model

    def start_positions(self, model: mujoco.MjModel) -> Floats:
        """Return the model's own qpos0 under either protocol."""
        return np.array(model.qpos0)

    def observe(self, physics: Physics) -> Tensor:
        """Return observations (N, O), in the physics' type."""
        return OBSERVATIONS[decided(self.observation)](physics)


@dataclass(frozen=True, kw_only=True)
class HalfCheetahVel(HalfCheetah, SpeedGoal):
    """Run at a wanted speed: reward -abs(v - v*) - .05 sum a^2, with v* ~ U[0, 2] m/s.

    Task 0: wanted x velocity v*, m/s. Observation, action: see `HalfCheetah`.
    """

    speed_high: float = 2.0
    """Fastest wanted speed, m/s."""

    name: ClassVar[str] = "half_cheetah_vel"

    def reward(self, velocity: Tensor, actions: Tensor, tasks: Tensor) -> Tensor:
        """-abs(v - v*) - control_cost sum a^2."""
        return -(velocity - tasks[:, 0]).abs() - self.control_cost * actions.square().sum(1)


@dataclass(frozen=True, kw_only=True)
class HalfCheetahDir(HalfCheetah, DirectionGoal):
    """Run forward or backward as fast as possible: reward d v - .05 sum a^2, with d -1 or +1.

    Task 0: direction d, -1 backward or +1 forward. Observation, action: see `HalfCheetah`.
    """

    name: ClassVar[str] = "half_cheetah_dir"

    def reward(self, velocity: Tensor, actions: Tensor, tasks: Tensor) -> Tensor:
        """Return d v - control_cost sum a^2."""
        return tasks[:, 0] * velocity - self.control_cost * actions.square().sum(1)
