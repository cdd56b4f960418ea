"""Renderings of real policies: whose returns they show, from what start, and which files are left.

The episodes are done again here, one by one, in plain worlds and with the noise that the sampler's
documentation says.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import maml_rl
from envs.cameras import Frame
from envs.family import FamilyError, Transition, Worlds
from envs.navigation import NavigationWorlds
from maml_rl import render as render_module
from maml_rl import stage as stage_module
from maml_rl.adapt import Params
from maml_rl.assess import Subject
from maml_rl.captions import Caption, captioned
from maml_rl.errors import InputError, RunStopped
from maml_rl.evaluate import evaluate
from maml_rl.movies import has_ffmpeg
from maml_rl.policy import log_std
from maml_rl.render import FRAMES, WITHOUT_FFMPEG, render
from maml_rl.rendering import RECORD, Rendering, RenderSettings, read_rendering
from maml_rl.sampler import Sampler, task_seeds
from maml_rl.task_sets import CHOSEN, TaskSet
from tests.conftest import files_at_most, needs_opengl
from tests.tiny import SETTINGS

pytestmark = pytest.mark.usefixtures("one_torch_thread")
needs_ffmpeg = pytest.mark.skipif(not has_ffmpeg(), reason="no imageio-ffmpeg: maml-rl[video]")
SMALL = RenderSettings(size=64)


def subject_of(name: str, **changed: object) -> Subject:
    """An untrained policy of an experiment, cut down, whose every gradient step is felt."""
    settings = {
        **SETTINGS,
        "evaluation__steps": 2,
        "policy__initial_log_std": -0.5,
        "adaptation__step_size": 3.0,
        "threads": 1,
        **changed,
    }
    trained = maml_rl.new_policy(maml_rl.load_experiment(name, **settings))
    return Subject(trained, "maml", Path("run"), iterations=7, env_steps=0)


NAVIGATION = subject_of("navigation", family__horizon=6, family__goal_radius=0.05)
SHORT = subject_of("navigation", family__horizon=4, evaluation__steps=1)
"""For what does not depend on the episodes."""
# One so near that adapted policies get there.
GOALS = TaskSet(CHOSEN, np.array([[0.15, 0.1], [-0.3, 0.2]], np.float32))


@dataclass
class Replayed:
    """Episodes done again."""

    returns: npt.NDArray[np.float64]
    """(n + 1, T)."""
    endings: npt.NDArray[np.str_]
    """(n + 1, T): in words, "" for those that lasted."""
    adapted: list[Params]


def replay(subject: Subject, tasks: TaskSet, *, mean: bool = False) -> Replayed:
    """Adapt as `evaluate` does, then step a world of its own for each tile, one episode.

    The seed is of the test's stream (2, 2) for iteration 1, phase 0, task 0, whatever the task.
    """
    experiment = subject.trained.experiment
    policy, family = subject.trained.policy, subject.family
    adapted: list[Params] = []
    evaluate(
        policy,
        subject.trained.params,
        family,
        settings=experiment.evaluation,
        adaptation=experiment.adaptation,
        advantages=experiment.advantages,
        action_scale=experiment.policy.action_scale,
        threads=1,
        tasks=tasks,
        see=lambda params, _: adapted.append(params),
    )
    (seed,) = np.random.SeedSequence(1703_03400, spawn_key=(2, 2, 1, 0, 0)).generate_state(
        1, np.uint64
    )
    low, high = family.action_bounds
    shape = (len(adapted), len(tasks.tasks))
    returns, endings = np.zeros(shape), np.full(shape, "", dtype="<U99")
    for column, row in np.ndindex(shape):
        params = {name: p[row] for name, p in adapted[column].items()}
        std = torch.exp(log_std(params))
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
        start = family.draw_start(rng)[None]
        noise = rng.standard_normal((family.episode_steps, len(low)), dtype=np.float32)
        with family.make_worlds(1, threads=1) as worlds:
            observation = worlds.reset(torch.from_numpy(tasks.tasks[row : row + 1]), start)
            for t in range(family.episode_steps):
                action = policy.network(params, observation)
                if not mean:
                    action = action + std * torch.from_numpy(noise[t])
                scaled = action.double().numpy() / experiment.policy.action_scale
                control = (low + high) / 2 + (high - low) / 2 * scaled
                step = worlds.step(torch.from_numpy(control).float())
                returns[column, row] += float(step.rewards[0])
                if step.terminated[0]:
                    ending = family.ending(worlds.state(0))
                    endings[column, row] = f"{ending} at {family.moment(t + 1)}"
                    break
                observation = step.observations
    return Replayed(returns, endings, adapted)


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[Caption]:
    """Every caption that is drawn."""
    found: list[Caption] = []

    def note(picture: Frame, caption: Caption, letters: int) -> Frame:
        found.append(caption)
        return captioned(picture, caption, letters)

    monkeypatch.setattr(stage_module, "captioned", note)
    return found


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw white pictures in no time, without OpenGL, into no MP4."""

    class Blank:
        def frame(self, *_: object) -> Frame:
            return np.full((64, 64, 3), 255, np.uint8)

        def close(self) -> None:
            pass

    monkeypatch.setattr(stage_module, "open_camera", lambda *_: Blank())
    monkeypatch.setattr(render_module, "what_is_missing", lambda: "")
    monkeypatch.setattr(render_module, "has_ffmpeg", lambda: False)


