"""The half-cheetah families against plain MuJoCo and Gymnasium's own HalfCheetah-v5."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
import pytest
import torch

import envs
from envs.family import FamilyError
from envs.half_cheetah import HalfCheetah, HalfCheetahDir, HalfCheetahVel
from tests.plain_mujoco import moments, single, velocity

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv

Floats = npt.NDArray[np.float64]

FILE = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "half_cheetah.xml"
FAMILIES = (HalfCheetahVel, HalfCheetahDir)
SUBSTEPS = {"paper": 1, "gymnasium": 5}
SECONDS = {"paper": 0.01, "gymnasium": 0.05}
JOINTS = ("rootx", "rootz", "rooty", "bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")


@pytest.fixture(scope="module")
def unedited(tmp_path_factory: pytest.TempPathFactory) -> mujoco.MjModel:
    """What MuJoCo makes of Gymnasium's file as it is; it warns of settotalmass, in C."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("log"))
        return mujoco.MjModel.from_xml_path(str(FILE))


def named(data: mujoco.MjData) -> dict[str, float]:
    """Every number an observation may hold, by the name it should have."""
    numbers = {}
    for joint in JOINTS:
        numbers[joint] = float(data.joint(joint).qpos[0])
        numbers[f"{joint}_velocity"] = float(data.joint(joint).qvel[0])
    for a, place in zip("xyz", data.subtree_com[data.body("torso").id], strict=True):
        numbers[f"center_of_mass_{a}"] = float(place)
    return numbers


def draw(family: HalfCheetah, worlds: int, steps: int) -> tuple[Floats, npt.NDArray[np.float32]]:
    """Starts (N, 18) and actions (T, N, 6), a third of them beyond the bound."""
    rng = np.random.default_rng(17)
    starts = np.stack([family.draw_start(rng) for _ in range(worlds)])
    starts[:, 1] -= 0.1  # Feet in the ground, so that contact is there.
    return starts, rng.uniform(-1.5, 1.5, (steps, worlds, 6)).astype(np.float32)


@pytest.mark.parametrize("protocol", ["paper", "gymnasium"])
@pytest.mark.parametrize("cls", FAMILIES)
def test_reward_measure_and_ending_by_hand(
    cls: type[HalfCheetah], protocol: str, unedited: mujoco.MjModel
) -> None:
    """-|v - v*| - .05 sum a^2, or d v - .05 sum a^2, a clipped; v by protocol; no early end."""
    family = cls(protocol=protocol)  # type: ignore[arg-type]  # a parameter is a plain str
    tasks = {HalfCheetahVel: [0.4, 1.7, 0.0, 2.0], HalfCheetahDir: [-1.0, 1.0, 1.0, -1.0]}[cls]
    starts, actions = draw(family, 4, 8)
    with family.make_worlds(4, threads=1) as worlds:
        worlds.reset(torch.tensor(tasks)[:, None], starts)
        steps = [worlds.step(torch.from_numpy(action)) for action in actions]
    for i, task in enumerate(single(tasks)):
        qpos, qvel = unedited.qpos0 + starts[i, :9], starts[i, 9:]
        moves = actions[:, i].astype(float)
        alone = moments(unedited, qpos, qvel, moves, SUBSTEPS[protocol])
        next(alone)
        for step, moment in zip(steps, alone, strict=True):
            v = velocity(protocol, moment)
            cost = 0.05 * sum(a * a for a in moment.action)
            expected = task * v - cost if cls is HalfCheetahDir else -abs(v - task) - cost
            assert float(step.rewards[i]) == pytest.approx(expected, abs=1e-6, rel=1e-6)
            assert float(step.measures[i, 0]) == pytest.approx(v, abs=1e-6, rel=1e-6)
            assert not step.terminated[i]
            assert not step.diverged[i]


