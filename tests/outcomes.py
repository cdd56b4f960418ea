"""Tests' outcomes with numbers made by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from envs import HalfCheetahVel, Navigation2D, TaskFamily
from maml_rl.comparison import Method, Outcome
from maml_rl.evaluate import Evaluation


def outcome(
    returns: list[list[float]],
    tasks: npt.NDArray[np.float32],
    *,
    method: Method = "maml",
    variant: str = "",
    seed: int = 0,
    step_size: float = 0.5,
    source: str = "test",
    family: TaskFamily | None = None,
) -> Outcome:
    """A test whose measure is a hundredth of its return, and its spread a tenth."""
    array = np.array(returns)
    evaluation = Evaluation(tasks, array, array / 10, array[..., None] / 100, episodes=7)
    usual = Navigation2D() if tasks.shape[1] == 2 else HalfCheetahVel()
    outside = (family or usual).outside_training(tasks)
    return Outcome(method, variant, seed, step_size, source, evaluation, outside)
