"""Testing runs side by side: same tasks, same seeds, and what is no comparison refused."""

from __future__ import annotations

import csv
import functools
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from maml_rl import assess
from maml_rl.adapt import broadcast
from maml_rl.assess import (
    Subject,
    evaluate_policy,
    load_subject,
    load_subjects,
    method_of,
    outcomes_of,
    told_apart,
    under_settings,
)
from maml_rl.cli import run
from maml_rl.comparison import Comparison
from maml_rl.config import load_experiment
from maml_rl.evaluate import Evaluation, evaluate
from maml_rl.sampler import Sampler, task_seeds
from maml_rl.seeds import TEST, TEST_SEED, VALIDATION
from maml_rl.task_sets import TaskSet, held_out
from maml_rl.train import meta_train
from tests.tiny import SETTINGS

RUNS: dict[str, dict[str, object]] = {
    "meta-seed0": {},
    "meta-seed1": {"seed": 1},
    "wide-seed0": {"iterations": 1, "family__goal_range": 0.9, "evaluation__episodes": 2},
    "told": {"iterations": 1, "adaptation__inner_steps": 0, "policy__observe_task": True},
    "later-seed7": {"iterations": 0, "seed": 7, "evaluation__later_step_scale": 0.001},
    "plain": {"iterations": 1, "adaptation__inner_steps": 0},
    "fresh": {"iterations": 0},
    "longer": {"iterations": 0, "family__horizon": 7},
    "noise-seed0": {"adaptation__times_variance": True, "adaptation__step_size": 0.4},
    "noise-seed1": {"adaptation__times_variance": True, "adaptation__step_size": 0.4, "seed": 1},
    "speed": {"iterations": 0, "name": "half_cheetah_vel"},
    "speed-gymnasium": {
        **{"iterations": 0, "name": "half_cheetah_vel", "family__protocol": "gymnasium"},
        "policy__action_scale": 1.0,
    },
    "direction": {"iterations": 0, "name": "half_cheetah_dir"},
    "balanced": {"iterations": 0, "name": "half_cheetah_dir", "family__balanced": True},
}
"""Settings of each run folder, besides the tiny ones."""


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small runs, none of which a test changes."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changed in RUNS.items():
        settings = {**SETTINGS, "threads": 1, **changed}
        which = str(settings.pop("name", "navigation"))
        meta_train(load_experiment(which, **settings), out=folder / name)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run where the runs are, without matplotlib, and leave no file there."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(trained)
    before = written(trained)
    yield
    assert written(trained) == before


@functools.cache
def loaded(run_folder: Path, checkpoint: str = "latest", *place: None) -> Subject:
    """A run, read once for all tests."""
    return load_subject(run_folder, checkpoint, *place)


def written(folder: Path) -> dict[Path, int]:
    """When each file was."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def evaluated(out: Path, *words: str) -> list[dict[str, str]]:
    """Rows of evaluation.csv."""
    assert run(["evaluate", *words, "--out", str(out), "--quiet"]) == 0
    with (out / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Sequence[dict[str, str]], name: str, **where: object) -> list[str]:
    """One column, in the order of the rows that agree with `where`."""
    return [r[name] for r in rows if all(r[k] == str(v) for k, v in where.items())]


def returns_of(rows: Sequence[dict[str, str]], **where: object) -> list[float]:
    return [float(value) for value in column(rows, "return_mean", **where)]


def by_hand(
    name: str,
    tasks: TaskSet | None = None,
    *,
    size: float | None = None,
    steps: int = 1,
    episodes: int = 3,
) -> Evaluation:
    """A test through the library's lower half: nothing of what puts the command together."""
    policy = loaded(Path(name)).trained
    experiment = policy.experiment
    size = experiment.adaptation.step_size if size is None else size
    return evaluate(
        policy.policy,
        policy.params,
        experiment.family,
        settings=replace(experiment.evaluation, steps=steps, episodes=episodes),
        adaptation=replace(experiment.adaptation, step_size=size),
        advantages=experiment.advantages,
        action_scale=experiment.policy.action_scale,
        threads=1,
        tasks=held_out(experiment.family, 2) if tasks is None else tasks,
    )


def flat(returns: npt.NDArray[np.float64]) -> list[float]:
    found: list[float] = returns.reshape(-1).tolist()
    return found


