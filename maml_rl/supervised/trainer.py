"""One run of the supervised mode: draw tasks, take a step of Adam, validate; a row at a time."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from maml_rl.adapt import Params, flatten
from maml_rl.checkpoints import State
from maml_rl.chunks import Chunks, torch_threads
from maml_rl.devices import reproducible
from maml_rl.errors import RunStopped, RunWarning
from maml_rl.memory import memory_to, repeated_where_memory_fails
from maml_rl.runs import Row
from maml_rl.seeds import TRAINING, VALIDATION
from maml_rl.supervised.config import SupervisedExperiment, query_of
from maml_rl.supervised.learner import Learner, MetaGradient
from maml_rl.supervised.networks import OwnNetwork
from maml_rl.supervised.recorded import Recorded
from maml_rl.supervised.tasks import Batch, Problem, TaskSource, task_generator
from maml_rl.supervised.trained import LearnedNetwork, measure_name

ADAMS_MOMENTS = 2
"""Numbers that Adam remembers for each parameter."""
NOT_FINITE = "loss or gradient not finite"
"""Why an update was refused."""
SMALL = 20_000
"""Parameters up to which a network's products are so small that chunks would only cost time."""
LARGEST_CHUNK = 8
"""Tasks; a few tasks' images stay in a core's cache."""


def chunk_size(tasks: int, parameters: int, device: str) -> int:
    """Return how many tasks go through together; the number of threads is of no matter.

    Args:
        tasks: of the batch.
        parameters: of the network.
        device: cpu or cuda.
    """
    if device != "cpu" or parameters <= SMALL:
        return tasks
    return min(LARGEST_CHUNK, math.ceil(tasks / 2))


class Adam:
    """torch's Adam on parameters by name, with a memory that can be saved."""

    def __init__(self, params: Params, learning_rate: float, memory: Params) -> None:
        """Begin with `memory`, as `memory` returned it; empty for none."""
        self.params = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        leaves = list(self.params.values())
        self._adam = torch.optim.Adam(leaves, learning_rate, fused=True)
        for name, p in self.params.items() if memory else ():
            parts = ("step", "exp_avg", "exp_avg_sq")
            self._adam.state[p] = {
                part: memory[f"{part}.{name}"].clone().to(p.device) for part in parts
            }

    def step(self, gradient: Params) -> None:
        """Step down a gradient."""
        for name, p in self.params.items():
            p.grad = gradient[name]
        self._adam.step()

    @property
    def memory(self) -> Params:
        """Its moments and how many steps it took, each by the parameter's name."""
        return {
            f"{part}.{name}": value.detach().clone()
            for name, p in self.params.items()
            for part, value in self._adam.state[p].items()
        }


