"""A benchmark: one budget for every method, step sizes chosen on tasks that no test uses."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from envs.family import TaskFamily
from maml_rl import assess, cli_evaluate
from maml_rl.assess import BrokenDown, Subject, Trial, evaluate_policy, load_subject
from maml_rl.benchmark import Planned, choose_step_sizes, plan
from maml_rl.benchmark_file import Benchmark, OwnSettings, merged
from maml_rl.cli import run
from maml_rl.comparison import Method
from maml_rl.config import Experiment, load_experiment
from maml_rl.evaluate import Evaluation, evaluate
from maml_rl.rollout import SamplingError
from maml_rl.runs import Row
from maml_rl.sampler import task_generator
from maml_rl.seeds import TEST_SEED, VALIDATION
from maml_rl.signals import Terminated
from maml_rl.task_sets import TaskSet, held_out, papers_own
from maml_rl.train import meta_train
from maml_rl.trained import TrainedPolicy, new_policy
from tests.conftest import rows

HUGE = 1e6
"""A step size that leaves no policy whole."""
FILE: Mapping[str, object] = {
    "name": "small",
    "experiment": "navigation",
    "seeds": [3, 1],
    "iterations": 2,
    "pretrained_step_size": 0.2,
    "random_step_size": 0.3,
    "candidates": [HUGE, 0.05, 0.4],
    "validation_tasks": 5,
    "settings": {
        "threads": 1,
        # No episode ends early, so that control steps can be counted by hand.
        "family": {"horizon": 6, "goal_radius": 0.0},
        "sampling": {"tasks": 4, "episodes": 3},
        "policy": {"layers": [8, 5]},
        "evaluation": {"tasks": 3, "episodes": 2, "steps": 2},
    },
}
METHODS = ("maml", "pretrained", "oracle", "random")
STEP_SIZES = {"maml": 0.5, "pretrained": 0.2, "random": 0.3}
"""The paper's own."""

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def write(path: Path, **changed: object) -> str:
    """A benchmark's file, with some of it changed."""
    path.write_text(yaml.safe_dump({**FILE, **changed}))
    return str(path)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark that nothing interrupted; no test changes it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        words = [write(folder / "small.yaml"), "--out", str(folder / "out"), "--quiet"]
        assert run(["benchmark", *words]) == 0
    return folder / "out"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def returns_of(folder: Path, **where: object) -> list[float]:
    """Of the rows of evaluation.csv that agree with `where`, in their order."""
    found = [r for r in table(folder) if all(r[k] == str(v) for k, v in where.items())]
    return [float(r["return_mean"]) for r in found]


@functools.cache
def loaded(run_folder: Path) -> Subject:
    """A run, read once for all tests."""
    return load_subject(run_folder)


def written(folder: Path) -> dict[Path, int]:
    """When each file was."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def parameters(run_folder: Path) -> bytes:
    return (run_folder / "checkpoints/latest/parameters.safetensors").read_bytes()


def by_hand(run_folder: Path, tasks: TaskSet, size: float, steps: int = 2) -> Evaluation:
    """A test through the library's lower half."""
    policy = loaded(run_folder).trained
    experiment = policy.experiment
    return evaluate(
        policy.policy,
        policy.params,
        experiment.family,
        settings=replace(experiment.evaluation, steps=steps, episodes=2),
        adaptation=replace(experiment.adaptation, step_size=size),
        advantages=experiment.advantages,
        action_scale=experiment.policy.action_scale,
        threads=1,
        tasks=tasks,
    )


def test_every_method_samples_as_many_control_steps(whole: Path) -> None:
    """2 iterations x 2 batches x 4 tasks x 3 episodes x 6 steps; random samples none."""
    for method, iterations in (("maml", 2), ("pretrained", 4), ("oracle", 4)):
        for seed in (3, 1):
            found = rows(whole / f"{method}-seed{seed}")
            assert len(found) == iterations
            assert int(found[-1]["env_steps"]) == 2 * 2 * 4 * 3 * 6
    runs = json.loads((whole / "summary.json").read_text())["runs"]
    assert [(r["method"], r["seed"]) for r in runs] == [(m, s) for m in METHODS for s in (3, 1)]
    assert {r["env_steps"] for r in runs[:6]} == {288}
    assert {r["env_steps"] for r in runs[6:]} == {0}


def test_budgets_follow_the_inner_steps() -> None:
    """Two inner steps draw three batches an iteration; the experiment's own total by default."""
    base = load_experiment("navigation", adaptation__inner_steps=2, iterations=7)
    for iterations, total in ((None, 7), (10, 10)):
        given = Benchmark(name="x", experiment="navigation", iterations=iterations)
        found = {one.method: one.experiment for one in plan(given, base, Path("out"))}
        assert {m: e.iterations for m, e in found.items()} == {
            **{"maml": total, "pretrained": 3 * total, "oracle": 3 * total, "random": 0}
        }
        assert {m: e.adaptation.inner_steps for m, e in found.items()} == {
            **{"maml": 2, "pretrained": 0, "oracle": 0, "random": 2}
        }
        assert [m for m, e in found.items() if e.policy.observe_task] == ["oracle"]


OWN: Mapping[str, object] = {
    "maml": {"sampling": {"tasks": 5}},
    "pretrained": {"sampling.episodes": 7, "advantages": {"gae_lambda": 0.5}},
    "oracle": {"sampling": {"tasks": 9}, "adaptation.later_from": []},
}
"""Settings that one method has, nested and with dots."""


