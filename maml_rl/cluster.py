"""Processes of a Ray cluster that do what they are asked; knows nothing of what that is.

The only module that imports ray. A worker is a Ray actor that holds one object and calls its
methods. A worker that is lost, or does not answer in time, is done without; who asked has it done
again by another. Nothing here waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
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

# Before ray is imported, which reads them then. A late call shall not begin another cluster.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

try:
    import ray
    from ray.exceptions import (
        ActorDiedError,
        ActorUnavailableError,
        GetTimeoutError,
        RayError,
        RayTaskError,
    )
except ImportError as missing:
    raise ImportError(
        "a cluster needs ray, which is not installed: pip install 'ray>=2.50'"
    ) from missing

T = TypeVar("T")

MATTERS = ("maml-rl", "git", "torch", "mujoco", "numpy", "mujoco-warp", "warp-lang")
"""Packages of which a worker must have the driver's versions."""
CONNECTED = 30.0
"""Seconds in which a cluster must be joined."""
HEAD_ANSWERS = 20.0
"""Seconds in which Ray's head must answer. Ray ends a process itself 60 s after it lost it."""
LOOK_EVERY = 10.0
"""Seconds after which a wait looks whether it is still there."""
STARTING = 60.0
"""Seconds that a process may take to start, however short patience is."""
RETRIES = 3
"""Times that something is tried again which has cost a worker."""
UNKNOWN = 10.0
"""Times `hang` that a worker may take for what none has done yet."""

Ticket = Any
"""What a worker will answer."""


class WorkerLostError(Exception):
    """A worker is no more, or its answer is not."""


class WorkerFailedError(Exception):
    """What a worker was asked for raised an exception; the message is its traceback there."""

    def __init__(self, error: RayTaskError) -> None:
        super().__init__(plain(str(error)))
        self.cause: Exception | None = error.cause
        """The exception itself."""


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
        self.crews: list[Crew] = []
        self.crews_to_come = 1
        """Among how many crews the workers are shared."""
        self.lock = threading.Lock()
        """Held by the crew that asks for workers."""
        self.dropped = False
        """Set, every wait ends with an exception."""
        self._looked = time.monotonic()
        self._gone = False
        connect(settings)
        try:
            if not self._fitting_in_all():
                raise InputError(
                    f"the cluster has no room for a worker of {settings.threads_per_worker} cores "
                    f"and {settings.gpus_per_worker:g} GPUs: no machine of it has so many"
                )
        except BaseException:
            self.close()
            raise

    def _fitting(self, resources: dict[str, float]) -> int:
        """Return how many workers these resources are enough for."""
        settings = self.settings
        fitting = resources.get("CPU", 0.0) / settings.threads_per_worker
        if settings.gpus_per_worker:
            fitting = min(fitting, resources.get("GPU", 0.0) / settings.gpus_per_worker)
        return int(fitting)

    def machines(self) -> dict[str, dict[str, float]]:
        """Return the resources of each machine, by Ray's name for it."""
        found = self.ask_head(ray.nodes)
        return {one["NodeID"]: one["Resources"] for one in found if one["Alive"]}

    def _fitting_in_all(self) -> int:
        """Return how many workers the machines are large enough for, each of them on one."""
        return sum(map(self._fitting, self.machines().values()))

    @property
    def workers(self) -> int:
        """Workers that all crews may have together: as many as fit, or were asked for."""
        asked, fitting = self.settings.most_workers, max(1, self._fitting_in_all())
        return min(asked, fitting) if asked else fitting

    def room(self) -> int:
        """Return how many workers more there may be at the moment."""
        taken = sum(crew.size for crew in self.crews)
        return min(self.workers - taken, self._fitting(self.ask_head(ray.available_resources)))

    def ask_head(self, question: Callable[[], T]) -> T:
        """Return what Ray's head answers, which Ray itself would wait for without end.

        Raises:
            RunStopped: if it does not.
        """
        try:
            return in_time(question, 0.0 if self._gone else HEAD_ANSWERS)
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
            self.machines()

    def close(self) -> None:
        """Let all workers go, and leave the cluster."""
        for crew in list(self.crews):
            crew.close()
        # Though the head is gone, what is here wants a little time to end.
        with contextlib.suppress(TimeoutError):
            in_time(ray.shutdown, HEAD_ANSWERS)

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
        self._joining: dict[Ticket, tuple[Any, float]] = {}
        """Processes that are starting, and since when."""
        self._told: set[str] = set()
        self._failures = 0
        self._in_vain = 0
        """Workers asked for in vain on these machines, which another would be too."""
        self._machines: set[str] = set()
        self._slowest: dict[str, float] = {}
        cluster.crews.append(self)
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
            raise WorkerFailedError(error) from None
        except GetTimeoutError:
            raise WorkerLostError("its answer does not come") from None
        except ActorUnavailableError:
            raise WorkerLostError("its machine does not answer") from None
        except ActorDiedError:
            raise WorkerLostError("its process has ended") from None
        except RayError as error:
            raise WorkerLostError(last_line(error)) from None

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

    @property
    def size(self) -> int:
        """Workers, those that are starting included."""
        return len(self.workers) + len(self._joining)

    def join(self) -> None:
        """Take in workers that are ready, and ask for as many as there is room for.

        Raises:
            RunStopped: if the head is gone.
        """
        self._greet_who_comes(0.0)
        cluster = self._cluster
        with cluster.lock:
            share = -(-cluster.workers // cluster.crews_to_come)
            if (machines := set(cluster.machines())) != self._machines:
                self._machines, self._failures, self._in_vain = machines, 0, 0
            missing = min(share, self._most) - self.size - self._in_vain
            for _ in range(min(missing, cluster.room()) if missing > 0 else 0):
                actor = self._make.remote(*self._arguments)
                hello = actor.hello.remote(self._physics)
                self._joining[hello] = actor, time.monotonic()

    def _greet_who_comes(self, seconds: float) -> None:
        """Take in workers that are ready in so many seconds; do without those that hang."""
        if not self._joining:
            return
        count = 1 if seconds else len(self._joining)
        ready, _ = ray.wait(list(self._joining), num_returns=count, timeout=seconds)
        for reference in ready:
            self._greet(reference)
        for reference, (actor, since) in list(self._joining.items()):
            if time.monotonic() > since + self._settings.hang:
                del self._joining[reference]
                self._end(actor)
                self._not_started(f"no answer in {self._settings.hang:g} s", again=True)

    def _not_started(self, why: str, *, again: bool) -> None:
        """Note that a worker did not start, and whether it may be tried again, a few times."""
        self._failures += 1
        self._in_vain += not again or self._failures > RETRIES
        self._tell_once(f"a worker did not start: {why}")

    def _greet(self, reference: Ticket) -> None:
        """Take in a worker that has answered, unless it is of other versions."""
        actor, _ = self._joining.pop(reference)
        try:
            found = ray.get(reference, timeout=self._settings.hang)
        except (RayError, GetTimeoutError) as error:
            self._not_started(last_line(error), again="creation task" not in str(error))
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
        self._in_vain += 1
        self._tell_once(f"worker {name} is refused: it has {', '.join(differing)}", found["host"])

    def _tell_once(self, what: str, key: str = "") -> None:
        """Say something, if nothing of that key has been said; by default, if it has not been."""
        if (key or what) not in self._told:
            self._told.add(key or what)
            tell(what)

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
            self._cluster.look()
            if self._joining:
                self._greet_who_comes(1.0)
            else:
                time.sleep(0.5)
            # Other runs' workers will be free.
            if any(crew.size for crew in self._cluster.crews if crew is not self):
                began = time.monotonic()
            waited = time.monotonic() - began
            if waited > (max(patience, STARTING) if self._joining else patience):
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
        if self in self._cluster.crews:
            self._cluster.crews.remove(self)
            starting = [actor for actor, _ in self._joining.values()]
            self._end(*(worker.actor for worker in self.workers), *starting)
            self.workers.clear()
            self._joining.clear()

    def __exit__(self, *exception: object) -> None:
        self.close()


def tell(what: str) -> None:
    """Say something of the cluster that the user should know."""
    warnings.warn(what, RunWarning, stacklevel=2)


def plain(text: str) -> str:
    """Return text without what colours it in a terminal."""
    return re.sub(r"\x1b\[\d*m", "", text)


def last_line(error: BaseException) -> str:
    """Return what an error says, in a line: the last one, where a traceback has its cause."""
    lines = plain(str(error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def in_time(question: Callable[[], T], seconds: float) -> T:
    """Return what a function returns.

    Raises:
        TimeoutError: if it takes longer. It is left to itself, in a thread that keeps nothing.
    """
    answer = Future[T]()

    def ask() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(seconds)


def connect(settings: ClusterSettings) -> None:
    """Join the cluster, or begin one of this machine alone.

    Raises:
        InputError: if there is none at the address in 30 s.
    """
    where = settings.address
    options: dict[str, Any] = {"address": where, "log_to_driver": False, "logging_level": "ERROR"}
    if local := settings.local_workers:
        # By its name: without an address ray joins any cluster that it finds.
        options |= {"address": "local", "num_cpus": local * settings.threads_per_worker}
        options |= {"include_dashboard": False}
        if sys.platform == "linux":
            # Traffic stays on the loopback; its first address Ray does not take.
            options |= {"_node_ip_address": "127.0.0.2"}
    terminate = signal.getsignal(signal.SIGTERM)
    # It prints what becomes of processes, of which the run tells a line itself.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    with warnings.catch_warnings():
        # Ray's own, of what it will change.
        warnings.simplefilter("ignore")
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            if where != "auto" and not local:
                host, _, port = where.rpartition(":")
                with socket.create_connection((host, int(port)), timeout=CONNECTED):
                    pass
            if local:
                # In this thread, since what it starts ends with the thread.
                ray.init(**options)
            else:
                in_time(lambda: ray.init(**options), CONNECTED)
        except (ConnectionError, OSError, ValueError, RuntimeError, TimeoutError) as error:
            why = last_line(error) if str(error) else f"nothing in {CONNECTED:g} s"
            raise InputError(
                f"no Ray cluster answers at {where}: {why}; start one with: ray start --head"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                # Ray has taken SIGTERM for itself, in Python and in C++.
                signal.signal(signal.SIGTERM, terminate)
