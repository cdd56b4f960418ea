"""Tasks of every iteration spread over a Ray cluster; the result is that of one process.

The only module that imports ray. A worker is a Ray actor that holds a `Shard`: it samples its
tasks' episodes, keeps them, and answers for each task alone, so that the sums are made here, in
task order, and are the same bits however the tasks are divided. Parameters, and vectors of their
size, are all that travels. A worker that is lost, or does not answer in time, has its tasks sampled
again by another from their seeds.
"""

from __future__ import annotations

import contextlib
import copyreg
import dataclasses
import math
import os
import platform
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from envs.family import TaskFamily
from maml_rl.adapt import Params
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.config import Experiment
from maml_rl.errors import InputError, RunStopped, RunWarning
from maml_rl.maml import BatchReport, MetaReport, not_finite, outer_step, sum_of
from maml_rl.policy import GaussianPolicy
from maml_rl.rollout import SamplingError
from maml_rl.sampler import check_diverged
from maml_rl.shard import Shard, ShardReport
from maml_rl.versions import versions

# Before ray is imported, which reads it then.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError
except ImportError as missing:
    raise ImportError(
        "a cluster needs ray, which is not installed: pip install 'ray>=2.50'"
    ) from missing

# An exception is pickled as its class and message, which is not all that this one is made of.
copyreg.pickle(RunStopped, lambda error: (RunStopped, (str(error), error.exit_code)))

MATTERS = ("maml-rl", "torch", "mujoco", "numpy", "mujoco-warp", "warp-lang")
"""Packages of which a worker must have the driver's versions."""


class WorkerActor:
    """A worker: a shard of the tasks, in a process of its own."""

    def __init__(
        self, experiment: Experiment[TaskFamily], policy: GaussianPolicy, tasks: int, chunk: int
    ) -> None:
        torch.set_num_threads(1)
        self._shards: dict[int, Shard] = {}
        self._make: Callable[[], Shard] = lambda: Shard(experiment, policy, tasks, chunk)
        self._free: list[Shard] = []

    def hello(self, physics: str) -> dict[str, str]:
        """Return what this process runs, and where."""
        where = {"host": socket.gethostname(), "pid": str(os.getpid())}
        return {**versions(physics), **where, "machine": platform.machine()}

    def begin(self, theta: Params, iteration: int, start: int, stop: int) -> ShardReport:
        """See `Shard.begin`; the part is known by its first task from here on."""
        if start not in self._shards:
            self._shards[start] = self._free.pop() if self._free else self._make()
        return self._shards[start].begin(theta, iteration, start, stop)

    def forget(self) -> None:
        """Let go of every part; their worlds are used again."""
        self._free += self._shards.values()
        self._shards.clear()

    def build(self, start: int, pool: int) -> None:
        """See `Shard.build`."""
        self._shards[start].build(pool)

    def gradient(self, start: int) -> Tensor:
        """See `Shard.gradient`."""
        return self._shards[start].gradient()

    def product(self, start: int, vector: Tensor) -> Tensor:
        """See `Shard.product`."""
        return self._shards[start].product(vector)

    def evaluate(self, start: int, candidate: Tensor) -> Tensor:
        """See `Shard.evaluate`."""
        return self._shards[start].evaluate(candidate)


@dataclass(eq=False)
class Worker:
    """A worker as the driver sees it."""

    actor: Any
    name: str
    """Host and process, for messages."""


@dataclass(frozen=True)
class Part:
    """Tasks start to stop - 1 of a batch."""

    start: int
    stop: int