def planned_by(
    monkeypatch: pytest.MonkeyPatch, file: str, *words: str
) -> dict[str, Experiment[TaskFamily]]:
    """The experiments that a benchmark plans, by method; it ends before any is trained."""
    seen: list[Planned] = []

    def stop(planned: Sequence[Planned], given: Sequence[Path], **_: object) -> None:
        seen.extend(planned)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli_evaluate, "check_plan", stop)
        assert run(["benchmark", file, *words]) == 130
    return {one.method: one.experiment for one in seen}


def test_a_method_may_have_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the file's `settings`, of that method alone, and with them as many iterations as draw
    maml's 2 x 2 batches x 5 tasks x 3 episodes = 60, rounded up: of 4 x 7, and of 9 x 3."""
    plain = planned_by(monkeypatch, write(Path("plain.yaml")))
    found = planned_by(monkeypatch, write(Path("b.yaml"), settings_of=OWN))
    changed: Mapping[str, Mapping[str, Mapping[str, object]]] = {
        "maml": {"sampling": {"tasks": 5}},
        "pretrained": {"sampling": {"episodes": 7}, "advantages": {"gae_lambda": 0.5}},
        "oracle": {"sampling": {"tasks": 9}},
        "random": {},
    }
    iterations = {"maml": 2, "pretrained": 3, "oracle": 3, "random": 0}
    assert list(found) == list(METHODS)
    for method, sections in changed.items():
        expected = replace(plain[method], iterations=iterations[method])
        for section, values in sections.items():
            part = replace(getattr(expected, section), **values)
            expected = replace(expected, **{section: part})
        assert found[method] == expected


def test_on_the_command_line_a_setting_is_every_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of one that a method has of its own, and leaves the others; a method that
    is left out there may have settings in the file, and maml's still count for the budget."""
    file = write(Path("b.yaml"), settings_of=OWN)
    found = planned_by(monkeypatch, file, "--sampling.tasks", "6", "--methods", "oracle", "maml")
    batches = {m: (e.sampling.tasks, e.sampling.episodes, e.iterations) for m, e in found.items()}
    assert batches == {"oracle": (6, 3, 4), "maml": (6, 3, 2)}
    found = planned_by(monkeypatch, file, "--sampling.tasks=6", "--methods", "pretrained")
    assert {m: e.sampling.episodes for m, e in found.items()} == {"pretrained": 7}
    assert found["pretrained"].advantages.gae_lambda == 0.5
    found = planned_by(monkeypatch, file, "--methods", "oracle")
    assert {m: e.iterations for m, e in found.items()} == {"oracle": 3}


def test_settings_of_is_a_flag_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the file's, for all methods; quoted or not, and another flag still wins."""
    file = write(Path("b.yaml"), settings_of=OWN)
    mapping = "{oracle: {sampling: {tasks: 2}, sampling.episodes: 9}}"
    for words in (["--settings-of", mapping], ["--settings_of", *mapping.split(" ")]):
        found = planned_by(monkeypatch, file, *words, "--sampling.episodes", "4")
        batches = [(e.sampling.tasks, e.sampling.episodes, e.iterations) for e in found.values()]
        assert batches == [(4, 4, 2), (4, 4, 4), (2, 4, 8), (4, 4, 0)]


@pytest.mark.parametrize(
    ("episodes", "iterations"),
    [(1, 36), (3, 12), (4, 9), (5, 8), (35, 2), (36, 1), (37, 1), (1000, 1)],
)
def test_budgets_are_equal_in_episodes(episodes: int, iterations: int) -> None:
    """Of maml 4 x 3 batches x 2 tasks x 3 episodes = 72; another's batch is of 2 tasks x E."""
    batch = {"sampling__tasks": 2, "sampling__episodes": 3}
    base = load_experiment("navigation", adaptation__inner_steps=2, iterations=4, **batch)
    given = Benchmark(
        name="x",
        experiment="navigation",
        settings_of={"oracle": {"sampling.episodes": episodes}},
    )
    found = {one.method: one.experiment.iterations for one in plan(given, base, Path("out"))}
    assert found == {"maml": 4, "pretrained": 12, "oracle": iterations, "random": 0}


