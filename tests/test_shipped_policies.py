"""The trained policies that ship: whole, listed, and still worth what their tables say."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs import HalfCheetahDir
from maml_rl.cli import run
from maml_rl.config import (
    find_run,
    load_experiment,
    shipped_benchmarks,
    shipped_experiments,
    shipped_policies,
    shipped_supervised,
)
from maml_rl.evaluate import Evaluation, evaluate
from maml_rl.runs import begun_from, read_metrics
from maml_rl.stored import read_outcomes
from maml_rl.trained import TrainedPolicy, load
from tests.tiny import TINY

POLICIES = shipped_policies()
LONGER = ("--iterations", "4", "--family.horizon", "100")
SHIP = Path(__file__).parent.parent / "experiments" / "checkpoints" / "ship.py"


def stored_test(path: Path) -> Evaluation:
    (outcome,) = read_outcomes(path / "evaluation", load_experiment(path / "config.yaml").family)
    return outcome.evaluation


def first_tasks(policy: TrainedPolicy, count: int) -> Evaluation:
    """Test on the first of the test tasks, with the seeds of a test of all, up to one step."""
    experiment = policy.experiment
    return evaluate(
        policy.policy,
        policy.params,
        experiment.family,
        settings=replace(experiment.evaluation, steps=1),
        adaptation=policy.adaptation,
        advantages=experiment.advantages,
        action_scale=experiment.policy.action_scale,
        part=slice(0, count),
    )


def standard_errors(found: Evaluation, stored: Evaluation) -> list[float]:
    """Return, for 0 and 1 steps, how many standard errors of the difference two means differ by."""
    tasks = len(found.tasks)
    differences = []
    for step in (0, 1):
        difference = found.returns[step].mean() - stored.returns[step, :tasks].mean()
        variance = (
            np.square(found.return_sds[step]).sum() / found.episodes
            + np.square(stored.return_sds[step, :tasks]).sum() / stored.episodes
        )
        differences.append(abs(difference) * tasks / math.sqrt(variance))
    return differences


QUICK = ("half_cheetah_dir", "navigation")
"""Tested within two seconds each, so every time."""


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(POLICIES)]
)
def test_a_shipped_policy_is_still_worth_what_its_table_says(name: str) -> None:
    """The first 8 of its test tasks, before and after one step, within 3 standard errors."""
    policy = load(POLICIES[name])
    stored = stored_test(POLICIES[name])
    found = first_tasks(policy, 8)
    assert np.array_equal(found.tasks, stored.tasks[:8])
    assert max(standard_errors(found, stored)) < 3


@pytest.mark.slow
def test_another_policy_or_other_physics_would_be_noticed() -> None:
    """The same check fails where actions have 1.6 times the noise, or the body weighs 20 kg."""
    path = POLICIES["half_cheetah_dir"]
    policy, stored = load(path), stored_test(path)
    louder = {n: p + 0.5 * (n == "log_std") for n, p in policy.params.items()}
    assert max(standard_errors(first_tasks(replace(policy, params=louder), 8), stored)) > 3
    family = policy.experiment.family
    assert isinstance(family, HalfCheetahDir)
    heavier = replace(policy.experiment, family=replace(family, total_mass=20.0))
    found = first_tasks(replace(policy, experiment=heavier), 8)
    assert max(standard_errors(found, stored)) > 3


BEFORE = {
    "half_cheetah_vel": 600,
    "half_cheetah_dir_gymnasium": 500,
    "half_cheetah_vel_gymnasium": 500,
}
"""First iterations that were done with another physics or other batches; what ships is the best of
the others."""


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_shipped_policy_is_a_whole_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named after its experiment; test, settings and metrics are of one another."""
    path = POLICIES[name]
    experiment = load_experiment(path / "config.yaml")
    assert experiment.name == name
    assert experiment.adaptation.inner_steps == 1
    assert stored_test(path).returns.shape == (4, 40)
    assert (path / "evaluation" / "learning_curves.png").is_file()
    metrics = read_metrics(path / "metrics.csv")
    summary = json.loads((path / "evaluation" / "summary.json").read_text())
    (tested,) = summary["runs"]
    since = metrics["return_1"][BEFORE.get(name, 0) :]
    assert max(since) == metrics["return_1"][tested["iterations"]]
    assert run(["inspect", str(path)]) == 0
    assert "every file matches its sha256" in capsys.readouterr().out
    sums = dict(line.split()[::-1] for line in (path / "SHA256SUMS").read_text().splitlines())
    assert {"config.yaml", "evaluation/evaluation.csv"} < sums.keys()
    for file, expected in sums.items():
        found = hashlib.sha256((path / file).read_bytes()).hexdigest()
        assert found == expected, f"{file} is not what shipped: git checkout it, or ship.py anew"