@pytest.mark.parametrize("protocol", ["paper", "gymnasium"])
@pytest.mark.parametrize("cls", FAMILIES)
def test_every_entry_of_an_observation_is_what_its_column_says(
    cls: type[HalfCheetah], protocol: str, unedited: mujoco.MjModel
) -> None:
    """qpos[1:] and qvel, then under `paper` the centre of mass, of the present state."""
    family = cls(protocol=protocol)  # type: ignore[arg-type]  # a parameter is a plain str
    starts, actions = draw(family, 2, 6)
    tasks = torch.from_numpy(family.sample_tasks(2, np.random.default_rng(0)))
    with family.make_worlds(2, threads=2) as worlds:
        seen = [worlds.reset(tasks, starts)]
        seen += [worlds.step(torch.from_numpy(action)).observations for action in actions]
    names = [column.name for column in family.observation_columns]
    for i in range(2):
        qpos, qvel = unedited.qpos0 + starts[i, :9], starts[i, 9:]
        moves = actions[:, i].astype(float)
        alone = moments(unedited, qpos, qvel, moves, SUBSTEPS[protocol])
        for observations, moment in zip(seen, alone, strict=True):
            data = moment.data
            blocks = [data.qpos[1:], data.qvel]
            if protocol == "paper":
                blocks.append(data.subtree_com[1])
            expected = single(np.concatenate(blocks))
            assert len(expected) == {"paper": 20, "gymnasium": 17}[protocol]
            assert observations[i].tolist() == expected
            by_name = named(data)
            assert single([by_name[name] for name in names]) == expected


def test_units_follow_from_what_is_measured() -> None:
    """Angles in rad, the root's x and z in m, and their rates per second."""
    for column in HalfCheetahVel().observation_columns:
        length = column.name.startswith(("rootx", "rootz", "center_of_mass"))
        rate = "/s" if column.name.endswith("_velocity") else ""
        assert column.unit == ("m" if length else "rad") + rate


@pytest.mark.parametrize("protocol", ["paper", "gymnasium"])
def test_the_model_is_gymnasiums_own(protocol: str, unedited: mujoco.MjModel) -> None:
    """Each number of the compiled model equals the unedited file's; the body weighs 14 kg.

    MuJoCo's deprecated settotalmass is applied by hand, so masses and inertias must agree.
    """
    family = HalfCheetahDir(protocol=protocol)  # type: ignore[arg-type]  # a plain str
    model = family.build_model(family.sensors)
    assert float(model.body_mass.sum()) == pytest.approx(14.0, abs=1e-12)
    compared = set()
    for field in dir(unedited):
        ours, theirs = getattr(model, field), getattr(unedited, field)
        # Names and sensors are what was added.
        if isinstance(theirs, np.ndarray) and not field.startswith(("_", "name", "sensor_")):
            np.testing.assert_array_equal(ours, theirs, err_msg=field)
            compared.add(field)
    assert {"body_mass", "body_inertia", "geom_size", "geom_solref", "jnt_range"} <= compared
    assert {"dof_damping", "jnt_stiffness", "dof_invweight0", "actuator_gear"} <= compared
    assert model.opt.timestep == unedited.opt.timestep == 0.01
    assert model.opt.integrator == unedited.opt.integrator