def divide(tasks: int, chunk: int, workers: int) -> list[Part]:
    """Divide tasks among workers in whole chunks, as evenly as these allow.

    A task goes through the same products whoever has it, and so comes to the same bits.
    """
    chunks = -(-tasks // chunk)
    shares = [chunks // workers + (i < chunks % workers) for i in range(min(workers, chunks))]
    stops = [min(chunk * sum(shares[: i + 1]), tasks) for i in range(len(shares))]
    return [Part(*pair) for pair in zip([0, *stops[:-1]], stops, strict=True)]


def unit(chunk: int, episodes: int) -> int:
    """Return how many tasks must stay together: whole chunks, whose actions are whole 16 bytes.

    MKL multiplies a batch of matrices in a way that depends on whether a product begins at a
    multiple of 16 bytes, and those of a task's K episodes begin where those of the tasks before
    it end: a part must begin where K times any width of float32 is such a multiple.
    """
    return math.lcm(chunk, 4 // math.gcd(4, episodes))


class Cluster:
    """The workers of one run: those that there are, those that join, and what each has to do."""

    def __init__(
        self,
        settings: ClusterSettings,
        experiment: Experiment[TaskFamily],
        policy: GaussianPolicy,
        chunk: int,
    ) -> None:
        """Connect, and wait for the first worker.

        Raises:
            InputError: if there is no cluster at the address, or no room for a worker in it.
        """
        self._settings = settings
        self._tasks = experiment.sampling.tasks
        self._unit = unit(chunk, experiment.sampling.episodes)
        most = -(-self._tasks // self._unit)
        local = settings.local_workers
        asked = local or settings.workers
        if asked > most:
            raise InputError(
                f"{asked} workers are more than {self._tasks} tasks in parts of {self._unit} can "
                f"use: at most {most}"
            )
        self._wanted = asked or most
        threads = settings.threads_per_worker
        device = "cuda" if settings.gpus_per_worker else experiment.device
        self._experiment = dataclasses.replace(experiment, threads=threads, device=device)
        self._trust_region = experiment.trust_region
        share = -(-most // self._wanted) * self._unit
        self._arguments = (self._experiment, policy, share, chunk)
        connect(settings, local)
        self._make = ray.remote(WorkerActor).options(
            num_cpus=threads,
            num_gpus=settings.gpus_per_worker,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self.workers: list[Worker] = []
        self._joining: dict[Any, Any] = {}
        self._refused: set[str] = set()
        self.lost = 0
        self._slowest: dict[str, float] = {}
        try:
            self._check_room()
            self._await_worker()
            self._await_others()
        except BaseException:
            self.close()
            raise

    def _check_room(self) -> None:
        """Raise InputError if no worker will ever fit."""
        settings, there = self._settings, ray.cluster_resources()
        cores, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
        if settings.threads_per_worker > cores or settings.gpus_per_worker > gpus:
            raise InputError(
                f"the cluster has no room for a worker of {settings.threads_per_worker} cores and "
                f"{settings.gpus_per_worker:g} GPUs: it has {cores:g} and {gpus:g}"
            )

    def iterate(self, theta: Params, iteration: int) -> tuple[Params, MetaReport]:
        """Return theta after one meta-iteration, and what happened; see `meta_iteration`.

        Raises:
            SamplingError: if sampling cannot go on.
            RunStopped: if no worker is left, and none joins.
        """
        self._join()
        parts = divide(self._tasks, self._unit, max(1, len(self.workers)))
        batch = Batch(self, parts, ray.put(theta), iteration)
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
                self._experiment.sampling.max_diverged,
                next((one for one in found if one is not None), None),
            )
        seconds = max(report.seconds for report in reports)
        if kept <= self._experiment.adaptation.inner_steps:
            return theta, MetaReport(joined, not_finite(), seconds)
        batch.build(int(joined[-1].live_steps.sum()))
        updated, step = outer_step(theta, batch, self._trust_region)
        return updated, MetaReport(joined, step, seconds)

    def message_seconds(self, times: int = 50) -> float:
        """Return the driver's seconds for each message to a worker and back, of so many rounds."""
        began = time.perf_counter()
        for _ in range(times):
            ray.get([worker.actor.forget.remote() for worker in self.workers])
        return (time.perf_counter() - began) / (times * len(self.workers))

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
        return {"workers": len(self.workers), "workers_lost": self.lost}

    def limit(self, what: str) -> float:
        """Return the seconds after which a worker is given up that has not answered."""
        return max(self._settings.hang, 5.0 * self._slowest.get(what, 0.0))

    def took(self, what: str, seconds: float) -> None:
        """Remember how long a worker may take for something."""
        self._slowest[what] = max(self._slowest.get(what, 0.0), seconds)

    def lose(self, worker: Worker, why: str) -> None:
        """Do without a worker from here on."""
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        self.lost += 1
        with contextlib.suppress(Exception):
            ray.kill(worker.actor, no_restart=True)
        tell(f"worker {worker.name} is lost ({why}): its tasks are sampled again elsewhere")

    def another(self, busy: Sequence[Worker]) -> Worker:
        """Return the worker with the least to do; wait for one where there is none.

        Raises:
            RunStopped: if none comes.
        """
        if not self.workers:
            self._await_worker()
        return min(self.workers, key=busy.count)

    def _join(self) -> None:
        """Take in workers that are ready, and ask for as many as there is room for."""
        if self._joining:
            ready, _ = ray.wait(list(self._joining), num_returns=len(self._joining), timeout=0)
            for reference in ready:
                self._greet(reference)
        free, settings = ray.available_resources(), self._settings
        room = free.get("CPU", 0.0) / settings.threads_per_worker
        if settings.gpus_per_worker:
            room = min(room, free.get("GPU", 0.0) / settings.gpus_per_worker)
        missing = self._wanted - len(self.workers) - len(self._joining)
        for _ in range(min(missing, int(room))):
            actor = self._make.remote(*self._arguments)
            self._joining[actor.hello.remote(self._experiment.physics)] = actor

    def _greet(self, reference: Any) -> None:
        """Take in a worker that has answered, unless it is of other versions."""
        actor = self._joining.pop(reference)
        try:
            found = ray.get(reference)
        except RayError as error:
            tell(f"a worker did not start: {first_line(error)}")
            return
        name = f"{found['host']} process {found['pid']}"
        ours = {**versions(self._experiment.physics), "machine": platform.machine()}
        differing = [
            f"{package} {found.get(package, 'absent')} (here {ours[package]})"
            for package in (*MATTERS, "machine")
            if package in ours and found.get(package) != ours[package]
        ]
        if not differing:
            self.workers.append(Worker(actor, name))
            return
        ray.kill(actor, no_restart=True)
        if found["host"] not in self._refused:
            self._refused.add(found["host"])
            tell(f"worker {name} is refused: it has {', '.join(differing)}")

    def _await_worker(self) -> None:
        """Wait until there is a worker.

        Raises:
            RunStopped: if there is none in time.
        """
        until = time.monotonic() + self._settings.patience
        told = False
        while not self.workers:
            self._join()
            if self._joining:
                ready, _ = ray.wait(list(self._joining), timeout=1.0)
                for reference in ready:
                    self._greet(reference)
            else:
                time.sleep(0.5)
            if self.workers:
                return
            if time.monotonic() > until:
                raise RunStopped(
                    f"no worker is left in the cluster, and none has joined in "
                    f"{self._settings.patience:g} s (cluster.patience); what was done is saved",
                    4,
                )
            if not told and time.monotonic() > until - self._settings.patience + 30.0:
                told = True
                tell(f"no worker is there; waiting up to {self._settings.patience:g} s for one")

    def _await_others(self) -> None:
        """Give the first workers' fellows a little time, so that the first iteration has them."""
        until = time.monotonic() + 30.0
        while self._joining and time.monotonic() < until:
            ready, _ = ray.wait(list(self._joining), timeout=0.5)
            for reference in ready:
                self._greet(reference)

    def close(self) -> None:
        """Let the workers go."""
        for worker in self.workers:
            with contextlib.suppress(Exception):
                ray.kill(worker.actor, no_restart=True)
        for actor in self._joining.values():
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        ray.shutdown()


class Batch:
    """One iteration's tasks, wherever they are: the trust region's objective."""

    def __init__(self, cluster: Cluster, parts: Sequence[Part], theta: Any, iteration: int) -> None:
        self._cluster = cluster
        self._theta = theta
        self._iteration = iteration
        self._pool: int | None = None
        self._moved = False
        self._redone: dict[Part, list[Any]] = {}
        self._homes = dict(zip(parts, cluster.workers, strict=False))
        for worker in cluster.workers:
            worker.actor.forget.remote()

    def begin(self) -> list[ShardReport]:
        """Have every part sampled and adapted to."""
        return self._ask("begin", lambda actor, part: self._begin(actor, part))

    def build(self, pool: int) -> None:
        """Have every part linearised."""
        self._pool = pool
        self._ask("build", lambda actor, part: actor.build.remote(part.start, pool))

    def gradient(self) -> Tensor:
        """See `Objective.gradient`."""
        terms = self._ask("gradient", lambda actor, part: actor.gradient.remote(part.start))
        joined = torch.cat(terms)
        return sum_of(joined) / len(joined)

    def product(self, vector: Tensor) -> Tensor:
        """See `Objective.product`."""
        sent = ray.put(vector)
        terms = self._ask("product", lambda actor, part: actor.product.remote(part.start, sent))
        return sum_of(torch.cat(terms))

    def evaluate(self, candidate: Tensor) -> tuple[float, float]:
        """See `Objective.evaluate`."""
        sent = ray.put(candidate)
        terms = self._ask("evaluate", lambda actor, part: actor.evaluate.remote(part.start, sent))
        joined = torch.cat(terms)
        surrogate, kl = sum_of(joined).tolist()
        return surrogate / len(joined), kl

    def _begin(self, actor: Any, part: Part) -> Any:
        return actor.begin.remote(self._theta, self._iteration, part.start, part.stop)

    def _ask(self, what: str, call: Callable[[Any, Part], Any]) -> list[Any]:
        """Ask for every part, and again elsewhere where its worker is lost; in task order."""
        cluster = self._cluster
        answers: dict[Part, Any] = {}
        waiting = {call(worker.actor, part): part for part, worker in self._homes.items()}
        began = last = time.monotonic()
        while waiting:
            left = last + self._limit(what) - time.monotonic()
            ready, _ = ray.wait(list(waiting), timeout=max(0.0, left))
            gone: dict[Worker, str] = {}
            for reference in ready:
                part = waiting.pop(reference)
                try:
                    answers[part] = ray.get(reference, timeout=self._limit(what))
                except RayTaskError as error:
                    first = self._first_error(part, error)
                    raise explained(first, part) from first
                except (RayError, GetTimeoutError) as error:
                    gone[self._homes[part]] = first_line(error)
            if ready:
                last = time.monotonic()
            else:
                why = f"no answer in {self._limit(what):.0f} s"
                gone = {self._homes[part]: why for part in waiting.values()}
            for worker, why in gone.items():
                cluster.lose(worker, why)
                for part in [p for p, home in self._homes.items() if home is worker]:
                    waiting = {r: p for r, p in waiting.items() if p is not part}
                    reference = self._move(part, what, call)
                    if part not in answers:
                        waiting[reference] = part
                last = time.monotonic()
        if not self._moved:
            # What was lost, and was waited for in vain, says nothing of what a worker needs.
            cluster.took(what, time.monotonic() - began)
        return [answers[part] for part in sorted(answers, key=lambda part: part.start)]

    def _limit(self, what: str) -> float:
        """Seconds to wait for an answer; a part that was moved is sampled and built before it."""
        steps = dict.fromkeys(("begin", "build", what)) if self._moved else (what,)
        return sum(map(self._cluster.limit, steps))

    def _move(self, part: Part, what: str, call: Callable[[Any, Part], Any]) -> Any:
        """Give a part to another worker, which does again what had been done."""
        home = self._cluster.another(list(self._homes.values()))
        self._homes[part] = home
        self._moved = True
        self._redone[part] = []
        if what != "begin":
            self._redone[part].append(self._begin(home.actor, part))
            if what != "build":
                self._redone[part].append(home.actor.build.remote(part.start, self._pool))
        return call(home.actor, part)

    def _first_error(self, part: Part, error: RayTaskError) -> RayTaskError:
        """Return the error that came first: in what had to be done again, or else in the answer."""
        for earlier in self._redone.get(part, ()):
            try:
                ray.get(earlier, timeout=self._limit("begin"))
            except RayTaskError as cause:
                return cause
        return error


def tell(what: str) -> None:
    """Say something of the cluster that the user should know."""
    warnings.warn(what, RunWarning, stacklevel=2)


def explained(error: RayTaskError, part: Part) -> Exception:
    """Return what to raise here for an error in a worker."""
    cause = error.cause
    if isinstance(cause, (SamplingError, RunStopped, InputError, MemoryError)):
        return cause
    text = "".join(traceback.format_exception_only(cause)) if cause else str(error)
    return RuntimeError(
        f"a worker failed with tasks {part.start} to {part.stop - 1}: {text.strip()}\n{error}"
    )


def first_line(error: Exception) -> str:
    """Return what an error says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def connect(settings: ClusterSettings, local: int) -> None:
    """Join the cluster, or begin one of this machine alone.

    Raises:
        InputError: if there is none at the address.
    """
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with warnings.catch_warnings():
        # Ray's own, of what it will change.
        warnings.simplefilter("ignore")
        if local:
            # By its name: without an address ray joins any cluster that it finds.
            ray.init("local", num_cpus=local * settings.threads_per_worker, **quiet)
            return
        where = settings.address
        try:
            if where != "auto":
                host, _, port = where.rpartition(":")
                with socket.create_connection((host, int(port)), timeout=10.0):
                    pass
            ray.init(address=where, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"no Ray cluster answers at {where}: {first_line(error)}; start one with: "
                "ray start --head"
            ) from error