@dataclass
class Tally:
    """What happened in the iterations of a row of metrics."""

    refused_in_a_row: int
    refused: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Of gradients; NaN of an update that was refused."""
    sampling: float = 0.0
    updating: float = 0.0
    """Seconds."""

    def add(self, found: MetaGradient, norm: float) -> None:
        """Add an iteration."""
        self.losses.append(float(found.losses.mean()))
        self.scores.append(float(found.scores.mean()))
        self.norms.append(norm)
        taken = math.isfinite(norm)
        self.refused += not taken
        self.refused_in_a_row = 0 if taken else self.refused_in_a_row + 1


@dataclass
class SupervisedTrainer:
    """One run's state and what it needs to go on by a row of metrics."""

    experiment: SupervisedExperiment[Problem]
    learner: Learner
    source: TaskSource
    adam: Adam
    state: State
    chunks: Chunks
    validation: Batch | None
    """Validation tasks, always the same; None where there are no classes for any."""
    best: tuple[Params, State, Params] | None = None

    def __post_init__(self) -> None:
        """Have nothing recorded yet."""
        self.recorded = Recorded(self.learner.terms)

    @classmethod
    def build(cls, network: LearnedNetwork, state: State, memory: Params) -> SupervisedTrainer:
        """Put a network to be trained on its device."""
        experiment, source = network.experiment, network.source
        outer, device = experiment.outer, experiment.device
        meta = {name: p.to(device) for name, p in network.meta.items()}
        size = outer.tasks_at_once or chunk_size(outer.tasks, flatten(meta).numel(), device)
        validation = None
        if "validation" in source.splits:
            # Judged by as many examples as in a test, so that the scores can be compared.
            count = experiment.evaluation.validation_tasks
            query = query_of(experiment, experiment.data.shots)
            rng = task_generator(VALIDATION, 0, 0)
            validation = source.sample("validation", count, rng, query=query).to(device)
        return cls(
            experiment,
            network.learner,
            source,
            Adam(meta, outer.learning_rate, memory),
            state,
            Chunks(experiment.threads, min(size, state.chunk_size or size)),
            validation,
        )

    @property
    def theta(self) -> Params:
        """Meta-parameters."""
        return {name: p.detach() for name, p in self.adam.params.items()}

    @property
    def optimizer(self) -> Params:
        """Adam's memory."""
        return self.adam.memory

    @property
    def total(self) -> int:
        """Iterations wanted."""
        return self.experiment.iterations

    @property
    def max_refused(self) -> int:
        """Updates refused in a row after which the run ends."""
        return self.experiment.max_refused

    def advice(self, row: Row) -> str:
        """Return what to try where updates are refused."""
        experiment = self.experiment
        return (
            f"a smaller adaptation.step_size (now {experiment.adaptation.step_size:g}) or "
            f"outer.learning_rate (now {experiment.outer.learning_rate:g})"
        )

    def step(self) -> Row:
        """Go on to the next multiple of `record_every` iterations, and return the row of metrics.

        Raises:
            RunStopped: if memory does not suffice for one task.
        """
        # Tasks share the threads among them; torch's own would only get in their way.
        with torch_threads(1), reproducible(self.experiment.device):
            return self._iterate()

    def _iterate(self) -> Row:
        begin, every = self.state.iteration, self.experiment.record_every
        end = min(self.total, (begin // every + 1) * every)
        tally = Tally(refused_in_a_row=self.state.refused_in_a_row)
        for iteration in range(begin, end):
            began = time.perf_counter()
            batch = self.draw(iteration)
            drawn = time.perf_counter()
            found = repeated_where_memory_fails(
                lambda batch=batch: self.gradient(batch),  # type: ignore[misc]  # bound now
                self._halve_chunks,
            )
            tally.add(found, self._update(found))
            tally.sampling += drawn - began
            tally.updating += time.perf_counter() - drawn
            if tally.refused_in_a_row >= self.max_refused:
                break
        done = len(tally.losses)
        row: dict[str, float | int | str] = {
            "iteration": begin + done - 1,
            "tasks": self.state.env_steps + done * self.experiment.outer.tasks,
            "loss": mean(tally.losses),
            measure_name(self.experiment.data): mean(tally.scores),
            "gradient_norm": mean(tally.norms),
            "refused": tally.refused,
            "refused_because": NOT_FINITE if tally.refused else "",
        }
        began = time.perf_counter()
        validation = self._validation()
        row |= validation
        # The last is that after as many steps as are trained with.
        score = list(validation.values())[-1] if validation else mean(tally.scores)
        row["seconds_sampling"] = round(tally.sampling, 4)
        row["seconds_updating"] = round(tally.updating, 4)
        row["seconds_validating"] = round(time.perf_counter() - began, 4)
        if not self.learner.classifies:
            score = -score
        self._advance(begin + done, int(row["tasks"]), score, tally.refused_in_a_row)
        return row

    def gradient(self, batch: Batch) -> MetaGradient:
        """Return the gradient of a batch's mean loss at the present meta-parameters.

        Where all tasks go through together what is done to them is recorded, unless a module of the
        user's own, which may not be pure, has a part in it.
        """
        together = self.chunks.size >= len(batch.support.inputs)
        record = together and not isinstance(self.learner.network, OwnNetwork)
        terms = self.recorded if record else self.learner.terms
        return self.learner.meta_gradient(self.adam.params, batch, self.chunks, terms)

    def draw(self, iteration: int) -> Batch:
        """Return the batch of an iteration, which follows from seed and iteration alone."""
        rng = task_generator(TRAINING, self.experiment.seed, iteration)
        with memory_to("draw tasks", "outer.tasks, data.shots or data.query"):
            batch = self.source.sample("train", self.experiment.outer.tasks, rng)
            return batch if self.experiment.device == "cpu" else batch.to(self.experiment.device)

    def _update(self, found: MetaGradient) -> float:
        """Take a step of Adam, unless a number is not finite; return the gradient's norm."""
        gradients = list(found.gradient.values())
        norms: list[Tensor] = torch._foreach_norm(gradients)  # type: ignore[assignment]
        norm = float(torch.stack(norms).norm()) + 0.0 * float(found.losses.sum())
        if not math.isfinite(norm):
            return math.nan
        clip = self.experiment.outer.clip
        if clip is not None:
            found = found._replace(
                gradient={n: g.clamp(-clip, clip) for n, g in found.gradient.items()}
            )
        self.adam.step(found.gradient)
        return norm

    def _validation(self) -> dict[str, float]:
        """Return the scores of the validation tasks after 0, 1, ... inner steps, by their column.

        Nothing where there are no such tasks.
        """
        if self.validation is None:
            return {}
        inner = self.experiment.adaptation
        with memory_to("validate", "evaluation.validation_tasks or evaluation.query"):
            scores, _ = self.learner.test(
                self.theta,
                self.validation,
                inner.inner_steps,
                self.chunks,
                transductive=inner.transductive,
            )
        measure = measure_name(self.experiment.data)
        means = enumerate(scores.mean(1).tolist())
        return {f"validation_{measure}_{step}": value for step, value in means}

    def _advance(self, iteration: int, tasks: int, score: float, refused: int) -> None:
        now = replace(self.state, iteration=iteration, env_steps=tasks, refused_in_a_row=refused)
        better = score > now.best_return
        if better:
            now = replace(now, best_return=score, best_iteration=iteration - 1)
        self.state = now
        self.best = (self.theta, now, self.optimizer) if better else None

    def _halve_chunks(self) -> None:
        """Let fewer tasks go through together.

        Raises:
            RunStopped: if they go one by one already.
        """
        size = min(self.chunks.size, self.experiment.outer.tasks)
        if size == 1:
            raise RunStopped(
                f"the memory does not suffice for one task after {self.state.iteration} "
                f"iterations: lower data.query, data.shots, data.ways, the network's size, "
                f"adaptation.inner_steps or threads (now {self.chunks.threads})",
                3,
            )
        warnings.warn(
            f"the memory does not suffice for {size} tasks together: training goes on with "
            f"{size // 2} at a time",
            RunWarning,
            stacklevel=3,
        )
        self.chunks.close()
        self.chunks = Chunks(self.experiment.threads, size // 2)
        self.state = replace(self.state, chunk_size=size // 2)
        if self.experiment.device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Release threads."""
        self.chunks.close()


def mean(values: list[float]) -> float:
    """Return the mean of what is finite, NaN of nothing."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan
