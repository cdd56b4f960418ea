"""One line of what `maml-rl speed` measures."""

from __future__ import annotations

from typing import TypedDict

GIGABYTE = 1e9


class Figure(TypedDict):
    """One line of the report."""

    what: str
    value: float
    unit: str
    goal: str
    met: bool | None
    """None where the machine or the scale is not the one that the goal is meant for."""
    detail: str
