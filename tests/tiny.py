"""Sizes at which a real experiment takes a second; all different, so that a swapped axis breaks."""

from __future__ import annotations

from collections.abc import Mapping

TINY = [
    *("--iterations", "1", "--sampling.tasks", "2", "--sampling.episodes", "3"),
    *("--family.horizon", "5", "--policy.layers", "7", "4", "--trust-region.cg-iterations", "2"),
    *("--evaluation.tasks", "2", "--evaluation.episodes", "3", "--evaluation.steps", "2"),
]
"""Flags that cut any experiment down."""

SETTINGS: Mapping[str, object] = {
    "iterations": 3,
    "sampling__tasks": 4,
    "sampling__episodes": 3,
    "family__horizon": 6,
    "policy__layers": [8, 5],
    "evaluation__tasks": 2,
    "evaluation__episodes": 3,
    "evaluation__steps": 1,
}
"""The same for `load_experiment`."""


def flags(**changed: object) -> list[str]:
    """SETTINGS, some changed, as words of the command line."""
    words = []
    for name, value in {**SETTINGS, **changed}.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('__', '.')}", *map(str, values)]
    return words
