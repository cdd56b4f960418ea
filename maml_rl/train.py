"""The training loop: sample, adapt, update, record, save."""

from __future__ import annotations

import math
import shlex
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from envs.family import TaskFamily
from maml_rl.adapt import Params, flatten
from maml_rl.checkpoints import FRESH, Checkpoint, State
from maml_rl.chunks import Chunks, torch_threads
from maml_rl.config import Experiment, origin_of
from maml_rl.devices import Device, Physics, reproducible
from maml_rl.errors import InputError, RunStopped, RunWarning
from maml_rl.loop import Watcher, run_iterations, state_to_go_on
from maml_rl.maml import (
    INNER_STEP_NOT_FINITE,
    MetaReport,
    meta_iteration,
)
from maml_rl.memory import check_memory, repeated_where_memory_fails
from maml_rl.policy import GaussianPolicy, entropy
from maml_rl.replay import dump_of
from maml_rl.rollout import SamplingError
from maml_rl.runs import Row, RunFolder
from maml_rl.sampler import Sampler
from maml_rl.shard import chunks_for, collector, make_sampler
from maml_rl.trained import (
    TrainedPolicy,
    experiment_of,
    new_policy,
    parameters_for,
    restore,
    to_device,
)
from maml_rl.trust_region import Refusal

ADVICE: Mapping[str, str] = {
    INNER_STEP_NOT_FINITE: "a smaller adaptation.step_size (now {alpha:g})",
    Refusal.LOSS_NOT_FINITE: "a smaller adaptation.step_size (now {alpha:g})",
    Refusal.GRADIENT_ZERO: "a task family whose reward depends on the action",
    Refusal.PRODUCT_NOT_FINITE: "a smaller adaptation.step_size (now {alpha:g})",
    Refusal.CURVATURE_NOT_POSITIVE: "a larger trust_region.damping (now {damping:g})",
    Refusal.STEP_NOT_FINITE: "a larger trust_region.damping (now {damping:g})",
    Refusal.CANDIDATE_NOT_FINITE: "a smaller trust_region.max_kl (now {max_kl:g})",
    Refusal.KL_TOO_LARGE: "more trust_region.backtracks (now {backtracks})",
    Refusal.DID_NOT_FALL: "a larger sampling.tasks (now {tasks}) or sampling.episodes "
    "(now {episodes}), or a smaller trust_region.max_kl (now {max_kl:g})",
}
"""What to try where updates are refused, by the reason."""
DIRECTION = "direction"
"""In a checkpoint, where the last outer step went."""


class Engine(Protocol):
    """Where iterations are done: in this process, or in those of a cluster."""

    @property
    def device(self) -> str:
        """Where theta has to be."""

    @property
    def chunk_size(self) -> int:
        """Tasks that go through the update together."""

    def iterate(
        self, theta: Params, iteration: int, earlier: Tensor | None = None
    ) -> tuple[Params, MetaReport]:
        """Return theta after one meta-iteration, and what happened; see `meta_iteration`.

        Raises:
            SamplingError: if sampling cannot go on.
            RunStopped: if there is nothing left to do it with.
        """

    def take_less(self, iteration: int) -> int:
        """Let fewer tasks go through the update together, and return how many.

        Raises:
            RunStopped: if there are no fewer.
        """

    def figures(self) -> Mapping[str, int]:
        """Return what the last iteration's row of metrics says of the engine itself."""

    def close(self) -> None:
        """Release what it holds."""


