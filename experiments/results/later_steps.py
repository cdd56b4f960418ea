"""How large should the steps after the first be? Tried on validation tasks, which no test uses.

python experiments/results/later_steps.py RUN

Prints mean returns before and after each gradient step by `evaluation.later_step_scale`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from maml_rl.assess import evaluate_policy, load_subject
from maml_rl.config import find_run
from maml_rl.task_sets import validation

SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
TASKS = 40


def main(run: Path) -> None:
    """Do it.

    Args:
        run: the run folder, whose newest checkpoint is tried.
    """
    policy = load_subject(find_run(run)).trained
    experiment = policy.experiment
    tasks = validation(experiment.family, TASKS)
    print(f"$ python experiments/results/later_steps.py {run}")
    print(
        "later steps  before"
        + "".join(f"{k:>8}" for k in range(1, experiment.evaluation.steps + 1))
    )
    for scale in SCALES:
        settings = replace(experiment.evaluation, later_step_scale=scale)
        trial = replace(policy, experiment=replace(experiment, evaluation=settings))
        returns = evaluate_policy(trial, tasks=tasks).returns.mean(axis=1)
        print(f"{scale:11g}" + "".join(f"{value:8.1f}" for value in returns), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
