"""What must fit in memory, told before it is taken."""

from __future__ import annotations

import math

from maml_rl.errors import InputError
from maml_rl.memory import physical_memory
from maml_rl.supervised.config import SupervisedExperiment, network_of, query_of
from maml_rl.supervised.evaluate import DRAWN
from maml_rl.supervised.tasks import Problem


def check_memory(experiment: SupervisedExperiment[Problem]) -> None:
    """Raise InputError where more must be in memory at once than the machine has.

    Counts only what is there in any case: the examples of a batch, of the validation tasks and of
    the test tasks that are drawn together; parameters, their gradient and Adam's two moments. So
    what is refused cannot fit; what is not refused may still not fit.

    Raises:
        InputError: with what to lower, and what it takes, GB.
    """
    problem, outer, test = experiment.data, experiment.outer, experiment.evaluation
    groups = problem.outputs if problem.classifies else 1
    parameters = network_of(experiment).parameter_count
    number = 4 * groups * math.prod(problem.input_shape)
    most_shots = max((problem.shots, *test.shots))
    parts = (
        (
            16 * parameters,
            f"the network's {parameters:,} parameters",
            "network.layers, network.filters or network.blocks",
        ),
        (
            number * outer.tasks * (problem.shots + problem.training_query),
            f"batches of {outer.tasks} tasks",
            "outer.tasks, data.shots or data.query",
        ),
        (
            number * test.validation_tasks * (problem.shots + query_of(experiment, problem.shots)),
            f"{test.validation_tasks} validation tasks",
            "evaluation.validation_tasks or evaluation.query",
        ),
        (
            number * min(DRAWN, test.tasks) * (most_shots + query_of(experiment, most_shots)),
            f"test tasks of {most_shots} shots",
            "evaluation.shots or evaluation.query",
        ),
    )
    total, available = sum(taken for taken, *_ in parts), physical_memory()
    if total > available:
        _, what, lower = max(parts)
        raise InputError(
            f"{what} take at least {total / 1e9:,.1f} GB of memory at once, and this machine has "
            f"{available / 1e9:,.1f} GB: lower {lower}"
        )
