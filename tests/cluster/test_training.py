"""Iterations spread over a Ray cluster: the bits of one process, whatever becomes of the workers.

Layers have 16 units or more: torch multiplies smaller matrices in another way.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from ray import cluster_utils

from envs import Navigation2D, TaskFamily
from envs.family import Transition, Worlds
from envs.navigation import NavigationWorlds
from maml_rl.adapt import Params
from maml_rl.cli import run
from maml_rl.cluster import Actor, Crew, Worker
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.config import Experiment, load_experiment
from maml_rl.errors import RunStopped, RunWarning
from maml_rl.loop import Watcher
from maml_rl.maml import outer_step
from maml_rl.runs import Row, RunFolder
from maml_rl.sampler import task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.spread import Batch, Part, Shards, Spread, divide, unit_of
from maml_rl.train import meta_train, resume
from maml_rl.trained import new_policy
from maml_rl.versions import versions
from maml_rl.workplace import workplace_for
from tests.cluster.conftest import FILTERS, node
from tests.conftest import rows
from tests.tiny import SETTINGS, flags

pytestmark = FILTERS

SMALL: Mapping[str, object] = {
    **SETTINGS,
    "sampling__tasks": 10,
    "sampling__episodes": 4,
    "policy__layers": [16, 17],
}
"""Ten tasks are five chunks of two."""


NAVIGATION = load_experiment("navigation", **SMALL)


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    params: Params
    table: list[dict[str, str]]
    workers: list[int]
    """In each iteration; empty for a run in one process."""
    lost: list[int]

    def same_as(self, other: Outcome) -> bool:
        """Whether parameters are the same bits, and metrics the same text."""
        a, b = self.params, other.params
        same = list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
        return same and self.table == other.table


def outcome(params: Params, folder: Path) -> Outcome:
    """Read a run's folder."""
    table = [dict(row) for row in rows(folder)]
    columns = [[int(row.pop(c)) for row in table if c in row] for c in ("workers", "workers_lost")]
    return Outcome(params, table, *columns)


def train(
    experiment: Experiment[TaskFamily],
    folder: Path,
    address: str,
    *,
    watch: Watcher | None = None,
    **settings: Any,
) -> Outcome:
    """Train on a cluster."""
    with workplace_for(ClusterSettings(address=address, **settings)) as place:
        trained = meta_train(experiment, out=folder, engine=place.engine, watch=watch)
    return outcome(trained.params, folder)


@functools.cache
def alone(experiment: Experiment[TaskFamily]) -> Outcome:
    """The same in one process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        return outcome(meta_train(experiment, out=out).params, out)


def process(worker: Worker) -> int:
    """The process that a worker is."""
    return int(worker.name.split()[-1])


@pytest.fixture
def disturb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let something befall workers while they do what they are asked for the nth time."""

    def install(
        what: str,
        nth: int = 1,
        *,
        victims: int = 1,
        act: Callable[[Batch, int], None] = lambda batch, pid: os.kill(pid, signal.SIGKILL),
    ) -> list[int]:
        """Stop the first `victims` workers, so that none has answered when they are acted on."""
        true, asked, struck = Crew.wait, Counter[str](), list[int]()
        true_ask = Batch._ask

        def ask(self: Batch, kind: str, *arguments: object) -> list[Any]:
            asked[kind] += 1
            if (kind, asked[kind]) != (what, nth):
                return true_ask(self, kind, *arguments)
            pids = [process(worker) for worker in self._crew.workers[:victims]]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)

            def wait(crew: Crew, *waited: Any) -> list[Any]:
                if not struck:
                    # All have been asked.
                    struck.extend(pids)
                    for pid in pids:
                        act(self, pid)
                return true(crew, *waited)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Crew, "wait", wait)
                return true_ask(self, kind, *arguments)

        monkeypatch.setattr(Batch, "_ask", ask)
        return struck

    return install


