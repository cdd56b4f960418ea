"""Tests of networks by the paper's protocol, and the files and tables that come of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maml_rl import supervised
from maml_rl.adapt import Params
from maml_rl.chunks import Chunks
from maml_rl.errors import InputError, RunStopped
from maml_rl.seeds import TEST, TEST_SEED
from maml_rl.supervised.config import SupervisedExperiment
from maml_rl.supervised.evaluate import (
    DRAWN,
    Bench,
    Floats,
    Outcome,
    Subject,
    kind_of,
    load_subjects,
    method_of,
    outcomes_of,
)
from maml_rl.supervised.learner import Learner
from maml_rl.supervised.paper import paper_scores
from maml_rl.supervised.results import (
    column_names,
    notes_of,
    score_words,
    training_of,
    write_results,
)
from maml_rl.supervised.tasks import Examples, Problem, Split, task_generator
from tests.conftest import files_at_most
from tests.tiny_supervised import characters, sinusoid

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def subject(experiment: SupervisedExperiment[Problem], name: str = "run") -> Subject:
    return Subject(Path(name), supervised.meta_train(experiment), experiment.iterations)


@pytest.fixture(scope="module")
def curves() -> Subject:
    return subject(sinusoid())


def outcomes(one: Subject, **changed: object) -> list[Outcome]:
    return list(outcomes_of(one, replace(one.experiment.evaluation, **changed)))  # type: ignore[arg-type]


def test_scores_are_those_of_the_learner_on_the_test_stream(curves: Subject) -> None:
    """Six tasks, 0, 1 and 2 steps, from 4 and from 3 shots, judged by 100 points."""
    found = outcomes(curves)
    assert [(one.shots, one.statistics, one.step_size) for one in found] == [
        (4, "", 0.001),
        (3, "", 0.001),
    ]
    learned = curves.learned
    batch = learned.source.sample("test", 6, task_generator(TEST, TEST_SEED, 0), query=100)
    with Chunks(1, 0) as chunks:
        scores, losses = learned.learner.test(learned.meta, batch, 2, chunks, transductive=True)
    np.testing.assert_allclose(found[0].scores, scores.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found[0].losses, losses.numpy(), rtol=1e-5)
    assert found[0].scores.shape == found[1].scores.shape == (3, 6)


def test_tasks_are_the_same_for_every_seed_and_others_than_validation(curves: Subject) -> None:
    """A network of another seed with the same parameters scores the same to the last bit."""
    other = replace(curves.learned, experiment=replace(curves.experiment, seed=8))
    twin = replace(curves, learned=other)
    for one, two in zip(outcomes(curves), outcomes(twin), strict=True):
        np.testing.assert_array_equal(one.scores, two.scores)
    splits: tuple[Split, Split] = ("test", "validation")
    with Bench(curves.learned, 4, 0) as bench:
        both = [bench.measure(split, 6, statistics="", scale=1.0)[0] for split in splits]
    assert not np.isin(both[0], both[1]).any()


def test_many_tasks_are_drawn_piece_by_piece(curves: Subject) -> None:
    """The first pieces are whatever comes after them, and no two pieces are alike."""
    short = outcomes(curves, tasks=DRAWN, shots=())[0]
    long = outcomes(curves, tasks=DRAWN + 3, shots=())[0]
    np.testing.assert_array_equal(long.scores[:, :DRAWN], short.scores)
    assert long.scores.shape == (3, DRAWN + 3)
    assert not np.isin(long.scores[0, DRAWN:], short.scores[0]).any()


def test_intervals_are_the_papers() -> None:
    """1.96 sd / sqrt(T): of 0, 0, 1, 1 the mean is .5, the sd .5, half the width .49."""
    scores = np.array([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    one = Outcome(subject(sinusoid(iterations=0)), 5, "", 0.1, scores, scores)
    np.testing.assert_allclose(one.means, [0.5, 1.0])
    np.testing.assert_allclose(one.sds, [0.5, 0.0])
    np.testing.assert_allclose(one.half_widths, [0.49, 0.0])


@pytest.mark.slow
def test_both_kinds_of_statistics_are_reported(tmp_path: Path) -> None:
    """First what was trained with; they give different numbers after adapting."""
    one = subject(characters(tmp_path / "set", evaluation__tasks=9))
    found = outcomes(one)
    assert [outcome.statistics for outcome in found] == ["batch", "support"]
    assert not np.array_equal(found[0].losses, found[1].losses)
    trained = subject(characters(tmp_path / "set", adaptation__transductive=False))
    assert [outcome.statistics for outcome in outcomes(trained)] == ["support", "batch"]
    with Chunks(1, 0) as chunks:
        batch = one.learned.source.sample("test", 9, task_generator(TEST, TEST_SEED, 0), query=1)
        expected, _ = one.learned.learner.test(
            one.learned.meta, batch, 2, chunks, transductive=False
        )
    np.testing.assert_allclose(found[1].scores, expected.numpy())


def test_a_step_size_is_chosen_on_validation_tasks_alone(
    curves: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three, the one with the lowest error after the last step; a ruinous one is no choice."""
    seen: list[str] = []
    measure = Bench.measure

    def watched(
        self: Bench, split: Split, tasks: int, *, statistics: str, scale: float
    ) -> tuple[Floats, Floats]:
        seen.append(split)
        return measure(self, split, tasks, statistics=statistics, scale=scale)

    monkeypatch.setattr(Bench, "measure", watched)
    sizes = (0.01, 0.1, 1e6)
    (found,) = outcomes(curves, step_sizes=sizes, shots=())
    assert seen == ["validation"] * 3 + ["test"]
    monkeypatch.undo()
    errors = {}
    with Bench(curves.learned, 100, 2) as bench:
        for size in sizes:
            scores, _ = bench.measure("validation", 5, statistics="", scale=size / 0.001)
            errors[size] = float(scores[-1].mean())
    assert found.step_size == pytest.approx(min(sizes[:2], key=lambda size: errors[size]))
    (single,) = outcomes(curves, step_sizes=(0.5,), shots=())
    assert single.step_size == pytest.approx(0.5)
    assert not np.array_equal(single.scores, found.scores)


