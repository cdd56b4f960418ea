"""Tasks in chunks, each on one thread; results are in task order for any number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self, TypeVar

import torch

from maml_rl.adapt import Params

T = TypeVar("T")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run a block with so many torch threads in this thread of Python."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Chunks:
    """Applies a function to chunks of tasks on a few threads of one torch thread each."""

    def __init__(self, threads: int = 0, size: int = 1) -> None:
        """Make a pool of `threads` threads (0: one a core) and chunks of `size` tasks (0: all)."""
        self.threads = threads or len(os.sched_getaffinity(0))
        self.size = size
        self._start_threads()

    def _start_threads(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(
            self.threads, "maml-rl", initializer=torch.set_num_threads, initargs=(1,)
        )

    def map(self, function: Callable[[int, int], T], tasks: int) -> list[T]:
        """Return function(start, stop) of every chunk, in task order."""
        if self._process != os.getpid():
            # After a fork: the parent's threads are not here.
            self._start_threads()
        size = self.size or tasks
        if size >= tasks:
            # Nothing to share: on a GPU, where this is usual, a thread would only be in the way.
            with torch_threads(1):
                return [function(0, tasks)]
        starts = range(0, tasks, size)
        return list(self._pool.map(lambda s: function(s, min(s + size, tasks)), starts))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def of_tasks(params: Params, start: int, stop: int) -> Params:
    """Return parameters of tasks start to stop - 1."""
    return {name: p[start:stop] for name, p in params.items()}


def join_tasks(parts: Sequence[Params]) -> Params:
    """Join chunks of tasks' parameters along the task axis."""
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
