"""How much a cluster's workers reach of one process, and what a larger one would (`maml-rl speed`).

What this machine can show is measured: iterations of one process and of as many workers in turn, a
task's seconds, a message's, an addition's. What it cannot is predicted from these, and said to be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from maml_rl.adapt import flatten
from maml_rl.checkpoints import FRESH
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.config import load_experiment
from maml_rl.figure import Figure
from maml_rl.memory import parameter_count
from maml_rl.sums import nodes_of
from maml_rl.train import MakeEngine, Trainer, local
from maml_rl.trained import new_policy
from maml_rl.workplace import checked, workplace_for

REPEATS = 3
EXPERIMENT = "half_cheetah_dir"
TASKS = 40
WORKERS = (4, 16, 64, 256, 1024)
TASKS_A_WORKER = 20
"""Of the clusters that are predicted."""
BANDWIDTH = 10e9 / 8
"""Bytes a second that the driver's network carries: 10 Gbit/s."""
LATENCY = 1e-3
"""Seconds of a message there and back."""
LINE_SEARCH = 2
"""Evaluations: of the parameters as they were, and of a candidate that is taken at once."""


@dataclass(frozen=True)
class Costs:
    """What an iteration is made of, in seconds unless said otherwise."""

    task: float
    """Of a task on one thread: sampling, adapting, and its part of the update."""
    message: float
    """Of the driver, for each vector sent to a worker and the sums of 20 tasks back."""
    addition: float
    """Of the driver, for each vector that it adds."""
    parameters: int
    """Numbers in a vector."""
    products: int
    """Fisher products an iteration."""

    @property
    def calls(self) -> int:
        """Times that every worker is asked: begin, build, gradient, products, evaluations."""
        return 3 + self.products + LINE_SEARCH

    def bytes_of(self, tasks: int) -> int:
        """Bytes that an iteration moves between the driver and one worker of so many tasks."""
        vector = 4 * self.parameters
        sent = vector * (1 + self.products + LINE_SEARCH)
        received = sums_of(tasks) * (2 * vector * (1 + self.products) + 16 * LINE_SEARCH)
        return sent + received

    def predicted(self, workers: int) -> dict[str, float]:
        """Return the seconds of each part of an iteration of so many workers, 20 tasks each."""
        sums = sums_of(TASKS_A_WORKER)
        return {
            "workers": TASKS_A_WORKER * self.task,
            "latency": self.calls * LATENCY,
            "messages": self.calls * workers * self.message,
            "network": workers * self.bytes_of(TASKS_A_WORKER) / BANDWIDTH,
            "driver's sums": workers * sums * (1 + self.products) * self.addition,
        }


def measure(
    settings: ClusterSettings, scale: float = 1.0, say: Callable[[str], None] | None = None
) -> list[Figure]:
    """Measure workers of one thread each against one process of as many threads, and predict.

    Args:
        settings: the cluster; `local:N` is N workers here.
        scale: fraction of the 40 tasks; figures are held to their goals only at 1.
        say: is told what is being measured.
    """
    tell = (lambda _: None) if say is None else say
    tasks = max(1, round(TASKS * scale))
    tell(f"{EXPERIMENT}, {tasks} tasks: iterations of workers and of one process in turn ...")
    with workplace_for(settings) as place, ExitStack() as stack:
        clustered = trainer_of(tasks, 1, checked(place))
        stack.callback(clustered.close)
        workers = clustered.engine.figures()["workers"]
        alone = trainer_of(tasks, workers * settings.threads_per_worker, local)
        stack.callback(alone.close)
        pairs = [(timed(alone), timed(clustered)) for _ in range(REPEATS + 1)][1:]
        size = len(flatten(clustered.theta))
        message = clustered.engine.message_seconds(sums_of(TASKS_A_WORKER), size)  # type: ignore[attr-defined]
    share = statistics.median(one / other for one, other in pairs)
    seconds = statistics.median(other for _, other in pairs)
    tell("one process of one thread ...")
    single = trainer_of(tasks, 1, local)
    timed(single)
    costs = Costs(
        task=min(timed(single) for _ in range(REPEATS)) / tasks,
        message=message,
        addition=addition_seconds(len(flatten(single.theta))),
        parameters=parameter_count(single.experiment),
        products=single.experiment.trust_region.cg_iterations,
    )
    single.close()
    share_of_tasks = -(-tasks // workers)
    figures: list[Figure] = [
        {
            "what": f"{workers} workers of one thread against one process of {workers} threads",
            "value": share,
            "unit": "of its speed",
            "goal": ">= 0.85",
            "met": share >= 0.85 if scale == 1.0 else None,
            "detail": f"{seconds:.2f} s an iteration of {tasks} tasks",
        },
        {
            "what": "what an iteration moves between the driver and a worker",
            "value": costs.bytes_of(share_of_tasks) / 1e6,
            "unit": "MB",
            "goal": "-",
            "met": None,
            "detail": f"{share_of_tasks} tasks, {costs.calls} calls",
        },
        {
            "what": "measured for what follows: a task on one thread",
            "value": costs.task,
            "unit": "s",
            "goal": "-",
            "met": None,
            "detail": f"a message {1e3 * costs.message:.2f} ms, an addition "
            f"{1e6 * costs.addition:.0f} us",
        },
    ]
    return figures + [prediction(costs, count) for count in WORKERS]


def trainer_of(tasks: int, threads: int, engine: MakeEngine) -> Trainer:
    """Set up an experiment with so many tasks."""
    loaded = load_experiment(EXPERIMENT, sampling__tasks=tasks, threads=threads)
    experiment = replace(loaded, sampling=replace(loaded.sampling, count="episodes"))
    fresh = new_policy(experiment)
    return Trainer.build(experiment, fresh.policy, fresh.params, FRESH, engine)


def timed(trainer: Trainer) -> float:
    """Return seconds of one iteration."""
    began = time.perf_counter()
    trainer.step()
    return time.perf_counter() - began


def sums_of(tasks: int) -> int:
    """Return the most sums that a worker of so many tasks answers with, of many such workers."""
    starts = range(0, 64 * tasks, tasks)
    return max(len(nodes_of(start, start + tasks, 64 * tasks)) for start in starts)


def addition_seconds(size: int) -> float:
    """Return the driver's seconds to add a vector of so many numbers."""
    one, other = torch.zeros(2, size, dtype=torch.float64)
    began = time.perf_counter()
    for _ in range(100):
        _ = one + other
    return (time.perf_counter() - began) / 100


def prediction(costs: Costs, workers: int) -> Figure:
    """Return the figure of a cluster that nobody has run."""
    parts = costs.predicted(workers)
    bottleneck = max(parts, key=lambda name: parts[name])
    words = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    return {
        "what": f"predicted: {workers:,} workers of {TASKS_A_WORKER} tasks each",
        "value": sum(parts.values()),
        "unit": "s an iteration",
        "goal": "-",
        "met": None,
        "detail": f"most of it: {bottleneck}; {words}; 10 Gbit/s, 1 ms, nothing overlapping",
    }
