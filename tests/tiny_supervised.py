"""Supervised experiments at sizes that take an instant; all different, so a swapped axis breaks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from maml_rl.supervised.config import SupervisedExperiment, load_experiment
from maml_rl.supervised.drawn_characters import draw_characters
from maml_rl.supervised.tasks import Problem

SINUSOID: Mapping[str, object] = {
    "iterations": 6,
    "record_every": 2,
    "data__shots": 4,
    "data__query": 5,
    "network__layers": [8, 7],
    "outer__tasks": 3,
    "evaluation__tasks": 6,
    "evaluation__steps": 2,
    "evaluation__shots": [4, 3],
    "evaluation__validation_tasks": 5,
}
"""Overrides for `load_experiment`."""
CHARACTERS: Mapping[str, object] = {
    "iterations": 2,
    "record_every": 1,
    "data__ways": 3,
    "data__train_classes": 5,
    "data__validation_classes": 3,
    "network__blocks": 2,
    "network__filters": 4,
    "outer__tasks": 2,
    "evaluation__tasks": 4,
    "evaluation__steps": 2,
    "evaluation__validation_tasks": 3,
}


def sinusoid(**changed: object) -> SupervisedExperiment[Problem]:
    """Return a tiny experiment on sine curves."""
    return load_experiment("sinusoid", **{**SINUSOID, **changed})


def characters(root: Path, **changed: object) -> SupervisedExperiment[Problem]:
    """Return a tiny experiment on characters, drawn into a folder if they are not there yet."""
    if not root.exists():
        draw_characters(root, characters=11, drawings=4)
    return load_experiment("drawn_characters", data__root=str(root), **{**CHARACTERS, **changed})


def flags(settings: Mapping[str, object]) -> list[str]:
    """Return overrides as words of the command line."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('__', '.')}", *map(str, values)]
    return words
