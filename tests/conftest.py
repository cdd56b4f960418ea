"""Fixtures and helpers that more than one test module needs."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from maml_rl.opengl import choose_platform, what_is_missing

# Before anything imports mujoco, so that bodies can be drawn in this process.
choose_platform()

from maml_rl.chunks import torch_threads  # noqa: E402

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv

needs_opengl = pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_arrives() -> None:
    """A shell that starts pytest in the background has it ignore SIGINT, which is tested here."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: object) -> Iterator[None]:
    """Where all that tests need has been installed, as in .ci/run, a skipped one has failed."""
    report: pytest.TestReport = yield  # type: ignore[assignment]  # what pytest sends
    if report.skipped and os.environ.get("MAML_RL_NO_SKIPS"):
        report.outcome = "failed"
    return report  # type: ignore[return-value]  # a hook's wrapper gives back what it was sent


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """As in training; two threads that wait for each other take 40 times as long on a busy core."""
    with torch_threads(1):
        yield


@pytest.fixture
def gymnasium_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], MujocoEnv]:
    """Build one of Gymnasium's own MuJoCo environments from its module's and its class's name.

    Gymnasium imports imageio to write pictures, which nothing here does: where it is not
    installed an empty module stands in. MuJoCo logs to the working directory.
    """
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("imageio") is None:
        monkeypatch.setitem(sys.modules, "imageio", ModuleType("imageio"))

    def build(module: str, name: str) -> MujocoEnv:
        cls: type[MujocoEnv] = getattr(
            importlib.import_module(f"gymnasium.envs.mujoco.{module}"), name
        )
        return cls()  # type: ignore[call-arg]  # the subclass knows its own file

    return build


@contextmanager
def files_at_most(count: int) -> Iterator[None]:
    """Let no file grow over `count` bytes, as on a full disk or over a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rows(run: Path) -> list[Mapping[str, str]]:
    """Rows of a run's metrics without the times, which no two runs share."""
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith("seconds")}
            for row in csv.DictReader(file)
        ]
