"""Families as Gymnasium environments, against Gymnasium's own checker and SyncVectorEnv."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode

import envs
from envs import FAMILIES, FamilyError, Transition, Worlds
from envs.cameras import open_camera
from envs.gymnasium_env import FamilyEnv, FamilyVectorEnv
from envs.locomotion import LocomotionWorlds

LOCOMOTION = ["HalfCheetahVel", "HalfCheetahDir", "AntVel", "AntDir"]
Fields = dict[str, Any]  # Any: keyword arguments of many types
EVERY: list[tuple[str, Fields]] = [("Navigation2D", {})] + [
    (name, {"protocol": protocol}) for name in LOCOMOTION for protocol in ("paper", "gymnasium")
]


def single(name: str, **fields: Any) -> FamilyEnv:
    env = gymnasium.make(f"MamlRL/{name}-v0", **fields).unwrapped
    assert isinstance(env, FamilyEnv)
    return env


def native(name: str, count: int, **fields: Any) -> FamilyVectorEnv:
    env = gymnasium.make_vec(f"MamlRL/{name}-v0", num_envs=count, **fields)
    assert isinstance(env, FamilyVectorEnv)
    return env


def physics(env: FamilyEnv | FamilyVectorEnv) -> Any:
    worlds = env._lockstep.worlds
    assert isinstance(worlds, LocomotionWorlds)
    return worlds.physics


def imported_modules(statements: list[ast.stmt]) -> Iterator[str]:
    """Yield the modules that these statements import when they run, calls of functions aside."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            assert statement.module is not None
            yield statement.module
        elif isinstance(statement, ast.Try):
            yield from imported_modules(statement.body)


def test_importing_envs_registers_every_family_and_loads_nothing_slow() -> None:
    """Entry points are strings, no TimeLimit is added, and no renderer or GPU code is loaded.

    Follows the imports of envs/__init__.py from file to file.
    """
    for family in FAMILIES.values():
        spec = gymnasium.spec(f"MamlRL/{family.__name__}-v0")
        assert isinstance(spec.entry_point, str)
        assert isinstance(spec.vector_entry_point, str)
        assert spec.max_episode_steps is None
    root = Path(envs.__file__).parent
    waiting, seen = ["envs"], {"envs"}
    while waiting:
        name = waiting.pop()
        if name.split(".")[0] != "envs":
            continue
        file = root / "__init__.py" if name == "envs" else root / f"{name.split('.')[1]}.py"
        found = set(imported_modules(ast.parse(file.read_text()).body)) - seen
        seen |= found
        waiting += found
    assert {"envs.physics", "envs.gymnasium_family"} < seen
    assert "envs.gymnasium_env" not in seen
    outside = {name.split(".")[0] for name in seen} - sys.stdlib_module_names
    assert outside == {"envs", "torch", "mujoco", "gymnasium", "numpy"}


@pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is -?infinity")
@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_gymnasium_finds_no_fault(name: str, fields: Fields) -> None:
    """check_env passes with every warning an error, but that observations are unbounded."""
    env = single(name, **fields)
    check_env(env, skip_render_check=True)
    family = env.family
    assert env.observation_space == Box(
        -np.inf, np.inf, (len(family.observation_columns),), np.float32
    )
    low, high = family.action_bounds
    assert isinstance(env.action_space, Box)
    assert env.action_space.dtype == np.float32
    np.testing.assert_array_equal(env.action_space.low, low.astype(np.float32))
    np.testing.assert_array_equal(env.action_space.high, high.astype(np.float32))


ENDINGS: list[tuple[str, Fields]] = [
    ("Navigation2D", {"goal_radius": 0.3}),
    ("AntVel", {"z_low": 0.55}),
    ("AntDir", {"protocol": "gymnasium", "z_low": 0.68}),
    # A start so fast that the simulation breaks down at once.
    ("HalfCheetahVel", {"velocity_noise": 1e5}),
]