def test_a_shipped_policy_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From everywhere, unless something there has it; one that nearly has the name is not taken."""
    monkeypatch.chdir(tmp_path)
    # Without figures, which take time.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert find_run(Path("navigation")) == POLICIES["navigation"]
    assert run(["inspect", "navigation"]) == 0
    assert f"{POLICIES['navigation']}: navigation" in capsys.readouterr().out
    words = ["evaluate", "navigation", "--steps", "0", "--episodes", "2", "--out", "test"]
    assert run(words) == 0
    for command in ("inspect", "render", "evaluate", "report", "resume"):
        assert run([command, "ant_dri"]) == 2
        assert "did you mean 'ant_dir'?" in capsys.readouterr().err
    short = ["--evaluation.steps", "1", "--evaluation.episodes", "2", "--evaluation.tasks", "2"]
    words = ["train", "navigation", "--iterations", "0", "--init", "navigation", *short]
    assert run([*words, "--out", "begun"]) == 0
    assert begun_from(Path("begun")) == "navigation"
    assert "Later steps" not in capsys.readouterr().out
    words = ["benchmark", "benchmark_navigation", "--reuse", "navigation", "--settings-may-differ"]
    words += ["--methods", "maml", "--seeds", "0", "--candidates", "--tasks", "test", *short]
    assert run([*words, "--out", "compared"]) == 0
    assert "maml, seed 0: " + str(POLICIES["navigation"]) in capsys.readouterr().out
    assert find_run(Path("elsewhere/navigation")) == Path("elsewhere/navigation")
    (tmp_path / "navigation").mkdir()
    assert find_run(Path("navigation")) == Path("navigation")
    monkeypatch.chdir(POLICIES["navigation"].parent.parent)
    assert find_run(Path("ant_vel")) == Path("checkpoints/ant_vel")


def test_list_shows_what_an_experiment_is_in_whole_sentences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first of its file goes over several lines."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["list"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    experiments = {*shipped_experiments(), *shipped_supervised(), *shipped_benchmarks()}
    shown = [line for line in lines if line.partition(" ")[0] in experiments]
    told = [line for line in shown if line.endswith(".") and not line.endswith("al.")]
    assert len(told) == len(experiments)


def test_list_shows_them_with_their_returns(capsys: pytest.CaptureFixture[str]) -> None:
    """A row each, with the means of the table beside it."""
    assert run(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, path in POLICIES.items():
        wanted = [f"{mean:.1f}" for mean in stored_test(path).returns.mean(axis=1)]
        assert any(row[:1] == [name] and row[-4:] == wanted for row in rows)


@pytest.mark.slow
def test_a_run_is_shipped_with_its_best_checkpoint(tmp_path: Path) -> None:
    """By the script: what is newest there is the run's best, tested; of its pictures the learning
    curves alone are left."""
    spec = importlib.util.spec_from_file_location("ship", SHIP)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trained = tmp_path / "run"
    assert run(["train", "navigation", *TINY, *LONGER, "--out", str(trained)]) == 0
    for _ in range(2):  # The second replaces the first.
        assert script.ship(trained, tmp_path / "kept") == 0
    kept = load(tmp_path / "kept")
    best = load(trained, checkpoint="best")
    assert all(bool((p == best.params[name]).all()) for name, p in kept.params.items())
    files = {str(p.relative_to(tmp_path / "kept")) for p in tmp_path.glob("kept/**/*.*")}
    assert {"evaluation/evaluation.csv", "papers_tasks/evaluation.csv"} <= files
    pictures = {name for name in files if name.endswith((".png", ".svg"))}
    assert pictures <= {"evaluation/learning_curves.png"}
    sums = (tmp_path / "kept" / "SHA256SUMS").read_text().split()
    assert sums[1::2] == [
        "checkpoints/latest/parameters.safetensors",
        "config.yaml",
        "evaluation/evaluation.csv",
        "papers_tasks/evaluation.csv",
    ]
    assert sums[2] == hashlib.sha256((tmp_path / "kept" / "config.yaml").read_bytes()).hexdigest()
