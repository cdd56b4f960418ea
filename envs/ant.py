"""A four-legged ant that is asked for a speed or a direction (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import mujoco
import numpy as np
import torch
from torch import Tensor

from envs.family import LARGEST, Column, FamilyError, Floats, check_choice, check_range, decided
from envs.locomotion import (
    AXES,
    CENTER_OF_MASS,
    DirectionGoal,
    LocomotionFamily,
    SpeedGoal,
    View,
    add_sensors,
    load_asset,
)
from envs.physics import Physics

Contact = Literal["soft", "file"]

POSITION_JOINTS = tuple(f"{j}_{i}" for i in (1, 2, 3, 4) for j in ("hip", "ankle"))
MOTORS = tuple(f"{j}_{i}" for i in (4, 1, 2, 3) for j in ("hip", "ankle"))


def paper_observation(physics: Physics) -> Tensor:
    """qpos, qvel, the torso's rotation matrix row by row, centre of mass: (N, 41)."""
    rotation = torch.stack([physics.sensor(axis) for axis in AXES], 2).flatten(1)
    return torch.cat([physics.qpos, physics.qvel, rotation, physics.sensor(CENTER_OF_MASS)], 1)


def gymnasium_observation(physics: Physics) -> Tensor:
    """qpos without x and y, qvel: (N, 27), the first 27 of Gymnasium's Ant-v5."""
    return torch.cat([physics.qpos[:, 2:], physics.qvel], 1)


OBSERVATIONS: Mapping[str, Callable[[Physics], Tensor]] = {
    "paper": paper_observation,
    "gymnasium": gymnasium_observation,
}


def pose_of_file(model: mujoco.MjModel) -> Floats:
    """The model's qpos0: torso at .75 m, legs straight."""
    return np.array(model.qpos0)


def pose_init_qpos(model: mujoco.MjModel) -> Floats:
    """The model's own init_qpos numeric: torso at .55 m, ankles bent."""
    return np.array(model.numeric("init_qpos").data)


START_POSES: Mapping[str, Callable[[mujoco.MjModel], Floats]] = {
    "qpos0": pose_of_file,
    "init_qpos": pose_init_qpos,
}