def test_own_settings_are_trained_with_told_and_looked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run is what train makes of them to the bit, summary.json names them, and the same folder
    is refused without them."""
    own = {"pretrained": {"sampling.episodes": 5, "adaptation": {"step_size": 0.7}}}
    changed: dict[str, Any] = {"candidates": [], "seeds": [3], "pretrained_step_size": None}
    file = write(Path("b.yaml"), settings_of=own, methods=["pretrained", "random"], **changed)
    assert run(["benchmark", file, "--out", "out", "--quiet"]) == 0
    config = "out/pretrained-seed3/config.yaml"
    # 2 x 2 batches x 4 tasks x 3 episodes are 48, and 3 iterations of 4 x 5 are 60.
    experiment = load_experiment(config)
    assert (experiment.sampling.tasks, experiment.sampling.episodes) == (4, 5)
    assert int(rows(Path("out/pretrained-seed3"))[-1]["env_steps"]) == 3 * 4 * 5 * 6
    expected = meta_train(experiment).params
    found = load_subject(Path("out/pretrained-seed3")).trained.params
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["benchmark"]["settings_of"] == {
        "pretrained": {"sampling.episodes": 5, "adaptation.step_size": 0.7}
    }
    sizes = {(r["method"], r["step_size"]) for r in table(Path("out"))}
    assert sizes == {("pretrained", "0.7"), ("random", "0.3")}
    before = written(Path("out/pretrained-seed3"))
    capsys.readouterr()
    for settings, complaint in (
        ({}, "adaptation.step_size 0.7 -> 0.5, sampling.episodes 5 -> 3"),
        ({"pretrained": {"adaptation.step_size": 0.7}}, "sampling.episodes 5 -> 3"),
    ):
        other = write(Path("o.yaml"), settings_of=settings, methods=["pretrained"], **changed)
        for words in (["--out", "out"], ["--out", "new", "--reuse", "out/pretrained-seed3"]):
            assert run(["benchmark", other, *words, "--quiet"]) == 2
            assert (
                f"the benchmark's for pretrained, seed 3: {complaint};" in capsys.readouterr().err
            )
    again = ["--methods", "pretrained", "--reuse", "out/pretrained-seed3", "--out", "new"]
    assert run(["benchmark", file, *again, "--quiet"]) == 0
    assert written(Path("out/pretrained-seed3")) == before
    assert [p.name for p in Path("new").iterdir() if p.is_dir()] == []


def test_a_step_size_of_its_own_is_no_other_methods() -> None:
    """That of pretrained is tested with, unless the benchmark names one; the others have maml's,
    or where there is no maml that of one which has none of its own."""

    def subject(method: Method, alpha: float) -> Subject:
        fresh = new_policy(load_experiment("navigation", adaptation__step_size=alpha))
        return Subject(fresh, method, Path(method), 0, 0)

    oracle, random = subject("oracle", 0.2), subject("random", 0.3)
    maml, pretrained = subject("maml", 0.4), subject("pretrained", 0.6)
    own: OwnSettings = {
        "oracle": {"adaptation.step_size": 0.2},
        "maml": {"adaptation.step_size": 0.4},
        "pretrained": {"adaptation.later_step_sizes": [0.6], "adaptation.later_from": [1]},
    }
    for given, subjects, expected in (
        ({}, [oracle, pretrained, random, maml], {"maml": 0.4, "pretrained": 0.6, "random": 0.4}),
        ({"pretrained_step_size": 0.9}, [pretrained, maml], {"maml": 0.4, "pretrained": 0.9}),
        ({}, [oracle, pretrained, random], {"pretrained": 0.6, "random": 0.3}),
        ({"settings_of": {}}, [maml, pretrained], {"maml": 0.4, "pretrained": 0.4}),
    ):
        settings: dict[str, Any] = {"settings_of": own, "candidates": (), **given}
        methods = tuple(s.method for s in subjects)
        benchmark = Benchmark(name="x", experiment="x", methods=methods, **settings)
        found = choose_step_sizes(benchmark, subjects, lambda _: None)
        assert {name: size.own for name, size in found.items()} == expected


def test_an_alpha_that_goes_with_the_noise_is_each_methods_own() -> None:
    """Unless the benchmark names one: random acts with more noise than what is trained."""

    def subject(method: Method, log_std: float) -> Subject:
        settings = {"adaptation__times_variance": True, "adaptation__step_size": 0.5}
        experiment = load_experiment("navigation", policy__initial_log_std=log_std, **settings)
        return Subject(new_policy(experiment), method, Path(method), 0, 0)

    mamls = [subject("maml", -1.0), subject("maml", -1.2)]
    subjects = [*mamls, subject("pretrained", -1.5), subject("random", 0.0)]
    # Of several runs the mean.
    both = 0.5 * (math.exp(-2.0) + math.exp(-2.4)) / 2
    own = {"maml": both, "pretrained": 0.5 * math.exp(-3.0), "random": 0.5}
    for given in ({}, {"random_step_size": 0.7}):
        methods = ("maml", "pretrained", "random")
        settings: dict[str, Any] = {"methods": methods, "candidates": (), **given}
        found = choose_step_sizes(
            Benchmark(name="x", experiment="x", **settings), subjects, lambda _: None
        )
        expected = {**own, **({"random": 0.7} if given else {})}
        assert {m: size.own for m, size in found.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_train_makes_of_its_settings(method: str, whole: Path) -> None:
    """The same parameters to the bit: no method has a trainer of its own."""
    plain = {"iterations": 4, "adaptation__inner_steps": 0}
    changed: Mapping[str, object] = {
        "maml": {"iterations": 2},
        "pretrained": plain,
        "oracle": {**plain, "policy__observe_task": True},
        "random": {"iterations": 0},
    }[method]
    small = {"sampling__tasks": 4, "sampling__episodes": 3, "policy__layers": [8, 5]}
    point = {"family__horizon": 6, "family__goal_radius": 0.0, "threads": 1}
    experiment = load_experiment("navigation", seed=1, **small, **point, **changed)
    expected = meta_train(experiment).params
    one, other = (loaded(whole / f"{method}-seed{seed}").trained.params for seed in (1, 3))
    assert list(one) == list(expected)
    assert all(torch.equal(one[name], expected[name]) for name in one)
    assert not all(torch.equal(other[name], expected[name]) for name in one)


def test_the_best_candidate_on_validation_tasks_is_chosen(whole: Path) -> None:
    """The largest mean over both runs after the last step, on goals and episodes of a stream of
    their own; one that breaks a policy is none."""
    family = loaded(whole / "maml-seed3").family
    goals = family.sample_tasks(5, task_generator(VALIDATION, TEST_SEED, 0))
    tasks = TaskSet("validation", goals, VALIDATION)
    chosen = json.loads((whole / "summary.json").read_text())["step_sizes"]
    assert list(chosen) == ["maml", "pretrained", "random"]
    for method, found in chosen.items():
        expected = {
            size: np.mean(
                [by_hand(whole / f"{method}-seed{s}", tasks, size).returns[2] for s in (3, 1)]
            )
            for size in (STEP_SIZES[method], 0.05, 0.4)
        }
        with pytest.raises(SamplingError, match="not finite"):
            by_hand(whole / f"{method}-seed3", tasks, HUGE)
        assert found["validation"][str(HUGE)] is None
        for size, value in expected.items():
            assert found["validation"][str(size)] == pytest.approx(value, rel=1e-12)
        assert found["best"] == max(expected, key=lambda size: expected[size])
        assert found["own"] == STEP_SIZES[method]


def test_the_test_is_of_both_step_sizes_on_the_same_tasks(whole: Path) -> None:
    """The paper's own and the best, both for every run, in numbers done by hand; before the first
    step its size does not matter; and an oracle takes none."""
    chosen = json.loads((whole / "summary.json").read_text())["step_sizes"]
    tasks = held_out(loaded(whole / "maml-seed3").family, 3)
    for method in ("maml", "pretrained", "random"):
        sizes = [STEP_SIZES[method], chosen[method]["best"]]
        where = {"method": method, "seed": 1}
        kinds = [r["step_size"] for r in table(whole) if r["method"] == method and r["seed"] == "1"]
        assert list(dict.fromkeys(kinds)) == list(dict.fromkeys(map(str, sizes)))
        for size in sizes:
            expected = by_hand(whole / f"{method}-seed1", tasks, size).returns
            found = returns_of(whole, step_size=size, **where)
            assert found == expected.reshape(-1).tolist()
        before = [returns_of(whole, step_size=s, gradient_steps=0, **where) for s in sizes]
        assert before[0] == before[1]
    # So that two rows of a method were looked at.
    assert any(found["own"] != found["best"] for found in chosen.values())
    expected = by_hand(whole / "oracle-seed3", tasks, 1.0, steps=0).returns
    assert returns_of(whole, method="oracle", seed=3) == expected[0].tolist()
    goals = {(r["task"], r["task_goal_x"], r["task_goal_y"], r["tasks"]) for r in table(whole)}
    assert len(goals) == 3


def test_a_candidate_that_breaks_a_policy_is_never_chosen(whole: Path) -> None:
    """NaN compares with nothing, so it must not come to a comparison, wherever it stands; where
    nothing is left, or nothing beats it, the method keeps its own, which is tried too."""
    values = {0.1: math.nan, 0.2: -3.0, 0.4: -1.0, 0.8: math.nan, 0.5: -2.0}

    subjects = [loaded(whole / "maml-seed3")]
    some = evaluate_policy(subjects[0].trained)

    def known(trials: Sequence[Trial]) -> Iterator[Evaluation | BrokenDown]:
        for trial in trials:
            assert trial.step_size is not None
            value = values[trial.step_size]
            returns = np.full_like(some.returns, value)
            yield BrokenDown("", 3) if math.isnan(value) else replace(some, returns=returns)

    for candidates, best in (
        ((0.1, 0.2, 0.4, 0.8), 0.4),
        ((0.8, 0.4, 0.2), 0.4),
        ((0.2, 0.1), 0.5),
        ((0.1, 0.8), 0.5),
        ((), 0.5),
    ):
        given = Benchmark(name="x", experiment="x", methods=("maml",), candidates=candidates)
        said: list[str] = []
        found = choose_step_sizes(given, subjects, said.append, known)
        assert (found["maml"].own, found["maml"].best) == (0.5, best)
        tried = found["maml"].validation
        sizes = (0.5, *candidates) if candidates else ()
        assert tried == pytest.approx({c: values[c] for c in sizes}, nan_ok=True)
        assert len(said) == len(sizes) + 1


def test_without_candidates_each_method_has_its_own_step_size(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is alpha where the file gives none; and nothing is trained that is there already, so
    the runs stay as they were."""
    for method in METHODS:
        shutil.copytree(whole / f"{method}-seed3", f"out/{method}-seed3")
    before = written(Path("out"))
    file = write(Path("b.yaml"), candidates=[], seeds=[3], random_step_size=None)
    assert run(["benchmark", file, "--out", "out"]) == 0
    assert "iteration 1/" not in capsys.readouterr().out
    sizes = {(r["method"], r["step_size"]) for r in table(Path("out")) if r["method"] != "oracle"}
    assert sizes == {("maml", "0.5"), ("pretrained", "0.2"), ("random", "0.5")}
    assert before.items() <= written(Path("out")).items()