@pytest.mark.parametrize(("name", "fields"), [(n, f | {"horizon": 4}) for n, f in EVERY + ENDINGS])
def test_the_vector_environment_is_that_many_single_ones_to_the_bit(
    name: str, fields: Fields
) -> None:
    """Everything that reset and step return equals SyncVectorEnv's, infos and masks included.

    Three environments, eleven steps, so at least two autoresets each; then one reset that goes on
    drawing, and one with a seed for each.
    """
    count = 3
    vector = native(name, count, threads=2, **fields)
    sync = gymnasium.make_vec(
        f"MamlRL/{name}-v0",
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        **fields,
    )
    assert vector.metadata == sync.metadata
    assert vector.observation_space == sync.observation_space
    assert vector.action_space == sync.action_space
    rng = np.random.default_rng(5)
    size = vector.single_action_space.shape
    assert size is not None
    endings = 0
    resets: list[Fields] = [{"seed": 17}, {}, {"seed": [9, 2, 9]}]
    for steps, arguments in zip((11, 1, 5), resets, strict=True):
        assert data_equivalence(vector.reset(**arguments), sync.reset(**arguments), exact=True)
        for _ in range(steps):
            actions = rng.uniform(-1.2, 1.2, (count, *size)).astype(np.float32)
            ours, theirs = vector.step(actions), sync.step(actions)
            assert data_equivalence(ours, theirs, exact=True), (ours, theirs)
            assert ours[1].dtype == np.float64
            endings += int(ours[2].sum())
    if (name, {k: v for k, v in fields.items() if k != "horizon"}) in ENDINGS:
        assert endings > 2
    vector.close()
    sync.close()


def test_an_episode_draws_its_task_and_then_its_start_from_the_environments_generator() -> None:
    """By hand from the same seed, two episodes long; a fixed task leaves its draw out."""
    env = single("HalfCheetahVel")
    family = env.family
    rng, _ = seeding.np_random(23)
    for seed in (23, None):
        observation, info = env.reset(seed=seed)
        task, start = family.sample_tasks(1, rng), family.draw_start(rng)
        with family.make_worlds(1) as worlds:
            expected = worlds.reset(torch.from_numpy(task), start[None])
        np.testing.assert_array_equal(observation, expected[0].numpy())
        np.testing.assert_array_equal(info["task"], task[0])
    rng, _ = seeding.np_random(23)
    observation, info = env.reset(seed=23, options={"task": [0.75]})
    with family.make_worlds(1) as worlds:
        expected = worlds.reset(torch.tensor([[0.75]]), family.draw_start(rng)[None])
    np.testing.assert_array_equal(observation, expected[0].numpy())


def tasks_of_episodes(env: FamilyEnv, count: int) -> list[list[float]]:
    """Return the task of some episodes, as reset and every step agree on it."""
    tasks = []
    for _ in range(count):
        _, info = env.reset()
        tasks.append(np.asarray(info["task"]).tolist())
        over = False
        while not over:
            _, _, terminated, truncated, info = env.step(np.zeros(2))
            assert np.asarray(info["task"]).tolist() == tasks[-1]
            over = terminated or truncated
    return tasks


def test_a_task_holds_until_a_reset_names_another() -> None:
    """From make, then from reset's options, kept by a reset with empty ones, released by None."""
    env = single("Navigation2D", task=[0.5, -0.25], horizon=2)
    assert tasks_of_episodes(env, 2) == [[0.5, -0.25]] * 2
    env.reset(options={"task": np.array([0.125, 0.25])})
    assert tasks_of_episodes(env, 2) == [[0.125, 0.25]] * 2
    env.reset(options={})
    assert tasks_of_episodes(env, 1) == [[0.125, 0.25]]
    env.reset(options={"task": None})
    drawn = tasks_of_episodes(env, 3)
    assert len({tuple(t) for t in drawn}) == 3


def test_the_vector_environment_takes_one_task_or_one_each() -> None:
    """(P,) for all and (N, P) one each, over autoresets; the reward is of the named task."""
    env = native("Navigation2D", 3, task=[0.5, 0.0], horizon=2)
    still = np.zeros((3, 2), np.float32)
    each = np.array([[0.25, 0.0], [0.0, 0.375], [0.0, -0.5]], np.float32)
    cases = [(None, np.array([[0.5, 0.0]] * 3, np.float32)), ({"task": each}, each)]
    for options, expected in cases:
        _, infos = env.reset(options=options)
        for _ in range(5):
            np.testing.assert_array_equal(infos["task"], expected)
            np.testing.assert_array_equal(infos["_task"], [True] * 3)
            _, rewards, _, _, infos = env.step(still)
            np.testing.assert_array_equal(rewards, -np.abs(expected).sum(1))
    _, infos = env.reset(options={"task": None})
    assert len(np.unique(infos["task"])) == 6