def test_what_a_policy_is_called_follows_from_its_training() -> None:
    """An untrained one is random, whatever it was to become."""
    names = {name: loaded(Path(name)).method for name in RUNS}
    assert [names[n] for n in ("meta-seed0", "wide-seed0", "told", "plain", "fresh", "speed")] == [
        *("maml", "maml", "oracle", "pretrained", "random", "random")
    ]
    told = load_experiment(Path("told/config.yaml"))
    assert [method_of(told, iterations) for iterations in (0, 1)] == ["random", "oracle"]


def test_seeds_whose_alpha_goes_with_their_noise_are_tested_with_one() -> None:
    """Their mean, so that they are one row; a single run with its own."""
    runs = load_subjects([Path("noise-seed0"), Path("noise-seed1")])
    alphas = [run.alpha for run in runs]
    assert alphas == [
        pytest.approx(0.4 * math.exp(2 * float(run.trained.params["log_std"].mean())))
        for run in runs
    ]
    assert alphas[0] != alphas[1]
    tasks = held_out(runs[0].family, 2)
    outcomes = outcomes_of(runs, tasks, {})
    assert {one.step_size for one in outcomes} == {sum(alphas) / 2}
    assert len(Comparison.of(outcomes, runs[0].family).scores) == 1
    (alone,) = outcomes_of(runs[1:], tasks, {})
    assert alone.step_size == alphas[1]
    expected = evaluate_policy(runs[0].trained, tasks=tasks, step_size=sum(alphas) / 2)
    assert np.array_equal(outcomes[0].evaluation.returns, expected.returns)


