"""evaluation.csv and summary.json: every column, nothing unknown given a number."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import envs
from envs import HalfCheetahVel, Navigation2D
from maml_rl.assess import Subject, load_subject
from maml_rl.comparison import Comparison
from maml_rl.config import load_experiment
from maml_rl.errors import InputError, RunStopped
from maml_rl.results import long_form, results_folder, write_own_test, write_results
from maml_rl.terminal import evaluation_notes, later_steps_note
from maml_rl.train import meta_train
from tests.conftest import files_at_most
from tests.outcomes import outcome as hand_made
from tests.tiny import SETTINGS

GOALS = np.array([[0.1, 0.2], [-0.6, 0.4], [0.5, -0.5]], np.float32)


outcome = functools.partial(hand_made, tasks=GOALS)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A run of three iterations."""
    run = tmp_path_factory.mktemp("trained") / "three-seed0"
    meta_train(load_experiment("navigation", **SETTINGS), out=run)
    return load_subject(run)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_long_form_has_a_row_a_task_and_step() -> None:
    """With every column that tells where a number comes from; the second goal lies outside."""
    tested = outcome([[1, 2, 3], [4, 5, 6]], method="random", variant="b", seed=3, source="chosen")
    rows = list(long_form([tested], Navigation2D(horizon=6)))
    assert len(rows) == 6
    expected = {
        "family": "navigation",
        "protocol": "",
        "method": "random",
        "seed": 3,
        "task": 1,
        "task_goal_x": pytest.approx(-0.6),
        "task_goal_y": pytest.approx(0.4),
        "gradient_steps": 1,
        "return_mean": 5.0,
        "return_sd": 0.5,
        "episodes": 7,
        "count": "episodes",
        "distance_mean": 0.05,
        "step_size": 0.5,
        "variant": "b",
        "tasks": "chosen",
        "outside_training": 1,
    }
    assert rows[4] == expected
    assert list(rows[4]) == list(expected)
    assert [(r["gradient_steps"], r["task"], r["outside_training"]) for r in rows] == [
        *((0, 0, 0), (0, 1, 1), (0, 2, 0)),
        *((1, 0, 0), (1, 1, 1), (1, 2, 0)),
    ]


@pytest.mark.parametrize("protocol", ["paper", "gymnasium"])
def test_a_family_with_protocols_names_its_own(protocol: str) -> None:
    tested = outcome([[1]], tasks=np.ones((1, 1), np.float32))
    (row,) = long_form([tested], envs.make("ant_vel", protocol=protocol))
    assert (row["family"], row["protocol"], row["task_velocity"]) == ("ant_vel", protocol, 1.0)