@dataclass(frozen=True, kw_only=True)
class Ant(LocomotionFamily):
    """The body both ant families share.

    Observation under `gymnasium` (27): entries 2-28 of this table. Under `paper` (41): all.

    ======  ================================================  ========
    0-2     torso x, y, z                                      m
    3-6     torso orientation, quaternion w x y z              1
    7-14    joints hip_1 ankle_1 hip_2 ankle_2 ... ankle_4     rad
    15-17   torso velocity x, y, z                             m/s
    18-20   torso angular velocity, torso frame                rad/s
    21-28   joint rates, same order                            rad/s
    29-37   torso rotation matrix, row by row                  1
    38-40   centre of mass x, y, z                             m
    ======  ================================================  ========

    Action 0-7: torque of hip_4 ankle_4 hip_1 ankle_1 hip_2 ankle_2 hip_3 ankle_3, -1 to 1, where
    1 is the motor's bound (150 N m). Measure: x velocity, m/s. The episode ends with the step
    after which the torso's height is outside [z_low, z_high] or the state is not finite. The
    paper's ant also observed 84 contact forces and paid for them; both are left out.
    """

    control_cost: float = 0.005
    """Price of the sum of squared actions (in units of the bound) a step."""
    alive_bonus: float = 0.05
    """Reward for every step."""
    z_low: float = 0.2
    """Lowest height of the torso, m."""
    z_high: float = 1.0
    """Highest height of the torso, m."""
    start_pose: Literal["qpos0", "init_qpos"] | None = None
    """Pose before reset noise."""
    contact: Contact | None = None
    """Contact of all geoms: the softer one below, as in the paper's model, or the file's."""
    soft_solref: tuple[float, float] = (0.02, 1.0)
    """MuJoCo's solref (time constant in s, damping ratio) of the soft contact."""
    soft_solimp: tuple[float, float, float] = (0.8, 0.8, 0.01)
    """MuJoCo's solimp (dmin, dmax, width in m) of the soft contact."""

    paper_sensors: ClassVar[tuple[str, ...]] = (CENTER_OF_MASS, *AXES)
    ending_is_failure: ClassVar[bool] = True
    view: ClassVar[View] = View(4.5, -20.0, 0.4, 1.4)
    protocols: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {
            "frame_skip": 1,
            "timestep": 0.02,
            "velocity_of": "center-of-mass",
            "observation": "paper",
            "position_noise": 0.01,
            "position_noise_shape": "normal",
            "velocity_noise": 0.1,
            "start_pose": "init_qpos",
            "contact": "soft",
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
            "start_pose": "qpos0",
            "contact": "file",
            "horizon": 100,
        },
    }

    def __post_init__(self) -> None:
        """Check this body's numbers, then the shared ones."""
        for name in ("alive_bonus", "z_low", "z_high"):
            check_range(self.name, name, getattr(self, name), -LARGEST, LARGEST)
        if self.z_low >= self.z_high:
            raise FamilyError(f"{self.name}: z_low {self.z_low} is not below z_high {self.z_high}")
        for name, size in (("soft_solref", 2), ("soft_solimp", 3)):
            numbers = getattr(self, name)
            if len(numbers) != size or not (np.abs(numbers) <= LARGEST).all():
                raise FamilyError(
                    f"{self.name}: {name} must be {size} numbers between {-LARGEST:g} and "
                    f"{LARGEST:g}, got {numbers!r}"
                )
        super().__post_init__()
        # The protocol has now decided these two.
        check_choice(self.name, "start_pose", decided(self.start_pose), START_POSES)
        check_choice(self.name, "contact", decided(self.contact), get_args(Contact))

    @property
    def observation_columns(self) -> tuple[Column, ...]:
        """The 27 or 41 numbers of an observation."""
        position = tuple(Column(f"torso_{a}", "m") for a in "xyz")
        shared = (
            *(Column(f"torso_quaternion_{a}", "1") for a in "wxyz"),
            *(Column(j, "rad", "joint angle") for j in POSITION_JOINTS),
            *(Column(f"torso_velocity_{a}", "m/s") for a in "xyz"),
            *(Column(f"torso_angular_velocity_{a}", "rad/s") for a in "xyz"),
            *(Column(f"{j}_velocity", "rad/s") for j in POSITION_JOINTS),
        )
        extra = (
            *(Column(f"torso_rotation_{r}{c}", "1") for r in "xyz" for c in "xyz"),
            *(Column(f"center_of_mass_{a}", "m") for a in "xyz"),
        )
        return {
            "paper": position + shared + extra,
            "gymnasium": position[2:] + shared,
        }[decided(self.observation)]

    @property
    def action_columns(self) -> tuple[Column, ...]:
        """Eight torques in units of the motors' bound."""
        return tuple(Column(m, "bound", "torque") for m in MOTORS)

    @property
    def state_sizes(self) -> tuple[int, int]:
        """(nq, nv)."""
        return 15, 14

    def ending(self, state: Mapping[str, Floats]) -> str:
        """Return what took the torso out of its range of heights."""
        return "jumped" if state["qpos"][2] > self.z_high else "fell"

    def build_model(self, sensors: tuple[str, ...]) -> mujoco.MjModel:
        """Compile Gymnasium's ant.xml with this family's timestep and contact."""
        spec = mujoco.MjSpec.from_string(load_asset("ant.xml"))
        spec.option.timestep = decided(self.timestep)
        contacts = {"soft": spec.geoms, "file": []}
        for geom in contacts[decided(self.contact)]:
            geom.solref = self.soft_solref
            geom.solimp[:3] = self.soft_solimp
        add_sensors(spec, sensors)
        return spec.compile()

    def start_positions(self, model: mujoco.MjModel) -> Floats:
        """Return the chosen start pose (15,)."""
        return START_POSES[decided(self.start_pose)](model)

    def observe(self, physics: Physics) -> Tensor:
        """Return observations (N, O), in the physics' type."""
        return OBSERVATIONS[decided(self.observation)](physics)

    def terminated(self, physics: Physics) -> Tensor:
        """Return (N,) bool: the torso left its range of heights, or the state is not finite."""
        height = physics.qpos[:, 2]
        finite = torch.isfinite(physics.qpos).all(1) & torch.isfinite(physics.qvel).all(1)
        return ~(finite & (height >= self.z_low) & (height <= self.z_high))


@dataclass(frozen=True, kw_only=True)
class AntVel(Ant, SpeedGoal):
    """Walk at a wanted speed: reward 1 - abs(v - v*) - .005 sum a^2 + .05, v* ~ U[0, 3] m/s.

    Task 0: wanted x velocity v*, m/s. Observation, action, ending: see `Ant`.
    """

    speed_high: float = 3.0
    """Fastest wanted speed, m/s."""
    speed_bonus: float = 1.0
    """Reward a step at exactly the wanted speed."""

    name: ClassVar[str] = "ant_vel"

    def __post_init__(self) -> None:
        """Check the bonus, then the rest."""
        check_range(self.name, "speed_bonus", self.speed_bonus, -LARGEST, LARGEST)
        super().__post_init__()

    def reward(self, velocity: Tensor, actions: Tensor, tasks: Tensor) -> Tensor:
        """Return speed_bonus - abs(v - v*) - control_cost sum a^2 + alive_bonus."""
        cost = self.control_cost * actions.square().sum(1)
        return self.speed_bonus - (velocity - tasks[:, 0]).abs() - cost + self.alive_bonus


@dataclass(frozen=True, kw_only=True)
class AntDir(Ant, DirectionGoal):
    """Walk forward or backward: reward d v - .005 sum a^2 + .05, with d -1 or +1.

    Task 0: direction d, -1 backward or +1 forward. Observation, action, ending: see `Ant`.
    """

    name: ClassVar[str] = "ant_dir"

    def reward(self, velocity: Tensor, actions: Tensor, tasks: Tensor) -> Tensor:
        """Return d v - control_cost sum a^2 + alive_bonus."""
        cost = self.control_cost * actions.square().sum(1)
        return tasks[:, 0] * velocity - cost + self.alive_bonus
