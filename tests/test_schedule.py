"""Settings that are others from some iterations on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from maml_rl.schedule import MAX_ITERATION, check_schedule, value_at


@pytest.mark.parametrize(
    ("starts", "later", "expected"),
    [
        ((), (), "aaaaaa"),
        ((2,), "b", "aabbbb"),
        ((1, 2, 5), "bcd", "abcccd"),
        ((MAX_ITERATION,), "b", "aaaaaa"),
    ],
)
def test_a_value_holds_from_its_start_to_the_next(
    starts: Sequence[int], later: Sequence[str], expected: str
) -> None:
    check_schedule("section", starts, "later_values", later)
    assert "".join(value_at(i, "a", starts, later) for i in range(6)) == expected


@pytest.mark.parametrize(
    ("starts", "later", "message"),
    [
        ((0,), "b", r"section.later_from must be iterations from 1 to 1000000000, .* got \[0\]"),
        ((MAX_ITERATION + 1,), "b", "section.later_from must be iterations"),
        ((3, 3), "bc", r"each later than the one before, got \[3, 3\]"),
        ((5, 3), "bc", "each later than the one before"),
        ((3,), "", "section.later_values must be one for each of section.later_from, got 0 for 1"),
        ((), "b", "got 1 for 0"),
    ],
)
def test_a_schedule_that_is_none_is_refused(
    starts: Sequence[int], later: Sequence[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule("section", starts, "later_values", later)
