"""Training in the supervised mode: draw tasks, adapt, take a step of Adam, validate, record."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from maml_rl.adapt import Params, flatten
from maml_rl.checkpoints import FRESH, State
from maml_rl.chunks import Chunks, torch_threads
from maml_rl.errors import InputError, RunStopped, RunWarning
from maml_rl.loop import Watcher, run_iterations
from maml_rl.memory import repeated_where_memory_fails
from maml_rl.runs import Row, RunFolder
from maml_rl.seeds import TRAINING, VALIDATION
from maml_rl.supervised.config import (
    OuterLoopSettings,
    SupervisedExperiment,
    origin_of,
    query_of,
)
from maml_rl.supervised.learner import InnerLoopSettings, Learner, MetaGradient
from maml_rl.supervised.memory import check_memory
from maml_rl.supervised.networks import OwnNetwork
from maml_rl.supervised.own import OwnTasks, TaskSampler
from maml_rl.supervised.recorded import Recorded
from maml_rl.supervised.tasks import Batch, Problem, TaskSource, silent, task_generator
from maml_rl.supervised.trained import (
    LearnedNetwork,
    experiment_of,
    measure_name,
    new_network,
    parameters_for,
    restore,
)

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
    best: tuple[Params, State] | None = None

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
            Chunks(experiment.threads, state.chunk_size or size),
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
        with torch_threads(1):
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
        score = self._validate(row)
        row["seconds_sampling"] = round(tally.sampling, 4)
        row["seconds_updating"] = round(tally.updating, 4)
        row["seconds_validating"] = round(time.perf_counter() - began, 4)
        self._advance(begin + done, int(row["tasks"]), score, tally.refused_in_a_row)
        return row

    def gradient(self, batch: Batch) -> MetaGradient:
        """Return the gradient of a batch's mean loss at the present meta-parameters.

        Where all tasks go through together what is done to them is recorded, unless a module of the
        user's own, which may not be pure, has a part in it.
        """
        together = self.chunks.size in (0, len(batch.support.inputs))
        record = together and not isinstance(self.learner.network, OwnNetwork)
        terms = self.recorded if record else self.learner.terms
        return self.learner.meta_gradient(self.adam.params, batch, self.chunks, terms)

    def draw(self, iteration: int) -> Batch:
        """Return the batch of an iteration, which follows from seed and iteration alone."""
        rng = task_generator(TRAINING, self.experiment.seed, iteration)
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

    def _validate(self, row: dict[str, float | int | str]) -> float:
        """Add scores on validation tasks to a row; return what the best checkpoint is chosen by."""
        measure, inner = measure_name(self.experiment.data), self.experiment.adaptation.inner_steps
        score = float(row[measure])
        if self.validation is not None:
            scores, _ = self.learner.test(
                self.theta,
                self.validation,
                inner,
                self.chunks,
                transductive=self.experiment.adaptation.transductive,
            )
            tested = scores.mean(1)
            for step, value in enumerate(tested.tolist()):
                row[f"validation_{measure}_{step}"] = value
            score = float(tested[-1])
        return score if self.learner.classifies else -score

    def _advance(self, iteration: int, tasks: int, score: float, refused: int) -> None:
        now = replace(self.state, iteration=iteration, env_steps=tasks, refused_in_a_row=refused)
        better = score > now.best_return
        if better:
            now = replace(now, best_return=score, best_iteration=iteration - 1)
        self.state = now
        self.best = (self.theta, now) if better else None

    def _halve_chunks(self) -> None:
        """Let fewer tasks go through together.

        Raises:
            RunStopped: if they go one by one already.
        """
        size = self.chunks.size or self.experiment.outer.tasks
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


def meta_train(
    experiment: SupervisedExperiment[Problem],
    *,
    out: str | Path | None = None,
    init: str | Path | None = None,
    network: nn.Module | None = None,
    tasks: TaskSampler | None = None,
    watch: Watcher | None = None,
    say: Callable[[str], None] = silent,
) -> LearnedNetwork:
    """Train a supervised experiment.

    Args:
        experiment: all settings.
        out: a new run folder; None writes nothing.
        init: a run whose parameters to start from.
        network: a module of your own (S, ...) -> (S, Y), in place of the experiment's network.
        tasks: a function of your own that draws tasks, in place of the experiment's data.
        watch: is told of every row of metrics.
        say: is told what is about to be trained, and what takes time before.

    Returns:
        The network after the last iteration.

    Raises:
        InputError: if device, data, `out` or `init` cannot be used.
        RunStopped: if the run ended early; what was done is in `out`.
    """
    if network is None:
        check_memory(experiment)
    fresh = new_network(experiment, network=network, tasks=tasks, say=say)
    say(describe(experiment))
    begun_from = None
    if init is not None:
        fresh = replace(fresh, meta=parameters_for(RunFolder.open(Path(init)).load(), fresh))
        begun_from = Path(init).resolve().name
    folder = None
    if out is not None:
        folder = RunFolder.create(Path(out), origin_of(experiment), fresh.meta, init=begun_from)
    return _finish(fresh, FRESH, {}, folder, watch)


def meta_learn(
    network: nn.Module,
    tasks: TaskSampler,
    *,
    iterations: int,
    classes: int | None = None,
    adaptation: InnerLoopSettings | None = None,
    outer: OuterLoopSettings | None = None,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    record_every: int = 100,
    name: str = OwnTasks.name,
    out: str | Path | None = None,
    watch: Watcher | None = None,
) -> LearnedNetwork:
    """Meta-learn a module of your own on tasks of your own.

    Args:
        network: maps inputs (S, ...) to outputs (S, Y): values, or a score for each class. Left
            as it is; training begins with its parameters.
        tasks: draws M tasks with a generator of random numbers, as two pairs of arrays, support
            and query: inputs (M, S, ...) and targets, which are (M, S) whole numbers for classes
            or (M, S, Y) values to regress to.
        iterations: outer updates.
        classes: how many there are, if not as many as the first tasks' numbers say.
        adaptation: the inner loop; by default one step of size .01.
        outer: the outer loop; by default 25 tasks and Adam with a learning rate of .001.
        seed: of everything random, the module's own parameters aside.
        device: where the network is.
        record_every: iterations that a row of metrics stands for.
        name: of the run, for config.yaml.
        out: a new run folder; None writes nothing.
        watch: is told of every row of metrics.

    Returns:
        The network after the last iteration.

    Raises:
        InputError: if network, tasks or a setting cannot be used.
        RunStopped: if the run ended early; what was done is in `out`.
    """
    experiment = SupervisedExperiment[Problem](
        name=name,
        data=OwnTasks.of(tasks, classes),
        iterations=iterations,
        record_every=record_every,
        seed=seed,
        device=device,
        adaptation=adaptation or InnerLoopSettings(),
        outer=outer or OuterLoopSettings(),
    )
    return meta_train(experiment, out=out, network=network, tasks=tasks, watch=watch)


def resume(
    run: str | Path,
    *,
    iterations: int | None = None,
    root: str | None = None,
    network: nn.Module | None = None,
    tasks: TaskSampler | None = None,
    watch: Watcher | None = None,
    say: Callable[[str], None] = silent,
) -> LearnedNetwork:
    """Go on with a run from its last checkpoint, or extend a finished one.

    Args:
        run: the run folder.
        iterations: a new total.
        root: where its images are now, if not where they were.
        network: the module that it was trained with, where that was your own.
        tasks: the function that draws its tasks, where that was your own.
        watch: is told of every row of metrics.
        say: is told what takes time before.

    Raises:
        InputError: if the folder is no supervised run, or holds no checkpoint.
        RunStopped: if the run ended early again.
    """
    folder = RunFolder.open(Path(run))
    folder.lock()
    try:
        if not folder.config.is_file():
            folder.restore_config()
        experiment = experiment_of(folder, root)
        learned, found = restore(folder, experiment, network=network, tasks=tasks, say=say)
        state = found.state
        if state.refused_in_a_row >= experiment.max_refused:
            # The run had ended for it; whoever resumes it wants it to be tried anew.
            state = replace(state, refused_in_a_row=0)
        experiment = extended(experiment, iterations, state, run)
        learned = replace(learned, experiment=experiment)
        folder.go_on_from(found, origin_of(experiment), every=experiment.record_every)
    except BaseException:
        folder.close()
        raise
    return _finish(learned, state, found.optimizer, folder, watch)


def describe(experiment: SupervisedExperiment[Problem]) -> str:
    """Return in a sentence what is about to be trained."""
    problem, inner = experiment.data, experiment.adaptation
    shots = f"{problem.shots} shot{'s' * (problem.shots > 1)}"
    kind = f"{problem.outputs} ways, {shots}" if problem.classifies else shots
    steps = f"{inner.inner_steps} gradient step{'s' * (inner.inner_steps > 1)} to each"
    return (
        f"Training {problem.name} ({kind}): {experiment.iterations} iterations of "
        f"{experiment.outer.tasks} tasks, {steps if inner.inner_steps else 'without adaptation'}."
    )


def extended(
    experiment: SupervisedExperiment[Problem],
    iterations: int | None,
    state: State,
    run: str | Path,
) -> SupervisedExperiment[Problem]:
    """Return an experiment with a new total of iterations, if one is given.

    Raises:
        InputError: if more are done already.
    """
    if iterations is None:
        return experiment
    if iterations < state.iteration:
        raise InputError(
            f"{run} has done {state.iteration} iterations; --iterations is the new total and "
            f"must be at least that, got {iterations}"
        )
    return replace(experiment, iterations=iterations)


def _finish(
    learned: LearnedNetwork,
    state: State,
    memory: Params,
    folder: RunFolder | None,
    watch: Watcher | None,
) -> LearnedNetwork:
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder)
        trainer = SupervisedTrainer.build(learned, state, memory)
        stack.callback(trainer.close)
        run_iterations(trainer, folder, watch)
        return replace(learned, meta=trainer.theta)
