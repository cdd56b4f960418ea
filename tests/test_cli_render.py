"""`maml-rl render` and `--render`, as a user types them: output, files, exit codes, TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import maml_rl
from maml_rl import cli_render
from maml_rl import render as render_module
from maml_rl.cli import run
from maml_rl.errors import RunStopped
from maml_rl.movies import has_ffmpeg
from maml_rl.opengl import VARIABLE
from maml_rl.rendering import RECORD, Rendering, RenderSettings, read_rendering
from maml_rl.runs import RunFolder
from tests.conftest import files_at_most, needs_opengl, rows
from tests.tiny import flags

pytestmark = pytest.mark.usefixtures("one_torch_thread")
CHECKOUT = Path(maml_rl.__file__).parent.parent
SMALL = ["--size", "64"]


def train(name: str, out: Path, *words: str, **changed: object) -> Path:
    settings = flags(**{"threads": 1, "family__horizon": 4, **changed})
    assert run(["train", name, *settings, "--out", str(out), "--quiet", *words]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of navigation: three iterations, one gradient step in its evaluation."""
    return train("navigation", tmp_path_factory.mktemp("navigation") / "run")


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cheetah") / "run"
    return train("half_cheetah_vel", folder, iterations=0)


@pytest.fixture
def navigation(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as `run` beside the user; videos are WebP, to save time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(render_module, "has_ffmpeg", lambda: False)
    shutil.copytree(trained, "run")
    return Path("run")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `--render` of other commands make small pictures."""
    monkeypatch.setattr(
        cli_render, "render", partial(render_module.render, settings=RenderSettings(size=64))
    )


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `evaluate` draw no figures, which take seconds and are tested elsewhere."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )


def made_in(folder: Path) -> Rendering:
    made = read_rendering(folder)
    assert made is not None
    return made


def test_a_run_is_rendered_into_its_folder(
    navigation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Returns, files and what to install are printed; nothing else of the run changes."""
    before = {p: p.read_bytes() for p in navigation.rglob("*") if p.is_file()}
    assert run(["render", "run", *SMALL]) == 0
    made = made_in(navigation / "video")
    assert (made.checkpoint, made.iterations, made.mean) == ("latest", 3, False)
    assert len(made.tasks) == 3
    assert [column.gradient_steps for column in made.columns] == [0, 1]
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == "Return of the rendered episode:"
    first, second = (column.returns[0] for column in made.columns)
    assert lines[1] == (
        f"  {made.task_words[0]}: before adapting {first:.1f}, 1 gradient step {second:.1f}"
    )
    assert "Note: without ffmpeg the videos are animated WebP" in printed.out
    assert "Video: run/video/adaptation.webp" in lines
    assert "Film strips: run/video/strip_0.png, run/video/strip_1.png, run/video/strip_2.png" in (
        lines
    )
    assert lines[-1] == "Written: run/video"
    assert {p: p.read_bytes() for p in before} == before
    assert {p.name for p in navigation.iterdir()} == {p.parts[1] for p in before} | {"video"}


def test_every_option_reaches_the_rendering(
    navigation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks, steps, noise, speed, size, formats, checkpoint, folder."""
    words = ["--task", "0.25,0.5", "--task", "-0.125,0", "--steps", "2", "--checkpoint", "previous"]
    words += ["--mean", "--fps", "50", "--slow", "0.5", "--gif", "--frames", "--out", "a/b"]
    assert run(["render", "run", *SMALL, *words, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    made = made_in(Path("a/b"))
    assert made.tasks == ((0.25, 0.5), (-0.125, 0.0))
    assert len(made.columns) == 3
    assert (made.checkpoint, made.mean, made.fps, made.slow) == ("previous", True, 50.0, 0.5)
    previous = RunFolder.open(navigation).load("previous").state.iteration
    assert made.iterations == previous < 3
    assert made.video == "adaptation.gif"
    # Five states at 25 a second, at half speed, 50 frames a second.
    assert made.frames == 20 == len(list(Path("a/b/frames").iterdir()))
    assert not (navigation / "video").exists()


def test_a_task_that_training_never_drew_is_said_to_be_one(
    navigation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the others."""
    words = ["render", str(navigation), "--task", "0.1,0.1", "--task", "2,0", "--out", "a"]
    assert run([*words, "--steps", "0", "--gif"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "never" in line]
    assert told == ["Training never drew task 2,0."]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["render"], "expected one RUN"),
        (["render", "run", "run"], "expected one RUN"),
        (["render", "nowhere"], "nowhere is not a run folder"),
        (["render", "run", "--size", "65"], "size must be even, got 65"),
        (["render", "run", "--size", "0"], "size must be between 64 and 1920, got 0"),
        (["render", "run", "--fps", "0"], "fps must be between 1 and 240, got 0.0"),
        (["render", "run", "--slow", "0"], "slow must be between 0.01 and 100, got 0.0"),
        (["render", "run", "--task", "0.5"], "a task is goal_x (m), goal_y (m)"),
        (["render", "run", "--task", "left"], "got 'left'"),
        (["render", "run", "--steps", "-1"], "steps must be at least 0, got -1"),
        (["render", "run", "--checkpoint", "newest"], "newest"),
        (["render", "run", "--speed", "2"], "speed"),
    ],
)
def test_wrong_options_are_a_sentence_and_exit_2(
    words: list[str], complaint: str, navigation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr; nothing is written."""
    assert run(words) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not list(Path().rglob("*.webp"))
    assert not (navigation / "video").exists()


def test_a_full_disk_is_exit_3_and_the_former_video_is_kept(
    navigation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["render", "run", *SMALL, "--quiet"]) == 0
    before = {p: p.read_bytes() for p in (navigation / "video").iterdir()}
    with files_at_most(400):
        assert run(["render", "run", *SMALL, "--quiet"]) == 3
    assert "the video cannot be written to run/video: " in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (navigation / "video").iterdir()} == before


def test_without_opengl_all_else_is_written_and_exit_0(
    cheetah: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """MUJOCO_GL=disabled: the returns, and what to install on Debian and on Fedora."""
    monkeypatch.setenv(VARIABLE, "disabled")
    out = str(tmp_path / "video")
    assert run(["render", str(cheetah), *SMALL, "--out", out, "--steps", "1"]) == 0
    made = made_in(tmp_path / "video")
    assert made.video is None
    assert np.isfinite([column.returns for column in made.columns]).all()
    printed = capsys.readouterr()
    (note,) = (line for line in printed.out.splitlines() if line.startswith("Note: "))
    assert note == f"Note: {made.trouble}"
    for words in ("'disabled'", "apt install libegl1", "dnf install mesa-libEGL"):
        assert words in note
    assert "Video: " not in printed.out
    assert f"before adapting {made.columns[0].returns[0]:.1f}" in printed.out
    assert [path.name for path in (tmp_path / "video").iterdir()] == [RECORD]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["", "disabled", "nonsense"])
def test_a_body_is_rendered_without_a_display(platform: str, cheetah: Path, tmp_path: Path) -> None:
    """In a process of its own, which chooses by itself; whatever is set, exit code 0."""
    hidden = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {VARIABLE: platform} if platform else {}
    done = subprocess.run(
        [sys.executable, "-m", "maml_rl", "render", cheetah, *SMALL, "--out", tmp_path / "out"],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    made = made_in(tmp_path / "out")
    if platform:
        assert made.video is None
        assert f"MUJOCO_GL is {platform!r}" in done.stdout
        assert "apt install" in done.stdout
    elif made.video is None:
        pytest.skip(f"no OpenGL here: {made.trouble}")
    else:
        assert (tmp_path / "out" / made.video).stat().st_size > 1000


# Training and evaluation with --render.


def board(folder: Path) -> Any:
    """What TensorBoard reads of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def scalar_steps(folder: Path) -> list[int]:
    return [event.step for event in board(folder).Scalars("return_1")]


@pytest.fixture
def quick(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(render_module, "has_ffmpeg", lambda: False)


@pytest.mark.slow
def test_training_with_render_ends_with_film_strips_in_tensorboard(
    quick: None, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image a task, of the step that training has come to; all else is as without.

    Training goes on after that, and its numbers are all there.
    """
    out = Path("run")
    train("navigation", out, "--render")
    made = made_in(out / "video")
    assert (made.iterations, made.checkpoint, len(made.strips)) == (3, "latest", 3)
    events = board(out)
    assert events.Tags()["images"] == [f"film_strip/{words}" for words in made.task_words]
    for words, name in zip(made.task_words, made.strips, strict=True):
        (picture,) = events.Images(f"film_strip/{words}")
        assert picture.step == 3
        assert picture.encoded_image_string == (out / "video" / name).read_bytes()
    assert scalar_steps(out) == scalar_steps(trained) == [0, 1, 2]
    assert rows(out) == rows(trained)
    for file in ("checkpoints/latest/parameters.safetensors", "evaluation/evaluation.csv"):
        assert (out / file).read_bytes() == (trained / file).read_bytes(), file
    assert run(["resume", "run", "--iterations", "5", "--render"]) == 0
    printed = capsys.readouterr().out
    assert "Video: run/video/adaptation.webp" in printed
    assert scalar_steps(out) == [0, 1, 2, 3, 4]
    (*_, picture) = board(out).Images(f"film_strip/{made.task_words[0]}")
    assert picture.step == made_in(out / "video").iterations == 5


def test_pictures_never_purge_numbers(navigation: Path) -> None:
    """Not even those of an earlier checkpoint, whose iteration numbers go on beyond."""
    from PIL import Image

    for name, size in (("a.png", (7, 5)), ("b.png", (3, 4))):
        Image.new("RGB", size).save(name)
    pictures = {name: Path(name).read_bytes() for name in ("a.png", "b.png")}
    before = board(navigation)
    RunFolder.open(navigation).write_pictures(1, pictures)
    after = board(navigation)
    tags = before.Tags()["scalars"]
    assert after.Tags()["scalars"] == tags
    for tag in tags:
        assert after.Scalars(tag) == before.Scalars(tag)
    assert scalar_steps(navigation) == [0, 1, 2]
    assert after.Tags()["images"] == ["a.png", "b.png"]
    (first,), (second,) = after.Images("a.png"), after.Images("b.png")
    assert (first.step, first.width, first.height) == (1, 7, 5)
    assert (second.width, second.height) == (3, 4)
    # A second time, from another process or the same: both are there.
    RunFolder.open(navigation).write_pictures(2, {"a.png": pictures["a.png"]})
    assert [picture.step for picture in board(navigation).Images("a.png")] == [1, 2]
    assert scalar_steps(navigation) == [0, 1, 2]


@pytest.mark.slow
def test_an_evaluation_with_render_shows_its_own_tasks_steps_and_checkpoint(
    small: None, no_figures: None, navigation: Path, trained: Path
) -> None:
    """Of every run that is tested; results are where and what they are without it."""
    shutil.copytree(navigation, "other")
    words = ["--task", "0.25,0.5", "--steps", "2", "--checkpoint", "previous", "--quiet"]
    assert run(["evaluate", "run", "other", *words, "--render", "--out", "there"]) == 0
    for name in ("run", "other"):
        made = made_in(Path(name) / "video")
        assert (made.tasks, len(made.columns)) == (((0.25, 0.5),), 3)
        assert made.checkpoint == "previous"
        assert scalar_steps(Path(name)) == [0, 1, 2]
        (tag,) = board(Path(name)).Tags()["images"]
        assert tag == "film_strip/goal (0.25, 0.50) m"
    # Rendering counts for nothing where results are to go by default.
    shutil.rmtree(navigation / "evaluation")
    assert run(["evaluate", "run", "--render", "--quiet"]) == 0
    for file in ("evaluation.csv", "summary.json"):
        ours = (navigation / "evaluation" / file).read_bytes()
        assert ours == (trained / "evaluation" / file).read_bytes()


@pytest.mark.slow
def test_an_evaluation_with_render_adapts_as_it_tests(
    small: None, no_figures: None, navigation: Path
) -> None:
    """By as many episodes and its step size, the first of several; the start is the same."""

    def returns(*words: str) -> list[float]:
        assert run(["evaluate", "run", *words, "--render", "--quiet"]) == 0
        return [column.returns[0] for column in made_in(navigation / "video").columns]

    plain = returns()
    for words in (("--step-size", "0.9"), ("--episodes", "5")):
        other = returns(*words)
        assert other[0] == plain[0]
        assert other[1] != plain[1]
    assert returns("--step-size", "0.9", "0.1") == returns("--step-size", "0.9")


def stopped(*_: object, **__: object) -> None:
    raise RunStopped("the disk is full", 3)


def no_file(*_: object, **__: object) -> None:
    raise OSError("the disk is gone")


def test_training_is_not_lost_to_a_rendering_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, a sentence, and everything else is there; nor is a resumed one."""
    monkeypatch.setattr(cli_render, "render", stopped)
    train("navigation", tmp_path / "run", "--render", iterations=1)
    assert "Nothing was rendered: the disk is full" in capsys.readouterr().out
    assert (tmp_path / "run" / "evaluation" / "summary.json").exists()
    monkeypatch.setattr(cli_render, "render", no_file)
    assert run(["resume", str(tmp_path / "run"), "--iterations", "2", "--render"]) == 0
    assert "Nothing was rendered: the disk is gone" in capsys.readouterr().out
    assert len(rows(tmp_path / "run")) == 2


def test_an_evaluation_renders_the_runs_after_one_that_fails(
    quick: None, no_figures: None, navigation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(navigation, "other")
    good = partial(render_module.render, settings=RenderSettings(size=64))

    def first_fails(subject: Any, folder: Path, **settings: Any) -> Rendering:
        if folder.parent.name == "run":
            raise RunStopped("the disk is full", 3)
        return good(subject, folder, **settings)

    monkeypatch.setattr(cli_render, "render", first_fails)
    assert run(["evaluate", "run", "other", "--steps", "0", "--render", "--out", "there"]) == 0
    assert Path("there/summary.json").exists()
    assert not Path("run/video").exists()
    assert len(made_in(Path("other/video")).columns) == 1


def test_a_tensorboard_that_cannot_be_written_costs_only_the_pictures(
    small: None, no_figures: None, navigation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(navigation / "tensorboard")
    (navigation / "tensorboard").write_text("a file")
    assert run(["evaluate", "run", "--render"]) == 0
    assert "Nothing was rendered: " in capsys.readouterr().out
    assert (navigation / "video" / RECORD).exists()
    assert (navigation / "evaluation" / "summary.json").exists()


def test_without_opengl_training_with_render_writes_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record with the returns and the sentence; no picture in TensorBoard."""
    monkeypatch.setattr(render_module, "what_is_missing", lambda: "no picture: apt install libegl1")
    settings = flags(threads=1, iterations=1, evaluation__steps=0)
    out = tmp_path / "run"
    assert run(["train", "half_cheetah_dir", *settings, "--out", str(out), "--render"]) == 0
    assert "Note: no picture: apt install libegl1" in capsys.readouterr().out
    assert made_in(out / "video").video is None
    assert board(out).Tags()["images"] == []
    assert (out / "evaluation" / "summary.json").exists()


@needs_opengl
@pytest.mark.skipif(not has_ffmpeg(), reason="no imageio-ffmpeg: maml-rl[video]")
def test_a_body_is_rendered_from_the_command_line(cheetah: Path, tmp_path: Path) -> None:
    """Into an MP4 of two rows and two columns, with everything real."""
    out = tmp_path / "video"
    words = ["--task", "0.5", "--task", "1.5", "--steps", "1", "--out", str(out), "--quiet"]
    assert run(["render", str(cheetah), *SMALL, *words]) == 0
    made = made_in(out)
    assert made.task_words == ("wanted 0.50 m/s", "wanted 1.50 m/s")
    assert made.trouble == ""
    files: Mapping[str, int] = {name: (out / name).stat().st_size for name in made.files}
    assert len(files) == 5
    assert min(files.values()) > 1000


def test_an_oracle_takes_no_step_unless_told_to(tmp_path: Path, quick: None) -> None:
    """As in an evaluation: it has nothing to learn of a task that it knows."""
    run_folder = train(
        "navigation",
        tmp_path / "run",
        iterations=1,
        policy__observe_task=True,
        adaptation__inner_steps=0,
    )
    for words, columns in (([], 1), (["--steps", "2"], 3)):
        assert run(["render", str(run_folder), *SMALL, "--quiet", *words]) == 0
        assert len(made_in(run_folder / "video").columns) == columns
