"""The training loop: sample, adapt, update, record, save."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import nn

from envs.family import TaskFamily
from maml_rl.adapt import Params
from maml_rl.config import Experiment, InputError, load_experiment
from maml_rl.evaluate import Evaluation, evaluate
from maml_rl.maml import Chunks, MetaReport, chunk_size, meta_iteration
from maml_rl.policy import GaussianPolicy, entropy
from maml_rl.runs import Row, RunFolder, State
from maml_rl.sampler import (
    TRAINING,
    Sampler,
    SamplingError,
    task_generator,
    task_seeds,
    torch_threads,
)
from maml_rl.trained import TrainedPolicy, check_shapes, new_policy, to_device


class Watcher(Protocol):
    """Is told of every iteration."""

    def __call__(self, row: Row, total: int) -> None:
        """Show one row of metrics out of `total` iterations."""


class RunStopped(RuntimeError):  # noqa: N818  # it is news, not always a fault
    """A run ended before its last iteration; what was done is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Trainer:
    """One run's state and what it needs for an iteration."""

    experiment: Experiment[TaskFamily]
    policy: GaussianPolicy
    theta: Params
    state: State
    sampler: Sampler
    chunks: Chunks
    sampled_with: Params
    """theta that sampled the last batch, and so earned its returns."""

    @classmethod
    def build(
        cls,
        experiment: Experiment[TaskFamily],
        policy: GaussianPolicy,
        theta: Params,
        state: State,
    ) -> Trainer:
        """Make worlds and threads for an experiment."""
        settings = experiment.sampling
        sampler = Sampler(
            experiment.family,
            policy,
            tasks=min(settings.tasks_at_once or settings.tasks, settings.tasks),
            episodes=settings.episodes,
            count=settings.count,
            action_scale=experiment.policy.action_scale,
            threads=experiment.threads,
        )
        chunks = Chunks(experiment.threads, chunk_size(settings.tasks, experiment.device))
        on_device = to_device(theta, experiment.device)
        return cls(experiment, policy, on_device, state, sampler, chunks, on_device)

    def step(self) -> Row:
        """Do one meta-iteration and return its metrics."""
        experiment, iteration = self.experiment, self.state.iteration
        seed, M = experiment.seed, experiment.sampling.tasks
        drawn = experiment.family.sample_tasks(M, task_generator(TRAINING, seed, iteration))
        tasks = torch.from_numpy(drawn)
        began = time.perf_counter()
        try:
            # Tasks share the threads among them; torch's own would only get in their way.
            with torch_threads(1):
                updated, report = meta_iteration(
                    self.theta,
                    self.policy,
                    lambda params, phase: self.sampler.sample(
                        params, tasks, task_seeds(TRAINING, seed, iteration, phase, M)
                    ),
                    M,
                    adaptation=experiment.adaptation,
                    advantages=experiment.advantages,
                    trust_region=experiment.trust_region,
                    chunks=self.chunks,
                    clock=time.perf_counter,
                )
        except SamplingError as error:
            raise RunStopped(f"iteration {iteration}, run seed {seed}: {error}", 3) from error
        row = self._metrics(report, time.perf_counter() - began)
        self.sampled_with, self.theta = self.theta, updated
        adapted = float(row[f"return_{experiment.adaptation.inner_steps}"])
        better = adapted > self.state.best_return
        self.state = State(
            iteration + 1,
            int(row["env_steps"]),
            adapted if better else self.state.best_return,
            iteration if better else self.state.best_iteration,
        )
        return row

    def _metrics(self, report: MetaReport, seconds: float) -> Row:
        """Return the row of metrics.csv of an iteration."""
        sampled = sum(int(e.live_steps.sum()) for e in report.episodes)
        row: dict[str, float | int | str | bool] = {
            "iteration": self.state.iteration,
            "env_steps": self.state.env_steps + sampled,
        }
        for k, episodes in enumerate(report.episodes):
            returns = episodes.mean_returns()
            row[f"return_{k}"] = float(returns.mean())
            row[f"return_{k}_sd"] = float(returns.std(correction=0))
        step = report.step
        row |= {
            "surrogate_before": step.surrogate_before,
            "surrogate_after": step.surrogate_after,
            "kl": step.kl,
            "accepted": int(step.accepted),
            "refused_because": step.refused_because,
            "backtracks": step.backtracks,
            "cg_residual": step.cg_residual,
            "entropy": float(entropy(self.theta)),
        }
        for k, explained in enumerate(report.explained_variance):
            row[f"explained_variance_{k}"] = explained
        row["diverged_worlds"] = sum(int(e.diverged.sum()) for e in report.episodes)
        row["seconds_sampling"] = round(report.seconds_sampling, 4)
        row["seconds_updating"] = round(seconds - report.seconds_sampling, 4)
        return row

    @property
    def just_improved(self) -> bool:
        """Whether the last iteration's batch was the best so far."""
        return self.state.best_iteration == self.state.iteration - 1

    def close(self) -> None:
        """Release worlds and threads."""
        self.sampler.close()
        self.chunks.close()