def returns_of(made: Rendering) -> npt.NDArray[np.float64]:
    return np.array([column.returns for column in made.columns])


@pytest.mark.parametrize("mean", [False, True], ids=["noise", "mean"])
@pytest.mark.parametrize(
    ("subject", "tasks"),
    [
        pytest.param(NAVIGATION, GOALS, id="navigation"),
        pytest.param(
            subject_of("half_cheetah_vel", family__horizon=8),
            TaskSet(CHOSEN, np.array([[0.5], [1.5]], np.float32)),
            id="half_cheetah_vel",
        ),
        # Some fall where the torso must not come below .6 m.
        pytest.param(
            subject_of("ant_dir_gymnasium", family__horizon=9, family__z_low=0.6),
            TaskSet(CHOSEN, np.array([[-1.0], [1.0]], np.float32)),
            id="ant_dir",
        ),
    ],
)
def test_what_is_shown_is_the_evaluated_policys_own_episode(
    subject: Subject,
    tasks: TaskSet,
    mean: bool,
    captions: list[Caption],
    blank: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parameters are those of `evaluate`; record and last captions have the returns done again."""
    used: list[Sequence[Params]] = []
    real = render_module.play

    def spy(*arguments: Any, **settings: Any) -> Any:
        used.append(arguments[2])
        return real(*arguments, **settings)

    monkeypatch.setattr(render_module, "play", spy)
    expected = replay(subject, tasks, mean=mean)
    settings = RenderSettings(size=64, mean=mean, fps=50.0)
    made = render(subject, tmp_path / "video", tasks=tasks, settings=settings)
    for ours, theirs in zip(used[0], expected.adapted, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])
    returns = returns_of(made)
    np.testing.assert_allclose(returns, expected.returns, rtol=1e-4, atol=1e-5)
    # The comparison means something: most tiles have a return of their own.
    assert len(np.unique(returns.round(3))) > returns.size // 2
    assert made.mean == mean
    last = captions[-returns.size :]
    assert [caption.score for caption in last] == [
        f"return {value:z.1f}" for value in expected.returns.flatten()
    ]
    assert [list(column.endings) for column in made.columns] == expected.endings.tolist()
    assert [caption.ending for caption in last] == expected.endings.flatten().tolist()
    if subject.family.name != "half_cheetah_vel" and not mean:
        assert 0 < (expected.endings != "").sum() < returns.size


def test_the_mean_policy_starts_where_the_noisy_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """--mean changes the actions and not the start; all tiles begin alike, whatever their task."""
    subject = subject_of("half_cheetah_vel", family__horizon=2)
    starts: list[torch.Tensor] = []
    actions: list[torch.Tensor] = []

    def watch(worlds: Any, transition: Transition | None, now: torch.Tensor) -> None:
        if transition is None:
            starts.append(worlds.physics.qpos.clone())

    theta = {n: p.expand(2, *p.shape) for n, p in subject.trained.params.items()}
    for deterministic in (False, True):
        episodes = render_module.play(
            subject,
            np.array([[0.5], [1.5]], np.float32),
            [theta, theta],
            watch,
            deterministic=deterministic,
        )
        actions.append(episodes.actions[:, 0])
    assert torch.equal(starts[0], starts[1])
    assert (starts[0] == starts[0][0]).all()
    assert not (starts[0][0] == 0.0).all()
    # The same parameters on the same start with the same noise: the first actions are the same.
    assert (actions[0][:, 0] - actions[0][0, 0]).abs().max() < 1e-6
    assert (actions[1][:, 0] - actions[1][0, 0]).abs().max() < 1e-6
    assert (actions[0][:, 0] - actions[1][:, 0]).abs().min() > 1e-3


def test_watching_changes_no_episode() -> None:
    """The sampler's numbers are the same bits with and without somebody who sees its worlds."""
    subject, seen = NAVIGATION, []
    params = {n: p.expand(2, *p.shape) for n, p in subject.trained.params.items()}

    def sample(**settings: Any) -> Any:
        with Sampler(
            subject.family, subject.trained.policy, tasks=2, episodes=3, threads=1, **settings
        ) as sampler:
            return sampler.sample(params, torch.from_numpy(GOALS.tasks), task_seeds(2, 5, 0, 0, 2))

    plain = sample()
    watched = sample(watch=lambda _, transition, now: seen.append((transition, now.clone())))
    for name, values in vars(plain).items():
        assert torch.equal(values, getattr(watched, name)), name
    # Once after the reset, then after each step with those that it was taken by.
    assert seen[0][0] is None
    alive = [now.reshape(2, 3) for transition, now in seen if transition is not None]
    assert torch.equal(torch.stack(alive, 2), plain.alive[:, :, : len(alive)])


@needs_ffmpeg
def test_the_files_of_a_rendering(tmp_path: Path) -> None:
    """A video a column, one of all, a strip a task, every frame; their sizes and the record say so.

    The columns' videos are the columns of the grid.
    """
    from tests.test_movies import boxes

    settings = RenderSettings(size=64, frames=True, slow=0.5)
    folder = tmp_path / "video"
    made = render(NAVIGATION, folder, tasks=GOALS, checkpoint="best", settings=settings)
    names = ["adaptation.mp4", FRAMES, *(f"steps_{k}.mp4" for k in range(3))]
    names += ["strip_0.png", "strip_1.png", RECORD]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert made == read_rendering(folder)
    assert (made.checkpoint, made.iterations, made.mean) == ("best", 7, False)
    assert (made.fps, made.slow, made.trouble) == (25.0, 0.5, "")
    assert made.video == "adaptation.mp4"
    assert [(c.gradient_steps, c.video) for c in made.columns] == [
        (k, f"steps_{k}.mp4") for k in range(3)
    ]
    assert made.strips == ("strip_0.png", "strip_1.png")
    assert made.task_words == ("goal (0.15, 0.10) m", "goal (-0.30, 0.20) m")
    np.testing.assert_allclose(made.tasks, GOALS.tasks)
    # 6 control steps and the start, two frames each.
    frames = sorted((folder / FRAMES).iterdir())
    assert len(frames) == made.frames == 14
    with Image.open(frames[-1]) as picture:
        whole = np.asarray(picture)
    assert whole.shape == (2 * 64, 3 * 64, 3)
    assert boxes((folder / "adaptation.mp4").read_bytes())
    for k in range(3):
        last = last_frame(folder / f"steps_{k}.mp4", 128, 64)
        part = whole[:, 64 * k : 64 * (k + 1)].astype(int)
        differences = [
            np.abs(last - whole[:, 64 * j : 64 * (j + 1)].astype(int)).mean() for j in range(3)
        ]
        assert int(np.argmin(differences)) == k
        assert np.abs(last - part).mean() < 8
    strips = [(folder / name).read_bytes() for name in made.strips]
    assert strips[0] != strips[1]
    assert oct((folder / "adaptation.mp4").stat().st_mode & 0o444) == oct(0o444)


def last_frame(path: Path, height: int, width: int) -> npt.NDArray[np.int64]:
    import subprocess

    import imageio_ffmpeg

    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    )
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    return np.asarray(frames[-1], np.int64)


