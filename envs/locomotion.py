"""What families on a MuJoCo body share: the two protocols' machinery and their worlds.

Reward, observation and termination are torch code over the tensors that physics hands out, so
the same lines serve any backend that has `qpos`, `qvel`, `sensor`, `set_state` and `step`.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

import mujoco
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.family import (
    LARGEST,
    Column,
    DeviceWorlds,
    Draws,
    FamilyError,
    Floats,
    TaskFamily,
    Transition,
    WarpSettings,
    Worlds,
    check_choice,
    check_count,
    check_range,
    decided,
)
from envs.physics import CpuPhysics, Physics

Protocol = Literal["paper", "gymnasium"]
VelocityOf = Literal["center-of-mass", "root"]
NoiseShape = Literal["normal", "uniform"]

CENTER_OF_MASS = "center_of_mass"
CENTER_OF_MASS_VELOCITY = "center_of_mass_velocity"
AXES = ("axis_x", "axis_y", "axis_z")

SENSORS: Mapping[str, mujoco.mjtSensor] = {
    CENTER_OF_MASS: mujoco.mjtSensor.mjSENS_SUBTREECOM,
    CENTER_OF_MASS_VELOCITY: mujoco.mjtSensor.mjSENS_SUBTREELINVEL,
    AXES[0]: mujoco.mjtSensor.mjSENS_FRAMEXAXIS,
    AXES[1]: mujoco.mjtSensor.mjSENS_FRAMEYAXIS,
    AXES[2]: mujoco.mjtSensor.mjSENS_FRAMEZAXIS,
}
"""Sensors of the torso that observations and rewards may read."""


def load_asset(name: str) -> str:
    """Return a model's XML from the installed gymnasium package, which is not imported for it."""
    package = importlib.util.find_spec("gymnasium")
    if package is None or package.origin is None:
        raise ImportError("the bodies' files come with gymnasium: pip install gymnasium")
    return (Path(package.origin).parent / "envs" / "mujoco" / "assets" / name).read_text()


def add_sensors(spec: mujoco.MjSpec, names: tuple[str, ...]) -> None:
    """Add the named sensors of the body called torso to a model's specification."""
    for name in names:
        frame = name in AXES
        spec.add_sensor(
            name=name,
            type=SENSORS[name],
            objtype=mujoco.mjtObj.mjOBJ_XBODY if frame else mujoco.mjtObj.mjOBJ_BODY,
            objname="torso",
        )


def velocity_of_center_of_mass(physics: Physics, x_before: Tensor, seconds: float) -> Tensor:
    """Return the x velocity of the whole body's centre of mass at the present state, (N,)."""
    return physics.sensor(CENTER_OF_MASS_VELOCITY)[:, 0]


def velocity_of_root(physics: Physics, x_before: Tensor, seconds: float) -> Tensor:
    """Return the root's mean x velocity over the control step, (N,)."""
    return (physics.qpos[:, 0] - x_before) / seconds


VELOCITIES: Mapping[str, Callable[[Physics, Tensor, float], Tensor]] = {
    "center-of-mass": velocity_of_center_of_mass,
    "root": velocity_of_root,
}


class View(NamedTuple):
    """Where a body is looked at from; its camera follows the torso along the ground."""

    distance: float
    """m."""
    elevation: float
    """Degrees, negative from above."""
    height: float
    """Of the point looked at, m."""
    arrows: float
    """Height of the arrows of wanted and present velocity, m."""