def test_total_mass_and_timestep_reach_the_model(
    unedited: mujoco.MjModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body of 3.5 kg is what MuJoCo makes of settotalmass="3.5"."""
    monkeypatch.chdir(tmp_path)
    text = FILE.read_text().replace('settotalmass="14"', 'settotalmass="3.5"')
    light = mujoco.MjModel.from_xml_string(text)
    model = HalfCheetahVel(total_mass=3.5, timestep=0.004).build_model(())
    assert model.opt.timestep == 0.004
    np.testing.assert_array_equal(model.body_mass, light.body_mass)
    np.testing.assert_array_equal(model.body_inertia, light.body_inertia)
    np.testing.assert_allclose(model.body_mass, unedited.body_mass / 4, rtol=1e-12)


def test_each_action_drives_the_joint_it_is_named_for(unedited: mujoco.MjModel) -> None:
    """Motors' bounds are 120, 90, 60, 120, 60 and 30 N m at an action of 1."""
    family = HalfCheetahVel()
    joints = [unedited.joint(int(j)).name for j in unedited.actuator_trnid[:, 0]]
    assert [column.name for column in family.action_columns] == joints
    assert unedited.actuator_gear[:, 0].tolist() == [120.0, 90.0, 60.0, 120.0, 60.0, 30.0]
    low, high = family.action_bounds
    assert low.tolist() == unedited.actuator_ctrlrange[:, 0].tolist()
    assert high.tolist() == unedited.actuator_ctrlrange[:, 1].tolist()


@pytest.mark.parametrize("cls", FAMILIES)
def test_observations_and_resets_are_those_of_gymnasium(
    cls: type[HalfCheetah], gymnasium_body: Callable[[str, str], MujocoEnv]
) -> None:
    """Three episodes of HalfCheetah-v5 from one generator: starts, observations, x velocity."""
    family = cls(protocol="gymnasium")
    theirs = gymnasium_body("half_cheetah_v5", "HalfCheetahEnv")
    assert theirs.dt == pytest.approx(family.control_seconds, abs=1e-15)
    theirs.np_random = np.random.default_rng(23)
    rng, moves = np.random.default_rng(23), np.random.default_rng(4)
    task = torch.from_numpy(family.sample_tasks(1, np.random.default_rng(0)))
    with family.make_worlds(1, threads=1) as worlds:
        for _ in range(3):
            first, _ = theirs.reset()
            start = family.draw_start(rng)
            np.testing.assert_array_equal(theirs.init_qpos + start[:9], theirs.data.qpos)
            np.testing.assert_array_equal(start[9:], theirs.data.qvel)
            ours = worlds.reset(task, start[None])
            assert ours[0].tolist() == single(first)
            for _ in range(30):
                action = moves.uniform(-1, 1, 6).astype(np.float32)
                observation, _, terminated, _, info = theirs.step(action)
                step = worlds.step(torch.from_numpy(action)[None])
                assert step.observations[0].tolist() == single(observation)
                assert float(step.measures[0, 0]) == float(np.float32(info["x_velocity"]))
                assert bool(step.terminated[0]) is terminated is False


def test_what_each_protocol_decides() -> None:
    """The numbers of the design's table."""
    paper = {
        "protocol": "paper",
        "frame_skip": 1,
        "timestep": 0.01,
        "velocity_of": "center-of-mass",
        "observation": "paper",
        "position_noise": 0.01,
        "position_noise_shape": "normal",
        "velocity_noise": 0.1,
        "horizon": 200,
    }
    gymnasium_v5 = {
        "protocol": "gymnasium",
        "frame_skip": 5,
        "timestep": 0.01,
        "velocity_of": "root",
        "observation": "gymnasium",
        "position_noise": 0.1,
        "position_noise_shape": "uniform",
        "velocity_noise": 0.1,
        "horizon": 100,
    }
    shared = {"control_cost": 0.05, "total_mass": 14.0}
    speeds = {"speed_low": 0.0, "speed_high": 2.0}
    for protocol in (paper, gymnasium_v5):
        name = str(protocol["protocol"])
        fast = envs.make("half_cheetah_vel", protocol=name)
        assert dataclasses.asdict(fast) == {**protocol, **shared, **speeds}
        assert fast.control_seconds == pytest.approx(SECONDS[name], abs=1e-15)
        assert dataclasses.asdict(envs.make("half_cheetah_dir", protocol=name)) == {
            **protocol,
            **shared,
            "balanced": False,
        }
    assert HalfCheetahVel() == HalfCheetahVel(protocol="paper")


def test_the_papers_reset_noise_is_normal() -> None:
    """4,000 draws: sd .01 on each of 9 positions, .1 on each of 9 velocities, independent.

    The sd of 4,000 normal draws is off by 1 part in sqrt(8000), 1.1%; 4.5% is four of those.
    A normal draw is beyond 2 sd in 4.55% of cases, a uniform one never.
    """
    rng, family = np.random.default_rng(1), HalfCheetahDir()
    draws = np.array([family.draw_start(rng) for _ in range(4000)])
    assert draws.shape == (4000, 18)
    width = np.repeat([0.01, 0.1], 9)
    np.testing.assert_allclose(draws.std(axis=0) / width, 1.0, atol=0.045)
    assert (abs(draws.mean(axis=0)) < 4 * width / math.sqrt(4000)).all()
    assert (abs(draws) > 2 * width).mean() == pytest.approx(0.0455, abs=0.004)
    correlation = np.corrcoef(draws.T) - np.eye(18)
    assert abs(correlation).max() < 5 / math.sqrt(4000)


def test_gymnasiums_reset_noise_is_uniform_then_normal() -> None:
    """Positions within .1 with sd .1 / sqrt 3, velocities normal with sd .1."""
    rng, family = np.random.default_rng(1), HalfCheetahDir(protocol="gymnasium")
    draws = np.array([family.draw_start(rng) for _ in range(2000)])
    assert 0.099 < abs(draws[:, :9]).max() <= 0.1
    np.testing.assert_allclose(draws[:, :9].std(axis=0), 0.1 / math.sqrt(3), rtol=0.06)
    np.testing.assert_allclose(draws[:, 9:].std(axis=0), 0.1, rtol=0.065)
    assert (abs(draws[:, 9:]) > 0.2).mean() == pytest.approx(0.0455, abs=0.006)


def test_wanted_speeds_are_uniform_on_their_range() -> None:
    """U[0, 2]: mean 1, sd 2 / sqrt 12, a quarter in each quarter; and any other range."""
    speeds = HalfCheetahVel().sample_tasks(4000, np.random.default_rng(3))
    assert 0 <= speeds.min() < 0.01
    assert 1.99 < speeds.max() <= 2
    assert speeds.mean() == pytest.approx(1.0, abs=0.04)
    quarters = np.histogram(speeds, bins=4, range=(0, 2))[0] / 4000
    np.testing.assert_allclose(quarters, 0.25, atol=0.03)
    other = HalfCheetahVel(speed_low=-3.0, speed_high=-2.5)
    speeds = other.sample_tasks(500, np.random.default_rng(3))
    assert -3.0 <= speeds.min() < speeds.max() <= -2.5


def test_both_directions_are_as_likely() -> None:
    tasks = HalfCheetahDir().sample_tasks(4000, np.random.default_rng(3))
    assert set(tasks[:, 0].tolist()) == {-1.0, 1.0}
    assert abs(tasks.mean()) < 4 / math.sqrt(4000)


def test_tasks_in_words() -> None:
    assert HalfCheetahVel().describe_task([1.25]) == "wanted 1.25 m/s"
    assert HalfCheetahDir().describe_task([-1]) == "backward"
    assert HalfCheetahDir().describe_task([1]) == "forward"
    with pytest.raises(FamilyError, match=r"half_cheetah_dir: .*direction \(sign\).*got \[0\.5\]"):
        HalfCheetahDir().check_task([0.5])


def test_a_direction_sees_velocity_its_own_way() -> None:
    """Backward flips the sign; a wanted speed leaves it."""
    measures = torch.tensor([[[1.0], [2.0], [-3.0]], [[4.0], [-5.0], [6.0]]])
    tasks = torch.tensor([[-1.0], [1.0]])
    flipped = [[[-1.0], [-2.0], [3.0]], [[4.0], [-5.0], [6.0]]]
    assert HalfCheetahDir().wanted_measures(measures, tasks).tolist() == flipped
    assert HalfCheetahVel().wanted_measures(measures, tasks).tolist() == measures.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol", "v5"),
        ("observation", "v4"),
        ("frame_skip", 0),
        ("frame_skip", 2.5),
        ("timestep", 0.0),
        ("timestep", 0.2),
        ("position_noise", -0.1),
        ("position_noise_shape", "gamma"),
        ("velocity_noise", -0.1),
        ("velocity_of", "foot"),
        ("control_cost", -1.0),
        ("total_mass", 0.0),
        ("speed_high", -0.5),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(FamilyError, match=rf"half_cheetah_vel: {field} must be .*got '?{value}"):
        envs.make("half_cheetah_vel", **{field: value})
