"""Meta-reinforcement learning of locomotion with MAML (Finn et al. 2017, arXiv:1703.03400).

import maml_rl

experiment = maml_rl.load_experiment("quickstart", iterations=3)
policy = maml_rl.meta_train(experiment)
adapted = policy.adapt(experiment.family, task=[1.0], steps=1)
action = adapted.act(observation)
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from maml_rl._version import __version__

if TYPE_CHECKING:
    from maml_rl.assess import evaluate_policy
    from maml_rl.config import Experiment, load_experiment
    from maml_rl.errors import CheckpointError, InputError, RunStopped, RunWarning
    from maml_rl.evaluate import Evaluation
    from maml_rl.train import meta_train, resume
    from maml_rl.trained import TrainedPolicy, load, new_policy

HOMES = {
    "Experiment": "config",
    "CheckpointError": "errors",
    "InputError": "errors",
    "RunStopped": "errors",
    "RunWarning": "errors",
    "load_experiment": "config",
    "Evaluation": "evaluate",
    "evaluate_policy": "assess",
    "resume": "train",
    "meta_train": "train",
    "TrainedPolicy": "trained",
    "load": "trained",
    "new_policy": "trained",
}
"""The module that each public name comes from; imported when first asked for."""

__all__ = [
    "CheckpointError",
    "Evaluation",
    "Experiment",
    "InputError",
    "RunStopped",
    "RunWarning",
    "TrainedPolicy",
    "__version__",
    "evaluate_policy",
    "load",
    "load_experiment",
    "meta_train",
    "new_policy",
    "resume",
]


def check_envs() -> None:
    """Raise ImportError if another package called `envs` would be imported in place of ours."""
    found = importlib.util.find_spec("envs")
    origin = None if found is None else found.origin
    ours = Path(__file__).resolve().parent.parent / "envs" / "__init__.py"
    if origin is None or Path(origin).resolve() != ours:
        where = origin or "nowhere"
        raise ImportError(
            f"maml_rl needs its own package `envs`, but Python finds another first: {where}"
        )


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'maml_rl' has no attribute {name!r}")
    check_envs()
    value = getattr(importlib.import_module(f"maml_rl.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
