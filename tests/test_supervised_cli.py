"""The commands on supervised experiments, as a user types them, right and wrong."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from maml_rl.cli import run
from maml_rl.config import shipped_experiments, shipped_files, shipped_supervised
from maml_rl.supervised.commands import numbers_that_matter
from maml_rl.supervised.config import load_experiment
from tests.tiny import TINY
from tests.tiny_supervised import CHARACTERS, SINUSOID, flags

ROOT = Path(__file__).parent.parent
SMALL = flags(SINUSOID)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must exit with 2 complains of, one sentence without a traceback."""
    capsys.readouterr()
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("maml-rl: ")
    assert "Traceback" not in out + err
    return err.removeprefix("maml-rl: ").strip()


@pytest.mark.slow
def test_train_resume_evaluate_and_inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README shows, and what each prints."""
    monkeypatch.chdir(tmp_path)
    assert run(["train", "sinusoid", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "Training sinusoid (4 shots): 6 iterations of 3 tasks, 1 gradient step to each." in out
    assert "iteration 2/6  loss" in out
    assert "sinusoid, 3 shots: mean squared error" in out
    assert "Run folder: runs/sinusoid-seed0" in out
    assert run(["resume", "runs/sinusoid-seed0", "--iterations", "8"]) == 0
    assert "iteration 8/8" in capsys.readouterr().out
    words = ["evaluate", "runs/sinusoid-seed0", "--shots", "2", "5", "--steps", "1"]
    assert run([*words, "--step-size", "0.1", "0.2", "--checkpoint", "best"]) == 0
    out = capsys.readouterr().out
    assert "step size 0.1" in out.replace("\n", " ")
    custom = Path("runs/sinusoid-seed0/evaluation-custom")
    with (custom / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # 2 numbers of shots, 2 step sizes, 2 numbers of steps, 6 tasks.
    assert len(rows) == 2 * 2 * 2 * 6
    assert {(row["shots"], row["step_size"]) for row in rows} == {
        (shots, size) for shots in ("2", "5") for size in ("0.1", "0.2")
    }
    assert json.loads((custom / "summary.json").read_text())["checkpoint"] == "best"
    assert run(["inspect", "runs/sinusoid-seed0"]) == 0
    out = capsys.readouterr().out
    assert "tasks drawn" in out
    assert "made for: problem sinusoid, inputs 1, outputs 1" in out
    assert "control steps" not in out


@pytest.mark.slow
def test_characters_are_drawn_trained_on_and_tested_in_both_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the images move, and resume and evaluate are told where they are."""
    monkeypatch.chdir(tmp_path)
    assert run(["data", "drawn-characters", "set", "--characters", "11", "--drawings", "4"]) == 0
    assert "44 drawings of 11 characters" in capsys.readouterr().out
    words = ["train", "drawn_characters", "--data.root", "set", "--out", "run"]
    assert run([*words, *flags(CHARACTERS)]) == 0
    out = capsys.readouterr().out
    assert "decoding 44 images" in out
    assert "validation accuracy" in out
    for words_ in ("batch norm by the query's statistics", "batch norm by the support's"):
        assert words_ in out.replace("\n", " ")
    with (tmp_path / "run" / "evaluation" / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["batch_norm"] for row in rows} == {"batch", "support"}
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    (tmp_path / "set").rename(tmp_path / "moved")
    assert "there is no folder set" in refused(["evaluate", "run"], capsys)
    assert run(["evaluate", "run", "--data.root", "moved", "--quiet"]) == 0
    assert run(["resume", "run", "--iterations", "3", "--data.root", "moved", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_several_runs_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MAML, pretrained with a chosen step size, and the oracle, on the same tasks."""
    monkeypatch.chdir(tmp_path)
    for name in ("sinusoid", "sinusoid_pretrained", "sinusoid_oracle"):
        assert run(["train", name, *SMALL, "--out", name, "--quiet"]) == 0
    assert run(["evaluate", "sinusoid", "sinusoid_pretrained", "sinusoid_oracle"]) == 0
    out = capsys.readouterr().out
    for words in ("maml", "pretrained", "oracle", "Step size of pretrained from 3 shots"):
        assert words in out
    found = json.loads(Path("evaluation/summary.json").read_text())
    tests = {(one["method"], one["shots"]): one for one in found["tests"]}
    assert len(tests) == 6
    assert len(tests["oracle", 4]["gradient_steps"]) == 1
    assert len(tests["maml", 4]["gradient_steps"]) == 3
    assert tests["pretrained", 4]["step_size"] in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


def test_what_makes_no_sense_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence each, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    cases = {
        "train sinusoid --data.shotz 3": "there is no setting 'data.shotz'",
        "train sinusoid --data.shots 0": "data.shots must be at least 1, got 0",
        "train sinusoid --data.name sinus": "did you mean 'sinusoid'?",
        "train sinusoid --data.name cosine": "no problem is called 'cosine'",
        "train sinusoid --network.kind conv": "network.kind must be one of mlp, strided-conv",
        "train sinusoid --network.kind pooled-conv": "wants pictures",
        "train sinusoid --outer.tasks 0": "outer.tasks must be from 1 to 100000, got 0",
        "train sinusoid --adaptation.step-size 0": "adaptation.step_size must be above 0",
        "train sinusoid --evaluation.shots 0": "evaluation.shots must all be from 1",
        "train sinusoid --render": "--render means nothing for a run of supervised learning",
        "train sinusoid --allow-import": "--allow-import means nothing",
        "train sinusoid --family.horizon 3": "there is no setting 'family.horizon'",
        "train omniglot_5way_1shot": "--data.root DIR is missing",
        "train omniglot_5way_1shot --data.root none": "give --data.root DIR, else get images_back",
        "train miniimagenet_5way_1shot --data.root none": "there is no folder none",
        "train sinusoid --device cuda": "device cuda is not there",
        "data omniglot set": "there is no data set 'omniglot' that can be made",
        "data drawn-characters set --characters 0": "characters must be from 1 to 100000, got 0",
        "data drawn-characters": "folder",
        "evaluate": "expected RUN first",
        "evaluate nowhere": "nowhere is not a run folder",
    }
    for words, expected in cases.items():
        assert expected in refused(words.split(), capsys), words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_options_of_the_other_mode_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "sinusoid", *SMALL, "--out", "curves", "--quiet"]) == 0
    assert run(["train", "navigation", *TINY, "--out", "goals", "--quiet"]) == 0
    nothing = "means nothing for a run of supervised learning"
    for flag in ("--episodes 2", "--tasks paper", "--task 1", "--tasks-from 1 2", "--render"):
        words = ["evaluate", "curves", *flag.split()]
        assert refused(words, capsys) == f"{flag.split()[0]} {nothing}"
    assert nothing in refused(["resume", "curves", "--render"], capsys)
    nothing = "means nothing for a run of reinforcement learning"
    assert nothing in refused(["evaluate", "goals", "--shots", "3"], capsys)
    assert nothing in refused(["resume", "goals", "--data.root", "x"], capsys)
    assert "which has no images" in refused(["evaluate", "curves", "--data.root", "x"], capsys)
    other = refused(["train", "navigation", *TINY, "--init", "curves"], capsys)
    assert "checkpoint: problem sinusoid, inputs 1, outputs 1" in other
    other = refused(["train", "sinusoid", *SMALL, "--init", "goals"], capsys)
    assert "checkpoint: navigation, 2 observations" in other
    assert "network=" not in other
    both = refused(["evaluate", "goals", "curves"], capsys)
    assert both.startswith("curves is a run of supervised learning and goals one of")


@pytest.mark.slow
def test_runs_of_different_problems_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "sinusoid", *SMALL, "--out", "curves", "--quiet"]) == 0
    assert run(["data", "drawn-characters", "set", "--characters", "11", "--drawings", "4"]) == 0
    words = ["train", "drawn_characters", *flags(CHARACTERS), "--data.root", "set", "--quiet"]
    assert run([*words, "--out", "characters"]) == 0
    more = ["--data.split-seed", "4", "--out", "others"]
    assert run([*words, *more]) == 0
    text = refused(["evaluate", "characters", "others"], capsys)
    assert text.endswith("cannot be compared: split_seed 1 -> 4")
    text = refused(["evaluate", "curves", "characters"], capsys)
    assert "the first learns sinusoid, the second drawn_characters, 3 ways" in text


def test_a_test_that_cannot_be_made_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of eleven characters of four drawings each; nothing but the set is written."""
    monkeypatch.chdir(tmp_path)
    assert run(["data", "drawn-characters", "set", "--characters", "11", "--drawings", "4"]) == 0
    words = ["train", "drawn_characters", *flags(CHARACTERS), "--data.root", "set"]
    for more, expected in {
        "--evaluation.query 30": "31 images a class are wanted for 1 shots and the query",
        "--evaluation.shots 3": "a test of 3 shots: class",
        "--evaluation.step-sizes .1 .2 --data.validation-classes 0": "no validation classes",
    }.items():
        assert expected in refused([*words, *more.split()], capsys), more
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.slow
def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(["train", "omniglot_5way_1shot", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--data.root", "--data.ways", "--adaptation.first-order", "--outer.clip", "--out"):
        assert flag in out
    assert "maml-rl data NAME DIR" in help_text()


def help_text() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "maml_rl", "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_list_shows_problems_and_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("sinusoid", "omniglot", "miniimagenet", "drawn_characters", *shipped_supervised()):
        assert f"\n{name}" in out or f"  {name}" in out
    assert "Supervised experiments that ship" in out


@pytest.mark.parametrize("name", sorted(shipped_supervised()))
def test_shipped_experiments_say_what_they_are(name: str) -> None:
    """Each is valid, is called by its file's name, and begins with source, numbers and command."""
    experiment = load_experiment(name)
    assert experiment.name == name
    head = shipped_files()[name].read_text().split("name:")[0]
    assert "Finn et al. 2017" in head
    assert "Expected" in head
    assert f"maml-rl train {name}" in head
    assert all(line.startswith("#") and len(line) <= 100 for line in head.splitlines())


def test_the_two_kinds_of_experiment_are_told_apart() -> None:
    assert {"sinusoid", "drawn_characters"} <= set(shipped_supervised())
    assert "navigation" in shipped_experiments()
    assert not set(shipped_supervised()) & set(shipped_experiments())


def test_shipped_settings_are_the_papers() -> None:
    """The issue's table, read off the files."""
    omniglot = {
        (ways, shots): load_experiment(f"omniglot_{ways}way_{shots}shot")
        for ways in (5, 20)
        for shots in (1, 5)
    }
    for (ways, shots), e in omniglot.items():
        assert (e.data.outputs, e.data.shots, e.iterations) == (ways, shots, 60_000)
        assert (e.network.kind, e.network.filters, e.network.blocks) == ("strided-conv", 64, 4)
        inner = (e.adaptation.step_size, e.adaptation.inner_steps, e.evaluation.steps)
        assert inner == ((0.4, 1, 3) if ways == 5 else (0.1, 5, 5))
        assert e.outer.tasks == (32 if ways == 5 else 16)
        assert (e.outer.learning_rate, e.outer.clip) == (1e-3, None)
    for shots in (1, 5):
        plain = load_experiment(f"omniglot_5way_{shots}shot_mlp")
        assert (plain.network.layers, plain.network.batch_norm) == ((256, 128, 64, 64), True)
        assert (plain.adaptation, plain.outer) == (
            omniglot[5, shots].adaptation,
            omniglot[5, shots].outer,
        )
        mini = load_experiment(f"miniimagenet_5way_{shots}shot")
        assert (mini.network.kind, mini.network.filters) == ("pooled-conv", 32)
        inner = (mini.adaptation.step_size, mini.adaptation.inner_steps, mini.evaluation.steps)
        assert inner == (0.01, 5, 10)
        assert (mini.outer.tasks, mini.outer.clip) == (4 if shots == 1 else 2, 10.0)
        assert vars(mini.data)["query"] == 15
    for e in (*omniglot.values(), mini):
        assert (e.adaptation.loss, e.adaptation.transductive) == ("sum-over-classes", True)
        assert not e.adaptation.multi_step_loss
        assert e.evaluation.tasks == 600
    sinusoid = load_experiment("sinusoid")
    assert (sinusoid.network.layers, sinusoid.outer.tasks) == ((40, 40), 25)
    assert (sinusoid.iterations, sinusoid.outer.learning_rate) == (70_000, 1e-3)
    assert sinusoid.evaluation.steps == 10


def test_a_rows_words() -> None:
    """From before adapting to after the last inner step; refused updates are told."""
    row: dict[str, float | int | str] = {
        "loss": 0.51234,
        "accuracy": 0.75,
        "refused": 0,
        "refused_because": "",
    }
    row |= {f"validation_accuracy_{step}": value for step, value in enumerate((0.2, 0.5, 0.875))}
    assert numbers_that_matter(row) == (
        "loss 0.5123, accuracy 75.00 %, validation accuracy 20.00 -> 87.50 %"
    )
    alone: dict[str, float | int | str] = {
        "loss": 2.0,
        "error": 2.0,
        "refused": 3,
        "refused_because": "why",
    }
    assert numbers_that_matter(alone | {"validation_error_0": 1.5}) == (
        "loss 2, validation error 1.500, 3 updates refused: why"
    )