@dataclass
class Local:
    """Iterations in this process."""

    experiment: Experiment[TaskFamily]
    policy: GaussianPolicy
    sampler: Sampler
    chunks: Chunks

    @property
    def device(self) -> str:
        """The experiment's."""
        return self.experiment.device

    @property
    def chunk_size(self) -> int:
        """Tasks that go through the update together."""
        return self.chunks.size

    def iterate(
        self, theta: Params, iteration: int, earlier: Tensor | None = None
    ) -> tuple[Params, MetaReport]:
        """Do one meta-iteration."""
        experiment, M = self.experiment, self.experiment.sampling.tasks
        # Tasks share the threads among them; torch's own would only get in their way.
        with torch_threads(1), reproducible(experiment.device):
            return meta_iteration(
                theta,
                self.policy,
                collector(experiment, self.sampler, iteration, 0, M),
                M,
                adaptation=experiment.adaptation.at(iteration, theta),
                advantages=experiment.advantages,
                trust_region=experiment.trust_region.at(iteration),
                chunks=self.chunks,
                clock=time.perf_counter,
                earlier=earlier,
            )

    def take_less(self, iteration: int) -> int:
        """Halve the chunks."""
        size = self.chunks.size
        if size == 1:
            settings = self.experiment.sampling
            raise RunStopped(
                f"the memory does not suffice for the update after {iteration} "
                f"iterations: lower sampling.episodes (now {settings.episodes}), family.horizon "
                f"(now {self.experiment.family.horizon}), sampling.tasks (now {settings.tasks}) or "
                f"threads (now {self.chunks.threads})",
                3,
            )
        warnings.warn(
            f"the memory does not suffice for the update of {size} tasks together: iteration "
            f"{iteration} is repeated with {size // 2} at a time",
            RunWarning,
            stacklevel=4,
        )
        self.chunks.close()
        tasks = self.experiment.sampling.tasks
        self.chunks = chunks_for(self.experiment, self.policy, tasks, size // 2)
        if self.experiment.device == "cuda":
            torch.cuda.empty_cache()
        return size // 2

    def figures(self) -> Mapping[str, int]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Release worlds and threads."""
        self.sampler.close()
        self.chunks.close()


MakeEngine = Callable[[Experiment[TaskFamily], GaussianPolicy, int], Engine]
"""Makes an engine whose chunks are of so many tasks, or as fits where that is 0."""


def local(experiment: Experiment[TaskFamily], policy: GaussianPolicy, chunk: int) -> Local:
    """Make worlds and threads in this process.

    Raises:
        InputError: if what has to be kept is more than the machine's memory.
    """
    check_memory(experiment, "sampling")
    tasks = experiment.sampling.tasks
    sampler = make_sampler(experiment, policy, tasks)
    return Local(experiment, policy, sampler, chunks_for(experiment, policy, tasks, chunk))


@dataclass
class Trainer:
    """One run's state and what it needs for an iteration."""

    experiment: Experiment[TaskFamily]
    policy: GaussianPolicy
    theta: Params
    state: State
    engine: Engine
    earlier: Tensor | None = None
    """Where the last outer step went, (d,); None before the first."""
    best: tuple[Params, State, Params] | None = None
    """What the last iteration began with, if it sampled the best batch so far."""

    @classmethod
    def build(
        cls,
        experiment: Experiment[TaskFamily],
        policy: GaussianPolicy,
        theta: Params,
        state: State,
        make_engine: MakeEngine = local,
        earlier: Tensor | None = None,
    ) -> Trainer:
        """Make what an experiment's iterations are done with."""
        engine = make_engine(experiment, policy, state.chunk_size)
        if engine.device != "cpu":
            # What is free may be another amount when the run goes on, and chunks decide last bits.
            state = replace(state, chunk_size=engine.chunk_size)
        if earlier is not None:
            earlier = earlier.to(engine.device)
        return cls(experiment, policy, to_device(theta, engine.device), state, engine, earlier)

    def step(self) -> Row:
        """Do one meta-iteration and return its metrics.

        Where memory does not suffice the tasks go through the update in smaller chunks, and the
        iteration is repeated: the same episodes, since they follow from the seed, and the same
        gradient, since it is a sum over tasks.

        Raises:
            SamplingError: if sampling cannot go on.
            RunStopped: if memory does not suffice even so.
        """
        return repeated_where_memory_fails(self._iterate, self._halve_chunks)

    def _iterate(self) -> Row:
        experiment, before = self.experiment, self.state
        iteration = before.iteration
        began = time.perf_counter()
        updated, report = self.engine.iterate(self.theta, iteration, self.earlier)
        row = self._metrics(report, time.perf_counter() - began)
        adapted = float(row[f"return_{experiment.adaptation.inner_steps}"])
        better = adapted > before.best_return
        now = replace(before, best_return=adapted, best_iteration=iteration) if better else before
        # Resumed from there, this iteration is done again and the run goes on as it did.
        self.best = (self.theta, now, self.optimizer) if better else None
        self.theta = updated
        if report.step.followed is not None:
            self.earlier = report.step.followed
        self.state = replace(
            now,
            iteration=iteration + 1,
            env_steps=int(row["env_steps"]),
            refused_in_a_row=0 if report.step.accepted else before.refused_in_a_row + 1,
        )
        return row

    def _halve_chunks(self) -> None:
        size = self.engine.take_less(self.state.iteration)
        self.state = replace(self.state, chunk_size=size)

    def _metrics(self, report: MetaReport, seconds: float) -> Row:
        """Return the row of metrics.csv of an iteration."""
        live = sum(int(batch.live_steps.sum()) for batch in report.batches)
        row: dict[str, float | int | str | bool] = {
            "iteration": self.state.iteration,
            "env_steps": self.state.env_steps + live,
        }
        phases = self.experiment.adaptation.inner_steps + 1
        for k in range(phases):
            # An inner step that is not finite leaves nothing to sample with.
            sampled = k < len(report.batches)
            returns = report.batches[k].returns if sampled else torch.tensor([math.nan])
            row[f"return_{k}"] = float(returns.mean())
            row[f"return_{k}_sd"] = float(returns.std(correction=0))
        step = report.step
        row |= {
            "surrogate_before": step.surrogate_before,
            "surrogate_after": step.surrogate_after,
            "kl": step.kl,
            "accepted": int(step.accepted),
            "refused_because": str(step.refused_because),
            "backtracks": step.backtracks,
            "cg_residual": step.cg_residual,
            "entropy": float(entropy(self.theta)),
        }
        adaptation = self.experiment.adaptation
        if adaptation.times_variance:
            row["step_size"] = adaptation.at(self.state.iteration, self.theta).step_size
        explained = [float(batch.explained_variance.mean()) for batch in report.batches]
        for k in range(phases):
            row[f"explained_variance_{k}"] = explained[k] if k < len(explained) else math.nan
        row["diverged_worlds"] = sum(int(batch.diverged.sum()) for batch in report.batches)
        row |= self.engine.figures()
        row["seconds_sampling"] = round(report.seconds_sampling, 4)
        row["seconds_updating"] = round(seconds - report.seconds_sampling, 4)
        return row

    @property
    def total(self) -> int:
        """Iterations wanted."""
        return self.experiment.iterations

    @property
    def max_refused(self) -> int:
        """Updates refused in a row after which the run ends."""
        return self.experiment.max_refused

    @property
    def optimizer(self) -> Params:
        """What momentum carries on to the next step; nothing without it."""
        if not self.experiment.trust_region.momentum or self.earlier is None:
            return {}
        return {DIRECTION: self.earlier}

    def advice(self, row: Row) -> str:
        """Return what to try where updates are refused."""
        experiment, reason = self.experiment, str(row["refused_because"])
        iteration = int(row["iteration"])
        momentum = experiment.trust_region.momentum
        fading = f", or a smaller trust_region.momentum (now {momentum:g})"
        return ADVICE[reason].format(
            alpha=experiment.adaptation.size_at(iteration),
            tasks=experiment.sampling.tasks,
            episodes=experiment.sampling.episodes,
            **asdict(experiment.trust_region.at(iteration)),
        ) + (fading if momentum and reason == Refusal.DID_NOT_FALL else "")

    def close(self) -> None:
        """Release worlds and threads, or workers."""
        self.engine.close()


def broken_down(error: SamplingError, trainer: Trainer, folder: RunFolder | None) -> RunStopped:
    """Return the end of a run that cannot sample, having written a dump if it can be replayed."""
    experiment, iteration = trainer.experiment, trainer.state.iteration
    text = f"iteration {iteration}, run seed {experiment.seed}: {error}"
    if error.divergence is not None and folder is not None:
        dump = dump_of(error.divergence, experiment, iteration)
        try:
            path = folder.write_dump(f"iteration-{iteration}", dump)
            text += f". See it again with: maml-rl replay {shlex.quote(str(path))}"
        except OSError as trouble:
            text += f" (and no dump of it can be written: {trouble.strerror})"
    return RunStopped(text, 3)


def run(trainer: Trainer, folder: RunFolder | None, watch: Watcher | None) -> None:
    """Iterate until the experiment's last iteration, recording and saving after each.

    Raises:
        RunStopped: on Ctrl-C or SIGTERM after the running iteration, and when the run cannot go
            on. What was done is saved.
    """
    try:
        run_iterations(trainer, folder, watch)
    except SamplingError as error:
        raise broken_down(error, trainer, folder) from error


def meta_train(
    experiment: Experiment[TaskFamily],
    *,
    out: str | Path | None = None,
    init: str | Path | None = None,
    mean: nn.Module | None = None,
    watch: Watcher | None = None,
    engine: MakeEngine = local,
) -> TrainedPolicy:
    """Meta-train a policy.

    Args:
        experiment: all settings.
        out: a new run folder; None writes nothing.
        init: a run whose parameters to start from.
        mean: the policy's mean, a module (S, O) -> (S, A), in place of the MLP.
        watch: is told of every iteration.
        engine: makes what iterations are done with; a `Workplace` has one.

    Returns:
        The policy after the last iteration.

    Raises:
        InputError: if the device, `out` or `init` cannot be used.
        RunStopped: if the run ended early; what was done is in `out`.
    """
    fresh = new_policy(experiment, mean)
    theta = fresh.params
    if init is not None:
        theta = parameters_for(RunFolder.open(Path(init)).load(), fresh)
    begun_from = None if init is None else Path(init).resolve().name
    # Before the folder, so that what cannot be begun leaves none.
    trainer = Trainer.build(experiment, fresh.policy, theta, FRESH, engine)
    try:
        folder = (
            None
            if out is None
            else RunFolder.create(
                Path(out),
                origin_of(experiment),
                theta,
                init=begun_from,
                # A direction in float64.
                remembered=2 if experiment.trust_region.momentum else 0,
            )
        )
    except BaseException:
        trainer.close()
        raise
    return _finish(fresh, trainer, folder, watch)


def resume(
    run: str | Path,
    *,
    iterations: int | None = None,
    device: Device | None = None,
    physics: Physics | None = None,
    mean: nn.Module | None = None,
    watch: Watcher | None = None,
    engine: MakeEngine = local,
) -> TrainedPolicy:
    """Go on with a run from its last checkpoint, or extend a finished one.

    Args:
        run: the run folder.
        iterations: a new total.
        device: where to go on, if not where it was.
        physics: what to simulate with from here on, likewise.
        mean: the module that it was trained with, where that was not the MLP.
        watch: is told of every iteration.
        engine: makes what iterations are done with.

    Raises:
        InputError: if the folder is no run or holds no checkpoint.
        RunStopped: if the run ended early again.
    """
    folder = RunFolder.open(Path(run))
    folder.lock()
    try:
        if not folder.config.is_file():
            folder.restore_config()
        own = experiment_of(folder)
        experiment = replace(own, device=device or own.device, physics=physics or own.physics)
        policy, found = restore(folder, experiment, mean=mean)
        state = state_to_go_on(
            found.state, max_refused=experiment.max_refused, iterations=iterations, run=run
        )
        if experiment.device != own.device:
            # What fitted there says nothing of here.
            state = replace(state, chunk_size=0)
        if iterations is not None:
            policy = replace(policy, experiment=replace(experiment, iterations=iterations))
        earlier = remembered(found, policy.experiment)
        trainer = Trainer.build(
            policy.experiment, policy.policy, policy.params, state, engine, earlier
        )
        try:
            folder.go_on_from(found, origin_of(policy.experiment))
        except BaseException:
            trainer.close()
            raise
    except BaseException:
        folder.close()
        raise
    return _finish(policy, trainer, folder, watch)


def remembered(found: Checkpoint, experiment: Experiment[TaskFamily]) -> Tensor | None:
    """Return what momentum carries on from a checkpoint, (d,), None where there is none.

    Raises:
        InputError: if what is there is not of its parameters.
    """
    if not experiment.trust_region.momentum or not found.optimizer:
        return None
    size = flatten(found.theta).shape
    direction = found.optimizer.get(DIRECTION)
    if direction is None or direction.shape != size or not bool(torch.isfinite(direction).all()):
        raise InputError(
            f"checkpoint {found.path} holds no step of its {size.numel()} parameters for "
            "trust_region.momentum to carry on"
        )
    return direction


def _finish(
    policy: TrainedPolicy, trainer: Trainer, folder: RunFolder | None, watch: Watcher | None
) -> TrainedPolicy:
    with ExitStack() as stack:
        stack.callback(trainer.close)
        if folder is not None:
            stack.enter_context(folder)
        run(trainer, folder, watch)
        return replace(policy, params=trainer.theta, iteration=trainer.state.iteration)