@pytest.mark.parametrize(
    ("name", "task", "told"),
    [
        ("HalfCheetahVel", [1.0, 2.0], "all finite"),
        ("HalfCheetahVel", [], "all finite"),
        ("HalfCheetahVel", [float("nan")], "all finite"),
        ("Navigation2D", [0.1, float("inf")], "all finite"),
        ("AntDir", [0.5], r"one of \[-1.0\], \[1.0\]"),
        ("AntDir", "forward", "numbers, got 'forward'"),
        ("Navigation2D", [[0.1], [0.2, 0.3]], "numbers, got"),
    ],
)
def test_bad_tasks_are_refused(name: str, task: Any, told: str) -> None:
    """By make and by reset, single and vectorised; what was fixed before stays."""
    for build in (single, lambda n, **f: native(n, 2, **f)):
        with pytest.raises(FamilyError, match=told):
            build(name, task=task)
    for env in (single(name), native(name, 2)):
        _, before = env.reset(seed=1)
        with pytest.raises(FamilyError, match=told):
            env.reset(options={"task": task})
        _, after = env.reset(seed=1)
        np.testing.assert_array_equal(before["task"], after["task"])


def test_tasks_one_each_must_be_as_many_as_there_are_environments() -> None:
    """Two rows for three environments are refused, and the two good shapes named."""
    with pytest.raises(FamilyError, match=r"is \(1,\) and one each is \(3, 1\), got \(2, 1\)"):
        native("AntVel", 3, task=[[1.0], [2.0]])
    with pytest.raises(FamilyError, match=r"one each is \(1, 1\), got \(2, 1\)"):
        single("AntVel", task=[[1.0], [2.0]])


def test_unknown_options_fields_and_modes_are_refused() -> None:
    """With the name that was wrong; a mistyped option is not taken for no option."""
    for env in (single("Navigation2D"), native("Navigation2D", 2)):
        with pytest.raises(FamilyError, match="one option, 'task'; got 'tsak'"):
            env.reset(options={"task": [7.0, 7.0], "tsak": [0.0, 0.0]})
        _, info = env.reset()
        assert (np.abs(info["task"]) < 1).all()
    with pytest.raises(FamilyError, match="did you mean 'horizon'"):
        single("Navigation2D", horizn=3)
    with pytest.raises(FamilyError, match="'rgb_array', got 'depth'"):
        FamilyEnv("navigation", render_mode="depth")
    with pytest.raises(FamilyError, match="'rgb_array', got 'depth'"):
        FamilyVectorEnv("navigation", 2, render_mode="depth")


def test_actions_are_in_metres_and_clipped() -> None:
    """Navigation moves by what it is told, at most .1 m along each axis."""
    env = single("Navigation2D", task=[0.5, 0.5])
    env.reset()
    observation, *_ = env.step([0.0625, -0.03125])
    np.testing.assert_array_equal(observation, [0.0625, -0.03125])
    observation, *_ = env.step(np.array([7.0, -7.0]))
    np.testing.assert_allclose(observation, [0.1625, -0.13125], rtol=1e-6)


def test_an_action_of_another_shape_is_refused() -> None:
    """(1,) would be broadcast over all motors, and (A, 1) over all environments."""
    env, vector = single("AntVel"), native("AntVel", 3)
    env.reset()
    vector.reset()
    with pytest.raises(ValueError, match=r"shape \(8,\), got \(1,\)"):
        env.step([0.5])
    with pytest.raises(ValueError, match=r"shape \(3, 8\), got \(8,\)"):
        vector.step(np.zeros(8))


@pytest.mark.parametrize("horizon", [1, 5])
def test_an_episode_ends_at_the_familys_horizon(horizon: int) -> None:
    """Truncated, not terminated, after H steps; a step beyond is an error, not garbage."""
    env = single("HalfCheetahDir", horizon=horizon)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(6))
    for _ in range(2):
        env.reset()
        ends = [env.step(np.zeros(6))[2:4] for _ in range(horizon)]
        assert ends == [(False, False)] * (horizon - 1) + [(False, True)]
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(np.zeros(6))