def test_the_meta_policys_own_step_size_is_that_of_its_last_iteration() -> None:
    """Also where another method, at an earlier iteration, is given first."""
    later = {"adaptation__later_from": [2], "adaptation__later_step_sizes": [0.1]}
    fresh = new_policy(load_experiment("navigation", **later))
    subjects = [
        Subject(fresh, "random", Path("random"), 0, 0),
        Subject(replace(fresh, iteration=2), "maml", Path("maml"), 2, 0),
    ]
    given = Benchmark(name="x", experiment="x", methods=("random", "maml"), candidates=())
    found = choose_step_sizes(given, subjects, lambda _: None)
    assert {name: size.own for name, size in found.items()} == {"random": 0.1, "maml": 0.1}


def test_the_papers_tasks_and_runs_from_elsewhere(whole: Path) -> None:
    """All that is given is used, nothing trained, and a method may be left out."""
    given = [str(whole / f"{m}-seed3") for m in ("oracle", "random")]
    words = ["--methods", "random", "oracle", "--seeds", "3", "--candidates", "--reuse", *given]
    file = write(Path("b.yaml"), tasks="paper")
    assert run(["benchmark", file, *words, "--out", "new", "--quiet"]) == 0
    assert sorted(p.name for p in Path("new").iterdir()) == ["evaluation.csv", "summary.json"]
    tasks = papers_own(loaded(whole / "random-seed3").family)
    expected = by_hand(whole / "random-seed3", tasks, 0.3).returns
    assert returns_of(Path("new"), method="random") == expected.reshape(-1).tolist()
    assert {r["tasks"] for r in table(Path("new"))} == {"paper"}


