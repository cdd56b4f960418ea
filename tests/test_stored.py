"""Tests read again from their files: nothing is lost, and what is damaged is refused."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from envs import HalfCheetahDir, HalfCheetahVel, Navigation2D, TaskFamily
from maml_rl.comparison import Outcome
from maml_rl.errors import InputError
from maml_rl.report.tested import alike
from maml_rl.results import long_form
from maml_rl.stored import has_results, read_outcomes, read_summary
from tests.outcomes import outcome

GOALS = np.array([[0.1, 0.2], [-0.6, 0.4], [0.5, -0.5]], np.float32)
TESTS = [
    outcome([[1.0, 2.0, 3.0], [4.0, 5.0, 6.1]], GOALS),
    outcome([[1.0, 2.0, 3.0]], GOALS, method="oracle", variant='b, "c"', source="from 0 to 3"),
    outcome([[7.0, 8.0, 9.0], [-10.0, 1e-9, 12.0]], GOALS, seed=3),
    outcome([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]], GOALS, step_size=0.05),
]
"""Seeds, step sizes, variants and sources; an oracle that takes no step."""


def write_table(folder: Path, tests: Sequence[Outcome], family: TaskFamily) -> Path:
    rows = list(long_form(tests, family))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "evaluation.csv").write_text(text.getvalue(), newline="")
    return folder / "evaluation.csv"


def arrays(one: Outcome) -> list[npt.NDArray[np.generic]]:
    found = one.evaluation
    numbers = [found.returns, found.return_sds, found.measures]
    return [found.tasks, one.outside_training, *numbers]


def same(one: Outcome, other: Outcome) -> bool:
    """Whether two tests are equal to the last bit."""
    pairs = zip(arrays(one), arrays(other), strict=True)
    named = (one.key, one.seed, one.evaluation.episodes, one.evaluation.count)
    theirs = (other.key, other.seed, other.evaluation.episodes, other.evaluation.count)
    return named == theirs and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_table(tmp_path, TESTS, Navigation2D())
    found = read_outcomes(tmp_path, Navigation2D())
    assert len(found) == len(TESTS)
    assert all(map(same, TESTS, found))
    assert found[0].outside_training.tolist() == [False, True, False]
    speeds = [outcome([[1.0, 2.0]], np.array([[0.3], [2.7]], np.float32))]
    write_table(tmp_path, speeds, HalfCheetahVel(protocol="gymnasium"))
    (again,) = read_outcomes(tmp_path, HalfCheetahVel(protocol="gymnasium"))
    assert same(again, speeds[0])
    by_steps = replace(speeds[0], evaluation=replace(speeds[0].evaluation, count="steps"))
    write_table(tmp_path, [by_steps], HalfCheetahVel(protocol="gymnasium"))
    (again,) = read_outcomes(tmp_path, HalfCheetahVel(protocol="gymnasium"))
    assert same(again, by_steps)
    assert not same(again, speeds[0])
    assert alike([speeds[0], speeds[0]])
    assert not alike([speeds[0], by_steps])


def without_last_row(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


def swapped(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:1], lines[2], lines[1], *lines[3:]])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_last_row, "evaluation.csv is damaged"),
        (swapped, "not those of whole tests"),
        (lambda text: text.replace("navigation", "ant_vel"), "it is of ant_vel"),
        (lambda text: text.replace(",maml,", ",malm,"), "damaged"),
        (lambda text: text.replace("6.1,", "nan,"), "no finite number"),
        (lambda text: text.replace("6.1,", "six,"), "six"),
        (lambda text: text.replace("return_mean", "return"), "return_mean"),
        (lambda text: text.replace("6.1,", "6.1,7,"), "other columns"),
        (lambda text: text.splitlines()[0] + "\n", "no rows"),
        (lambda text: "", "no rows"),
        (lambda text: text.replace("0.5", '"0.5', 1), "damaged"),
        (lambda text: text.replace(",7,", ",8,", 1), "not those of whole tests"),
    ],
)
def test_a_damaged_table_is_refused(
    tmp_path: Path, spoil: Callable[[str], str], words: str
) -> None:
    """With what to do; never half of it."""
    file = write_table(tmp_path, TESTS, Navigation2D())
    text = file.read_bytes().decode()
    assert spoil(text) != text
    file.write_bytes(spoil(text).encode())
    with pytest.raises(InputError, match=words) as refused:
        read_outcomes(tmp_path, Navigation2D())
    assert "make the test again" in str(refused.value)


def test_a_task_that_is_none_of_the_familys_is_refused(tmp_path: Path) -> None:
    """A direction of .5."""
    tests = [outcome([[1.0, 2.0]], np.array([[1.0], [-1.0]], np.float32))]
    file = write_table(tmp_path, tests, HalfCheetahDir())
    file.write_text(file.read_text().replace(",1.0,0,", ",0.5,0,"))
    with pytest.raises(InputError, match="direction"):
        read_outcomes(tmp_path, HalfCheetahDir())


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.csv").write_bytes(b"family\xff\n\x00")
    with pytest.raises(InputError, match="damaged"):
        read_outcomes(tmp_path, Navigation2D())
    with pytest.raises(InputError, match="cannot read"):
        read_outcomes(tmp_path / "nowhere", Navigation2D())


RUN = {
    **{"method": "maml", "variant": "", "seed": 2, "run": "a-seed2"},
    **{"iterations": 40, "env_steps": 960, "seconds": 1.5},
}
SUMMARY = {"versions": {"torch": "2.7"}, "runs": [RUN], "methods": []}


def test_a_summary_tells_runs_versions_and_benchmark(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    found = read_summary(tmp_path)
    assert (found.versions, found.benchmark) == ({"torch": "2.7"}, "")
    assert asdict(found.runs[0]) == RUN
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, "benchmark": {"name": "b"}}))
    assert read_summary(tmp_path).benchmark == "b"


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "null", '{"runs": 3}'),
        json.dumps({**SUMMARY, "runs": [{**RUN, "seed": "0"}]}),
        json.dumps({**SUMMARY, "runs": [{**RUN, "run": 3}]}),
        json.dumps({**SUMMARY, "runs": [{"method": "maml"}]}),
        json.dumps({**SUMMARY, "versions": []}),
        json.dumps({**SUMMARY, "benchmark": "b"}),
        "[" * 100_000,
    ],
)
def test_a_damaged_summary_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError, match=r"summary\.json is damaged"):
        read_summary(tmp_path)


def test_results_are_both_files(tmp_path: Path) -> None:
    write_table(tmp_path, TESTS, Navigation2D())
    assert not has_results(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert has_results(tmp_path)