def test_threads() -> None:
    """A single environment has one physics thread, the vector environment as many as asked."""
    assert physics(single("AntVel")).threads == 1
    assert physics(native("AntVel", 4, threads=2)).threads == 2


@pytest.mark.parametrize("protocol", ["paper", "gymnasium"])
def test_a_diverged_world_ends_its_episode_and_no_other(protocol: str) -> None:
    """World 1 of 3 breaks down in its second step: no reward, the last good observation, told."""
    env = native("HalfCheetahDir", 3, protocol=protocol)
    env.reset(seed=3)
    action = np.full((3, 6), 0.25, np.float32)
    before, _, _, _, infos = env.step(action)
    np.testing.assert_array_equal(infos["diverged"], [False] * 3)
    assert "final_obs" not in infos
    physics(env).qvel[1] = 1e12
    after, rewards, terminated, truncated, infos = env.step(action)
    np.testing.assert_array_equal(terminated, [False, True, False])
    np.testing.assert_array_equal(truncated, [False] * 3)
    np.testing.assert_array_equal(rewards == 0.0, [False, True, False])
    np.testing.assert_array_equal(infos["final_obs"][1], before[1])
    np.testing.assert_array_equal(infos["final_info"]["diverged"], [False, True, False])
    assert np.isfinite(after).all()
    assert not np.array_equal(after[1], before[1])
    for _ in range(3):
        _, _, terminated, _, _ = env.step(action)
        assert not terminated.any()


def test_a_single_diverged_world_says_so() -> None:
    """Terminated, reward 0, the last good observation, info; then a reset heals it.

    The last good observation is the environment's: what a caller does to what it got is nothing.
    """
    env = single("AntVel")
    for steps in (0, 1):
        handed, _ = env.reset(seed=3)
        for _ in range(steps):
            handed, *_ = env.step(np.zeros(8))
        good = handed.copy()
        handed += 99.0
        physics(env).qvel[0] = 1e12
        observation, reward, terminated, truncated, info = env.step(np.zeros(8))
        assert (reward, terminated, truncated, info["diverged"]) == (0.0, True, False, True)
        np.testing.assert_array_equal(observation, good)
    env.reset()
    _, reward, terminated, _, info = env.step(np.zeros(8))
    assert (terminated, info["diverged"]) == (False, False)
    assert reward != 0.0


def test_an_action_that_is_not_a_number_counts_as_diverged() -> None:
    """In navigation too, which has no simulator to say so."""
    env = single("Navigation2D", task=[0.5, 0.5])
    env.reset()
    env.step([0.0625, 0.0])
    observation, reward, terminated, _, info = env.step([float("nan"), 0.0])
    np.testing.assert_array_equal(observation, [0.0625, 0.0])
    assert (reward, terminated, info["diverged"]) == (0.0, True, True)


def test_a_reward_that_is_not_finite_counts_as_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an environment, not of its neighbour, though both observations are good."""
    env = native("Navigation2D", 2)
    env.reset()
    step = env._lockstep.worlds.step
    infinite = torch.tensor([-1.0, torch.inf])
    monkeypatch.setattr(
        env._lockstep.worlds, "step", lambda actions: step(actions)._replace(rewards=infinite)
    )
    _, rewards, terminated, _, _ = env.step(np.zeros((2, 2)))
    np.testing.assert_array_equal(rewards, [-1.0, 0.0])
    np.testing.assert_array_equal(terminated, [False, True])


@pytest.mark.parametrize(
    ("name", "fields", "fps"),
    [
        ("Navigation2D", {}, 1),
        ("HalfCheetahVel", {"protocol": "paper"}, 100),
        ("HalfCheetahVel", {"protocol": "gymnasium"}, 20),
        ("AntDir", {"protocol": "paper"}, 50),
        ("AntDir", {"protocol": "gymnasium"}, 20),
        ("AntDir", {"frame_skip": 4, "timestep": 0.002}, 125),
    ],
)
def test_frames_a_second_are_control_steps_a_second(name: str, fields: Fields, fps: float) -> None:
    """So that a video of one frame a step runs at the speed of the simulation."""
    for env in (single(name, **fields), native(name, 2, **fields)):
        assert env.metadata["render_fps"] == pytest.approx(fps)
        assert env.metadata["render_modes"] == ["rgb_array"]


def middle(frame: npt.NDArray[np.uint8], color: tuple[int, int, int]) -> tuple[float, float]:
    """Return the mean column and row of a colour's pixels, from -1 (left, bottom) to 1."""
    rows, columns = np.nonzero((frame == color).all(-1))
    height, width = frame.shape[:2]
    return (2 * columns.mean() + 1) / width - 1, 1 - (2 * rows.mean() + 1) / height