@pytest.mark.parametrize("gif", [False, True])
def test_without_ffmpeg_the_videos_are_webp(
    gif: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a sentence says what to install; the grid alone is a GIF where it is to be one."""
    monkeypatch.setattr(render_module, "has_ffmpeg", lambda: False)
    made = render(NAVIGATION, tmp_path, tasks=GOALS, settings=RenderSettings(size=64, gif=gif))
    assert made.trouble == WITHOUT_FFMPEG
    assert "pip install 'maml-rl[video]'" in made.trouble
    assert made.video == ("adaptation.gif" if gif else "adaptation.webp")
    assert [column.video for column in made.columns] == [f"steps_{k}.webp" for k in range(3)]
    for name, width, kind in (
        (made.video, 3 * 64, "GIF" if gif else "WEBP"),
        (made.columns[1].video, 64, "WEBP"),
    ):
        with Image.open(tmp_path / str(name)) as animation:
            assert (animation.format, animation.size) == (kind, (width, 128))
            # Fewer where several are the same.
            assert 3 <= getattr(animation, "n_frames", 1) <= made.frames == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*made.files, RECORD])


@needs_ffmpeg
def test_a_gif_is_the_grid_alone(tmp_path: Path) -> None:
    made = render(NAVIGATION, tmp_path, tasks=GOALS, settings=replace(SMALL, gif=True))
    assert [made.video, *(c.video for c in made.columns)] == [
        *("adaptation.gif", "steps_0.mp4", "steps_1.mp4", "steps_2.mp4")
    ]
    assert made.trouble == ""


@pytest.fixture
def webp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no MP4, for what does not depend on it, to save time."""
    monkeypatch.setattr(render_module, "has_ffmpeg", lambda: False)


@pytest.mark.usefixtures("webp")
def test_by_default_tasks_are_spread_over_the_familys_range(tmp_path: Path) -> None:
    """Three goals round a circle of .8 of the range; and no frames are written as PNG."""
    made = render(NAVIGATION, tmp_path, settings=SMALL)
    tasks = np.array(made.tasks)
    assert tasks.shape == (3, 2)
    np.testing.assert_allclose(np.hypot(*tasks.T), 0.4, rtol=1e-6)
    gaps = [np.linalg.norm(tasks[i] - tasks[j]) for i, j in ((0, 1), (1, 2), (2, 0))]
    np.testing.assert_allclose(gaps, 0.4 * np.sqrt(3), rtol=1e-6)
    assert not (tmp_path / FRAMES).exists()


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("half_cheetah_vel", [[1 / 3], [1.0], [5 / 3]]),
        ("ant_vel", [[0.5], [1.5], [2.5]]),
        ("ant_dir", [[-1.0], [1.0]]),
    ],
)
def test_the_spread_of_a_familys_tasks(name: str, tasks: list[list[float]]) -> None:
    """Middles of equal parts of the speeds, both directions."""
    spread = subject_of(name).family.spread_tasks(render_module.ROWS)
    assert spread.dtype == np.float32
    np.testing.assert_allclose(spread, tasks, rtol=1e-6)