@dataclass(frozen=True, kw_only=True)
class LocomotionFamily(TaskFamily):
    """A MuJoCo body that is asked to move along x.

    `protocol` decides the fields that default to None; an explicit value wins, and after
    construction every field holds its resolved number.
    """

    protocol: Protocol = "paper"
    """`paper`: what the numbers of Finn et al. 2017 were made with. `gymnasium`: what has been
    used since. Returns under the two cannot be compared."""
    frame_skip: int | None = None
    """Physics steps per control step."""
    timestep: float | None = None
    """Seconds of one physics step."""
    velocity_of: VelocityOf | None = None
    """Whose x velocity the reward reads: the centre of mass's now, or the root's mean over the
    control step."""
    observation: Protocol | None = None
    """Which protocol's observation."""
    position_noise: float | None = None
    """Width of the reset noise on every qpos entry (m, rad or quaternion)."""
    position_noise_shape: NoiseShape | None = None
    """`normal`: the width is the standard deviation. `uniform`: plus or minus the width."""
    velocity_noise: float | None = None
    """Standard deviation of the reset noise on every qvel entry (m/s or rad/s)."""
    control_cost: float = 0.0
    """Price of the sum of squared actions (in units of the bound) a step."""

    measure_columns: ClassVar[tuple[Column, ...]] = (
        Column("velocity", "m/s", "x velocity that the reward reads"),
    )
    protocols: ClassVar[Mapping[str, Mapping[str, object]]]
    """For each protocol, the values of the fields it decides."""
    paper_sensors: ClassVar[tuple[str, ...]]
    """Names of the torso's sensors in the `paper` observation."""
    view: ClassVar[View] = View(4.0, -20.0, 0.5, 1.2)
    """Of pictures."""

    def __post_init__(self) -> None:
        """Fill what the protocol decides, then check ranges."""
        check_choice(self.name, "protocol", self.protocol, self.protocols)
        for field, value in self.protocols[self.protocol].items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        check_count(self.name, "frame_skip", self.frame_skip, 1, 1000)
        check_range(self.name, "timestep", decided(self.timestep), 1e-5, 0.1)
        check_range(self.name, "position_noise", decided(self.position_noise), 0, LARGEST)
        check_range(self.name, "velocity_noise", decided(self.velocity_noise), 0, LARGEST)
        check_range(self.name, "control_cost", self.control_cost, 0, LARGEST)
        check_choice(self.name, "velocity_of", decided(self.velocity_of), VELOCITIES)
        check_choice(self.name, "observation", decided(self.observation), self.protocols)
        shape = decided(self.position_noise_shape)
        check_choice(self.name, "position_noise_shape", shape, get_args(NoiseShape))
        super().__post_init__()

    @property
    def control_seconds(self) -> float:
        """Seconds of simulated time in one control step."""
        return decided(self.frame_skip) * decided(self.timestep)

    @property
    def shown_seconds(self) -> float:
        """Seconds of video that a control step takes: those of the simulation."""
        return self.control_seconds

    @property
    def shown_mean_steps(self) -> int:
        """Control steps in half a second: a body's velocity swings with every stride."""
        return max(1, round(0.5 / self.control_seconds))

    def moment(self, steps: int) -> str:
        """Return when something is, so many control steps after the start, in seconds."""
        return f"{steps * self.control_seconds:.1f} s"

    @property
    def world_bytes(self) -> int:
        """Memory that one world takes at the least, bytes.

        With sensors a world has a simulation of its own: 176 kB for the ant and 184 kB for the
        cheetah, as measured. Without, threads share simulations, and a world is its state: 1 kB.
        """
        return 100_000 if self.sensors else 1000

    @abstractmethod
    def build_model(self, sensors: tuple[str, ...]) -> mujoco.MjModel:
        """Compile the body with this family's timestep and the named sensors of the torso."""

    @abstractmethod
    def start_positions(self, model: mujoco.MjModel) -> Floats:
        """Return qpos (nq,) before reset noise."""

    @abstractmethod
    def observe(self, physics: Physics) -> Tensor:
        """Return observations (N, O) of the present state, in the physics' type."""

    @abstractmethod
    def reward(self, velocity: Tensor, actions: Tensor, tasks: Tensor) -> Tensor:
        """Return rewards (N,) of a step.

        Args:
            velocity: (N,) x velocity, m/s.
            actions: (N, A) clipped, in units of the bound.
            tasks: (N, P).
        """

    def wanted_velocity(self, task: npt.NDArray[np.float32]) -> float | None:
        """Return the x velocity that a task (P,) asks for, m/s; None where it asks for none."""
        return None

    def terminated(self, physics: Physics) -> Tensor:
        """Return (N,) bool: the present state ends the episode. Never, unless overridden."""
        return torch.zeros_like(physics.diverged)

    @property
    @abstractmethod
    def state_sizes(self) -> tuple[int, int]:
        """The body's (nq, nv)."""

    @property
    def sensors(self) -> tuple[str, ...]:
        """Names of the torso's sensors that observation and reward read."""
        observed = {"paper": self.paper_sensors, "gymnasium": ()}[decided(self.observation)]
        moved = {"center-of-mass": (CENTER_OF_MASS_VELOCITY,), "root": ()}
        return observed + moved[decided(self.velocity_of)]

    def draw_start(self, rng: np.random.Generator) -> Floats:
        """Draw reset noise for qpos, then for qvel, (nq + nv,), as Gymnasium does."""
        nq, nv = self.state_sizes
        width = decided(self.position_noise)
        shapes: Mapping[str, Callable[[], Floats]] = {
            "normal": lambda: width * rng.standard_normal(nq),
            "uniform": lambda: rng.uniform(-width, width, nq),
        }
        positions = shapes[decided(self.position_noise_shape)]()
        return np.concatenate([positions, decided(self.velocity_noise) * rng.standard_normal(nv)])

    def draw_starts(self, draws: Draws) -> Tensor:
        """Draw reset noise for qpos, then for qvel, of N episodes, (N, nq + nv)."""
        nq, nv = self.state_sizes
        width = decided(self.position_noise)
        shapes: Mapping[str, Callable[[], Tensor]] = {
            "normal": lambda: width * draws.normal(nq),
            "uniform": lambda: width * (2.0 * draws.uniform(nq) - 1.0),
        }
        positions = shapes[decided(self.position_noise_shape)]()
        return torch.cat([positions, decided(self.velocity_noise) * draws.normal(nv)], 1)

    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        """Make `count` worlds on `threads` threads (0: one a core)."""
        model = self.build_model(self.sensors)
        return LocomotionWorlds(self, CpuPhysics(model, count, threads=threads))

    def make_device_worlds(
        self, count: int, *, device: str | torch.device, settings: WarpSettings
    ) -> DeviceWorlds:
        """Make `count` worlds that mujoco_warp simulates on a device."""
        # Here alone: what it needs is an extra.
        from envs.warp import WarpPhysics

        model = self.build_model(self.sensors)
        return LocomotionWorlds(self, WarpPhysics(model, count, device=device, settings=settings))