def test_a_ruinous_step_size_is_never_chosen(curves: Subject) -> None:
    """Its error is no number, wherever it stands among the others."""
    for sizes in ((1e6, 0.01), (0.01, 1e6)):
        (found,) = outcomes(curves, step_sizes=sizes, shots=(), steps=9)
        assert found.step_size == pytest.approx(0.01)


@pytest.mark.slow
def test_more_shots_in_the_test_are_a_step_of_the_same_scale(tmp_path: Path) -> None:
    """Cross-entropy over as many shots as the test has, though one was trained with."""
    one = subject(characters(tmp_path / "set", evaluation__tasks=3))
    (found, _) = outcomes(one, shots=(2,))
    learned = one.learned
    source = replace(one.experiment.data, **{"shots": 2}).open()
    batch = source.sample("test", 3, task_generator(TEST, TEST_SEED, 0), query=2)
    learner = replace(learned.learner, shots=2)
    with Chunks(1, 0) as chunks:
        _, losses = learner.test(learned.meta, batch, 2, chunks, transductive=True)
    np.testing.assert_allclose(found.losses, losses.numpy(), rtol=1e-5)
    # Three ways times the mean: log 3 where the network knows nothing.
    assert 0.5 < found.losses[0].mean() / (3 * math.log(3)) < 2