def test_navigation_is_drawn_to_scale_without_opengl() -> None:
    """Goal green at (.5, .25) m and point blue at (-.1, .1) m in a picture of +-.625 m."""
    env = native("Navigation2D", 2, task=[[0.5, 0.25], [-0.25, 0.0]], render_mode="rgb_array")
    env.reset()
    env.step([[-0.1, 0.1], [0.0, 0.0]])
    frames = env.render()
    assert frames is not None
    assert [f.shape for f in frames] == [(480, 480, 3)] * 2
    assert frames[0].dtype == np.uint8
    green, blue = (60, 170, 90), (40, 80, 200)
    np.testing.assert_allclose(middle(frames[0], green), np.array([0.5, 0.25]) / 0.625, atol=0.01)
    np.testing.assert_allclose(middle(frames[0], blue), np.array([-0.1, 0.1]) / 0.625, atol=0.01)
    np.testing.assert_allclose(middle(frames[1], green), (-0.4, 0.0), atol=0.01)
    silent = single("Navigation2D")
    silent.reset()
    assert silent.render() is None


@pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is -?infinity")
def test_gymnasium_finds_no_fault_in_navigations_pictures() -> None:
    """check_env draws in every declared mode."""
    check_env(single("Navigation2D", render_mode="rgb_array"))


DRAW = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco/>")
with mujoco.Renderer(model, 8, 8) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    renderer.render()
print("OpenGL works", flush=True)
import gymnasium, numpy as np, envs
for name, protocol in (("HalfCheetahVel", "paper"), ("AntDir", "gymnasium")):
    env = gymnasium.make(f"MamlRL/{name}-v0", protocol=protocol, render_mode="rgb_array")
    env.reset(seed=1)
    first = env.render()
    assert first.shape == (480, 640, 3) and first.dtype == np.uint8 and first.std() > 5
    for _ in range(9):
        env.step(env.action_space.high)
    assert (env.render() != first).any()
    env.close()
    env.close()
vector = gymnasium.make_vec(
    "MamlRL/AntDir-v0", num_envs=2, protocol="gymnasium", render_mode="rgb_array"
)
vector.reset(seed=0)
frames = vector.render()
assert len(frames) == 2 and (frames[0] != first).any()
assert (frames[1] == first).all()  # environment 1 has seed 0 + 1
vector.close()
print("bodies are drawn")
"""


@pytest.mark.slow
def test_bodies_are_drawn_where_there_is_opengl() -> None:
    """One frame a world, of its own present state; the same state gives the same picture.

    In a process of its own: MUJOCO_GL counts when mujoco is imported, and a missing library may
    abort.
    """
    platform = os.environ.get("MUJOCO_GL", "egl")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRAW],
        env=os.environ | {"MUJOCO_GL": platform},
        cwd=Path(envs.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "OpenGL works" not in run.stdout:
        pytest.skip(f"no OpenGL with MUJOCO_GL={platform}: {run.stderr.strip()[-200:]}")
    assert (run.stdout.splitlines()[-1], run.returncode) == ("bodies are drawn", 0), run.stderr


def test_without_opengl_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the platform raised, the reader learns of MUJOCO_GL."""

    def fail(*_: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr("mujoco.Renderer", fail)
    env = single("AntVel", render_mode="rgb_array")
    env.reset()
    with pytest.raises(RuntimeError, match="MUJOCO_GL=egl"):
        env.render()


def test_a_family_that_nothing_draws_says_so() -> None:
    """Worlds of a kind that no camera knows are refused by name."""

    class Strange(Worlds):
        def reset(self, *_: object) -> torch.Tensor:
            raise NotImplementedError

        def step(self, *_: object) -> Transition:
            raise NotImplementedError

    with pytest.raises(FamilyError, match="Strange cannot be drawn"):
        open_camera(Strange())
