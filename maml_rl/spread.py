"""Tasks of iterations and of tests spread over a cluster; the results are those of one process.

Of an iteration, a worker samples some tasks' episodes, keeps them, and answers with sums over them;
the batch's are the same bits however its tasks are divided, see `maml_rl/sums.py`. Parameters, and
vectors of their size, are all that travels. Of tests, every part of one is a job of its own. What a
lost worker had is sampled again by another from its seeds.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.family import TaskFamily
from maml_rl.adapt import Params
from maml_rl.assess import BrokenDown, Trial, evaluate_policy
from maml_rl.chunks import torch_threads
from maml_rl.cluster import (
    RETRIES,
    Cluster,
    Crew,
    Ticket,
    Worker,
    WorkerFailedError,
    WorkerLostError,
    last_line,
)
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.config import Experiment
from maml_rl.errors import InputError, RunStopped
from maml_rl.evaluate import Evaluation
from maml_rl.maml import BatchReport, MetaReport, chunk_size, not_finite, outer_step
from maml_rl.memory import check_memory
from maml_rl.policy import GaussianPolicy
from maml_rl.rollout import SamplingError
from maml_rl.sampler import check_diverged, whole_bytes
from maml_rl.shard import Shard, ShardReport
from maml_rl.sums import nodes_of, sum_of_nodes
from maml_rl.task_sets import TaskSet
from maml_rl.trained import TrainedPolicy, to_device


@dataclass(frozen=True)
class Part:
    """Tasks start to stop - 1 of a batch or of a test."""

    start: int
    stop: int


def divide(tasks: int, unit: int, parts: int) -> list[Part]:
    """Divide tasks into so many parts of whole units, or fewer, as even as these allow."""
    units = -(-tasks // unit)
    shares = [units // parts + (i < units % parts) for i in range(min(parts, units))]
    stops = [min(unit * sum(shares[: i + 1]), tasks) for i in range(len(shares))]
    return [Part(*pair) for pair in zip([0, *stops[:-1]], stops, strict=True)]


def unit_of(chunk: int, episodes: int) -> int:
    """Return how many tasks must stay together for a task to come to the same bits.

    Whole chunks, since a chunk's tasks go through the same products; and whole 16 bytes, see
    `whole_bytes`. Where chunks are as each worker wants them, 0, nothing has to.
    """
    return math.lcm(chunk, whole_bytes(episodes)) if chunk else 1


class Spread(AbstractContextManager["Spread"]):
    """A cluster to train and to test on: a `Workplace`. It is joined when there is work."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings

    @functools.cached_property
    def _cluster(self) -> Cluster:
        return Cluster(self._settings)

    def check(self, experiment: Experiment[TaskFamily], *sections: str, runs: int = 1) -> None:
        """Raise InputError where there are more workers than work, or no GPU is theirs.

        Memory is known of this machine alone.
        """
        placed = self._placed(experiment)
        if self._settings.local_workers:
            check_memory(placed, *sections)
        work = getattr(placed, sections[0])
        unit = unit_of(self._chunk(placed, work.tasks), work.episodes)
        most = -(-work.tasks // unit) * runs
        asked = self._settings.most_workers
        if asked > most:
            raise InputError(
                f"{asked} workers are more than {work.tasks} tasks in parts of {unit} can use: at "
                f"most {most}"
            )

    def at_once(self, runs: int) -> int:
        """Return how many of so many runs to train side by side: with a worker each, all."""
        return max(1, min(runs, self._cluster.workers))

    def to_come(self, runs: int) -> None:
        """Share the workers among so many runs from here on."""
        self._cluster.crews_to_come = max(1, runs)

    def drop(self) -> None:
        """Let every wait end at once."""
        self._cluster.dropped = True

    def _placed(self, experiment: Experiment[TaskFamily]) -> Experiment[TaskFamily]:
        """Return an experiment as a worker has it.

        Raises:
            InputError: if it wants a GPU, and workers have none.
        """
        settings = self._settings
        if experiment.device == "cuda" and not settings.gpus_per_worker:
            raise InputError("device cuda on a cluster needs --cluster.gpus-per-worker, such as 1")
        device = "cuda" if settings.gpus_per_worker else experiment.device
        return replace(experiment, threads=settings.threads_per_worker, device=device)

    @staticmethod
    def _chunk(placed: Experiment[TaskFamily], tasks: int) -> int:
        """Return the tasks of a chunk; 0, as many as fit, on a GPU, where bits are not kept."""
        return chunk_size(tasks, "cpu") if placed.device == "cpu" else 0

    def engine(
        self, experiment: Experiment[TaskFamily], policy: GaussianPolicy, chunk: int
    ) -> SpreadEngine:
        """Make what the iterations of a run are done with; see `MakeEngine`."""
        placed = self._placed(experiment)
        sampling = experiment.sampling
        chunk = chunk or self._chunk(placed, sampling.tasks)
        unit = unit_of(chunk, sampling.episodes)
        most = -(-sampling.tasks // unit)
        crew = Crew(self._cluster, most, placed.physics, Shards, (placed, policy, chunk))
        return SpreadEngine(crew, placed, unit, chunk)

    def test(self, trials: Sequence[Trial]) -> Iterator[Evaluation | BrokenDown]:
        """Yield what tests come to, in order; see `Tester`.

        Raises:
            InputError: as `evaluate_policy`.
            RunStopped: if memory does not suffice, or no worker is left.
        """
        if not trials:
            return
        experiments = [self._placed(trial.trained.experiment) for trial in trials]
        # Two rounds for every worker, so that none waits long for the last.
        parts = max(1, -(-2 * self._cluster.workers // len(trials)))
        pieces = [
            Piece(number, part)
            for number, pair in enumerate(zip(trials, experiments, strict=True))
            for part in self._parts_of(*pair, parts)
        ]
        physics = next((e.physics for e in experiments if e.physics == "warp"), "cpu")
        with Crew(self._cluster, len(pieces), physics, Trials) as crew:
            # A policy is sent once, whatever it is tested with.
            policies = {id(trial.trained): trial.trained for trial in trials}
            sent = {key: crew.put(policy) for key, policy in policies.items()}
            jobs = [
                Job(trial, sent[id(trial.trained)], experiment)
                for trial, experiment in zip(trials, experiments, strict=True)
            ]
            arriving = results_of(crew, jobs, pieces)
            found: dict[Piece, Evaluation | BrokenDown] = {}
            for number in range(len(trials)):
                mine = [piece for piece in pieces if piece.trial == number]
                while not all(piece in found for piece in mine):
                    found.update([next(arriving)])
                yield join_parts([found[piece] for piece in mine])

    def _parts_of(self, trial: Trial, placed: Experiment[TaskFamily], parts: int) -> list[Part]:
        """Divide a test into so many parts, or fewer."""
        tasks = len(trial.tasks.tasks)
        unit = unit_of(self._chunk(placed, tasks), placed.evaluation.episodes)
        return divide(tasks, unit, parts)

    def __exit__(self, *exception: object) -> None:
        if "_cluster" in vars(self):
            self._cluster.close()


class Shards:
    """What a worker of a run holds: parts of the present batch, each known by its first task."""

    def __init__(
        self, experiment: Experiment[TaskFamily], policy: GaussianPolicy, chunk: int
    ) -> None:
        self._experiment = experiment
        self._policy = policy
        self._chunk = chunk
        self._shards: dict[int, Shard] = {}
        self._free: list[Shard] = []

    def begin(self, part: Part, theta: Params, iteration: int) -> ShardReport:
        """See `Shard.begin`."""
        if part.start not in self._shards:
            self._shards[part.start] = self._shard_for(part.stop - part.start)
        return self._shards[part.start].begin(theta, iteration, part.start, part.stop)

    def _shard_for(self, tasks: int) -> Shard:
        """Return a shard with worlds for so many tasks, one that is free if it has them."""
        while self._free:
            shard = self._free.pop()
            if shard.tasks >= tasks:
                return shard
            # From now on parts are larger.
            shard.close()
        return Shard(self._experiment, self._policy, tasks, self._chunk)

    def forget(self) -> None:
        """Let go of every part; their worlds are used again."""
        for shard in self._shards.values():
            shard.forget()
            self._free.append(shard)
        self._shards.clear()

    def echo(self, vector: Tensor, vectors: int) -> Tensor:
        """Answer at once as much as a product of so many sums, to be timed."""
        return vector.double().repeat(vectors, 1)

    def build(self, part: Part, pool: int) -> None:
        """See `Shard.build`."""
        self._shards[part.start].build(pool)

    def gradient(self, part: Part) -> Tensor:
        """See `Shard.gradient`."""
        return self._shards[part.start].gradient()

    def product(self, part: Part, vector: Tensor) -> Tensor:
        """See `Shard.product`."""
        return self._shards[part.start].product(vector)

    def metric(self, part: Part, vector: Tensor) -> Tensor:
        """See `Shard.metric`."""
        return self._shards[part.start].metric(vector)

    def evaluate(self, part: Part, candidate: Tensor) -> Tensor:
        """See `Shard.evaluate`."""
        return self._shards[part.start].evaluate(candidate)


class SpreadEngine:
    """Iterations of one run, each spread over a crew: an `Engine`."""

    device = "cpu"
    """Where theta is between iterations."""

    def __init__(
        self, crew: Crew, experiment: Experiment[TaskFamily], unit: int, chunk: int
    ) -> None:
        self._crew = crew
        self._experiment = experiment
        self._unit = unit
        self.chunk_size = chunk

    def iterate(
        self, theta: Params, iteration: int, earlier: Tensor | None = None
    ) -> tuple[Params, MetaReport]:
        """Return theta after one meta-iteration, and what happened; see `meta_iteration`.

        Raises:
            SamplingError: if sampling cannot go on.
            RunStopped: if no worker is left, and none joins.
        """
        crew, settings = self._crew, self._experiment.sampling
        crew.join()
        parts = divide(settings.tasks, self._unit, max(1, len(crew.workers)))
        batch = Batch(crew, parts, theta, iteration, self._experiment.seed)
        reports = batch.begin()
        kept = min(len(report.batches) for report in reports)
        joined = tuple(
            BatchReport(
                **{
                    name: torch.cat([getattr(report.batches[k], name) for report in reports])
                    for name in BatchReport.__dataclass_fields__
                }
            )
            for k in range(kept)
        )
        for k, one in enumerate(joined):
            found = (report.divergences[k] for report in reports)
            check_diverged(
                int(one.diverged.sum()),
                int(one.sampled.sum()),
                settings.max_diverged,
                next((one for one in found if one is not None), None),
            )
        seconds = max(report.seconds for report in reports)
        if kept <= self._experiment.adaptation.inner_steps:
            return theta, MetaReport(joined, not_finite(), seconds)
        batch.build(int(joined[-1].live_steps.sum()))
        region = self._experiment.trust_region.at(iteration)
        # Sums of several threads could come to other bits.
        with torch_threads(1):
            updated, step = outer_step(theta, batch, region, earlier)
        return updated, MetaReport(joined, step, seconds)

    def message_seconds(self, vectors: int, parameters: int, times: int = 20) -> float:
        """Return the driver's seconds for each message to a worker and its answer.

        Args:
            vectors: of float64 in the answer.
            parameters: numbers in a vector.
            times: rounds to measure.
        """
        crew, began = self._crew, time.perf_counter()
        for _ in range(times):
            vector = crew.put(torch.zeros(parameters))
            for ticket in [crew.call(worker, "echo", vector, vectors) for worker in crew.workers]:
                crew.answer(ticket)
        return (time.perf_counter() - began) / (times * len(crew.workers))

    def take_less(self, iteration: int) -> int:
        """Refuse: a worker's memory is its own."""
        settings = self._experiment.sampling
        raise RunStopped(
            f"a worker's memory does not suffice after {iteration} iterations: lower "
            f"sampling.episodes (now {settings.episodes}), family.horizon (now "
            f"{self._experiment.family.horizon}) or the workers on a machine",
            3,
        )

    def figures(self) -> dict[str, int]:
        """Return how many workers there are, and how many have been lost so far."""
        return {"workers": len(self._crew.workers), "workers_lost": self._crew.lost}

    def close(self) -> None:
        """Let the workers go."""
        self._crew.close()


class Batch:
    """One iteration's tasks, wherever they are: the trust region's objective."""

    def __init__(
        self, crew: Crew, parts: Sequence[Part], theta: Params, iteration: int, seed: int
    ) -> None:
        self._crew = crew
        self._name = f"iteration {iteration} (run seed {seed})"
        self._beginning = (crew.put(theta), iteration)
        self._tasks = max(part.stop for part in parts)
        self._pool: int | None = None
        self._homes = dict(zip(parts, crew.workers, strict=False))
        self._redone: dict[Part, list[Ticket]] = {}
        """Of parts that were moved, what has to be done again before what is asked for."""
        self._losses = Counter[Part]()
        for worker in crew.workers:
            crew.call(worker, "forget")

    def begin(self) -> list[ShardReport]:
        """Have every part sampled and adapted to."""
        return self._ask("begin", *self._beginning)

    def build(self, pool: int) -> None:
        """Have every part linearised."""
        self._pool = pool
        self._ask("build", pool)

    def gradient(self) -> Tensor:
        """See `Objective.gradient`."""
        return self._sum("gradient") / self._tasks

    def product(self, vector: Tensor) -> Tensor:
        """See `Objective.product`."""
        return self._sum("product", self._crew.put(vector))

    def metric(self, vector: Tensor) -> Tensor:
        """See `Objective.metric`."""
        return self._sum("metric", self._crew.put(vector))

    def evaluate(self, candidate: Tensor) -> tuple[float, float]:
        """See `Objective.evaluate`."""
        surrogate, kl = self._sum("evaluate", self._crew.put(candidate)).tolist()
        return surrogate / self._tasks, kl

    def _sum(self, what: str, *arguments: object) -> Tensor:
        """Ask for every part's sums, and add them."""
        parts = sorted(self._homes, key=lambda part: part.start)
        sums = {
            node: total
            for part, totals in zip(parts, self._ask(what, *arguments), strict=True)
            for (node, _), total in zip(
                nodes_of(part.start, part.stop, self._tasks), totals, strict=True
            )
        }
        return sum_of_nodes(sums, self._tasks)

    def _ask(self, what: str, *arguments: object) -> list[Any]:
        """Ask for every part, and again elsewhere where its worker is lost; in task order."""
        crew, answers = self._crew, dict[Part, Any]()
        waiting = {
            crew.call(home, what, part, *arguments): part for part, home in self._homes.items()
        }
        began = last = time.monotonic()
        while waiting:
            ready = crew.wait(waiting, last + self._limit(what))
            gone: dict[Worker, str] = {}
            for ticket in ready:
                part = waiting.pop(ticket)
                try:
                    answers[part] = crew.answer(ticket)
                except WorkerFailedError as failed:
                    raise raised_by(self._first(failed, part), part, self._name) from None
                except WorkerLostError as lost:
                    gone[self._homes[part]] = str(lost)
                else:
                    if part not in self._redone:
                        # What was waited for in vain before says nothing of what a worker needs.
                        crew.took(what, time.monotonic() - began)
            if not ready:
                why = f"no answer in {self._limit(what):.0f} s"
                gone = {self._homes[part]: why for part in waiting.values()}
            for worker, why in gone.items():
                crew.lose(worker, why)
                for part in [p for p, home in self._homes.items() if home is worker]:
                    self._losses[part] += part not in answers
                    check_losses(self._losses[part], part, why)
                    waiting = {t: p for t, p in waiting.items() if p is not part}
                    ticket = self._move(part, what, arguments)
                    if part not in answers:
                        waiting[ticket] = part
            last = time.monotonic()
        return [answers[part] for part in sorted(answers, key=lambda part: part.start)]

    def _limit(self, what: str) -> float:
        """Seconds to wait for an answer; a part that was moved is sampled and built before it."""
        steps = dict.fromkeys(("begin", "build", what)) if self._redone else (what,)
        return sum(map(self._crew.limit, steps))

    def _move(self, part: Part, what: str, arguments: Sequence[object]) -> Ticket:
        """Give a part to another worker, which does again what had been done."""
        crew = self._crew
        self._homes[part] = home = crew.another(self._homes.values())
        self._redone[part] = []
        if what != "begin":
            self._redone[part].append(crew.call(home, "begin", part, *self._beginning))
            if what != "build":
                self._redone[part].append(crew.call(home, "build", part, self._pool))
        return crew.call(home, what, part, *arguments)

    def _first(self, failed: WorkerFailedError, part: Part) -> WorkerFailedError:
        """Return what failed first: of what had to be done again, or else this."""
        for earlier in self._redone.get(part, ()):
            try:
                self._crew.answer(earlier)
            except WorkerFailedError as first:
                return first
            except WorkerLostError:
                break
        return failed


def check_losses(count: int, part: Part, why: str) -> None:
    """Raise RunStopped where tasks have cost one worker after the other."""
    if count > RETRIES:
        raise RunStopped(
            f"tasks {part.start} to {part.stop - 1} have cost {count} workers, the last with: "
            f"{why}. Perhaps a machine's memory does not suffice, or the family ends its process",
            3,
        )


def raised_by(failed: WorkerFailedError, part: Part, work: str) -> Exception:
    """Return what to raise here for what failed in a worker: what the user can mend as it is.

    Args:
        failed: what it answered.
        part: the tasks that it had.
        work: of what, in words.
    """
    if isinstance(failed.cause, (SamplingError, RunStopped, InputError, MemoryError)):
        return failed.cause
    return RuntimeError(
        f"a worker failed with tasks {part.start} to {part.stop - 1} of {work}: "
        f"{last_line(failed)}\n{failed}"
    )


@dataclass(frozen=True)
class Piece:
    """A job: a part of a test."""

    trial: int
    part: Part


@dataclass(frozen=True)
class Job:
    """A test, as workers are told of it."""

    trial: Trial
    sent: Any
    """Its policy, where workers find it."""
    experiment: Experiment[TaskFamily]
    """As a worker has it."""

    def episodes(self, part: Part) -> int:
        """Return how many episodes a part takes."""
        settings = self.experiment.evaluation
        return (part.stop - part.start) * settings.episodes * (settings.steps + 1)


class Trials:
    """What a worker of tests holds: nothing, since every test is whole in itself."""

    def test(
        self,
        trained: TrainedPolicy,
        experiment: Experiment[TaskFamily],
        tasks: TaskSet,
        step_size: float | None,
        part: Part,
    ) -> Evaluation:
        """Test a policy on some of the tasks of a trial."""
        params = to_device(trained.params, experiment.device)
        there = replace(trained, experiment=experiment, params=params)
        some = slice(part.start, part.stop)
        return evaluate_policy(there, tasks=tasks, step_size=step_size, part=some)


def results_of(
    crew: Crew, jobs: Sequence[Job], pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, Evaluation | BrokenDown]]:
    """Yield every piece's result as it comes; what a lost worker had, another does."""
    todo, losses = deque(pieces), Counter[Piece]()
    busy: dict[Ticket, tuple[Worker, Piece, float]] = {}

    def ask(worker: Worker, piece: Piece) -> None:
        job = jobs[piece.trial]
        # The policy itself is where `sent` says.
        how = (job.trial.tasks, job.trial.step_size)
        ticket = crew.call(worker, "test", job.sent, job.experiment, *how, piece.part)
        busy[ticket] = worker, piece, time.monotonic()

    def again(worker: Worker, piece: Piece, why: str) -> None:
        crew.lose(worker, why)
        losses[piece] += 1
        check_losses(losses[piece], piece.part, why)
        todo.appendleft(piece)

    def ends(piece: Piece, since: float) -> float:
        return since + crew.limit("test", jobs[piece.trial].episodes(piece.part))

    while todo or busy:
        crew.join()
        crew.await_worker()
        working = [worker for worker, _, _ in busy.values()]
        for worker in [w for w in crew.workers if w not in working][: len(todo)]:
            ask(worker, todo.popleft())
        # Not for long, so that who joins has work soon.
        for ticket in crew.wait(busy, time.monotonic() + 2.0):
            worker, piece, since = busy.pop(ticket)
            try:
                result = crew.answer(ticket)
            except WorkerLostError as lost:
                again(worker, piece, str(lost))
                continue
            except WorkerFailedError as failed:
                if not isinstance(failed.cause, BrokenDown):
                    raise raised_by(failed, piece.part, "a test") from None
                result = failed.cause
            seconds = time.monotonic() - since
            crew.took("test", seconds, jobs[piece.trial].episodes(piece.part))
            yield piece, result
        for ticket, (worker, piece, since) in list(busy.items()):
            if time.monotonic() > ends(piece, since):
                del busy[ticket]
                again(worker, piece, f"no answer in {ends(piece, 0.0):.0f} s")


def join_parts(parts: Sequence[Evaluation | BrokenDown]) -> Evaluation | BrokenDown:
    """Return a test of which these are the parts, or why it could not go on."""
    whole = [part for part in parts if isinstance(part, Evaluation)]
    if len(whole) < len(parts):
        return next(part for part in parts if isinstance(part, BrokenDown))
    tasks, returns, sds, measures = (
        np.concatenate([getattr(part, name) for part in whole], axis=axis)
        for name, axis in (("tasks", 0), ("returns", 1), ("return_sds", 1), ("measures", 1))
    )
    return Evaluation(tasks, returns, sds, measures, whole[0].episodes, whole[0].count)