def test_a_test_for_which_memory_fails_goes_on_with_fewer_tasks(
    curves: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time fit; where not even one does: exit 3 with what to lower."""
    before = outcomes(curves)
    test = Learner.along

    def small(self: Learner, meta: Params, support: Examples, *rest: float) -> Iterator[Params]:
        if len(support.inputs) > most:
            raise torch.OutOfMemoryError("no memory")
        return test(self, meta, support, *rest)  # type: ignore[arg-type]  # passed on

    most = 3
    monkeypatch.setattr(Learner, "along", small)
    for one, two in zip(before, outcomes(curves), strict=True):
        np.testing.assert_allclose(one.scores, two.scores, rtol=1e-4)
    most = 0
    with pytest.raises(RunStopped, match=r"for the test: lower evaluation\.query") as stopped:
        outcomes(curves)
    assert stopped.value.exit_code == 3


@pytest.mark.slow
def test_a_runs_time_is_that_of_its_checkpoints_iterations(tmp_path: Path) -> None:
    """Of the one before the last: two rows of three."""
    supervised.meta_train(sinusoid(), out=tmp_path / "run")
    (before,) = load_subjects([tmp_path / "run"], "previous")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("seconds_sampling", "seconds_updating", "seconds_validating")
    seconds = sum(float(row[name]) for row in rows[:2] for name in names)
    found = training_of(before)
    assert (found["iterations"], found["seconds"]) == (4, round(seconds, 1))


def test_an_oracle_takes_no_step() -> None:
    one = subject(sinusoid(data__observe_task=True, adaptation__inner_steps=0))
    assert [outcome.scores.shape for outcome in outcomes(one)] == [(1, 6), (1, 6)]


@pytest.mark.parametrize(
    ("changed", "iterations", "name"),
    [
        ({}, 3, "maml"),
        ({}, 0, "random"),
        ({"adaptation__first_order": True}, 3, "first-order maml"),
        ({"adaptation__inner_steps": 0}, 3, "pretrained"),
        ({"data__observe_task": True, "adaptation__inner_steps": 0}, 3, "oracle"),
        ({"adaptation__adapted": "last-layer"}, 3, "anil"),
        ({"adaptation__learned_step_sizes": True}, 3, "meta-sgd"),
        (
            {"adaptation__learned_step_sizes": True, "adaptation__adapted": "last-layer"},
            3,
            "anil with learned step sizes",
        ),
        ({"adaptation__multi_step_loss": True}, 3, "maml with multi-step loss"),
    ],
)
def test_methods_are_called_by_what_they_do(
    changed: dict[str, object], iterations: int, name: str
) -> None:
    assert method_of(sinusoid(**changed), iterations) == name


@pytest.mark.slow
def test_what_cannot_be_tested_is_refused(tmp_path: Path, curves: Subject) -> None:
    root = tmp_path / "set"
    supervised.meta_train(characters(root), out=tmp_path / "characters")
    one = load_subjects([tmp_path / "characters"])[0]
    assert kind_of(one.experiment.data) == "drawn_characters, 3 ways"
    with pytest.raises(InputError, match=r"a test of 9 shots: class .* has 4 images"):
        outcomes(one, shots=(9,))
    lacking = subject(characters(root, data__validation_classes=0))
    with pytest.raises(InputError, match=r"no validation classes: raise data\.validation_classes"):
        outcomes(lacking, step_sizes=(0.1, 0.2))


def test_files_hold_every_task_and_what_they_come_to(tmp_path: Path, curves: Subject) -> None:
    found = outcomes(curves)
    write_results(tmp_path, found, curves.experiment.evaluation, {"checkpoint": "latest"})
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 * 3
    (row,) = (r for r in rows if (r["shots"], r["task"], r["gradient_steps"]) == ("3", "4", "2"))
    assert float(row["error"]) == pytest.approx(found[1].scores[2, 4], rel=1e-5)
    assert (row["problem"], row["method"], row["run"], row["seed"]) == (
        *("sinusoid", "maml"),
        *("run", "0"),
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["measure"] == "error"
    step = summary["tests"][1]["gradient_steps"][2]
    assert step["mean"] == pytest.approx(found[1].means[2])
    assert step["half_width_95"] == pytest.approx(found[1].half_widths[2])
    assert summary["settings"]["shots"] == [4, 3]
    assert summary["runs"][0] | {"seconds": 0.0} == {
        **{"method": "maml", "run": "run", "seed": 0, "iterations": 6, "tasks": 18},
        "seconds": 0.0,
    }
    with files_at_most(10), pytest.raises(RunStopped, match="cannot be written") as stopped:
        write_results(tmp_path, found, curves.experiment.evaluation, {})
    assert stopped.value.exit_code == 3


def test_numbers_that_are_not_finite_are_null_in_files(tmp_path: Path, curves: Subject) -> None:
    """A task that diverges is kept, and JSON has no word for its error."""
    scores = np.array([[1.0, math.nan]])
    one = Outcome(curves, 4, "", 0.1, scores, scores)
    write_results(tmp_path, [one], curves.experiment.evaluation, {})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tests"][0]["gradient_steps"][0]["mean"] is None


def test_papers_scores_are_those_of_the_same_kind_of_task(tmp_path: Path) -> None:
    """Accuracy as a share; the fully connected network has its own; others have none."""
    five = paper_scores(sinusoid(), 5)
    assert [(p.method, p.steps, p.mean) for p in five][:3] == [
        ("maml", 1, 0.67),
        ("maml", 5, 0.38),
        ("maml", 10, 0.35),
    ]
    assert paper_scores(sinusoid(), 10) == []
    (conv,) = paper_scores(supervised.load_experiment("omniglot_5way_1shot"), 1)
    assert (conv.method, conv.steps, conv.mean, conv.half_width) == ("maml", 3, 0.987, 0.004)
    (mlp,) = paper_scores(supervised.load_experiment("omniglot_5way_1shot_mlp"), 1)
    assert (mlp.method, mlp.mean) == ("maml", 0.897)
    mini = paper_scores(supervised.load_experiment("miniimagenet_5way_5shot"), 5)
    assert {p.method: p.mean for p in mini} == {"maml": 0.6311, "first-order maml": 0.6315}
    assert paper_scores(characters(tmp_path / "set"), 1) == []


def test_the_papers_numbers_are_whole() -> None:
    """Every row of the file belongs to an experiment that ships."""
    names = ["sinusoid", *(f"omniglot_{w}way_{s}shot" for w in (5, 20) for s in (1, 5))]
    names += [f"omniglot_5way_{s}shot_mlp" for s in (1, 5)]
    names += [f"miniimagenet_5way_{s}shot" for s in (1, 5)]
    found = 0
    for name in names:
        experiment = supervised.load_experiment(name)
        shots = 5 if name == "sinusoid" else experiment.data.shots
        found += len(paper_scores(experiment, shots))
    assert found == 16


def test_scores_in_words() -> None:
    """Percent of accuracies, numbers of errors, and an error too large for decimals."""
    assert score_words(0.98666, 0.0041, classifies=True) == "98.67 ± 0.41"
    assert score_words(0.6712, 0.05, classifies=False) == "0.671 ± 0.050"
    assert score_words(0.35, math.nan, classifies=False) == "0.350"
    assert score_words(1.234e27, math.nan, classifies=False) == "1.23e+27"


def test_columns_tell_equal_methods_apart(curves: Subject) -> None:
    """By their runs, or by the step sizes of one run."""
    scores = torch.ones(1, 2).double().numpy()

    def one(run: str, size: float) -> Outcome:
        return Outcome(replace(curves, path=Path(run)), 4, "", size, scores, scores)

    assert column_names([one("a", 0.1)]) == ["maml"]
    assert column_names([one("a", 0.1), one("b", 0.1)]) == ["a", "b"]
    two = column_names([one("a", 0.1), one("a", 0.2)])
    assert two == ["maml, step size 0.1", "maml, step size 0.2"]
    (first, *others) = notes_of([one("a", 0.02)])
    assert "± 1.96" in first
    assert others == ["Step size of maml from 4 shots in the test: 0.02."]
