"""Processes of a Ray cluster that do what they are asked; knows nothing of what that is.

The only module that imports ray. A worker is a Ray actor that holds one object and calls its
methods. A worker that is lost, or does not answer in time, is done without; who asked has it done
again by another. Nothing here waits for ever.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from envs.references import allow_imports, imports_allowed
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.errors import NOBODY_LEFT, InputError, RunStopped, RunWarning
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

T = TypeVar("T")

MATTERS = ("maml-rl", "torch", "mujoco", "numpy", "mujoco-warp", "warp-lang")
"""Packages of which a worker must have the driver's versions."""
HEAD_ANSWERS = 20.0
"""Seconds in which Ray's head must answer. Ray ends a process itself 60 s after it lost it."""
LOOK_EVERY = 10.0
"""Seconds after which a wait looks whether it is still there."""
UNKNOWN = 10.0
"""Times `hang` that a worker may take for what none has done yet."""

Ticket = Any
"""What a worker will answer."""


class WorkerLostError(Exception):
    """A worker is no more, or its answer is not."""


class WorkerFailedError(Exception):
    """What a worker was asked for raised an exception; the message has the worker's traceback."""

    def __init__(self, error: RayTaskError) -> None:
        super().__init__(str(error))
        self.cause: Exception | None = error.cause
        """As it was raised there."""

    def explained(self, what: str) -> RuntimeError:
        """Return a mistake to raise here, with the worker's traceback.

        Args:
            what: the worker was asked for, in words.
        """
        text = "".join(traceback.format_exception_only(self.cause)) if self.cause else ""
        return RuntimeError(f"a worker failed with {what}: {text.strip()}\n{self}")


class Actor:
    """A worker's process."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...], imports: bool) -> None:
        torch.set_num_threads(1)
        # What the user has allowed there is allowed here.
        self._allowing = allow_imports if imports else nullcontext
        with self._allowing():
            self._held = make(*arguments)

    def hello(self, physics: str) -> dict[str, str]:
        """Return what this process runs, and where."""
        where = {"host": socket.gethostname(), "pid": str(os.getpid())}
        return {**versions(physics), **where, "machine": platform.machine()}

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of what is held."""
        with self._allowing():
            return getattr(self._held, method)(*arguments)


@dataclass(eq=False)
class Worker:
    """A worker as the driver sees it."""

    actor: Any
    name: str
    """Host and process, for messages."""


class Cluster(AbstractContextManager["Cluster"]):
    """A connection to a Ray cluster, whose workers the crews of one command share."""

    def __init__(self, settings: ClusterSettings) -> None:
        """Connect.

        Raises:
            InputError: if there is no cluster at the address, or no room for a worker in it.
        """
        self.settings = settings
        self.crews_to_come = 1
        """Among how many crews the workers are shared."""
        self.dropped = False
        """Set, every wait ends with an exception."""
        self._looked = time.monotonic()
        self._gone = False
        connect(settings)
        try:
            self._check_room()
        except BaseException:
            self.close()
            raise

    def _check_room(self) -> None:
        """Raise InputError if no worker will ever fit."""
        settings = self.settings
        if not self._fitting_in_all():
            raise InputError(
                f"the cluster has no room for a worker of {settings.threads_per_worker} cores and "
                f"{settings.gpus_per_worker:g} GPUs: no machine of it has so many"
            )

    def _fitting(self, resources: dict[str, float]) -> int:
        """Return how many workers these resources are enough for."""
        settings = self.settings
        fitting = resources.get("CPU", 0.0) / settings.threads_per_worker
        if settings.gpus_per_worker:
            fitting = min(fitting, resources.get("GPU", 0.0) / settings.gpus_per_worker)
        return int(fitting)

    def _fitting_in_all(self) -> int:
        """Return how many workers the machines are large enough for, each of them on one."""
        machines = self.ask_head(ray.nodes)
        return sum(self._fitting(one["Resources"]) for one in machines if one["Alive"])

    @property
    def workers(self) -> int:
        """Workers that all crews may have together: as many as asked for, or as fit."""
        asked = self.settings.local_workers or self.settings.workers
        return asked or max(1, self._fitting_in_all())

    def room(self) -> int:
        """Return how many workers more fit at the moment."""
        return self._fitting(self.ask_head(ray.available_resources))

    def ask_head(self, question: Callable[[], T]) -> T:
        """Return what Ray's head answers, which Ray itself would wait for without end.

        Raises:
            RunStopped: if it does not.
        """
        answer = Future[T]()

        def ask() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        # A daemon: where the head is gone it never comes back, and must not keep Python.
        threading.Thread(target=ask, daemon=True).start()
        try:
            return answer.result(0.0 if self._gone else HEAD_ANSWERS)
        except TimeoutError:
            self._gone = True
            raise RunStopped(
                "the head of the Ray cluster, its first machine, has not answered in "
                f"{HEAD_ANSWERS:g} s",
                NOBODY_LEFT,
            ) from None

    def look(self) -> None:
        """Raise RunStopped if the head is gone, or everything is to end; called in every wait."""
        if self.dropped:
            raise RunStopped("interrupted", 130)
        if time.monotonic() > self._looked + LOOK_EVERY:
            self._looked = time.monotonic()
            self.ask_head(ray.nodes)

    def close(self) -> None:
        """Leave the cluster."""
        # Though the head is gone, what is here wants a little time to end.
        self._gone = False
        with contextlib.suppress(RunStopped):
            self.ask_head(ray.shutdown)

    def __exit__(self, *exception: object) -> None:
        self.close()


