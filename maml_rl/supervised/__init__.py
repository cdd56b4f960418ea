"""Supervised MAML (Finn et al. 2017, sections 5.1 and 5.2): regression and few-shot images.

from maml_rl import supervised

learned = supervised.meta_learn(module, draw_tasks, iterations=1000)
outputs = learned.adapt(inputs, targets, steps=5)(new_inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maml_rl.supervised.config import (
        OuterLoopSettings,
        SupervisedExperiment,
        load_experiment,
    )
    from maml_rl.supervised.learner import InnerLoopSettings
    from maml_rl.supervised.train import meta_learn, meta_train, resume
    from maml_rl.supervised.trained import AdaptedNetwork, LearnedNetwork, load

HOMES = {
    "AdaptedNetwork": "trained",
    "InnerLoopSettings": "learner",
    "LearnedNetwork": "trained",
    "OuterLoopSettings": "config",
    "SupervisedExperiment": "config",
    "load": "trained",
    "load_experiment": "config",
    "meta_learn": "train",
    "meta_train": "train",
    "resume": "train",
}
"""The module that each public name comes from; imported when first asked for."""

__all__ = [
    "AdaptedNetwork",
    "InnerLoopSettings",
    "LearnedNetwork",
    "OuterLoopSettings",
    "SupervisedExperiment",
    "load",
    "load_experiment",
    "meta_learn",
    "meta_train",
    "resume",
]


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'maml_rl.supervised' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"maml_rl.supervised.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