@pytest.mark.parametrize(
    ("tasks", "chunk", "workers", "sizes"),
    [
        (40, 4, 1, [40]),
        (40, 4, 3, [16, 12, 12]),
        (10, 2, 3, [4, 4, 2]),
        (7, 4, 2, [4, 3]),
        (6, 3, 5, [3, 3]),
        (1, 1, 1, [1]),
        (11, 4, 2, [8, 3]),
    ],
)
def test_tasks_are_divided_in_whole_chunks(
    tasks: int, chunk: int, workers: int, sizes: list[int]
) -> None:
    """In order, none left out, as even as whole chunks can be, and no part without tasks."""
    parts = divide(tasks, chunk, workers)
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_any_number_of_workers_comes_to_the_bits_of_one_process(
    workers: int, tmp_path: Path
) -> None:
    """Ten tasks are five chunks, which three workers cannot share evenly."""
    experiment = NAVIGATION
    found = train(experiment, tmp_path / "run", f"local:{workers}")
    assert found.same_as(alone(experiment))
    assert (found.workers, found.lost) == ([workers] * 3, [0] * 3)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        # Whose episodes end early, so that parts differ in steps; of 1100 steps, some end.
        ("ant_dir", {"sampling__count": "steps", "family__horizon": 60, "sampling__tasks": 6}),
        ("navigation", {"adaptation__inner_steps": 0}),
        ("navigation", {"adaptation__inner_steps": 2, "sampling__tasks": 7}),
        ("navigation", {"adaptation__inner_loss": "likelihood-ratio"}),
        ("navigation", {"trust_region__momentum": 0.9}),
        (
            "navigation",
            {"trust_region__later_from": [1], "trust_region__later_max_kls": [0.001]},
        ),
        # Of five chunks the first and the third, which are not with one worker.
        ("navigation", {"trust_region__metric_share": 0.4}),
        ("half_cheetah_vel", {"sampling__tasks": 9, "sampling__tasks_at_once": 2}),
        # Three episodes: products that do not begin at whole 16 bytes.
        ("half_cheetah_vel", {"sampling__episodes": 3}),
    ],
)
def test_whatever_is_trained(
    name: str, changed: dict[str, object], address: str, tmp_path: Path
) -> None:
    """The bits of one process with two workers."""
    experiment = load_experiment(name, **{**SMALL, **changed})
    found = train(experiment, tmp_path / "run", address, workers=2)
    assert found.same_as(alone(experiment))
    assert found.workers[0] == 2


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("what", "nth"),
    [("begin", 1), ("begin", 2), ("build", 2), ("gradient", 1), ("product", 4), ("evaluate", 2)],
)
def test_a_worker_may_be_killed_at_any_time(
    what: str, nth: int, address: str, disturb: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Its tasks are done again elsewhere, the user is told once, and no bit differs."""
    experiment = NAVIGATION
    struck = disturb(what, nth)
    with pytest.warns(RunWarning, match="is lost") as told:
        found = train(experiment, tmp_path / "run", address, workers=2)
    assert len([w for w in told if "is lost" in str(w.message)]) == 1
    assert f"process {struck[0]} " in str(told[0].message)
    assert found.same_as(alone(experiment))
    assert found.lost[-1] == 1


@pytest.mark.cluster
def test_two_workers_may_be_killed_at_once(
    address: str, disturb: Callable[..., list[int]], tmp_path: Path
) -> None:
    """The third does what all three had; the next iteration has three again."""
    disturb("product", 2, victims=2)
    with pytest.warns(RunWarning, match="is lost"):
        found = train(NAVIGATION, tmp_path / "run", address, workers=3)
    assert found.same_as(alone(NAVIGATION))
    assert found.lost == [2, 2, 2]


@pytest.mark.cluster
def test_the_last_worker_may_be_killed(
    address: str, disturb: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Another is made, and does all of it."""
    disturb("build", 2)
    with pytest.warns(RunWarning, match="is lost"):
        found = train(NAVIGATION, tmp_path / "run", address, workers=1)
    assert found.same_as(alone(NAVIGATION))
    assert (found.workers, found.lost) == ([1, 1, 1], [0, 1, 1])


@pytest.mark.cluster
def test_the_worker_that_takes_over_may_be_killed_too(
    address: str,
    disturb: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """While it samples again what the first had."""
    true, killed = Batch._move, list[int]()

    def move(self: Batch, part: Part, what: str, arguments: Sequence[object]) -> Any:
        reference = true(self, part, what, arguments)
        if not killed:
            killed.append(process(self._homes[part]))
            os.kill(killed[0], signal.SIGKILL)
        return reference

    monkeypatch.setattr(Batch, "_move", move)
    disturb("product", 2)
    with pytest.warns(RunWarning, match="is lost"):
        found = train(NAVIGATION, tmp_path / "run", address, workers=3)
    assert found.same_as(alone(NAVIGATION))
    assert found.lost == [2, 2, 2]


@pytest.mark.cluster
def test_a_worker_that_hangs_is_given_up(
    address: str, disturb: Callable[..., list[int]], tmp_path: Path
) -> None:
    """It is stopped, and does not answer in 8 s; nor does that make the next one's time longer."""
    stopped = disturb("product", 3, act=lambda batch, pid: None)
    try:
        with pytest.warns(RunWarning, match="no answer in 8 s"):
            found = train(NAVIGATION, tmp_path / "run", address, workers=2, hang=8.0)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
    assert found.same_as(alone(NAVIGATION))
    assert found.lost == [1, 1, 1]


@pytest.mark.cluster
def test_with_no_worker_left_the_run_ends_and_can_be_resumed(
    address: str, disturb: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Both are killed in the second iteration, and there is no room for others: exit code 4."""

    def kill(batch: Batch, pid: int) -> None:
        crew = batch._crew
        crew._make = ray.remote(Actor).options(num_cpus=100)
        crew._settings = replace(crew._settings, patience=2.0)
        patch.setattr("maml_rl.cluster.STARTING", 2.0)
        os.kill(pid, signal.SIGKILL)

    disturb("build", 2, victims=2, act=kill)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(RunWarning, match="is lost"),
        pytest.raises(RunStopped, match="no worker is left") as stopped,
    ):
        train(NAVIGATION, tmp_path / "run", address, workers=2)
    assert stopped.value.exit_code == 4
    assert RunFolder.open(tmp_path / "run").load().state.iteration == 1
    assert not ray.is_initialized()
    resumed = resume(tmp_path / "run").params
    assert all(torch.equal(p, alone(NAVIGATION).params[n]) for n, p in resumed.items())


@pytest.fixture
def three_nodes() -> Iterator[Any]:
    """A cluster of three nodes with room for a worker each."""
    there = cluster_utils.Cluster(initialize_head=True, head_node_args=node(3, 1))
    for number in (4, 5):
        there.add_node(**node(number, 1))
    yield there
    ray.shutdown()
    there.shutdown()


@pytest.mark.cluster
def test_nodes_may_leave_and_join(
    three_nodes: Any, disturb: Callable[..., list[int]], tmp_path: Path
) -> None:
    """One is lost in the second iteration, in the middle of the conjugate gradients, and another
    joins after it; the third node's worker is there from an iteration after that on."""
    gone: list[Any] = []

    def leave(batch: Batch, pid: int) -> None:
        if not gone:
            # Not the head, which the driver belongs to.
            gone.append(next(iter(three_nodes.worker_nodes)))
            three_nodes.remove_node(gone[0], allow_graceful=False)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def watch(row: Row, total: int) -> None:
        if row["iteration"] == 1:
            three_nodes.add_node(**node(6, 1))
        if cast("int", row["iteration"]) > 1:
            time.sleep(3.0)

    experiment = replace(NAVIGATION, iterations=7)
    disturb("product", NAVIGATION.trust_region.cg_iterations + 4, victims=3, act=leave)
    with pytest.warns(RunWarning, match="is lost"):
        found = train(experiment, tmp_path / "run", three_nodes.address, watch=watch)
    assert found.same_as(alone(experiment))
    assert gone
    assert found.workers[:2] == [3, 2]
    assert found.workers[-1] == 3
    assert found.lost == [0, 1, 1, 1, 1, 1, 1]


@pytest.mark.cluster
def test_a_worker_of_other_versions_is_refused_by_name(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And where there is no other the run has no worker: nothing is left behind."""
    monkeypatch.setattr(
        "maml_rl.cluster.versions", lambda physics: {**versions(physics), "torch": "0.1"}
    )
    with (
        pytest.warns(RunWarning, match=r"is refused: it has torch \S+ \(here 0\.1\)"),
        pytest.raises(RunStopped, match="no worker is left") as stopped,
    ):
        train(NAVIGATION, tmp_path / "run", address, workers=1, patience=12.0)
    assert stopped.value.exit_code == 4
    assert not (tmp_path / "run").exists()
    # Ray was left, so that the next attempt may begin.
    assert not ray.is_initialized()


class Breaking(NavigationWorlds):
    """Worlds all of which break down in their first step."""

    def step(self, actions: torch.Tensor, where: torch.Tensor | None = None) -> Transition:
        """Step, and break down."""
        step = super().step(actions, where)
        return step._replace(diverged=torch.ones_like(step.diverged))


class Raising(NavigationWorlds):
    """Worlds of a family with a mistake in it."""

    def step(self, actions: torch.Tensor, where: torch.Tensor | None = None) -> Transition:
        """Fail."""
        raise KeyError("no such joint")


class Hungry(NavigationWorlds):
    """Worlds that memory does not suffice for, once there is a file."""

    def step(self, actions: torch.Tensor, where: torch.Tensor | None = None) -> Transition:
        """Fail, or step as always."""
        assert isinstance(self.family, Faulty)
        if Path(self.family.file).exists():
            raise MemoryError
        return super().step(actions, where)


@dataclass(frozen=True, kw_only=True)
class Faulty(Navigation2D):
    """Navigation in worlds that fail."""

    worlds: type[NavigationWorlds] = Breaking
    file: str = "/"

    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        """Make them."""
        return self.worlds(self, count)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("worlds", "error", "message"),
    [
        (Breaking, RunStopped, r"iteration 0, run seed 0: task (0|6) \(seed (\d+)\).* diverged at"),
        (
            Raising,
            RuntimeError,
            r"tasks (0 to 5|6 to 9) of iteration 0 \(run seed 0\): KeyError: 'no such joint'"
            r"(.|\n)*in step",
        ),
        (Hungry, RunStopped, "the memory does not suffice to sample 10 tasks"),
    ],
)
def test_what_fails_in_a_worker_is_told_here(
    worlds: type[NavigationWorlds],
    error: type[Exception],
    message: str,
    address: str,
) -> None:
    """A task has its number in the whole batch; a mistake has its traceback."""
    experiment = replace(NAVIGATION, family=Faulty(horizon=6, worlds=worlds))
    with (
        workplace_for(ClusterSettings(address=address, workers=2)) as place,
        pytest.raises(error, match=message) as caught,
    ):
        meta_train(experiment, engine=place.engine)
    if worlds is Breaking:
        found = re.search(message, str(caught.value))
        assert found is not None
        seeds = task_seeds(TRAINING, 0, 0, 0, 10)
        assert int(found[2]) == int(seeds[int(found[1])])
    if isinstance(caught.value, RunStopped):
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster.address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
        (["--cluster.address", "nowhere"], "must be auto, HOST:PORT or local:N, got 'nowhere'"),
        (["--cluster.address", "auto"], "no Ray cluster answers at auto"),
        (["--cluster.address", "local:0"], "must be auto, HOST:PORT or local:N, got 'local:0'"),
        (["--cluster.address", "local:x"], "must be auto, HOST:PORT or local:N, got 'local:x'"),
        (["--cluster.address", "local:6"], "6 workers are more than 10 tasks"),
        (["--cluster.address", "auto", "--cluster.workers", "6"], "at most 5"),
        (["--cluster.address", "local:²"], "must be auto, HOST:PORT or local:N, got 'local:²'"),
        (["--cluster.hang", "0"], "cluster.hang must be between 1 and"),
        (["--cluster.workers", "2"], "cluster.workers needs cluster.address"),
        (
            ["--cluster.address", "auto", "--cluster.gpus-per-worker", "1.5"],
            "must be a fraction or a whole number of GPUs, got 1.5",
        ),
        pytest.param(
            ["--cluster.address", "local:1", "--cluster.gpus-per-worker", "1"],
            "no room for a worker of 1 cores and 1 GPUs",
            marks=pytest.mark.cluster,
        ),
    ],
)
def test_what_cannot_be_begun_leaves_nothing(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, a sentence, and no run folder."""
    # `auto` would find any cluster of this machine, even another test's.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(set))
    out = tmp_path / "run"
    sizes = flags(**{k: v for k, v in SMALL.items() if k not in SETTINGS or SETTINGS[k] != v})
    assert run(["train", "navigation", "--out", str(out), "--quiet", *sizes, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()
    assert not ray.is_initialized()


def test_without_ray_the_user_is_told_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no run folder."""
    monkeypatch.setitem(sys.modules, "ray", None)
    for module in ("maml_rl.cluster", "maml_rl.spread"):
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr(module)
    words = ["train", "navigation", "--out", str(tmp_path / "run"), "--quiet"]
    assert run([*words, *flags(), "--cluster.address", "auto"]) == 2
    assert "pip install 'ray>=2.50'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
def test_what_fails_in_doing_again_is_told_here(
    address: str, disturb: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Memory that does not suffice for a lost worker's tasks, and not what follows from it."""
    file = tmp_path / "file"

    def kill(batch: Batch, pid: int) -> None:
        file.touch()
        os.kill(pid, signal.SIGKILL)

    disturb("product", 2, act=kill)
    experiment = replace(NAVIGATION, family=Faulty(horizon=6, worlds=Hungry, file=str(file)))
    with (
        workplace_for(ClusterSettings(address=address, workers=2)) as place,
        pytest.warns(RunWarning, match="is lost"),
        pytest.raises(RunStopped, match="the memory does not suffice to sample"),
    ):
        meta_train(experiment, engine=place.engine)


@pytest.mark.cluster
@pytest.mark.parametrize("exhausted", [False, True])
def test_a_process_may_have_one_cluster_after_another(
    exhausted: bool, address: str, tmp_path: Path
) -> None:
    """Even where the first could not be begun, having waited for a worker in vain."""
    if exhausted:
        settings = ClusterSettings(address=address, workers=1, patience=0.0)
        with pytest.MonkeyPatch.context() as patch, workplace_for(settings) as place:
            patch.setattr("maml_rl.cluster.Crew.join", lambda self: None)
            with pytest.raises(RunStopped, match="no worker is left"):
                meta_train(NAVIGATION, engine=place.engine)
    else:
        train(replace(NAVIGATION, iterations=1), tmp_path / "first", address, workers=1)
    assert not ray.is_initialized()
    found = train(NAVIGATION, tmp_path / "second", address, workers=1)
    assert found.same_as(alone(NAVIGATION))


@pytest.mark.cluster
def test_workers_are_measured_against_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    """At a cut scale no goal is judged; what is not measured says that it is predicted."""
    assert run(["speed", "--cluster.address", "local:1", "--scale", "0.1", "--json"]) == 0
    measured, moved, costs, *others = json.loads(capsys.readouterr().out)
    assert 0 < measured["value"] < 3
    assert measured["met"] is None
    # 12,812 parameters: theta, 10 directions and 2 candidates one way; the other way, for a sum
    # over four tasks in float64, a gradient, 10 products and twice 2 numbers.
    assert moved["value"] == pytest.approx((12_812 * (4 * 13 + 8 * 11) + 8 * 4) / 1e6)
    assert costs["value"] > 0
    assert [f["what"].split()[:2] for f in others] == [
        ["predicted:", f"{count:,}"] for count in (4, 16, 64, 256, 1024)
    ]
    assert [f["value"] for f in others] == sorted(f["value"] for f in others)


@dataclass(frozen=True, kw_only=True)
class Deadly(Navigation2D):
    """Navigation whose worlds end their process, if it is another than the driver's."""

    driver: int

    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        """Die."""
        if os.getpid() != self.driver:
            os._exit(1)
        return super().make_worlds(count, threads=threads)


@pytest.mark.cluster
def test_tasks_that_cost_every_worker_end_the_run(address: str) -> None:
    """After four, with exit code 3; else it would go on for ever."""
    experiment = replace(NAVIGATION, family=Deadly(horizon=6, driver=os.getpid()))
    with (
        workplace_for(ClusterSettings(address=address, workers=1)) as place,
        pytest.warns(RunWarning, match=r"is lost \(its process has ended\)") as told,
        pytest.raises(RunStopped, match="tasks 0 to 9 have cost 4 workers") as stopped,
    ):
        meta_train(experiment, engine=place.engine)
    assert stopped.value.exit_code == 3
    assert len([w for w in told if "is lost" in str(w.message)]) == 4


class Unmade(Navigation2D):
    """What no worker can be made with."""

    def __setstate__(self, state: object) -> None:
        raise ModuleNotFoundError("No module named 'mine'")


@pytest.mark.cluster
def test_why_a_worker_cannot_be_made_is_told_once(address: str) -> None:
    """With what it lacks, and not again and again while it is waited for."""
    experiment = replace(NAVIGATION, family=Unmade(horizon=6))
    settings = ClusterSettings(address=address, workers=1, patience=5.0)
    with (
        workplace_for(settings) as place,
        pytest.warns(RunWarning, match="did not start: .*No module named 'mine'") as told,
        pytest.raises(RunStopped, match="no worker is left"),
    ):
        meta_train(experiment, engine=place.engine)
    assert len([w for w in told if "did not start" in str(w.message)]) == 1


def test_a_port_that_says_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who listens there is no Ray: exit code 2 in time."""
    monkeypatch.setattr("maml_rl.cluster.CONNECTED", 0.3)
    monkeypatch.setattr("ray.init", lambda **_: time.sleep(3.0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert run(["train", "navigation", *flags(), "--cluster.address", address]) == 2
    assert f"no Ray cluster answers at {address}: nothing in 0.3 s" in capsys.readouterr().err


def test_what_a_cluster_makes_no_use_of_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `speed`, and too many workers for a run that is gone on with."""
    there = ["--cluster.address", "local:50"]
    assert run(["speed", *there, "--threads", "2", "--seconds", "3"]) == 2
    said = "--threads and --seconds means nothing with --cluster.address"
    assert said in capsys.readouterr().err
    meta_train(replace(NAVIGATION, iterations=1), out=tmp_path / "run")
    assert run(["resume", str(tmp_path / "run"), "--iterations", "2", *there]) == 2
    assert "50 workers are more than 10 tasks in parts of 2 can use" in capsys.readouterr().err


def test_who_takes_long_is_not_given_up_too_soon() -> None:
    """Ten times `hang` for what none has done, then five times the slowest, by the amount."""
    crew = Crew.__new__(Crew)
    crew._settings = ClusterSettings(address="auto", hang=3.0)
    crew._slowest = {}
    assert crew.limit("begin") == 30.0
    crew.took("begin", 8.0, 4.0)
    crew.took("begin", 2.0, 4.0)
    assert (crew.limit("begin"), crew.limit("begin", 4.0), crew.limit("build")) == (
        10.0,
        40.0,
        30.0,
    )
    crew.took("build", 0.1)
    assert crew.limit("build") == 3.0


def test_a_worker_has_worlds_for_its_parts_and_keeps_nothing_else() -> None:
    """Those of parts that are forgotten are used again, if they are enough; graphs are let go."""
    shards = Shards(NAVIGATION, new_policy(NAVIGATION).policy, 2)
    theta = new_policy(NAVIGATION).params
    shards.begin(Part(0, 4), theta, 0)
    first = shards._shards[0]
    kept = [first._adapted]
    shards.forget()
    kept.append(first._adapted)
    assert [one is None for one in kept] == [False, True]
    shards.begin(Part(4, 6), theta, 1)
    assert shards._shards[4] is first
    shards.begin(Part(6, 10), theta, 1)
    assert shards._shards[6] is not first
    shards.forget()
    shards.begin(Part(0, 10), theta, 2)
    assert shards._shards[0].tasks == 10


def test_experiments_are_placed_as_workers_are() -> None:
    """On their threads and, where they have some, on their GPUs; there chunks are as fits."""
    settings = ClusterSettings(address="auto", threads_per_worker=3, gpus_per_worker=0.5)
    spread = Spread(settings)
    placed = spread._placed(NAVIGATION)
    assert (placed.threads, placed.device) == (3, "cuda")
    assert (spread._chunk(placed, 10), spread._chunk(NAVIGATION, 10)) == (0, 2)
    assert (unit_of(0, 3), unit_of(2, 4), unit_of(2, 3), unit_of(3, 2)) == (1, 2, 4, 6)


@pytest.mark.cluster
def test_the_drivers_sums_are_of_one_thread(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Several would add long vectors in another order."""
    seen: list[int] = []

    def step(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return outer_step(*arguments)

    monkeypatch.setattr("maml_rl.spread.outer_step", step)
    torch.set_num_threads(2)
    train(NAVIGATION, tmp_path / "run", address, workers=1)
    assert seen == [1, 1, 1]