def test_files_hold_every_figure_and_null_for_what_is_unknown(
    subject: Subject, tmp_path: Path
) -> None:
    """Means 2 and 5 over tasks; one seed says nothing of runs, and no oracle of the gap."""
    outcomes = [outcome([[1, 2, 3], [4, 5, 6]]), outcome([[7, 8, 9]], method="random")]
    family = subject.family
    compared = Comparison.of(outcomes, family)
    write_results(tmp_path, outcomes, compared, [subject], {"checkpoint": "best"})
    assert len(table(tmp_path)) == 9
    assert [float(r["return_mean"]) for r in table(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    text = (tmp_path / "summary.json").read_text()
    summary: Mapping[str, object] = json.loads(text, parse_constant=refuse)
    assert (summary["family"], summary["protocol"]) == ("navigation", "")
    assert summary["checkpoint"] == "best"
    assert "versions" in summary
    maml, random = json.loads(text)["methods"]
    assert {k: v for k, v in maml.items() if k != "gradient_steps"} == {
        "method": "maml",
        "variant": "",
        "seeds": [0],
        "step_size": 0.5,
        "tasks": "test",
        "task_count": 3,
        "outside_training": 1,
        "episodes": 7,
        "count": "episodes",
    }
    before, after = maml["gradient_steps"]
    assert (before["steps"], before["return"], after["steps"], after["return"]) == (0, 2, 1, 5)
    assert after["distance"] == pytest.approx(0.05)
    assert after["sd_over_tasks"] == pytest.approx(np.std([4, 5, 6]))
    assert after["interval_95"][0] < 5 < after["interval_95"][1]
    assert after["interval_95_over_runs"] is None
    assert after["gap_closed"] is None
    assert after["by_seed"] == [5]
    assert (before["share_worse"], after["share_worse"]) == (None, 0.0)
    (difference,) = json.loads(text)["differences"]
    assert difference.pop("interval_95")[0] == pytest.approx(-3)
    assert difference == {
        **{"than": "random", "variant": "", "step_size": 0.5, "steps": 1, "difference": -3.0}
    }
    assert json.loads(text)["settings"]["maml"]["later_step_scale"] == 0.5
    assert after["by_task"] == {}
    assert [s["return"] for s in random["gradient_steps"]] == [8]


def test_a_note_says_whether_episodes_or_steps_are_counted() -> None:
    """Only steps may take more episodes than are named."""
    one = outcome([[1, 2, 3], [4, 5, 6]])
    by_steps = replace(one, evaluation=replace(one.evaluation, count="steps"))
    for tested, more in ((one, False), (by_steps, True)):
        compared = Comparison.of([tested], Navigation2D())
        (note,) = (n for n in evaluation_notes(compared, Navigation2D()) if "acts for 7" in n)
        assert ("until it has taken as many steps" in note) == more


def test_how_later_steps_shrink_is_told_once_or_by_method() -> None:
    """Methods that share it together."""
    assert (
        later_steps_note({"maml": 0.5, "random": 0.5}) == "Later steps have 0.5 of the step size."
    )
    assert later_steps_note({"maml": 0.01, "pretrained": 0.5, "random": 0.5}) == (
        "Later steps have of the step size: maml 0.01; pretrained, random 0.5."
    )


def test_runs_are_listed_with_what_their_training_took(subject: Subject, tmp_path: Path) -> None:
    """Iterations, control steps and seconds by metrics.csv, which may hold more than was loaded."""
    lines = (subject.path / "metrics.csv").read_text().splitlines()
    (tmp_path / "metrics.csv").write_text("\n".join([*lines, lines[-1]]) + "\n")
    rows = list(csv.DictReader(lines))
    spent = sum(float(r["seconds_sampling"]) + float(r["seconds_updating"]) for r in rows)
    bare = tmp_path / "bare"
    bare.mkdir()
    outcomes = [outcome([[1, 2, 3]])]
    compared = Comparison.of(outcomes, subject.family)
    for path, seconds in ((subject.path, spent), (tmp_path, spent), (bare, 0.0)):
        there = Subject(subject.trained, "maml", path, subject.iterations, subject.env_steps, "v")
        write_results(tmp_path, outcomes, compared, [there], {})
        assert json.loads((tmp_path / "summary.json").read_text())["runs"] == [
            {
                "method": "maml",
                "variant": "v",
                "seed": 0,
                "run": path.name,
                "iterations": 3,
                "env_steps": int(rows[-1]["env_steps"]),
                "seconds": pytest.approx(seconds, abs=0.051),
            }
        ]


def test_by_task_where_there_are_few(subject: Subject, tmp_path: Path) -> None:
    """Backward 2, forward 5, with their speeds."""
    tasks = np.array([[1.0], [-1.0]], np.float32)
    outcomes = [outcome([[5, 2]], tasks=tasks)]
    compared = Comparison.of(outcomes, envs.make("half_cheetah_dir"))
    folder = tmp_path / "direction"
    meta_train(load_experiment("half_cheetah_dir", **{**SETTINGS, "iterations": 0}), out=folder)
    write_results(tmp_path, outcomes, compared, [load_subject(folder)], {})
    (method,) = json.loads((tmp_path / "summary.json").read_text())["methods"]
    assert method["gradient_steps"][0]["by_task"] == {
        "backward": {"return": 2.0, "velocity": 0.02},
        "forward": {"return": 5.0, "velocity": 0.05},
    }
    assert method["gradient_steps"][0]["interval_95"] is None


def test_a_full_disk_is_a_sentence_and_leaves_the_old_files(
    subject: Subject, tmp_path: Path
) -> None:
    """Exit 3; half a table would pass for a whole one."""
    outcomes = [outcome([[1, 2, 3]])]
    compared = Comparison.of(outcomes, subject.family)
    write_results(tmp_path, outcomes, compared, [subject], {})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    many = [outcome([[1, 2, 3]] * 40)]
    with (
        files_at_most(1000),
        pytest.raises(RunStopped, match=f"cannot be written to {tmp_path}: ") as stopped,
    ):
        write_results(tmp_path, many, compared, [subject], {})
    assert stopped.value.exit_code == 3
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_runs_own_test_is_kept_in_the_run(subject: Subject, tmp_path: Path) -> None:
    """By its experiment's settings, of the newest checkpoint, on two tasks after 0 and 1 steps."""
    run = shutil.copytree(subject.path, tmp_path / "run")
    (found,) = write_own_test(load_subject(run))
    assert found.evaluation.returns.shape == (2, 2)
    values = [float(r["return_mean"]) for r in table(run / "evaluation")]
    assert values == found.evaluation.returns.ravel().tolist()
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert (summary["checkpoint"], summary["runs"][0]["run"]) == ("latest", "run")


def test_results_go_into_the_run_or_beside_several(tmp_path: Path) -> None:
    """Or where they are told to."""
    one, two = tmp_path / "a" / "one", tmp_path / "b" / "two"
    one.mkdir(parents=True)
    assert results_folder([one], None, usual=True) == one / "evaluation"
    assert results_folder([one, two], None, usual=True) == tmp_path / "a" / "evaluation"
    assert results_folder([one, two], tmp_path / "x" / "y", usual=True) == tmp_path / "x" / "y"
    assert (tmp_path / "x" / "y").is_dir()
    assert results_folder([one], None, usual=False) == one / "evaluation-custom"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write to .*file"):
        results_folder([one], tmp_path / "file", usual=True)


def test_another_run_is_not_written_to_through_a_link(tmp_path: Path) -> None:
    """A run's `evaluation` that points elsewhere is refused."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="link"):
        results_folder([tmp_path / "run"], None, usual=True)
    assert not (tmp_path / "elsewhere").exists()


def test_speeds_beyond_those_trained_are_marked() -> None:
    """By the family's own range."""
    speeds = np.array([[0.5], [2.5], [2.0]], np.float32)
    rows = long_form([outcome([[1, 2, 3]], tasks=speeds)], HalfCheetahVel())
    assert [row["outside_training"] for row in rows] == [0, 1, 0]