@pytest.mark.usefixtures("webp")
def test_what_was_rendered_before_goes_and_all_else_stays(tmp_path: Path) -> None:
    """Fewer tasks and steps and no frames the second time; the user's own files are kept."""
    folder = tmp_path / "mine"
    for name in ("notes.txt", "steps_9.webp", "frames/a.png", "frames/note.txt", "sub/strip_1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    before = render(SHORT, folder, tasks=GOALS, settings=RenderSettings(size=64, frames=True))
    assert (folder / FRAMES / "00004.png").exists()
    assert set(before.files) <= {path.name for path in folder.iterdir()}
    fewer = TaskSet(CHOSEN, GOALS.tasks[:1])
    after = render(
        subject_of("navigation", evaluation__steps=0), folder, tasks=fewer, settings=SMALL
    )
    assert content(folder).keys() == {
        *("adaptation.webp", "steps_0.webp", "strip_0.png", RECORD),
        *("notes.txt", "steps_9.webp", "frames/a.png", "frames/note.txt", "sub/strip_1.png"),
    }
    assert (folder / "steps_9.webp").read_text() == "steps_9.webp"
    assert read_rendering(folder) == after != before


@pytest.mark.usefixtures("webp")
def test_a_folder_that_was_not_rendered_into_loses_nothing(tmp_path: Path) -> None:
    """Not even pictures that have the names of frames."""
    (tmp_path / FRAMES).mkdir()
    (tmp_path / FRAMES / "00000.png").write_text("mine")
    render(SHORT, tmp_path, tasks=GOALS, settings=SMALL)
    assert (tmp_path / FRAMES / "00000.png").read_text() == "mine"


def content(folder: Path) -> Mapping[str, bytes]:
    found = folder.rglob("*")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found if p.is_file()}