def test_evaluating_twice_gives_the_same_files(tmp_path: Path) -> None:
    """To the byte, several runs and step sizes together; the numbers are those done by hand."""
    words = ["meta-seed0", "meta-seed1", "fresh", "--step-size", "0.3", "0.05"]
    rows = evaluated(tmp_path / "a", *words)
    evaluated(tmp_path / "b", *words)
    for name in ("evaluation.csv", "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(rows) == 3 * 2 * 2 * 2
    for folder, who in (
        ("meta-seed0", {"method": "maml", "seed": 0}),
        ("meta-seed1", {"method": "maml", "seed": 1}),
        ("fresh", {"method": "random", "seed": 0}),
    ):
        for size in (0.3, 0.05):
            expected = by_hand(folder, size=size)
            assert returns_of(rows, step_size=size, **who) == flat(expected.returns)
            spread = column(rows, "return_sd", step_size=size, **who)
            assert [float(s) for s in spread] == flat(expected.return_sds)
        # What comes before the first step does not depend on its size; what comes after does.
        first, second = (
            [returns_of(rows, step_size=s, gradient_steps=k, **who) for s in (0.3, 0.05)]
            for k in (0, 1)
        )
        assert first[0] == first[1]
        assert second[0] != second[1]


def test_without_a_step_size_each_run_has_its_own(tmp_path: Path) -> None:
    rows = evaluated(tmp_path, "meta-seed0")
    assert set(column(rows, "step_size")) == {"0.5"}
    assert returns_of(rows) == flat(by_hand("meta-seed0").returns)


def test_every_policy_meets_the_same_tasks_and_seeds(tmp_path: Path, trained: Path) -> None:
    """A copy of a run, tested after another run, has the numbers of the run itself."""
    copy = tmp_path / "copy"
    shutil.copytree("meta-seed0", copy)
    rows = evaluated(tmp_path / "out", "meta-seed0", "fresh", str(copy))
    assert sorted(set(column(rows, "variant"))) == ["", "copy", "meta"]
    one, two = (returns_of(rows, variant=v) for v in ("meta", "copy"))
    assert one == two == flat(by_hand("meta-seed0").returns)
    goals = [
        list(zip(column(rows, "task_goal_x", **w), column(rows, "task_goal_y", **w), strict=True))
        for w in ({"variant": "meta"}, {"variant": "copy"}, {"method": "random"})
    ]
    assert goals[0] == goals[1] == goals[2]


@pytest.mark.parametrize("stream", [TEST, VALIDATION])
def test_episodes_are_of_the_stream_that_the_tasks_name(stream: int) -> None:
    """Step 0 by the sampler alone: seeds (stream, TEST_SEED, 0, 0), whatever the tasks."""
    trained = loaded(Path("fresh")).trained
    goals = np.array([[0.3, -0.1], [0.2, 0.4]], np.float32)
    found = evaluate_policy(trained, tasks=TaskSet("mine", goals, stream))
    assert found.episodes == 3
    with Sampler(trained.experiment.family, trained.policy, tasks=2, episodes=3) as sampler:
        seeds = task_seeds(stream, TEST_SEED, 0, 0, 2)
        episodes = sampler.sample(broadcast(trained.params, 2), torch.from_numpy(goals), seeds)
    np.testing.assert_allclose(found.returns[0], episodes.mean_returns(), rtol=1e-6)


def test_seeds_are_one_method_and_settings_are_variants(tmp_path: Path) -> None:
    """Named after the folder, without its seed; by the whole path where two folders would share
    a name, and not at all where a method has one kind of settings."""
    subjects = load_subjects([Path(n) for n in ("meta-seed0", "meta-seed1", "fresh")])
    assert [(s.method, s.variant) for s in subjects] == [*[("maml", "")] * 2, ("random", "")]
    subjects = load_subjects([Path(n) for n in ("meta-seed0", "wide-seed0", "meta-seed1")])
    assert [s.variant for s in subjects] == ["meta", "wide", "meta"]
    other = tmp_path / "meta-seed0"
    shutil.copytree("wide-seed0", other)
    subjects = load_subjects([Path("meta-seed0"), other, Path("meta-seed1")])
    assert [s.variant for s in subjects] == ["meta-seed0", str(other), "meta-seed1"]


def test_settings_that_change_no_return_make_no_variant() -> None:
    """Threads, the number of episodes in the test, the name; a step size is another method."""
    first = loaded(Path("meta-seed0"))
    experiment = first.trained.experiment

    def with_seed_1(**changed: object) -> Subject:
        changed_to = replace(experiment, seed=1, **changed)  # type: ignore[arg-type]  # any of them
        return replace(first, trained=replace(first.trained, experiment=changed_to))

    fewer = replace(experiment.evaluation, episodes=2)
    sampling = replace(experiment.sampling, tasks_at_once=1)
    same = with_seed_1(threads=2, name="other", evaluation=fewer, sampling=sampling)
    assert [s.variant for s in told_apart([first, same])] == ["", ""]
    steeper = with_seed_1(adaptation=replace(experiment.adaptation, step_size=0.2))
    assert all(s.variant for s in told_apart([first, steeper]))


def test_the_first_runs_settings_hold_for_all(tmp_path: Path) -> None:
    """Goals of its range and its number of episodes; which run comes first decides."""
    rows = evaluated(tmp_path / "a", "meta-seed0", "wide-seed0")
    assert set(column(rows, "episodes")) == {"3"}
    tasks = held_out(loaded(Path("meta-seed0")).family, 2)
    assert returns_of(rows, variant="wide") == flat(by_hand("wide-seed0", tasks).returns)
    rows = evaluated(tmp_path / "b", "wide-seed0", "meta-seed0")
    assert set(column(rows, "episodes")) == {"2"}
    # Each has its own range of goals, all the same.
    rows = evaluated(tmp_path / "c", "meta-seed0", "wide-seed0", "--task", "0.7,0", "--steps", "0")
    assert column(rows, "outside_training") == ["1", "0"]
    # Step sizes after the first too.
    rows = evaluated(tmp_path / "d", "fresh", "later-seed7", "--steps", "2")
    later = loaded(Path("later-seed7"))
    tasks = held_out(later.family, 2)
    assert later.trained.experiment.evaluation.later_step_scale == 0.001
    two = replace(loaded(Path("fresh")).trained.experiment.evaluation, steps=2)
    expected = evaluate_policy(under_settings([later], two)[0].trained, tasks=tasks)
    assert returns_of(rows, seed=7) == flat(expected.returns)


def test_an_oracle_takes_no_step_unless_told_to(tmp_path: Path) -> None:
    """And is tried once, whatever the step sizes; a step that is asked for it takes."""
    rows = evaluated(tmp_path / "a", "told", "plain", "--step-size", "0.1", "0.2")
    assert column(rows, "gradient_steps", method="oracle") == ["0", "0"]
    assert len(column(rows, "gradient_steps", method="pretrained")) == 2 * 2 * 2
    assert returns_of(rows, method="oracle") == flat(by_hand("told", steps=0).returns)
    rows = evaluated(
        tmp_path / "b", "told", "--steps", "2", "--episodes", "4", "--step-size", "0.1"
    )
    assert column(rows, "gradient_steps") == ["0", "0", "1", "1", "2", "2"]
    assert returns_of(rows) == flat(by_hand("told", size=0.1, steps=2, episodes=4).returns)


def test_tasks_of_ones_own(tmp_path: Path) -> None:
    """In the order given, a negative number first or not; the second is beyond the square."""
    rows = evaluated(
        tmp_path, "fresh", "--task", "-0.3,0.2", "--task", "0.1,-0.75", "--task=0.5,0.5"
    )
    assert column(rows, "tasks") == ["chosen"] * 6
    assert [float(v) for v in column(rows, "task_goal_x", gradient_steps=0)] == pytest.approx(
        [-0.3, 0.1, 0.5]
    )
    assert column(rows, "outside_training", gradient_steps=1) == ["0", "1", "0"]
    goals = TaskSet("chosen", np.array([[-0.3, 0.2], [0.1, -0.75], [0.5, 0.5]], np.float32))
    assert returns_of(rows) == flat(by_hand("fresh", goals).returns)


def test_the_papers_tasks(tmp_path: Path) -> None:
    """All 40, whatever the run's own number; the first by its seed."""
    rows = evaluated(tmp_path, "fresh", "--tasks", "paper", "--steps", "0", "--episodes", "1")
    assert column(rows, "tasks") == ["paper"] * 40
    assert float(rows[0]["task_goal_x"]) == pytest.approx(-0.082978, abs=1e-6)
    assert float(rows[0]["task_goal_y"]) == pytest.approx(0.220324, abs=1e-6)


@pytest.mark.parametrize(("low", "high"), [("-1", "0.5"), ("1.5", "2.5"), ("2.5", "3")])
def test_tasks_from_beyond_the_range_are_marked(low: str, high: str, tmp_path: Path) -> None:
    """Speeds below 0 or above 2 m/s, which training never draws."""
    rows = evaluated(tmp_path, "speed", "--tasks-from", low, high, "--steps", "0")
    assert column(rows, "tasks") == [f"from {low} to {high}"] * 2
    for row in rows:
        speed = float(row["task_velocity"])
        assert float(low) <= speed <= float(high)
        assert row["outside_training"] == str(int(not 0 <= speed <= 2))
    if low == "2.5":
        assert json.loads((tmp_path / "summary.json").read_text())["methods"][0][
            "outside_training"
        ] == len(rows)


def test_how_training_draws_its_tasks_is_no_hindrance(tmp_path: Path) -> None:
    """Directions balanced or not, tested together; one direction alone may be chosen."""
    rows = evaluated(tmp_path, "direction", "balanced", "--task", "-1", "--steps", "0")
    assert column(rows, "task_direction") == ["-1.0", "-1.0"]
    one, two = returns_of(rows)
    assert one == two


def test_an_earlier_checkpoint(tmp_path: Path) -> None:
    """`previous` is after two of three iterations; summary.json says which was tested."""
    rows = evaluated(tmp_path, "meta-seed0", "--checkpoint", "previous")
    assert returns_of(rows) != flat(by_hand("meta-seed0").returns)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["checkpoint"] == "previous"
    assert summary["runs"][0]["iterations"] == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["fresh", "speed"], "fresh is navigation, speed is half_cheetah_vel"),
        (["speed", "direction"], "different families"),
        (["fresh", "longer"], "fresh is navigation with horizon 6, longer is navigation with"),
        (["speed", "speed-gymnasium"], "speed is half_cheetah_vel with protocol paper"),
        (["fresh", "plain", "fresh"], "a run is given twice"),
        (["fresh", "./plain/../fresh"], "a run is given twice"),
        (["fresh", "nowhere"], "nowhere is not a run folder"),
        (["fresh", "--checkpoint", "best"], "best"),
        (["fresh", "--task", "0.3"], "goal_x (m), goal_y (m)"),
        (["fresh", "--task", "0,0", "--task", "nan,0"], "all finite"),
        (["fresh", "--task", "0,inf"], "all finite"),
        (["fresh", "--task", "there"], "got 'there'"),
        (["direction", "--task", "0.5"], "one of [-1.0], [1.0]"),
        (["fresh", "--episodes", "0"], "episodes must be at least 1, got 0"),
        (["fresh", "--steps", "-1"], "steps must be at least 0, got -1"),
        (["fresh", "--step-size", "0"], "step_size must be finite and above 0, got 0"),
        (["fresh", "--step-size", "0.1", "-0.2"], "step_size must be finite and above 0, got -0.2"),
        (["fresh", "--steps", "0", "--step-size", "-1"], "step_size must be finite and above 0"),
        (["told", "--step-size", "nan"], "step_size must be finite and above 0, got nan"),
        (["fresh", "--step-size", "nan"], "step_size must be finite and above 0, got nan"),
        (["fresh", "--step-size", "0.1", "0.2", "0.10"], "step size 0.1 is given twice"),
        (["fresh", "--tasks", "paper", "--task", "0,0"], "--tasks paper and --task exclude"),
        (["speed", "--task", "1", "--tasks-from", "1", "2"], "--task and --tasks-from exclude"),
        (["direction", "--tasks-from", "0", "1"], "whose task is one number"),
        (["fresh", "--tasks-from", "0", "1"], "whose task is one number"),
        (["speed", "--tasks-from", "2", "1"], "the lower first; got 2 1"),
        (["speed", "--tasks-from", "1", "1"], "the lower first; got 1 1"),
        (["speed", "--tasks-from", "nan", "1"], "two finite numbers"),
        (["--steps", "1"], "expected RUN first"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_written(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On stderr, exit 2; neither in the run nor where results would go."""
    monkeypatch.setattr(assess, "load_subject", loaded)
    assert run(["evaluate", *words, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside one that has its own."""
    shutil.copytree("plain", tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    assert run(["evaluate", "plain", str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_output_names_methods_step_sizes_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says how to have figures, where matplotlib is missing."""
    words = ["evaluate", "told", "plain", "--step-size", "0.1", "0.2", "--out", str(tmp_path)]
    assert run(words) == 0
    printed = capsys.readouterr()
    for text in ("oracle", "pretrained", "0.1", "0.2", f"Written: {tmp_path}"):
        assert text in printed.out
    assert "pip install 'maml-rl[plot]'" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("runs", [["meta-seed0"], ["meta-seed0", "meta-seed1", "told", "plain"]])
def test_no_number_is_cut_off_in_80_columns(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are broken where they must be, never elided."""
    assert run(["evaluate", *runs, "--steps", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    before = [
        r["return_mean"] for r in rows if r["method"] == "maml" and r["gradient_steps"] == "0"
    ]
    assert f"{sum(map(float, before)) / len(before):.1f}" in printed


def test_a_test_of_another_kind_leaves_the_runs_own_alone(tmp_path: Path) -> None:
    """By default a run's own test goes to `evaluation`, any other to `evaluation-custom`."""
    shutil.copytree("fresh", tmp_path / "run")
    assert run(["evaluate", str(tmp_path / "run"), "--quiet"]) == 0
    own = (tmp_path / "run" / "evaluation" / "evaluation.csv").read_bytes()
    assert run(["evaluate", str(tmp_path / "run"), "--task", "0.1,0.2", "--quiet"]) == 0
    assert (tmp_path / "run" / "evaluation" / "evaluation.csv").read_bytes() == own
    assert (tmp_path / "run" / "evaluation-custom" / "evaluation.csv").exists()


def test_a_step_size_that_breaks_a_policy_does_not_end_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told and left out; where nothing is left, exit 3."""
    words = ["evaluate", "fresh", "--quiet", "--out", str(tmp_path / "a"), "--step-size"]
    assert run([*words, "0.1", "1e6"]) == 0
    assert "random with step size 1e+06 is left out" in capsys.readouterr().err
    with (tmp_path / "a" / "evaluation.csv").open(newline="") as file:
        assert {row["step_size"] for row in csv.DictReader(file)} == {"0.1"}
    assert run([*words, "1e6"]) == 3


def test_a_run_that_stopped_early_is_no_seed_of_those_that_did_not(tmp_path: Path) -> None:
    """Other iterations are another policy, and the figures of both are told apart."""
    shutil.copytree("meta-seed1", tmp_path / "short-seed1")
    previous = tmp_path / "short-seed1" / "checkpoints" / "previous"
    shutil.rmtree(tmp_path / "short-seed1" / "checkpoints" / "latest")
    previous.rename(previous.with_name("latest"))
    subjects = load_subjects([Path("meta-seed0"), tmp_path / "short-seed1"])
    assert subjects[1].iterations < subjects[0].iterations
    assert [s.variant for s in subjects] == ["meta", "short"]
