"""The report's charts hold the numbers of tests and of training, and say what was done to them."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from envs import HalfCheetahDir, HalfCheetahVel, Navigation2D
from maml_rl.assess import Subject, load_subject
from maml_rl.comparison import compare
from maml_rl.config import load_experiment
from maml_rl.errors import InputError
from maml_rl.paper import Point as PaperPoint
from maml_rl.report.plots import (
    MOST_POINTS,
    curves_chart,
    curves_note,
    returns_chart,
    task_charts,
    thinned,
)
from maml_rl.train import meta_train
from tests.outcomes import outcome
from tests.tiny import SETTINGS

SPEEDS = np.array([[1.5], [0.5], [2.5]], np.float32)


def test_returns_are_the_means_with_their_intervals() -> None:
    """Means 2 and 5 of three tasks; side by side, so that bars can be told apart."""
    tests = [outcome([[1, 2, 3], [4, 5, 6]], SPEEDS, method=m) for m in ("maml", "random")]
    scores = compare(tests, HalfCheetahVel())
    found = returns_chart(scores, {}, HalfCheetahVel())
    maml, random = found.series
    assert [(p.x, p.y) for p in maml.points] == [(0, 2), (1, 5)]
    assert [(p.low, p.high) for p in maml.points] == [s.interval for s in scores[0].steps]
    assert [p.label for p in maml.points] == ["before adapting", "after 1 gradient step"]
    assert (maml.aside, random.aside) == (-2.5, 2.5)
    assert "maml from 2.0 to 5.0 after 1 step" in found.summary
    assert found.behind == []
    assert [tick for _, tick in found.x.ticks or ()] == ["0", "1"]


def test_an_oracle_is_a_line_across_and_the_papers_too() -> None:
    """They take no step; a point is read as such at either end."""
    tests = [
        outcome([[1, 2, 3], [4, 5, 6], [4, 5, 6]], SPEEDS),
        outcome([[7, 8, 9]], SPEEDS, method="oracle"),
    ]
    papers = {"oracle": [PaperPoint(0, 9.0, 1.0)], "maml": [PaperPoint(s, s, 1) for s in (0, 1)]}
    _, ours, theirs, papers_maml = returns_chart(
        compare(tests, HalfCheetahVel()), papers, HalfCheetahVel()
    ).series
    for one, value in ((ours, 8), (theirs, 9)):
        assert [(p.x, p.y) for p in one.points] == [(0, value), (2, value)]
        assert {p.label for p in one.points} == {"takes no gradient step"}
    assert (theirs.name, theirs.hollow, theirs.style) == ("oracle, the paper's", True, ":")
    assert [(p.x, p.y) for p in papers_maml.points] == [(0, 0), (1, 1)]


def test_what_falls_off_the_chart_is_named() -> None:
    fallen = outcome([[1, 2, 3], [-900, -900, -903]], SPEEDS, method="pretrained")
    tests = [outcome([[1, 2, 3], [4, 5, 6]], SPEEDS), fallen]
    found = returns_chart(compare(tests, HalfCheetahVel()), {}, HalfCheetahVel())
    assert found.series[1].name == "pretrained (falls to -901)"
    assert found.y.low > -10


def test_each_run_of_several_is_a_thin_line() -> None:
    tests = [
        outcome([[1, 2, 3], [4, 5, 6]], SPEEDS),
        outcome([[2, 2, 2], [8, 8, 8]], SPEEDS, seed=1),
    ]
    found = returns_chart(compare(tests, HalfCheetahVel()), {}, HalfCheetahVel())
    assert [line.points for line in found.behind] == [[(0, 2), (1, 5)], [(0, 2), (1, 8)]]
    assert found.y.high > 8


def test_tasks_are_drawn_from_left_to_right_with_what_lies_outside() -> None:
    """Speeds 0.5, 1.5 and 2.5, the last beyond those trained on; each by its number in the file."""
    tests = [outcome([[1, 2, 3], [9, 9, 9], [4, 5, 6]], SPEEDS)]
    family = HalfCheetahVel()
    (found,) = task_charts(tests, compare(tests, family), family)
    before, after, outside = found.series
    assert [(p.x, p.y) for p in before.points] == [(0.5, 2), (1.5, 1), (2.5, 3)]
    assert [(p.x, p.y) for p in after.points] == [(0.5, 5), (1.5, 4)]
    assert [(p.x, p.y) for p in outside.points] == [(2.5, 6)]
    assert after.points[0].label.startswith("task 1: ")
    assert "0.50 m/s" in after.points[0].label
    assert [one.name for one in found.series] == [
        *("before", "after 2 steps", "after 2 steps, outside training")
    ]
    assert found.behind[0].points == [(1.5, 1), (1.5, 4)]
    assert found.x.low < 0.5 < 2.5 < found.x.high
    assert "before adapting 1.0 to 3.0, after 2 steps 4.0 to 6.0" in found.summary


def test_directions_are_named_on_the_axis() -> None:
    both = np.array([[1.0], [-1.0]], np.float32)
    family = HalfCheetahDir()
    tests = [
        outcome([[5, 2], [6, 3]], both, family=family),
        outcome([[5, 2]], both, family=family, method="oracle"),
    ]
    maml, oracle = task_charts(tests, compare(tests, family), family)
    assert list(maml.x.ticks or ()) == [(0.0, "backward"), (1.0, "forward")]
    assert [p.label for p in maml.series[0].points] == ["task 1: backward", "task 0: forward"]
    assert [one.name for one in oracle.series] == ["takes no gradient step"]
    assert (maml.y, maml.x) == (oracle.y, oracle.x)


def test_a_task_of_three_numbers_has_no_chart() -> None:
    class ThreeNumbers(Navigation2D):
        task_columns = (*Navigation2D.task_columns, Navigation2D.task_columns[0])

    assert task_charts([], [], ThreeNumbers()) == []


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A run of three iterations."""
    run = tmp_path_factory.mktemp("trained") / "three-seed0"
    meta_train(load_experiment("navigation", **SETTINGS), out=run)
    return load_subject(run)