@pytest.mark.parametrize("mp4", [False, pytest.param(True, marks=needs_ffmpeg)])
def test_a_full_disk_stops_it_and_leaves_the_former_video(
    mp4: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3, wherever it fills: at a video, at a strip or at the record."""
    monkeypatch.setattr(render_module, "has_ffmpeg", lambda: mp4)
    folder = tmp_path / "video"
    render(SHORT, folder, tasks=GOALS, settings=SMALL)
    before = content(folder)
    for limit in (0, 300, 3000):
        with files_at_most(limit), pytest.raises(RunStopped, match="cannot be written") as stopped:
            render(SHORT, folder, tasks=GOALS, settings=SMALL)
        assert stopped.value.exit_code == 3
        assert str(folder) in str(stopped.value)
        assert content(folder) == before
        assert list(tmp_path.rglob(".*")) == []


@pytest.mark.usefixtures("webp")
def test_a_record_that_cannot_be_written_leaves_the_former_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the last file, and written before any of the old ones goes."""
    folder = tmp_path / "video"
    render(SHORT, folder, tasks=GOALS, settings=SMALL)
    before = content(folder)
    real = Path.write_text

    def full(path: Path, *arguments: Any, **settings: Any) -> int:
        if path.name == RECORD:
            raise OSError(28, "No space left on device")
        return real(path, *arguments, **settings)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunStopped, match="No space left"):
        render(SHORT, folder, tasks=GOALS, settings=SMALL)
    assert content(folder) == before


@pytest.mark.usefixtures("webp")
def test_where_there_is_a_record_its_files_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while new files are put in the place of the old, it leaves no record of either."""
    render(SHORT, tmp_path, tasks=GOALS, settings=SMALL)
    moved = 0
    real = os.replace

    def stop(source: Path, where: Path) -> None:
        nonlocal moved
        if moved == 1:
            raise KeyboardInterrupt
        moved += 1
        real(source, where)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        render(SHORT, tmp_path, tasks=GOALS, settings=SMALL)
    assert moved == 1
    assert read_rendering(tmp_path) is None


@pytest.mark.parametrize("mp4", [False, pytest.param(True, marks=needs_ffmpeg)])
def test_an_interrupted_rendering_leaves_nothing_behind(
    mp4: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two control steps: no temporary folder, and the former video as it was."""
    monkeypatch.setattr(render_module, "has_ffmpeg", lambda: mp4)
    folder = tmp_path / "video"
    render(SHORT, folder, tasks=GOALS, settings=SMALL)
    before = content(folder)
    steps = 0

    def interrupted(self: Any, worlds: Worlds, *rest: Any) -> None:
        nonlocal steps
        steps += 1
        real(self, worlds, *rest)
        if steps == 4:
            raise KeyboardInterrupt

    real = stage_module.Stage.__call__
    monkeypatch.setattr(stage_module.Stage, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render(SHORT, folder, tasks=GOALS, settings=replace(SMALL, frames=True))
    assert content(folder) == before
    assert list(tmp_path.rglob(".*")) == []


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "video").write_text("mine")
    with pytest.raises(RunStopped, match="cannot be written to") as stopped:
        render(SHORT, tmp_path / "video", tasks=GOALS, settings=SMALL)
    assert stopped.value.exit_code == 3
    assert (tmp_path / "video").read_text() == "mine"


CHEETAH = subject_of("half_cheetah_vel", family__horizon=5, evaluation__steps=1)