class Crew(AbstractContextManager["Crew"]):
    """Workers that hold the same: those that there are, and those that join."""

    def __init__(
        self,
        cluster: Cluster,
        most: int,
        physics: str,
        make: Callable[..., object],
        arguments: tuple[object, ...] = (),
    ) -> None:
        """Wait for the first worker.

        Args:
            cluster: whose workers.
            most: of them that there is work for.
            physics: what simulates, whose version matters.
            make: makes what a worker holds.
            arguments: what it is made of.

        Raises:
            RunStopped: if no worker comes.
        """
        self._cluster = cluster
        self._settings = cluster.settings
        self._most = most
        self._physics = physics
        self._arguments = (make, arguments, imports_allowed())
        self._make = ray.remote(Actor).options(
            num_cpus=self._settings.threads_per_worker,
            num_gpus=self._settings.gpus_per_worker,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self.workers: list[Worker] = []
        self.lost = 0
        """Workers, so far."""
        self._joining: dict[Ticket, Any] = {}
        self._refused: set[str] = set()
        self._slowest: dict[str, float] = {}
        try:
            self.await_worker()
            # Its fellows get a little time, so that the first work is shared.
            until = time.monotonic() + 30.0
            while self._joining and time.monotonic() < until:
                self._greet_who_comes(0.5)
        except BaseException:
            self.close()
            raise

    def put(self, value: object) -> Any:
        """Have a value where every worker finds it; to be given to `call` in its place."""
        return ray.put(value)

    def call(self, worker: Worker, method: str, *arguments: object) -> Ticket:
        """Ask a worker for something."""
        return worker.actor.call.remote(method, *arguments)

    def wait(self, tickets: Iterable[Ticket], until: float) -> list[Ticket]:
        """Return tickets that are answered, at least one; none at `until`, by the monotonic clock.

        Raises:
            RunStopped: if the head is gone.
        """
        waiting = list(tickets)
        while True:
            self._cluster.look()
            left = until - time.monotonic()
            ready, _ = ray.wait(waiting, timeout=min(max(0.0, left), 2.0))
            if ready or left <= 0:
                return list(ready)

    def answer(self, ticket: Ticket) -> Any:
        """Return the answer to what was asked.

        Raises:
            WorkerLostError: if there will be none.
            WorkerFailedError: if it is an exception.
        """
        try:
            return ray.get(ticket, timeout=self._settings.hang)
        except RayTaskError as error:
            raise WorkerFailedError(error) from error
        except (RayError, GetTimeoutError) as error:
            raise WorkerLostError(first_line(error)) from error

    def limit(self, what: str, amount: float = 1.0) -> float:
        """Return the seconds after which a worker is given up that has not answered."""
        hang = self._settings.hang
        slowest = self._slowest.get(what)
        return UNKNOWN * hang if slowest is None else max(hang, 5.0 * slowest * amount)

    def took(self, what: str, seconds: float, amount: float = 1.0) -> None:
        """Remember how long a worker may take for so much of something."""
        self._slowest[what] = max(self._slowest.get(what, 0.0), seconds / amount)

    def lose(self, worker: Worker, why: str) -> None:
        """Do without a worker from here on."""
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        self.lost += 1
        self._end(worker.actor)
        tell(f"worker {worker.name} is lost ({why}): its tasks are sampled again elsewhere")

    def another(self, busy: Iterable[Worker]) -> Worker:
        """Return the worker with the least to do; wait for one where there is none.

        Raises:
            RunStopped: if none comes.
        """
        self.await_worker()
        return min(self.workers, key=list(busy).count)

    def join(self) -> None:
        """Take in workers that are ready, and ask for as many as there is room for.

        Raises:
            RunStopped: if the head is gone.
        """
        self._greet_who_comes(0.0)
        cluster = self._cluster
        share = max(1, cluster.workers // cluster.crews_to_come)
        missing = min(share, self._most) - len(self.workers) - len(self._joining)
        for _ in range(min(missing, cluster.room()) if missing > 0 else 0):
            actor = self._make.remote(*self._arguments)
            self._joining[actor.hello.remote(self._physics)] = actor

    def _greet_who_comes(self, seconds: float) -> None:
        """Take in workers that are ready in so many seconds."""
        if self._joining:
            waiting = list(self._joining)
            ready, _ = ray.wait(
                waiting, num_returns=1 if seconds else len(waiting), timeout=seconds
            )
            for reference in ready:
                self._greet(reference)

    def _greet(self, reference: Ticket) -> None:
        """Take in a worker that has answered, unless it is of other versions."""
        actor = self._joining.pop(reference)
        try:
            found = ray.get(reference, timeout=self._settings.hang)
        except (RayError, GetTimeoutError) as error:
            tell(f"a worker did not start: {first_line(error)}")
            return
        name = f"{found['host']} process {found['pid']}"
        ours = {**versions(self._physics), "machine": platform.machine()}
        differing = [
            f"{package} {found.get(package, 'absent')} (here {ours[package]})"
            for package in (*MATTERS, "machine")
            if package in ours and found.get(package) != ours[package]
        ]
        if not differing:
            self.workers.append(Worker(actor, name))
            return
        self._end(actor)
        if found["host"] not in self._refused:
            self._refused.add(found["host"])
            tell(f"worker {name} is refused: it has {', '.join(differing)}")

    def await_worker(self) -> None:
        """Wait until there is a worker.

        Raises:
            RunStopped: if there is none in time, or the head is gone.
        """
        patience = self._settings.patience
        began, told = time.monotonic(), False
        while not self.workers:
            self.join()
            if self.workers:
                return
            if self._joining:
                self._greet_who_comes(1.0)
            else:
                time.sleep(0.5)
            self._cluster.look()
            waited = time.monotonic() - began
            if not self.workers and waited > patience:
                raise RunStopped(
                    f"no worker is left in the cluster, and none has joined in {patience:g} s "
                    "(cluster.patience)",
                    NOBODY_LEFT,
                )
            if not told and waited > 30.0:
                told = True
                tell(f"no worker is there; waiting up to {patience:g} s for one")

    def _end(self, *actors: Any) -> None:
        """End workers' processes, those that can be."""

        def end() -> None:
            for actor in actors:
                with contextlib.suppress(Exception):
                    ray.kill(actor, no_restart=True)

        with contextlib.suppress(RunStopped):
            self._cluster.ask_head(end)

    def close(self) -> None:
        """Let the workers go."""
        self._end(*(worker.actor for worker in self.workers), *self._joining.values())
        self.workers.clear()
        self._joining.clear()

    def __exit__(self, *exception: object) -> None:
        self.close()


def tell(what: str) -> None:
    """Say something of the cluster that the user should know."""
    warnings.warn(what, RunWarning, stacklevel=2)


def first_line(error: Exception) -> str:
    """Return what an error says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def connect(settings: ClusterSettings) -> None:
    """Join the cluster, or begin one of this machine alone.

    Raises:
        InputError: if there is none at the address.
    """
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    local, where = settings.local_workers, settings.address
    with warnings.catch_warnings():
        # Ray's own, of what it will change.
        warnings.simplefilter("ignore")
        if local:
            # By its name: without an address ray joins any cluster that it finds.
            cores = local * settings.threads_per_worker
            # Traffic stays on the loopback, where all of it has addresses; Ray refuses the first.
            loopback = "127.0.0.2" if sys.platform == "linux" else None
            ray.init(
                "local",
                num_cpus=cores,
                include_dashboard=False,
                _node_ip_address=loopback,
                **quiet,
            )
            return
        try:
            if where != "auto":
                host, _, port = where.rpartition(":")
                with socket.create_connection((host, int(port)), timeout=10.0):
                    pass
            ray.init(address=where, **quiet)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"no Ray cluster answers at {where}: {first_line(error)}; start one with: "
                "ray start --head"
            ) from error