FRESH = State(iteration=0, env_steps=0, best_return=-math.inf, best_iteration=-1)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Turn the first Ctrl-C or SIGTERM into a request, asked for by the yielded function.

    It returns the signal's number, or 0. A second one interrupts at once. Only in the main thread.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def record(folder: RunFolder, trainer: Trainer, row: Row) -> None:
    """Write an iteration's metrics and checkpoint.

    Raises:
        RunStopped: if they cannot be written; the checkpoint before is kept.
    """
    best = trainer.sampled_with if trainer.just_improved else None
    try:
        folder.write_row(row)
        folder.save(trainer.theta, trainer.state, best=best)
    except OSError as error:
        raise RunStopped(f"cannot write to {folder.path}: {error.strerror}", 3) from error


def run_iterations(trainer: Trainer, folder: RunFolder | None, watch: Watcher | None) -> None:
    """Iterate until the experiment's last iteration, recording and saving after each.

    Raises:
        RunStopped: on Ctrl-C or SIGTERM after the running iteration, and when a policy's action
            is not finite. What was done is saved.
    """
    total = trainer.experiment.iterations
    with stop_requests() as requested:
        try:
            while trainer.state.iteration < total:
                row = trainer.step()
                if folder is not None:
                    record(folder, trainer, row)
                if watch is not None:
                    watch(row, total)
                if requested():
                    break
        except KeyboardInterrupt:
            # The second Ctrl-C: the running iteration is dropped.
            pass
        if (number := requested()) and trainer.state.iteration < total:
            raise RunStopped(
                f"stopped after {trainer.state.iteration} of {total} iterations", 128 + number
            )


def meta_train(
    experiment: Experiment[TaskFamily],
    *,
    out: str | Path | None = None,
    init: str | Path | None = None,
    mean: nn.Module | None = None,
    watch: Watcher | None = None,
) -> TrainedPolicy:
    """Meta-train a policy.

    Args:
        experiment: all settings.
        out: a new run folder; None writes nothing.
        init: a run whose parameters to start from.
        mean: the policy's mean, a module (S, O) -> (S, A), in place of the MLP.
        watch: is told of every iteration.

    Returns:
        The policy after the last iteration.

    Raises:
        InputError: if the device, `out` or `init` cannot be used.
        RunStopped: if the run ended early; what was done is in `out`.
    """
    fresh = new_policy(experiment, mean)
    theta = fresh.params
    if init is not None:
        source = RunFolder.open(Path(init))
        theta = check_shapes(source.load()[0], theta, source.path)
    folder = None if out is None else RunFolder.create(Path(out), experiment)
    trainer = Trainer.build(experiment, fresh.policy, theta, FRESH)
    return _finish(trainer, folder, fresh, watch)


def resume(
    run: str | Path,
    *,
    iterations: int | None = None,
    mean: nn.Module | None = None,
    watch: Watcher | None = None,
) -> TrainedPolicy:
    """Go on with a run from its last checkpoint, or extend a finished one.

    Args:
        run: the run folder.
        iterations: a new total.
        mean: the module that it was trained with, where that was not the MLP.
        watch: is told of every iteration.

    Raises:
        InputError: if the folder is no run or holds no checkpoint.
        RunStopped: if the run ended early again.
    """
    folder = RunFolder.open(Path(run))
    experiment = load_experiment(folder.config)
    theta, state = folder.load()
    if iterations is not None and iterations < state.iteration:
        raise InputError(
            f"{run} has done {state.iteration} iterations; --iterations is the new total and must "
            f"be at least that, got {iterations}"
        )
    fresh = new_policy(experiment, mean)
    theta = check_shapes(theta, fresh.params, folder.path)
    if iterations is not None:
        experiment = replace(experiment, iterations=iterations)
        fresh = replace(fresh, experiment=experiment)
        folder.rewrite_config(experiment)
    folder.drop_rows_from(state.iteration)
    trainer = Trainer.build(experiment, fresh.policy, theta, state)
    return _finish(trainer, folder, fresh, watch)


def _finish(
    trainer: Trainer, folder: RunFolder | None, fresh: TrainedPolicy, watch: Watcher | None
) -> TrainedPolicy:
    try:
        if folder is not None and trainer.state.iteration == 0:
            folder.save(trainer.theta, trainer.state, best=None)
        run_iterations(trainer, folder, watch)
    finally:
        trainer.close()
        if folder is not None:
            folder.close()
    return replace(fresh, params=trainer.theta)


def evaluate_policy(trained: TrainedPolicy) -> Evaluation:
    """Test a policy by its experiment's evaluation settings.

    Raises:
        RunStopped: if an adapted policy's action is not finite.
    """
    experiment = trained.experiment
    try:
        return evaluate(
            trained.policy,
            trained.params,
            experiment.family,
            settings=experiment.evaluation,
            adaptation=experiment.adaptation,
            advantages=experiment.advantages,
            action_scale=experiment.policy.action_scale,
            threads=experiment.threads,
            tasks_at_once=experiment.sampling.tasks_at_once,
        )
    except SamplingError as error:
        raise RunStopped(f"the test was stopped: {error}", 3) from error
