"""Sums over tasks: the same bits however the tasks are divided."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maml_rl.sums import Node, nodes_of, partial_sums, sum_of, sum_of_nodes


@given(st.data())
def test_however_tasks_are_divided_the_sum_is_the_same(data: st.DataObject) -> None:
    """Bit for bit that of one process, which is right to float64's rounding."""
    total = data.draw(st.integers(1, 70))
    cuts = data.draw(st.sets(st.integers(1, max(1, total - 1)), max_size=6))
    terms = torch.randn(total, 5, generator=torch.Generator().manual_seed(total)) * 1e3
    sums: dict[Node, torch.Tensor] = {}
    for start, stop in pairwise(sorted({0, *cuts, total})):
        parts = nodes_of(start, stop, total)
        # In their order, all and nothing else.
        assert [i for _, tasks in parts for i in range(*tasks.indices(total))] == list(
            range(stop - start)
        )
        values = partial_sums(terms[start:stop], start, total)
        sums |= {node: value for (node, _), value in zip(parts, values, strict=True)}
    assert torch.equal(sum_of_nodes(sums, total), sum_of(terms))
    exact = [math.fsum(column) for column in terms.T.double().tolist()]
    assert sum_of(terms).tolist() == pytest.approx(exact, rel=1e-12, abs=1e-9)


def test_pairs_are_added_and_pairs_of_pairs() -> None:
    """Of five: ((0 + 1) + (2 + 3)) + 4; in another order float64 rounds otherwise."""
    terms = torch.tensor([[1.0], [2.0**-60], [2.0**-60], [-1.0], [3.0]], dtype=torch.float64)
    a, b, c, d, e = terms[:, 0].tolist()
    assert sum_of(terms).item() == ((a + b) + (c + d)) + e
    assert sum_of(terms[:4]).item() != a + d + (b + c)


@pytest.mark.parametrize(
    ("start", "stop", "total", "nodes"),
    [
        (0, 40, 40, [(6, 0)]),
        (0, 20, 40, [(4, 0), (2, 4)]),
        (20, 40, 40, [(2, 5), (3, 3), (5, 1)]),
        (8, 10, 10, [(3, 1)]),
        (3, 4, 10, [(0, 3)]),
        (0, 1, 1, [(0, 0)]),
    ],
)
def test_few_sums_have_many_tasks(
    start: int, stop: int, total: int, nodes: list[tuple[int, int]]
) -> None:
    """What is at the end of the batch belongs to a node that would have more."""
    assert [tuple(node) for node, _ in nodes_of(start, stop, total)] == nodes