def with_metrics(subject: Subject, folder: Path, count: int) -> Subject:
    """A run of so many iterations, whose returns are their numbers, and 1000 more after a step."""
    folder.mkdir()
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "env_steps", "return_0", "return_0_sd", "return_1"])
        writer.writerows([i, (i + 1) * 1e6, i, 0, i + 1000] for i in range(count))
    return dataclasses.replace(subject, path=folder, iterations=count)


def test_learning_curves_are_the_metrics(subject: Subject, tmp_path: Path) -> None:
    """Against millions of control steps; the running mean of 0 .. 6 ends at 4. Thin: as it was."""
    found, note = curves_chart([with_metrics(subject, tmp_path / "a", 7)])
    assert found is not None
    before, after = found.series
    assert (before.name, after.name) == ("maml, before", "maml, after 1 step")
    assert (before.style, after.style) == (":", "-")
    assert [p.x for p in before.points] == [1, 2, 3, 4, 5, 6, 7]
    assert [p.y for p in before.points] == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert after.points[-1].y == 1004
    assert [y for _, y in found.behind[0].points] == [0, 1, 2, 3, 4, 5, 6]
    assert "running over 5 iterations" in note
    assert "one iteration in" not in note


def test_seeds_are_averaged(subject: Subject, tmp_path: Path) -> None:
    runs = [with_metrics(subject, tmp_path / name, 3) for name in "ab"]
    found, _ = curves_chart(runs)
    assert found is not None
    assert len(found.series) == 2
    assert len(found.behind) == 4


def test_a_long_curve_is_thinned_and_that_is_said(subject: Subject, tmp_path: Path) -> None:
    """Of 2,400 iterations one in 10, from the last on; a mean over the 10 is what is drawn."""
    found, note = curves_chart([with_metrics(subject, tmp_path / "a", 2400)])
    assert found is not None
    points = found.series[0].points
    assert len(points) == 240 <= MOST_POINTS
    assert points[-1].y == np.mean(range(2390, 2400))
    assert points[0].x == 10
    assert note == curves_note(10)
    assert "one iteration in 10" in note
    assert "over 10 iterations" in note


def test_thinning_keeps_the_last_point() -> None:
    across, up = np.arange(8.0), np.arange(8.0) ** 2
    assert thinned(across, up, 3) == [(1, 1), (4, 16), (7, 49)]
    assert thinned(across, up, 1)[0] == (0, 0)


def test_curves_end_where_the_checkpoint_is(subject: Subject, tmp_path: Path) -> None:
    """A run that went on, or an older checkpoint, shows no later iterations."""
    run = dataclasses.replace(with_metrics(subject, tmp_path / "a", 7), iterations=4)
    found, _ = curves_chart([run])
    assert found is not None
    assert [p.x for p in found.series[0].points] == [1, 2, 3, 4]


def test_a_run_without_metrics_has_no_curves(subject: Subject, tmp_path: Path) -> None:
    assert curves_chart([dataclasses.replace(subject, path=tmp_path)]) == (None, "")
    assert curves_chart([dataclasses.replace(subject, iterations=0)]) == (None, "")
    (tmp_path / "metrics.csv").write_text("iteration,env_steps\n0,many\n")
    with pytest.raises(InputError, match="remove it"):
        curves_chart([dataclasses.replace(subject, path=tmp_path)])


def test_an_unknown_return_is_a_gap(subject: Subject, tmp_path: Path) -> None:
    run = with_metrics(subject, tmp_path / "a", 3)
    file = run.path / "metrics.csv"
    file.write_text(file.read_text().replace("1000000.0,0,", "1000000.0,,"))
    found, _ = curves_chart([run])
    assert found is not None
    assert math.isnan(found.series[0].points[0].y)
    assert math.isfinite(found.y.low)