@dataclass(frozen=True, kw_only=True)
class SpeedGoal(LocomotionFamily):
    """The task half of a family that is asked for a speed along x. Task 0: wanted speed, m/s.

    Name the body first, `class MyVel(MyBody, SpeedGoal)`, so that the body's defaults hold.
    """

    speed_low: float = 0.0
    """Slowest wanted speed, m/s."""
    speed_high: float = 1.0
    """Fastest wanted speed, m/s."""

    task_columns: ClassVar[tuple[Column, ...]] = (Column("velocity", "m/s", "wanted x velocity"),)
    training_fields: ClassVar[frozenset[str]] = frozenset({"speed_low", "speed_high"})

    def __post_init__(self) -> None:
        """Check the range of speeds, then the body."""
        check_range(self.name, "speed_low", self.speed_low, -LARGEST, LARGEST)
        check_range(self.name, "speed_high", self.speed_high, self.speed_low, LARGEST)
        super().__post_init__()

    def sample_tasks(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Draw wanted speeds uniformly, (count, 1)."""
        return rng.uniform(self.speed_low, self.speed_high, (count, 1)).astype(np.float32)

    def spread_tasks(self, count: int) -> npt.NDArray[np.float32]:
        """Return the middles of `count` equal parts of the range, (count, 1)."""
        middles = (np.arange(count) + 0.5) / count
        speeds = self.speed_low + (self.speed_high - self.speed_low) * middles
        return speeds.astype(np.float32)[:, None]

    def describe_task(self, task: npt.ArrayLike) -> str:
        """Return the wanted speed in words."""
        return f"wanted {self.check_task(task)[0]:.2f} m/s"

    def wanted_velocity(self, task: npt.NDArray[np.float32]) -> float | None:
        """Return the wanted speed, m/s."""
        return float(task[0])

    def outside_training(self, tasks: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return which speeds are slower or faster than any that is drawn, (T,)."""
        speeds = tasks[:, 0]
        return (speeds < np.float32(self.speed_low)) | (speeds > np.float32(self.speed_high))


DIRECTIONS = np.array([[-1.0], [1.0]], np.float32)
DIRECTION_WORDS = {-1.0: "backward", 1.0: "forward"}


@dataclass(frozen=True, kw_only=True)
class DirectionGoal(LocomotionFamily):
    """The task half of a family that is asked for a direction. Task 0: -1 backward, +1 forward.

    Name the body first, `class MyDir(MyBody, DirectionGoal)`, so that the body's defaults hold.
    """

    balanced: bool = False
    """Whether a batch has each direction equally often. The paper draws each task on its own;
    then one direction's surplus in a small batch outweighs what is to be learned from both."""

    task_columns: ClassVar[tuple[Column, ...]] = (
        Column("direction", "sign", "-1 backward, +1 forward"),
    )
    training_fields: ClassVar[frozenset[str]] = frozenset({"balanced"})

    def __post_init__(self) -> None:
        """Check the draw, then the body."""
        if not isinstance(self.balanced, bool):
            raise FamilyError(f"{self.name}: balanced must be true or false, got {self.balanced!r}")
        super().__post_init__()

    @property
    def finite_tasks(self) -> npt.NDArray[np.float32]:
        """Backward and forward."""
        return DIRECTIONS

    def sample_tasks(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Draw directions with equal chance, or equally often if `balanced`, (count, 1)."""
        if self.balanced:
            # Where the count is odd, chance decides which direction has one task more.
            both = rng.permutation(len(DIRECTIONS))
            which: npt.NDArray[np.int64] = rng.permutation(np.resize(both, count))
            return DIRECTIONS[which]
        return DIRECTIONS[rng.integers(0, len(DIRECTIONS), count)]

    def describe_task(self, task: npt.ArrayLike) -> str:
        """Return "forward" or "backward"."""
        return DIRECTION_WORDS[float(self.check_task(task)[0])]

    def wanted_velocity(self, task: npt.NDArray[np.float32]) -> float | None:
        """Return 2 m/s the wanted way, to be drawn: as fast as it can is asked for."""
        return 2.0 * float(task[0])

    def wanted_measures(self, measures: Tensor, tasks: Tensor) -> Tensor:
        """Return velocity the wanted way, m/s."""
        return measures * tasks[:, 0].reshape(-1, *[1] * (measures.ndim - 1))


class LocomotionWorlds(Worlds):
    """Worlds of a locomotion family over a physics backend."""

    def __init__(self, family: LocomotionFamily, physics: Physics) -> None:
        self.family = family
        self.physics = physics
        self.count = physics.count
        self.device = physics.device
        self._start = torch.from_numpy(family.start_positions(physics.model)).to(physics.qpos)
        self._tasks = torch.zeros(self.count, len(family.task_columns), device=self.device)
        self._velocity = VELOCITIES[decided(family.velocity_of)]

    def reset(self, tasks: Tensor, starts: Floats | Tensor, where: Tensor | None = None) -> Tensor:
        """Put worlds at their start pose plus the noise in `starts` (N, nq + nv)."""
        nq = self.physics.model.nq
        noise = torch.as_tensor(starts).to(self.physics.qpos)
        chosen = tasks if where is None else torch.where(where.unsqueeze(1), tasks, self._tasks)
        self._tasks.copy_(chosen)
        self.physics.set_state(self._start + noise[:, :nq], noise[:, nq:], where)
        return self.family.observe(self.physics).float()

    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        """Advance by one control step; actions (N, A) are clipped to [-1, 1]."""
        family, physics = self.family, self.physics
        clipped = actions.clamp(-1.0, 1.0)
        x_before = physics.qpos[:, 0].clone()
        physics.step(clipped, decided(family.frame_skip), where)
        velocity = self._velocity(physics, x_before, family.control_seconds)
        return Transition(
            observations=family.observe(physics).float(),
            rewards=family.reward(velocity, clipped.double(), self._tasks.double()).float(),
            terminated=family.terminated(physics),
            diverged=physics.diverged,
            measures=velocity.float()[:, None],
        )

    def state(self, world: int) -> Mapping[str, Floats]:
        """Return qpos (m, rad or quaternion) and qvel (m/s, rad/s)."""
        return self.physics.state(world)

    def trouble(self) -> str:
        """Return what the physics had no room for since this was last asked."""
        return self.physics.trouble()

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does what `body` does, in one launch where the device can."""
        return self.physics.as_graph(body)
