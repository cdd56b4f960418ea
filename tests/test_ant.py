"""The ant families against plain MuJoCo and Gymnasium's own Ant-v5."""

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
from envs.ant import Ant, AntDir, AntVel
from envs.family import FamilyError
from envs.physics import CpuPhysics
from tests.plain_mujoco import moments, single, velocity

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv

Floats = npt.NDArray[np.float64]

FILE = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "ant.xml"
FAMILIES = (AntVel, AntDir)
PROTOCOLS = ("paper", "gymnasium")
SUBSTEPS = {"paper": 1, "gymnasium": 5}
LEGS = tuple(f"{joint}_{leg}" for leg in "1234" for joint in ("hip", "ankle"))
INIT_QPOS = (0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1)
QPOS0 = (0, 0, 0.75, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
POSES = {"paper": INIT_QPOS, "gymnasium": QPOS0}


@pytest.fixture(scope="module")
def models() -> dict[str, mujoco.MjModel]:
    """The file as it is, and the paper's by edits of the text: softer contact, a longer step."""
    text = FILE.read_text()
    edits = (
        ('<geom conaffinity="0"', '<geom solref="0.02 1" solimp="0.8 0.8 0.01" conaffinity="0"'),
        ('timestep="0.01"', 'timestep="0.02"'),
    )
    paper = text
    for old, new in edits:
        assert paper.count(old) == 1
        paper = paper.replace(old, new)
    return {
        "paper": mujoco.MjModel.from_xml_string(paper),
        "gymnasium": mujoco.MjModel.from_xml_string(text),
    }


def named(data: mujoco.MjData) -> dict[str, float]:
    """Every number an observation may hold, by the name it should have."""
    root, torso = data.joint("root"), data.body("torso")
    numbers = {}
    for k, a in enumerate("xyz"):
        numbers[f"torso_{a}"] = float(root.qpos[k])
        numbers[f"torso_velocity_{a}"] = float(root.qvel[k])
        numbers[f"torso_angular_velocity_{a}"] = float(root.qvel[3 + k])
        numbers[f"center_of_mass_{a}"] = float(data.subtree_com[torso.id, k])
        for n, b in enumerate("xyz"):
            numbers[f"torso_rotation_{a}{b}"] = float(torso.xmat.reshape(3, 3)[k, n])
    for k, a in enumerate("wxyz"):
        numbers[f"torso_quaternion_{a}"] = float(root.qpos[3 + k])
    for joint in LEGS:
        numbers[joint] = float(data.joint(joint).qpos[0])
        numbers[f"{joint}_velocity"] = float(data.joint(joint).qvel[0])
    return numbers


def draw(family: Ant, worlds: int, steps: int) -> tuple[Floats, npt.NDArray[np.float32]]:
    """Starts (N, 29), tilted and near the floor, and actions (T, N, 8), some beyond the bound."""
    rng = np.random.default_rng(17)
    starts = np.stack([family.draw_start(rng) for _ in range(worlds)])
    starts[:, 3:7] += rng.normal(0, 0.3, (worlds, 4))
    starts[:, 2] -= 0.15
    return starts, rng.uniform(-1.5, 1.5, (steps, worlds, 8)).astype(np.float32)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cls", FAMILIES)
def test_reward_measure_and_ending_by_hand(
    cls: type[Ant], protocol: str, models: dict[str, mujoco.MjModel]
) -> None:
    """1 - |v - v*| - .005 sum a^2 + .05, or d v - .005 sum a^2 + .05; the ending step as well.

    World 1 is dropped from above and world 3 is deep in the floor: their steps end the episode, z
    being outside [.2, 1], and are rewarded like any other.
    """
    family = cls(protocol=protocol)  # type: ignore[arg-type]  # a parameter is a plain str
    tasks = {AntVel: [0.4, 2.6, 1.1, 3.0, 0.0], AntDir: [-1.0, 1.0, 1.0, -1.0, 1.0]}[cls]
    starts, actions = draw(family, 5, 7)
    starts[1, 2] = 1.2 - POSES[protocol][2]
    starts[3, 2] = {"paper": 0.02, "gymnasium": -4.0}[protocol] - POSES[protocol][2]
    with family.make_worlds(5, threads=1) as worlds:
        worlds.reset(torch.tensor(tasks)[:, None], starts)
        steps = [worlds.step(torch.from_numpy(action)) for action in actions]
    endings = set()
    for i, task in enumerate(single(tasks)):
        qpos, qvel = np.array(POSES[protocol]) + starts[i, :15], starts[i, 15:]
        moves = actions[:, i].astype(float)
        alone = moments(models[protocol], qpos, qvel, moves, SUBSTEPS[protocol])
        next(alone)
        for step, moment in zip(steps, alone, strict=True):
            v, z = velocity(protocol, moment), float(moment.data.qpos[2])
            goal = task * v if cls is AntDir else 1.0 - abs(v - task)
            expected = goal - 0.005 * sum(a * a for a in moment.action) + 0.05
            assert float(step.rewards[i]) == pytest.approx(expected, abs=1e-6, rel=1e-6)
            assert float(step.measures[i, 0]) == pytest.approx(v, abs=1e-6, rel=1e-6)
            assert bool(step.terminated[i]) is (not 0.2 <= z <= 1.0)
            assert not step.diverged[i]
            endings.add((z < 0.2) - (z > 1.0))
    assert endings == {-1, 0, 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_bounds_of_height_belong_to_the_living(
    protocol: str, models: dict[str, mujoco.MjModel]
) -> None:
    """With z_low, then z_high, at exactly the height after the step: alive; an ulp in: over."""
    calm = AntVel(protocol=protocol)  # type: ignore[arg-type]  # a parameter is a plain str
    starts, actions = draw(calm, 1, 1)
    qpos, qvel = np.array(POSES[protocol]) + starts[0, :15], starts[0, 15:]
    run = moments(models[protocol], qpos, qvel, actions[:, 0].astype(float), SUBSTEPS[protocol])
    z_before, z = (float(moment.data.qpos[2]) for moment in run)
    assert 0.2 < z < 1.0
    assert z != z_before

    def ends(**bounds: float) -> bool:
        family = dataclasses.replace(calm, **bounds)  # type: ignore[arg-type]  # names of floats
        with family.make_worlds(1, threads=1) as worlds:
            worlds.reset(torch.tensor([[1.0]]), starts)
            return bool(worlds.step(torch.from_numpy(actions[0])).terminated[0])

    assert not ends(z_low=z)
    assert ends(z_low=math.nextafter(z, 2.0))
    assert not ends(z_high=z)
    assert ends(z_high=math.nextafter(z, 0.0))


@pytest.mark.parametrize("field", ["qpos", "qvel"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_ends_the_episode(field: str, value: float) -> None:
    family = AntDir()
    physics = CpuPhysics(family.build_model(()), 3, threads=1)
    physics.set_state(
        torch.tensor([INIT_QPOS] * 3, dtype=torch.float64), torch.zeros(3, 14).double()
    )
    assert family.terminated(physics).tolist() == [False, False, False]
    getattr(physics, field)[1, 12] = value
    assert family.terminated(physics).tolist() == [False, True, False]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cls", FAMILIES)
def test_every_entry_of_an_observation_is_what_its_column_says(
    cls: type[Ant], protocol: str, models: dict[str, mujoco.MjModel]
) -> None:
    """`paper`: qpos, qvel, the torso's xmat row by row, its subtree's com; else qpos[2:], qvel."""
    family = cls(protocol=protocol)  # type: ignore[arg-type]  # a parameter is a plain str
    starts, actions = draw(family, 2, 6)
    tasks = torch.from_numpy(family.sample_tasks(2, np.random.default_rng(0)))
    with family.make_worlds(2, threads=2) as worlds:
        seen = [worlds.reset(tasks, starts)]
        seen += [worlds.step(torch.from_numpy(action)).observations for action in actions]
    names = [column.name for column in family.observation_columns]
    for i in range(2):
        qpos, qvel = np.array(POSES[protocol]) + starts[i, :15], starts[i, 15:]
        moves = actions[:, i].astype(float)
        alone = moments(models[protocol], qpos, qvel, moves, SUBSTEPS[protocol])
        for observations, moment in zip(seen, alone, strict=True):
            data = moment.data
            blocks = {
                "paper": [data.qpos, data.qvel, data.xmat[1], data.subtree_com[1]],
                "gymnasium": [data.qpos[2:], data.qvel],
            }[protocol]
            expected = single(np.concatenate(blocks))
            assert len(expected) == {"paper": 41, "gymnasium": 27}[protocol]
            by_name = named(data)
            assert single([by_name[name] for name in names]) == expected
            assert observations[i].tolist() == expected


def test_units_follow_from_what_is_measured() -> None:
    units = {column.name: column.unit for column in AntVel().observation_columns}
    assert [units[f"torso_{a}"] for a in "xyz"] == ["m", "m", "m"]
    assert [units[f"center_of_mass_{a}"] for a in "xyz"] == ["m", "m", "m"]
    assert {units[f"torso_quaternion_{a}"] for a in "wxyz"} == {"1"}
    assert {units[f"torso_rotation_{a}{b}"] for a in "xyz" for b in "xyz"} == {"1"}
    assert {units[f"torso_velocity_{a}"] for a in "xyz"} == {"m/s"}
    assert {units[f"torso_angular_velocity_{a}"] for a in "xyz"} == {"rad/s"}
    assert {units[joint] for joint in LEGS} == {"rad"}
    assert {units[f"{joint}_velocity"] for joint in LEGS} == {"rad/s"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_model_is_gymnasiums_own_but_for_contact_and_timestep(
    protocol: str, models: dict[str, mujoco.MjModel]
) -> None:
    """Each number equals that of the file, or of the file with the paper's contact and step."""
    family = AntDir(protocol=protocol)  # type: ignore[arg-type]  # a parameter is a plain str
    model, expected = family.build_model(family.sensors), models[protocol]
    compared = set()
    for field in dir(expected):
        ours, theirs = getattr(model, field), getattr(expected, field)
        # Names and sensors are what was added.
        if isinstance(theirs, np.ndarray) and not field.startswith(("_", "name", "sensor_")):
            np.testing.assert_array_equal(ours, theirs, err_msg=field)
            compared.add(field)
    assert {"body_mass", "body_inertia", "geom_solref", "geom_solimp", "jnt_range"} <= compared
    assert model.opt.timestep == {"paper": 0.02, "gymnasium": 0.01}[protocol]
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    assert model.ngeom == 14
    # By hand: time constant and damping ratio; dmin, dmax and width, then MuJoCo's own last two.
    solimp = {"paper": [0.8, 0.8, 0.01, 0.5, 2], "gymnasium": [0.9, 0.95, 0.001, 0.5, 2]}
    np.testing.assert_array_equal(model.geom_solref, [[0.02, 1.0]] * 14)
    np.testing.assert_array_equal(model.geom_solimp, [solimp[protocol]] * 14)


def test_contact_pose_and_timestep_can_be_chosen() -> None:
    family = AntVel(
        contact="soft",
        soft_solref=(0.03, 0.9),
        soft_solimp=(0.7, 0.75, 0.02),
        timestep=0.005,
        start_pose="qpos0",
    )
    model = family.build_model(())
    np.testing.assert_array_equal(model.geom_solref, [[0.03, 0.9]] * 14)
    np.testing.assert_array_equal(model.geom_solimp[:, :3], [[0.7, 0.75, 0.02]] * 14)
    assert model.opt.timestep == 0.005
    assert family.start_positions(model).tolist() == pytest.approx(QPOS0)
    file = AntVel(contact="file").build_model(())
    np.testing.assert_array_equal(file.geom_solimp[:, :3], [[0.9, 0.95, 0.001]] * 14)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_episode_starts_from_the_pose_plus_noise(protocol: str) -> None:
    """`paper`: the file's own init_qpos; `gymnasium`: its qpos0. Noise on every entry."""
    family = AntDir(protocol=protocol)  # type: ignore[arg-type]  # a parameter is a plain str
    pose = family.start_positions(family.build_model(()))
    assert pose.tolist() == pytest.approx(POSES[protocol], abs=1e-15)
    start = np.arange(1.0, 30.0) / 1000
    with family.make_worlds(1, threads=1) as worlds:
        seen = worlds.reset(torch.tensor([[1.0]]), start[None])[0]
    skipped = 0 if protocol == "paper" else 2
    expected = np.concatenate([np.array(POSES[protocol]) + start[:15], start[15:]])
    assert seen[: 29 - skipped].tolist() == single(expected[skipped:])


def test_each_action_drives_the_joint_it_is_named_for(models: dict[str, mujoco.MjModel]) -> None:
    """Motors drive leg 4 first, then 1, 2, 3; an action of 1 is 150 N m."""
    model = models["gymnasium"]
    joints = [model.joint(int(j)).name for j in model.actuator_trnid[:, 0]]
    family = AntVel()
    assert [column.name for column in family.action_columns] == joints
    assert joints[:4] == ["hip_4", "ankle_4", "hip_1", "ankle_1"]
    assert model.actuator_gear[:, 0].tolist() == [150.0] * 8
    low, high = family.action_bounds
    assert low.tolist() == model.actuator_ctrlrange[:, 0].tolist()
    assert high.tolist() == model.actuator_ctrlrange[:, 1].tolist()


@pytest.mark.parametrize("cls", FAMILIES)
def test_observations_resets_and_endings_are_those_of_gymnasium(
    cls: type[Ant], gymnasium_body: Callable[[str, str], MujocoEnv]
) -> None:
    """Three episodes of Ant-v5 from one generator; its first 27 entries come before the forces."""
    family = cls(protocol="gymnasium")
    theirs = gymnasium_body("ant_v5", "AntEnv")
    assert theirs.dt == pytest.approx(family.control_seconds, abs=1e-15)
    theirs.np_random = np.random.default_rng(23)
    rng, moves = np.random.default_rng(23), np.random.default_rng(4)
    task = torch.from_numpy(family.sample_tasks(1, np.random.default_rng(0)))
    with family.make_worlds(1, threads=1) as worlds:
        for _ in range(3):
            first, _ = theirs.reset()
            assert len(first) == 27 + 78
            start = family.draw_start(rng)
            np.testing.assert_array_equal(theirs.init_qpos + start[:15], theirs.data.qpos)
            np.testing.assert_array_equal(start[15:], theirs.data.qvel)
            ours = worlds.reset(task, start[None])
            assert ours[0].tolist() == single(first[:27])
            for _ in range(30):
                action = moves.uniform(-1, 1, 8).astype(np.float32)
                observation, _, terminated, _, _ = theirs.step(action)
                step = worlds.step(torch.from_numpy(action)[None])
                assert step.observations[0].tolist() == single(observation[:27])
                assert bool(step.terminated[0]) == bool(terminated)


def test_what_each_protocol_decides() -> None:
    """The numbers of the design's table."""
    paper = {
        "protocol": "paper",
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
        "start_pose": "qpos0",
        "contact": "file",
        "horizon": 100,
    }
    shared = {
        "control_cost": 0.005,
        "alive_bonus": 0.05,
        "z_low": 0.2,
        "z_high": 1.0,
        "soft_solref": (0.02, 1.0),
        "soft_solimp": (0.8, 0.8, 0.01),
    }
    speeds = {"speed_low": 0.0, "speed_high": 3.0, "speed_bonus": 1.0}
    seconds = {"paper": 0.02, "gymnasium": 0.05}
    for protocol in (paper, gymnasium_v5):
        name = str(protocol["protocol"])
        fast = envs.make("ant_vel", protocol=name)
        assert dataclasses.asdict(fast) == {**protocol, **shared, **speeds}
        assert fast.control_seconds == pytest.approx(seconds[name], abs=1e-15)
        direction = {**protocol, **shared, "balanced": False}
        assert dataclasses.asdict(envs.make("ant_dir", protocol=name)) == direction
    assert AntVel() == AntVel(protocol="paper")


def test_the_papers_reset_noise_is_normal() -> None:
    """3,000 draws: sd .01 on each of 15 positions, quaternion too, .1 on each of 14 velocities.

    The sd of 3,000 normal draws is off by 1 part in sqrt(6000), 1.3%; 5.2% is four of those.
    """
    rng, family = np.random.default_rng(1), AntDir()
    draws = np.array([family.draw_start(rng) for _ in range(3000)])
    assert draws.shape == (3000, 29)
    width = np.array([0.01] * 15 + [0.1] * 14)
    np.testing.assert_allclose(draws.std(axis=0) / width, 1.0, atol=0.052)
    assert (abs(draws.mean(axis=0)) < 4 * width / math.sqrt(3000)).all()
    assert (abs(draws) > 2 * width).mean() == pytest.approx(0.0455, abs=0.003)


def test_gymnasiums_reset_noise_is_uniform_then_normal() -> None:
    """Positions within .1 with sd .1 / sqrt 3, velocities normal with sd .1."""
    rng, family = np.random.default_rng(1), AntDir(protocol="gymnasium")
    draws = np.array([family.draw_start(rng) for _ in range(2000)])
    assert 0.099 < abs(draws[:, :15]).max() <= 0.1
    np.testing.assert_allclose(draws[:, :15].std(axis=0), 0.1 / math.sqrt(3), rtol=0.06)
    np.testing.assert_allclose(draws[:, 15:].std(axis=0), 0.1, rtol=0.065)


def test_wanted_speeds_are_uniform_on_their_range() -> None:
    """U[0, 3]: mean 1.5, a third in each third."""
    speeds = AntVel().sample_tasks(4000, np.random.default_rng(3))
    assert 0 <= speeds.min() < 0.01
    assert 2.99 < speeds.max() <= 3
    assert speeds.mean() == pytest.approx(1.5, abs=0.06)
    thirds = np.histogram(speeds, bins=3, range=(0, 3))[0] / 4000
    np.testing.assert_allclose(thirds, 1 / 3, atol=0.03)


def test_both_directions_are_as_likely() -> None:
    tasks = AntDir().sample_tasks(4000, np.random.default_rng(3))
    assert set(tasks[:, 0].tolist()) == {-1.0, 1.0}
    assert abs(tasks.mean()) < 4 / math.sqrt(4000)


def test_tasks_in_words() -> None:
    assert AntVel().describe_task([2.5]) == "wanted 2.50 m/s"
    assert AntDir().describe_task([-1]) == "backward"
    assert AntDir().describe_task([1]) == "forward"


def test_an_ant_that_left_its_range_of_heights_fell_or_jumped() -> None:
    """By the torso's height, the third number of qpos: below .2 m, or above 1 m."""
    for height, words in ((0.19, "fell"), (1.01, "jumped")):
        assert AntVel().ending({"qpos": np.array([0.0, 0.0, height])}) == words


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("horizon", 0),
        ("start_pose", "qpos"),
        ("contact", "hard"),
        ("z_low", math.inf),
        ("control_cost", -0.1),
        ("timestep", 1.0),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(FamilyError, match=rf"ant_dir: {field} must be .*got '?{value}"):
        envs.make("ant_dir", **{field: value})


def test_the_range_of_heights_is_not_empty() -> None:
    with pytest.raises(FamilyError, match=r"ant_vel: z_low 1\.0 is not below z_high 1\.0"):
        AntVel(z_low=1.0)