class Interrupting:
    """Watches training, and sends this process a signal after some iterations."""

    def __init__(self, number: int, after: int) -> None:
        self.number, self.left = number, after

    def __call__(self, row: Row, total: int) -> None:
        """Count an iteration."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_is_gone_on_with(
    number: int,
    code: int,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After 5 of 6 iterations, in the second run: the line that is printed leads to the same runs
    and numbers as an uninterrupted benchmark, and what was done is not done again."""
    file = write(Path("small file.yaml"), candidates=[])
    words = [file, "--methods", "maml", "pretrained", "--seeds", "3", "--out", "my out", "--quiet"]
    with monkeypatch.context() as patch:
        watch = Interrupting(number, after=5)
        patch.setattr(cli_evaluate, "watching", lambda console, quiet: nullcontext(watch))
        assert run(["benchmark", *words]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "stopped after 3 of 4 iterations" in error
    line = shlex.split(error.partition("Go on with: ")[2])
    assert line == ["maml-rl", "benchmark", *words]
    out = Path("my out")
    before = written(out / "maml-seed3")
    assert not (out / "evaluation.csv").exists()
    assert run(line[1:]) == 0
    assert written(out / "maml-seed3") == before
    for method in ("maml", "pretrained"):
        one = f"{method}-seed3"
        assert parameters(out / one) == parameters(whole / one)
        assert rows(out / one) == rows(whole / one)
        mine = {"method": method, "seed": "3", "step_size": str(STEP_SIZES[method])}
        expected = [r for r in table(whole) if r.items() >= mine.items()]
        assert [r for r in table(out) if r["method"] == method] == expected


@pytest.mark.parametrize(
    ("interrupt", "code", "where"),
    [(KeyboardInterrupt, 130, "choose_step_sizes"), (Terminated, 143, "outcomes_of")],
)
def test_an_interrupted_test_is_gone_on_with(
    interrupt: type[KeyboardInterrupt],
    code: int,
    where: str,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where no training runs a signal is an exception; the line is the same."""

    def stop(*arguments: object) -> None:
        raise interrupt

    given = ["--methods", "random", "--seeds", "3", "--reuse", str(whole / "random-seed3")]
    monkeypatch.setattr(cli_evaluate, where, stop)
    file = write(Path("b.yaml"), candidates=[])
    assert run(["benchmark", file, *given, "--quiet"]) == code
    line = capsys.readouterr().err.partition("Go on with: ")[2]
    assert shlex.split(line) == ["maml-rl", "benchmark", file, *given, "--quiet"]


@pytest.mark.parametrize(
    ("changed", "words", "complaint"),
    [
        ({"sead": [0]}, [], "did you mean 'seeds'"),
        ({}, ["--sampling.task", "3"], "did you mean 'sampling.tasks'"),
        ({"settings": {"sampling": {"task": 3}}}, [], "did you mean 'sampling.tasks'"),
        ({"settings": {"seed": 3}}, [], "seed of the experiment is set by the benchmark's seeds"),
        ({"settings": {"name": "x"}}, [], "name of the experiment is set by the benchmark's name"),
        ({}, ["--seed", "3"], "seed of the experiment is set by the benchmark's seeds"),
        ({"settings": 3}, [], "settings must hold settings of the experiment"),
        ({"experiment": "navigaton"}, [], "did you mean 'navigation'"),
        ({}, ["--adaptation.inner-steps", "0"], "adaptation.inner_steps must be at least 1"),
        ({"settings": {"policy": {"observe_task": True}}}, [], "policy.observe_task False"),
        ({"methods": []}, [], "methods must not be empty"),
        ({}, ["--seeds", "1", "1"], "seeds must all be different, got [1, 1]"),
        ({}, ["--seeds", "-1"], "seed must be between 0 and 2^63 - 1, got -1"),
        (
            {},
            ["--candidates", "-0.5", "0.1"],
            "candidates must be above 0 and at most 1e+06",
        ),
        ({}, ["--candidates", "0.1", "nan"], "candidates must be above 0 and at most 1e+06"),
        ({"pretrained_step_size": -0.1}, [], "pretrained_step_size must be above 0"),
        ({}, ["--random-step-size", "inf"], "random_step_size must be above 0"),
        ({"iterations": 0}, [], "iterations must be at least 1, got 0"),
        ({"iterations": 10**9}, [], "iterations must be at most 1000000000"),
        ({"validation_tasks": 0}, [], "validation_tasks must be between 1 and 100000, got 0"),
        ({}, ["--candidate", "0.1"], "did you mean 'candidates'"),
        (
            {},
            ["--methods", "mamll"],
            "a list of maml, pretrained, oracle, random, got ['mamll']; d",
        ),
        ({"settings_of": 3}, [], "b.yaml: settings_of must hold methods, such as `oracle:`"),
        ({"settings_of": None}, [], "settings_of must hold methods"),
        ({"settings_of": {"foo": {"threads": 1}}}, [], "no method 'foo': one of maml, pretrained,"),
        ({"settings_of": {"orcale.threads": 1}}, [], "'orcale': did you mean 'oracle'?"),
        ({"settings_of": {"oracle": 3}}, [], "settings_of.oracle must hold settings of the exp"),
        ({"settings_of": {"oracle": None}}, [], "settings_of.oracle must hold settings of the exp"),
        ({"settings_of": {"random": {"threads": 1}}}, [], "settings_of.random: random is not tr"),
        (
            {"settings_of": {"oracle": {"threads": 1}}, "methods": ["maml", "pretrained"]},
            [],
            "settings_of.oracle: oracle is not among the methods",
        ),
        (
            {"settings_of": {"oracle": {"sampling.tasks": 2, "sampling": {"tasks": 2}}}},
            [],
            "settings_of.oracle.sampling.tasks stands there twice",
        ),
        (
            {"settings_of": {"oracle": {"sampling": {"task": 3}}}},
            [],
            "settings_of.oracle: there is no setting 'sampling.task': did you mean",
        ),
        (
            {"settings_of": {"maml": {"sampling.tasks": "many"}}},
            [],
            "settings_of.maml: sampling.tasks must be a whole number, got 'many'",
        ),
        (
            {"settings_of": {"oracle": {"sampling.tasks": 0}}},
            ["--methods", "maml"],
            "settings_of.oracle: sampling.tasks must be at least 1, got 0",
        ),
        (
            {"settings_of": {"oracle": {"sampling": 3}}},
            [],
            "settings_of.oracle: sampling must hold settings of its own",
        ),
        (
            {},
            ["--settings-of.oracle.sampling.tasks", "3"],
            "command line: --settings-of takes all that it sets as one word",
        ),
        ({}, ["--settings-of", "{orcale: 3}"], "command line: settings_of: there is no method 'or"),
        ({}, ["--settings-of", "oracle"], "--settings-of holds no settings"),
        ({}, ["more"], "more"),
        ({}, ["--reuse", "nowhere"], "nowhere is not a run folder"),
        ({}, ["--settings-may-differ"], "is of the runs of --reuse, and there are none"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_trained(
    changed: dict[str, object],
    words: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On stderr, exit 2, before anything is begun."""
    assert run(["benchmark", write(Path("b.yaml"), **changed), *words]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert [p.name for p in Path().iterdir()] == ["b.yaml"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("name", "the benchmark sets it"),
        ("seed", "the benchmark sets it"),
        ("iterations", "the benchmark sets it"),
        ("adaptation.inner_steps", "it is what makes the method what it is"),
        ("policy.observe_task", "it is what makes the method what it is"),
        ("family", "all methods meet the same tasks and physics"),
        ("family.name", "all methods meet the same tasks and physics"),
        ("family.horizon", "all methods meet the same tasks and physics"),
        ("physics", "all methods meet the same tasks and physics"),
        ("warp.contacts", "all methods meet the same tasks and physics"),
        ("evaluation.tasks", "all methods are tested alike"),
        ("sampling.count", "what all methods sample is counted alike"),
    ],
)
@pytest.mark.parametrize("method", ["maml", "pretrained", "oracle"])
def test_what_no_method_has_of_its_own(
    path: str, reason: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is set to, and also where the command line has it too."""
    section, _, name = path.partition(".")
    for tree in ({path: 1}, {section: {name: 1}} if name else {section: 1}):
        assert run(["benchmark", write(Path("b.yaml"), settings_of={method: tree})]) == 2
        expected = f"b.yaml: settings_of must not set {method}.{path}, since {reason}"
        assert expected in capsys.readouterr().err
    assert [p.name for p in Path().iterdir()] == ["b.yaml"]


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """None at all, a wrong name, an experiment's."""
    for words, complaint in (
        ([], "expected FILE first"),
        (["benchmark_navigatio"], "did you mean 'benchmark_navigation'"),
        (["b.yaml"], "there is no benchmark file 'b.yaml'"),
    ):
        assert run(["benchmark", *words]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1


def test_runs_of_something_else_are_refused(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given or at their place: other settings, another seed, twice, too few or too many
    iterations."""
    maml, oracle = str(whole / "maml-seed3"), str(whole / "oracle-seed3")
    shutil.copytree(whole / "maml-seed3", "copy")
    shutil.copytree(whole / "maml-seed3", "moved/maml-seed1")
    there = ["--out", str(whole), "--seeds", "3", "--methods", "maml"]
    file = write(Path("b.yaml"))
    for words, complaint in (
        ([*there, "--sampling.tasks", "5"], "sampling.tasks 4 -> 5"),
        ([*there, "--policy.layers", "9"], "maml-seed3 was trained with other settings"),
        ([*there, "--iterations", "1"], "is to be trained for 2 iterations, and the benchmark w"),
        (["--seeds", "0", "--reuse", maml], "is maml, seed 3, which this benchmark has not"),
        (["--methods", "maml", "--reuse", maml, oracle], "is oracle, seed 3, which this benchmark"),
        (["--reuse", maml, "copy"], f"{maml} and copy are both maml, seed 3"),
        (["--iterations", "3", "--reuse", maml], "has done 2 iterations, and the benchmark want"),
        (
            ["--family.horizon", "7", "--reuse", oracle, "--settings-may-differ"],
            f"{oracle} is of navigation with horizon 6, and the benchmark of navigation with hori",
        ),
        (["--out", "b.yaml"], "b.yaml"),
        (["--out", "moved", "--seeds", "1", "--methods", "maml"], "moved/maml-seed1 has seed 3"),
    ):
        assert run(["benchmark", file, *words]) == 2, words
        printed = capsys.readouterr()
        assert complaint in printed.err, words
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert sorted(p.name for p in Path().iterdir()) == ["b.yaml", "copy", "moved"]


def test_settings_on_the_command_line_win(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the file's, which win over the experiment's; those of the benchmark likewise."""
    seen: list[tuple[Benchmark, Experiment[TaskFamily]]] = []

    def stop(benchmark: Benchmark, base: Experiment[TaskFamily], out: Path) -> None:
        seen.append((benchmark, base))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_evaluate, "plan", stop)
    words = ["--family.goal-range", "0.4", "--sampling.tasks", "6", "--candidates", "0.7", "0.9"]
    assert run(["benchmark", write(Path("b.yaml")), *words, "--iterations", "9"]) == 130
    ((found, base),) = seen
    assert (found.candidates, found.iterations, found.seeds) == ((0.7, 0.9), 9, (3, 1))
    assert base.family == replace(
        load_experiment("navigation").family, horizon=6, **{"goal_radius": 0.0, "goal_range": 0.4}
    )
    assert (base.sampling.tasks, base.sampling.episodes, base.sampling.count) == (6, 3, "steps")
    assert base.adaptation.step_size == 0.5


def test_runs_of_other_settings_are_taken_when_asked_for(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other iterations too; it is said in what they differ and how much they have sampled,
    they stay as they are, and the benchmark's test is of their policies."""
    maml = whole / "maml-seed3"
    words = ["--methods", "maml", "random", "--seeds", "3", "--candidates", "--reuse", str(maml)]
    words += ["--out", "out", "--iterations", "5", "--sampling.tasks", "6"]
    file, before = write(Path("b.yaml")), written(maml)
    assert run(["benchmark", file, *words]) == 2
    refusal = capsys.readouterr().err
    assert "sampling.tasks 4 -> 6; --settings-may-differ takes it as it is" in refusal
    assert run(["benchmark", file, *words, "--settings-may-differ"]) == 0
    assert (
        f"maml, seed 3: {maml}, 2 iterations, 288 control steps in all (5 iterations were planned)"
        "; not as planned: sampling.tasks 6 -> 4\n"
    ) in capsys.readouterr().out
    assert list(json.loads(Path("out/summary.json").read_text())["reused"]) == ["maml, seed 3"]
    tested = by_hand(maml, held_out(loaded(maml).family, 3), 0.5)
    found = returns_of(Path("out"), method="maml", gradient_steps=2)
    assert found == tested.returns[2].tolist()
    assert written(maml) == before
    assert [p.name for p in Path("out").iterdir() if p.is_dir()] == ["random-seed3"]
    # Not trained in its place when the same is typed again without it.
    again = ["--seeds", "3", "--candidates", "--out", "out", "--sampling.tasks", "6"]
    assert run(["benchmark", file, *again, "--methods", "maml", "random"]) == 2
    refusal = capsys.readouterr().err
    assert f"the results in out are of another run for maml, seed 3: {maml}, 2 iter" in refusal
    assert "give it again with --reuse" in refusal
    assert not Path("out/maml-seed3").exists()
    assert run(["benchmark", file, *again, "--methods", "random", "--quiet"]) == 0


def test_all_settings_of_a_reused_run_are_told(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is refused the first five, by name."""
    words = ["--methods", "maml", "--seeds", "3", "--candidates", "--out", "out"]
    words += ["--reuse", str(whole / "maml-seed3")]
    changes = {
        "advantages.discount": "0.9",
        "advantages.gae-lambda": "0.8",
        "sampling.episodes": "2",
        "sampling.tasks": "6",
        "trust-region.damping": "0.1",
        "trust-region.max-kl": "0.02",
    }
    for name, value in changes.items():
        words += [f"--{name}", value]
    file = write(Path("b.yaml"))
    assert run(["benchmark", file, *words]) == 2
    assert "trust_region.damping 1e-05 -> 0.1, and 1 more" in capsys.readouterr().err
    assert run(["benchmark", file, *words, "--settings-may-differ"]) == 0
    printed = capsys.readouterr().out
    assert "trust_region.damping 0.1 -> 1e-05, trust_region.max_kl 0.02 -> 0.01\n" in printed


def test_what_a_reused_run_would_have_been_tested_by_is_told(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the benchmark's test is another than its own, though its training is as planned."""
    words = ["--reuse", str(whole / "random-seed3"), "--out", "out", "--candidates"]
    words += ["--methods", "random", "--seeds", "3"]
    file = write(Path("b.yaml"))
    assert run(["benchmark", file, *words, "--evaluation.tasks", "2"]) == 0
    assert "0 control steps in all\n" in capsys.readouterr().out
    assert run(["benchmark", file, *words, "--evaluation.later-step-scale", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "; in its own test and in this one: evaluation.later_step_scale 0.5 -> 0.2\n" in printed
    assert "Later steps have 0.2 of the step size.\n" in printed


def test_how_later_steps_shrink_is_each_methods_own() -> None:
    """As alpha is; all else that a test has is the benchmark's."""
    own = {"pretrained": {"evaluation.later_step_scale": 0.3}}
    methods = ["pretrained", "random"]
    file = write(Path("b.yaml"), settings_of=own, methods=methods, seeds=[3], candidates=[])
    assert run(["benchmark", file, "--out", "out", "--quiet"]) == 0
    settings = json.loads(Path("out/summary.json").read_text())["settings"]
    assert {m: settings[m]["later_step_scale"] for m in methods} == {
        **{"pretrained": 0.3, "random": 0.5}
    }
    there = Path("out/pretrained-seed3")
    trained = load_subject(there).trained
    plain = replace(trained.experiment.evaluation, later_step_scale=0.5)
    for evaluation, same in ((trained.experiment.evaluation, True), (plain, False)):
        policy = replace(trained, experiment=replace(trained.experiment, evaluation=evaluation))
        tested = evaluate_policy(policy, step_size=0.2).returns
        for steps in (0, 1, 2):
            found = returns_of(Path("out"), method="pretrained", gradient_steps=steps)
            assert (found == tested[steps].tolist()) == (same or steps < 2)


@pytest.mark.slow
def test_evaluation_settings_are_the_benchmarks_and_not_each_runs(whole: Path) -> None:
    """Runs that were trained with others are tested by what is asked for now, all by the same."""
    words = ["--evaluation.steps", "1", "--evaluation.episodes", "4", "--evaluation.tasks", "2"]
    reused = [str(p) for p in sorted(whole.iterdir()) if p.is_dir()]
    file = write(Path("b.yaml"), candidates=[0.05])
    assert run(["benchmark", file, "--out", "out", "--quiet", "--reuse", *reused, *words]) == 0
    found = table(Path("out"))
    assert {r["episodes"] for r in found} == {"4"}
    assert {r["task"] for r in found} == {"0", "1"}
    steps = {m: {r["gradient_steps"] for r in found if r["method"] == m} for m in METHODS}
    assert steps == {m: {"0"} if m == "oracle" else {"0", "1"} for m in METHODS}


@pytest.mark.slow
def test_a_method_that_breaks_down_is_told_and_left_out(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its own step size; it stays with its best, and all else as it was."""
    file = write(Path("b.yaml"), pretrained_step_size=HUGE, candidates=[0.05])
    reused = [str(p) for p in sorted(whole.iterdir()) if p.is_dir()]
    assert run(["benchmark", file, "--out", "out", "--quiet", "--reuse", *reused]) == 0
    assert "pretrained with step size 1e+06 is left out: the test was" in capsys.readouterr().err
    sizes = {(r["method"], r["step_size"]) for r in table(Path("out"))}
    assert {s for m, s in sizes if m == "pretrained"} == {"0.05"}
    assert {m for m, _ in sizes} == set(METHODS)


def test_an_experiment_without_iterations_has_nothing_to_compare(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its own iterations count where the benchmark names none."""
    Path("none.yaml").write_text("name: x\nfamily: {name: navigation}\niterations: 0\n")
    file = write(Path("b.yaml"), experiment="none.yaml", iterations=None)
    assert run(["benchmark", file]) == 2
    assert "iterations must be at least 1, got 0" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_what_is_not_whole_is_found_before_anything_is_trained(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged run among those that are there, whichever comes last; and what to do."""
    shutil.copytree(whole, "out")
    shutil.rmtree("out/maml-seed3")
    for kind in Path("out/random-seed1/checkpoints").iterdir():
        (kind / "parameters.safetensors").write_bytes(b"damaged")
    assert run(["benchmark", write(Path("b.yaml")), "--out", "out", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "remove out/random-seed1 to have it trained again" in said
    assert not Path("out/maml-seed3").exists()


def test_a_run_begun_elsewhere_has_another_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """`train --init` takes the steps of another run as a gift."""
    file = write(Path("b.yaml"), methods=["maml"], seeds=[3], candidates=[])
    assert run(["benchmark", file, "--out", "first", "--quiet"]) == 0
    config = "first/maml-seed3/config.yaml"
    words = ["train", config, "--init", "first/maml-seed3", "--out", "second/maml-seed3"]
    assert run([*words, "--quiet"]) == 0
    capsys.readouterr()
    assert run(["benchmark", file, "--out", "second", "--quiet"]) == 2
    assert "was begun with the parameters of maml-seed3" in capsys.readouterr().err
    words = ["--reuse", "second/maml-seed3", "--settings-may-differ", "--out", "third"]
    assert run(["benchmark", file, *words]) == 0
    assert "in all, begun with the parameters of maml-seed3\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../x", "/x", "", "a/b"])
def test_a_benchmarks_name_is_a_folders(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written outside of runs/."""
    assert run(["benchmark", write(Path("b.yaml"), name=name)]) == 2
    assert "since a folder is named after it" in capsys.readouterr().err


@pytest.mark.slow
def test_an_oracle_that_breaks_down_is_left_out(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no step size of its own to name."""
    real = assess.evaluate_policy

    def fragile(trained: TrainedPolicy, **settings: Any) -> Evaluation:
        if trained.experiment.policy.observe_task:
            raise assess.BrokenDown("the test was stopped", 3)
        return real(trained, **settings)

    monkeypatch.setattr(assess, "evaluate_policy", fragile)
    file = write(Path("b.yaml"), candidates=[])
    reused = [str(p) for p in sorted(whole.iterdir()) if p.is_dir()]
    assert run(["benchmark", file, "--out", "out", "--quiet", "--reuse", *reused]) == 0
    assert "oracle with step size 0.5 is left out" in capsys.readouterr().err
    assert {r["method"] for r in table(Path("out"))} == {"maml", "pretrained", "random"}


def test_settings_may_be_written_with_dots() -> None:
    """In the benchmark's file or the experiment's; the benchmark's win."""
    nested = {"sampling": {"tasks": 2, "episodes": 3}, "iterations": 4}
    assert merged(nested, {"sampling.tasks": 5, "policy": {"layers": [1]}}) == {
        "sampling": {"tasks": 5, "episodes": 3},
        "iterations": 4,
        "policy": {"layers": [1]},
    }
    dotted = {"sampling.tasks": 2, "policy": {}}
    assert merged(dotted, {"sampling": {"tasks": 5}, "policy": {"layers": [1]}}) == {
        "sampling": {"tasks": 5},
        "policy": {"layers": [1]},
    }