@pytest.mark.parametrize("found_too_late", [False, True])
def test_without_opengl_the_returns_are_written(
    found_too_late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install, and no pictures.

    Even where the trial found OpenGL and mujoco, imported before, does not.
    """
    real = Image.open

    def fail(*_: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    sentence = "no picture of a body without OpenGL"
    monkeypatch.setattr("mujoco.Renderer", fail)
    monkeypatch.setattr(
        render_module, "what_is_missing", lambda: "" if found_too_late else sentence
    )
    tasks = TaskSet(CHOSEN, np.array([[0.5], [1.5]], np.float32))
    made = render(CHEETAH, tmp_path, tasks=tasks, settings=replace(SMALL, frames=True))
    assert made.trouble.startswith("no picture without OpenGL" if found_too_late else sentence)
    assert (made.video, made.strips, made.frames) == (None, (), 0)
    assert [column.video for column in made.columns] == [None, None]
    np.testing.assert_allclose(returns_of(made), replay(CHEETAH, tasks).returns, rtol=1e-4)
    assert made == read_rendering(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]
    assert Image.open is real


def test_without_opengl_videos_from_before_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their record; a record of returns alone is replaced."""
    monkeypatch.setattr(render_module, "what_is_missing", lambda: "no OpenGL")
    bare = render(CHEETAH, tmp_path, settings=SMALL)
    assert read_rendering(tmp_path) == bare
    record = tmp_path / RECORD
    record.write_text(record.read_text().replace('"video": null', '"video": "adaptation.mp4"'))
    before = record.read_text()
    made = render(CHEETAH, tmp_path, settings=SMALL)
    assert made.trouble == "no OpenGL; the videos from before are kept"
    assert record.read_text() == before


def test_navigation_is_drawn_without_opengl(
    webp: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody even asks for it."""

    def fail() -> str:
        raise AssertionError("asked for OpenGL")

    monkeypatch.setattr(render_module, "what_is_missing", fail)
    monkeypatch.setattr("mujoco.Renderer", fail)
    assert render(SHORT, tmp_path, tasks=GOALS, settings=SMALL).video is not None


@needs_opengl
@pytest.mark.usefixtures("webp")
def test_a_simulation_that_breaks_down_does_not_stop_the_others(
    tmp_path: Path, captions: list[Caption], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second tile's body is thrown away at 1e12 m/s in its third step: told, and grey."""
    monkeypatch.chdir(tmp_path)  # where MuJoCo logs it
    subject = subject_of("half_cheetah_vel", family__horizon=6, evaluation__steps=1)
    steps = 0
    real = stage_module.Stage.__call__

    def throw(self: Any, worlds: Any, *rest: Any) -> None:
        nonlocal steps
        real(self, worlds, *rest)
        steps += 1
        if steps == 3:
            worlds.physics.qvel[1] = 1e12

    monkeypatch.setattr(stage_module.Stage, "__call__", throw)
    tasks = TaskSet(CHOSEN, np.array([[1.0]], np.float32))
    settings = RenderSettings(size=64, fps=100.0, frames=True)
    made = render(subject, tmp_path / "video", tasks=tasks, settings=settings)
    assert [column.endings for column in made.columns] == [
        ("",),
        ("the simulation broke down at 0.0 s",),
    ]
    # What it had before, and what the caption says.
    assert [float(caption.score.split()[1]) for caption in captions[-2:]] == pytest.approx(
        [column.returns[0] for column in made.columns], abs=0.051
    )
    for number, is_grey in ((2, False), (3, True), (6, True)):
        with Image.open(tmp_path / "video" / FRAMES / f"{number:05d}.png") as picture:
            # Below the caption and above what is written across the foot.
            tile = np.asarray(picture)[32:46, 66:126].astype(int)
        assert ((tile.max(-1) - tile.min(-1)).max() == 0) == is_grey


@needs_opengl
@pytest.mark.usefixtures("webp")
def test_a_body_that_fell_is_grey_in_the_video(tmp_path: Path) -> None:
    """All columns, as soon as they have: an ant that must stay above .9 m."""
    subject = subject_of(
        "ant_vel_gymnasium", family__horizon=3, family__z_low=0.9, evaluation__steps=0
    )
    tasks = TaskSet(CHOSEN, np.array([[1.0]], np.float32))
    settings = RenderSettings(size=64, fps=20.0, frames=True)
    made = render(subject, tmp_path, tasks=tasks, settings=settings)
    assert made.columns[0].endings == ("fell at 0.1 s",)
    for number, is_grey in ((0, False), (1, True)):
        with Image.open(tmp_path / FRAMES / f"{number:05d}.png") as picture:
            tile = np.asarray(picture)[32:46, 2:62].astype(int)
        assert ((tile.max(-1) - tile.min(-1)).max() == 0) == is_grey


def test_an_action_that_is_no_number_stops_the_rendering(tmp_path: Path) -> None:
    """With exit code 3, as a test does."""
    params = {n: p * torch.nan for n, p in NAVIGATION.trained.params.items()}
    broken = replace(NAVIGATION, trained=replace(NAVIGATION.trained, params=params))
    with pytest.raises(RunStopped, match="not finite") as stopped:
        render(broken, tmp_path / "video", tasks=GOALS, settings=SMALL)
    assert stopped.value.exit_code == 3
    assert not (tmp_path / "video").exists()


def test_a_family_that_nothing_draws_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name; nothing is left in the folder."""

    class Strange(NavigationWorlds):
        pass

    def undrawn(*_: object) -> None:
        raise FamilyError("Strange cannot be drawn")

    monkeypatch.setattr(stage_module, "open_camera", undrawn)
    with pytest.raises(FamilyError, match="Strange cannot be drawn"):
        render(SHORT, tmp_path, tasks=GOALS, settings=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_length_of_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times as many frames, and at most a tenth of what they would take."""
    monkeypatch.setattr(render_module, "has_ffmpeg", lambda: False)
    peaks = []
    # What is loaded on demand.
    render(SHORT, tmp_path, settings=SMALL)
    for fps in (25.0, 120.0):
        tracemalloc.start()
        made = render(SHORT, tmp_path, settings=RenderSettings(size=64, fps=fps))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert made.frames == {25.0: 5, 120.0: 24}[fps]
    # Three tasks, two columns; each is in its column's video and in the grid.
    assert peaks[1] - peaks[0] < 19 * 2 * (3 * 2 * 64 * 64 * 3) / 10


RECORDED = Rendering(
    checkpoint="latest",
    iterations=3,
    mean=False,
    fps=25.0,
    slow=1.0,
    frames=4,
    tasks=((0.5,),),
    task_words=("wanted 0.50 m/s",),
    columns=(),
    video="adaptation.mp4",
    strips=("strip_0.png",),
    trouble="",
)


def record(folder: Path, **changed: object) -> Path:
    from dataclasses import asdict

    tree = {"format": 1, **asdict(RECORDED), **changed}
    (folder / RECORD).write_text(json.dumps(tree))
    return folder


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_rendering(record(tmp_path)) == RECORDED
    column = {"gradient_steps": 0, "video": None, "returns": [1.5], "endings": [""]}
    made = read_rendering(record(tmp_path, columns=[column], video=None, strips=[]))
    assert made is not None
    assert made.columns[0].returns == (1.5,)
    assert made.files == []


@pytest.mark.parametrize(
    "name",
    [
        *("../adaptation.mp4", "/etc/passwd", "..", ".", "", "sub/a.mp4", "..\\a.mp4"),
        *("a.mp4\0", "a.mp4\n", ".hidden.mp4", "config.yaml", 5),
    ],
)
@pytest.mark.parametrize("place", ["video", "strips", "columns"])
def test_a_record_that_names_other_files_is_refused(
    name: object, place: str, tmp_path: Path
) -> None:
    """Files outside of its folder, or that no rendering makes: it may come from anywhere."""
    column = {"gradient_steps": 0, "video": name, "returns": [], "endings": []}
    changed = {"video": name, "strips": [name], "columns": [column]}[place]
    assert read_rendering(record(tmp_path, **{place: changed})) is None


@pytest.mark.usefixtures("webp")
def test_rendering_over_a_strange_record_deletes_nothing_that_it_names(tmp_path: Path) -> None:
    victim = tmp_path / "strip_0.png"
    victim.write_text("mine")
    folder = tmp_path / "video"
    folder.mkdir()
    record(folder, strips=["../strip_0.png"])
    render(SHORT, folder, tasks=GOALS, settings=SMALL)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 2}',
        '{"format": 1}',
        "\udcff",
        '{"format": 1, "columns": 3}',
    ],
)
def test_a_record_that_is_damaged_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(text, errors="surrogateescape")
    assert read_rendering(tmp_path) is None


def test_no_record_is_none(tmp_path: Path) -> None:
    assert read_rendering(tmp_path) is None
    (tmp_path / RECORD).mkdir()
    assert read_rendering(tmp_path) is None


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"size": 65}, "size must be even, got 65"),
        ({"size": 62}, "size must be between 64 and 1920, got 62"),
        ({"size": 1922}, "size must be between"),
        ({"fps": 0.0}, "fps must be between 1 and 240, got 0.0"),
        ({"fps": float("nan")}, "fps must be between"),
        ({"fps": 241.0}, "fps must be between"),
        ({"slow": 0.0}, "slow must be between 0.01 and 100, got 0.0"),
        ({"slow": -1.0}, "slow must be between"),
        ({"slow": float("inf")}, "slow must be between"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        RenderSettings(**settings)
