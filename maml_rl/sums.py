"""Sums over the tasks of a batch whose bits do not depend on where the tasks are.

Tasks are added in pairs, pairs of pairs, and so on, by their index in the batch: a binary tree, of
which a node of level l and number i is the sum of tasks i 2^l to (i + 1) 2^l - 1, or those that
there are. Whoever has a node's tasks can add them up, and only nodes have to travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Node(NamedTuple):
    """A sum of neighbouring tasks."""

    level: int
    number: int


def nodes_of(start: int, stop: int, total: int) -> list[tuple[Node, slice]]:
    """Return the fewest nodes that have the tasks start to stop - 1 of a batch of `total`.

    Each with its tasks, counted from `start`.
    """
    found, at = [], start
    while at < stop:
        level = 0
        while (
            at % (2 << level) == 0 and 1 << level < total and min(at + (2 << level), total) <= stop
        ):
            level += 1
        end = min(at + (1 << level), total)
        found.append((Node(level, at >> level), slice(at - start, end - start)))
        at = end
    return found


def sum_of(terms: Tensor) -> Tensor:
    """Add the terms (M, d) of M tasks, the first of which begins a node, in float64, (d,)."""
    total = terms.double()
    while len(total) > 1:
        even = len(total) // 2 * 2
        paired = total[0:even:2] + total[1:even:2]
        total = torch.cat([paired, total[even:]])
    return total[0]


def partial_sums(terms: Tensor, start: int, total: int) -> Tensor:
    """Return the sums (n, d) of the nodes of `nodes_of`, for terms (M, d) of tasks from `start`."""
    parts = nodes_of(start, start + len(terms), total)
    return torch.stack([sum_of(terms[tasks]) for _, tasks in parts])


def sum_of_nodes(sums: Mapping[Node, Tensor], total: int) -> Tensor:
    """Return the sum (d,) over a batch of `total` tasks of which these nodes are all the tasks."""

    def value(node: Node) -> Tensor:
        if node in sums:
            return sums[node]
        level = node.level - 1
        left = value(Node(level, 2 * node.number))
        if (2 * node.number + 1) << level >= total:
            return left
        return left + value(Node(level, 2 * node.number + 1))

    return value(nodes_of(0, total, total)[0][0])
