"""Tests and benchmarks spread over a Ray cluster: the files of one process, byte for byte."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from ray import cluster_utils
from torch import Tensor

from envs import Navigation2D
from maml_rl.adapt import Params
from maml_rl.assess import BrokenDown, Trial, evaluate_policy
from maml_rl.benchmark import iterations_done
from maml_rl.cli import run
from maml_rl.cluster import Crew
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.config import load_experiment
from maml_rl.errors import RunStopped, RunWarning
from maml_rl.evaluate import Evaluation
from maml_rl.maml import MetaReport
from maml_rl.runs import RunFolder
from maml_rl.spread import SpreadEngine, join_parts
from maml_rl.task_sets import held_out
from maml_rl.train import meta_train, resume
from maml_rl.trained import TrainedPolicy
from maml_rl.workplace import workplace_for
from tests.cluster.conftest import FILTERS, node
from tests.tiny import SETTINGS, flags

pytestmark = FILTERS

HUGE = 1e6
"""A step size that leaves no policy whole."""
SMALL: Mapping[str, object] = {
    **SETTINGS,
    "iterations": 1,
    "policy__layers": [16, 17],
    "evaluation__tasks": 10,
    "evaluation__episodes": 3,
    "evaluation__steps": 2,
}
"""Of 3 episodes each, 4 tasks must stay together: ten are three parts."""


def same(one: Evaluation, other: Evaluation) -> bool:
    """Whether two tests came to the same bits."""
    names = ("tasks", "returns", "return_sds", "measures")
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


def part_of(whole: Evaluation, part: slice) -> Evaluation:
    """A test's figures of some of its tasks."""
    cut = {n: getattr(whole, n)[:, part] for n in ("returns", "return_sds", "measures")}
    return replace(whole, tasks=whole.tasks[part], **cut)


@pytest.fixture(scope="module")
def policy() -> TrainedPolicy:
    """A policy of navigation, hardly trained."""
    return meta_train(load_experiment("navigation", **SMALL))


@pytest.mark.parametrize(
    ("name", "together"),
    [
        ("navigation", 0),
        ("navigation", 1),
        ("navigation", 6),
        ("ant_vel", 1),
        pytest.param("ant_vel", 0, marks=pytest.mark.slow),
        pytest.param("ant_vel", 6, marks=pytest.mark.slow),
    ],
)
def test_a_part_of_a_test_is_that_part_of_the_whole(name: str, together: int) -> None:
    """Tasks, seeds and chunks are those that it has among all, however many are simulated at a
    time: by each other in whole fours, since three episodes are not whole 16 bytes."""
    settings = {**SMALL, "iterations": 0, "sampling__tasks_at_once": together}
    trained = meta_train(load_experiment(name, **settings))
    every = replace(trained.experiment.sampling, tasks_at_once=0)
    whole = evaluate_policy(
        replace(trained, experiment=replace(trained.experiment, sampling=every))
    )
    for part in (slice(0, 4), slice(4, 10), slice(8, 10), slice(0, 10)):
        assert same(evaluate_policy(trained, part=part), part_of(whole, part))


def test_a_part_of_a_test_counted_in_steps_is_that_part_of_the_whole() -> None:
    """Where tasks have unlike numbers of episodes, and the whole more room than a part needs."""
    settings = {**SMALL, "iterations": 0, "evaluation__count": "steps"}
    easy = {"family__horizon": 30, "family__goal_radius": 0.2, "evaluation__episodes": 8}
    trained = meta_train(load_experiment("navigation", **{**settings, **easy}))
    whole = evaluate_policy(trained)
    assert whole.count == "steps"
    for part in (slice(0, 4), slice(4, 10), slice(8, 10)):
        assert same(evaluate_policy(trained, part=part), part_of(whole, part))
    joined = join_parts([part_of(whole, part) for part in (slice(0, 4), slice(4, 10))])
    assert isinstance(joined, Evaluation)
    assert same(joined, whole)
    assert (joined.episodes, joined.count) == (whole.episodes, whole.count)


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_tests_as_one_process(
    workers: int, policy: TrainedPolicy, address: str
) -> None:
    """One test of ten tasks, and one of seven that starts with a step size of its own."""
    tasks = [held_out(policy.experiment.family, count) for count in (10, 7)]
    trials = [Trial(policy, tasks[0]), Trial(policy, tasks[1], 0.3)]
    with workplace_for(ClusterSettings(address=address, workers=workers)) as place:
        found = list(place.test(trials))
    expected = [evaluate_policy(t.trained, tasks=t.tasks, step_size=t.step_size) for t in trials]
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Evaluation)
        assert same(one, other)


@pytest.fixture
def disturb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Send a signal to the worker that is given the second piece of a test."""

    def install(number: int) -> list[int]:
        true, asked, struck = Crew.call, 0, list[int]()

        def call(self: Crew, worker: Any, method: str, *arguments: object) -> Any:
            nonlocal asked
            asked += method == "test"
            if method == "test" and asked == 2:
                struck.append(int(worker.name.split()[-1]))
                os.kill(struck[0], number)
            return true(self, worker, method, *arguments)

        monkeypatch.setattr(Crew, "call", call)
        return struck

    return install


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGKILL, "is lost"), (signal.SIGSTOP, "no answer in")]
)
def test_what_a_lost_worker_had_another_tests(
    number: int,
    why: str,
    policy: TrainedPolicy,
    address: str,
    disturb: Callable[..., list[int]],
) -> None:
    """Killed, or stopped so that it does not answer; the user is told once, and no bit differs."""
    struck = disturb(number)
    tasks = held_out(policy.experiment.family, 10)
    try:
        with (
            workplace_for(ClusterSettings(address=address, workers=2, hang=5.0)) as place,
            pytest.warns(RunWarning, match=why) as told,
        ):
            found = list(place.test([Trial(policy, tasks)]))
    finally:
        for pid in struck:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert len([w for w in told if "is lost" in str(w.message)]) == 1
    assert isinstance(found[0], Evaluation)
    assert same(found[0], evaluate_policy(policy, tasks=tasks))


def files_of(folder: Path) -> dict[str, bytes]:
    """What a test wrote, in bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".json")}


@pytest.mark.cluster
def test_runs_are_evaluated_on_the_command_line(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs by two step sizes, one of which breaks them and is left out: the same files, and
    the same words, as from one process."""
    for seed in (0, 1):
        experiment = load_experiment("navigation", **{**SMALL, "seed": seed})
        meta_train(experiment, out=tmp_path / f"run-seed{seed}")
    runs = [str(tmp_path / f"run-seed{seed}") for seed in (0, 1)]
    words = ["evaluate", *runs, "--step-size", "0.3", str(HUGE)]
    said = []
    for name, more in (("here", []), ("there", ["--cluster.address", address])):
        assert run([*words, "--out", str(tmp_path / name), *more]) == 0
        captured = capsys.readouterr()
        assert "step size 1e+06 is left out" in captured.err
        said.append(captured.out.replace(str(tmp_path / name), "FOLDER"))
    assert said[0] == said[1]
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


def test_what_cannot_be_evaluated_is_told(
    policy: TrainedPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More workers than parts, and a GPU that no worker has: exit code 2."""
    out = str(tmp_path / "run")
    meta_train(policy.experiment, out=out)
    # No cluster is there: what is wrong is told before one is looked for.
    words = ["--cluster.address", "127.0.0.1:1", "--cluster.workers"]
    assert run(["evaluate", out, *words, "4"]) == 2
    said = "4 workers are more than 10 tasks in parts of 4 can use: at most 3"
    assert said in capsys.readouterr().err
    assert run(["evaluate", out, "--step-size", "1", "2", *words, "4"]) == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err
    train = ["train", "navigation", *flags(), "--out", str(tmp_path / "other"), *words, "1"]
    assert run([*train, "--device", "cuda"]) == 2
    assert "device cuda on a cluster needs --cluster.gpus-per-worker" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


BENCHMARK: Mapping[str, object] = {
    "name": "small",
    "experiment": "navigation",
    "seeds": [3, 1],
    "iterations": 2,
    "candidates": [0.05, 0.4],
    "validation_tasks": 5,
    "settings": {
        "family": {"horizon": 6},
        "sampling": {"tasks": 8, "episodes": 4},
        "policy": {"layers": [16, 17]},
        "evaluation": {"tasks": 8, "episodes": 4, "steps": 1},
    },
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A benchmark's file."""
    path = tmp_path_factory.mktemp("file") / "small.yaml"
    path.write_text(yaml.safe_dump(BENCHMARK))
    return str(path)


@pytest.fixture(scope="module")
def whole(file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert run(["benchmark", file, "--out", str(out), "--quiet"]) == 0
    return out


RUNS = [f"{m}-seed{s}" for m in ("maml", "pretrained", "oracle", "random") for s in (3, 1)]


def check_same_benchmark(found: Path, expected: Path) -> None:
    """The same parameters and figures; only training took another time."""
    for name in RUNS:
        one, other = (RunFolder.open(f / name).load().theta for f in (found, expected))
        assert all(np.array_equal(one[n], other[n]) for n in other)
    tables = [(f / "evaluation.csv").read_bytes() for f in (found, expected)]
    assert tables[0] == tables[1]


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The threads and numbers of workers that did iterations, in their order."""
    seen: list[tuple[str, int]] = []
    true = SpreadEngine.iterate

    def iterate(
        self: SpreadEngine, theta: Params, iteration: int, earlier: Tensor | None
    ) -> tuple[Params, MetaReport]:
        result = true(self, theta, iteration, earlier)
        seen.append((threading.current_thread().name, self.figures()["workers"]))
        return result

    monkeypatch.setattr(SpreadEngine, "iterate", iterate)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return seen


@pytest.mark.cluster
def test_a_benchmarks_runs_are_trained_side_by_side(
    file: str,
    whole: Path,
    address: str,
    tmp_path: Path,
    shares: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three workers train three runs at a time, whose lines say whose they are; files and words of
    the test are those of one process."""
    words = ["--cluster.address", address, "--cluster.workers", "3", "--out", str(tmp_path)]
    assert run(["benchmark", file, *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len({thread for thread, _ in shares}) == 3
    assert {count for _, count in shares} == {1}
    for method, last in (("maml", 2), ("pretrained", 4), ("oracle", 4)):
        for seed in (3, 1):
            begun = [f"{method}, seed {seed}: iteration {i}/{last}" for i in range(1, last + 1)]
            told = [one for one in said if one.startswith(f"{method}, seed {seed}: iteration")]
            assert [one.split("  ")[0] for one in told] == begun
    check_same_benchmark(tmp_path, whole)


@pytest.mark.cluster
def test_the_last_run_of_a_benchmark_has_all_workers(
    file: str,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shares: list[tuple[str, int]],
) -> None:
    """Two runs have two workers each of four; when one is done the other takes over its two."""
    true = SpreadEngine.iterate

    def iterate(
        self: SpreadEngine, theta: Params, iteration: int, earlier: Tensor | None
    ) -> tuple[Params, MetaReport]:
        until = time.monotonic() + 60.0
        while iteration == 5 and len(self._crew.workers) < 4 and time.monotonic() < until:
            self._crew.join()
            time.sleep(0.2)
        return true(self, theta, iteration, earlier)

    monkeypatch.setattr(SpreadEngine, "iterate", iterate)
    words = ["--cluster.address", address, "--cluster.workers", "4", "--out", str(tmp_path)]
    words += ["--methods", "maml", "pretrained", "--seeds", "0", "--sampling.tasks", "16"]
    assert run(["benchmark", file, *words, "--iterations", "3", "--quiet"]) == 0
    assert len({thread for thread, _ in shares}) == 2
    assert {count for _, count in shares[:3]} == {2}
    assert shares[-1][1] == 4


@pytest.mark.cluster
def test_where_a_run_of_several_fails_the_others_can_be_gone_on_with(
    file: str,
    whole: Path,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shares: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They end after their iteration; who failed is named. Done again, the benchmark is whole."""
    true = SpreadEngine.iterate
    words = ["benchmark", file, "--cluster.address", address, "--cluster.workers", "3"]
    words += ["--out", str(tmp_path), "--quiet"]

    failed = threading.Event()

    def iterate(
        self: SpreadEngine, theta: Params, iteration: int, earlier: Tensor | None
    ) -> tuple[Params, MetaReport]:
        if self._experiment.adaptation.inner_steps and iteration == 1:
            failed.set()
            raise RunStopped("it is enough", 3)
        if iteration == 1:
            assert failed.wait(60)
            time.sleep(3.0)
        return true(self, theta, iteration, earlier)

    with monkeypatch.context() as patch:
        patch.setattr(SpreadEngine, "iterate", iterate)
        assert run(words) == 3
    assert re.fullmatch(r"maml-rl: maml, seed [31]: it is enough\n", capsys.readouterr().err)
    assert not ray.is_initialized()
    done = {name: iterations_done(tmp_path / name) for name in RUNS}
    assert done["pretrained-seed3"] == 2
    assert sum(done[name] for name in RUNS[3:]) == 0
    assert run(words) == 0
    check_same_benchmark(tmp_path, whole)


@pytest.mark.cluster
@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_ends_all_runs_of_a_benchmark(
    signals: int,
    file: str,
    whole: Path,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shares: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After their iteration, or the second time at once; what to type is told, and goes on."""
    true, struck = SpreadEngine.iterate, threading.Event()
    words = ["benchmark", file, "--cluster.address", address, "--cluster.workers", "2"]
    words += ["--out", str(tmp_path), "--quiet"]

    def iterate(
        self: SpreadEngine, theta: Params, iteration: int, earlier: Tensor | None
    ) -> tuple[Params, MetaReport]:
        if not struck.is_set():
            struck.set()
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1.0)
        return true(self, theta, iteration, earlier)

    with monkeypatch.context() as patch:
        patch.setattr(SpreadEngine, "iterate", iterate)
        assert run(words) == 130
    said = capsys.readouterr().err
    assert "Go on with: maml-rl benchmark" in said
    assert "Traceback" not in said
    assert not ray.is_initialized()
    # Who was struck twice did not end its iteration.
    assert len(shares) <= 3 - signals
    assert run(words) == 0
    check_same_benchmark(tmp_path, whole)


@pytest.mark.cluster
@pytest.mark.parametrize("horizon", [6, 400_000])
def test_where_the_head_is_lost_the_run_ends_and_can_be_resumed(
    horizon: int, tmp_path: Path
) -> None:
    """Ray would end Python itself after a minute; before that it is told, with exit code 4, between
    iterations, or in the middle of one that takes minutes."""
    there = cluster_utils.Cluster(initialize_head=True, head_node_args=node(7, 2))
    words = ["train", "navigation", "--out", str(tmp_path / "run")]
    words += flags(iterations=100_000, family__horizon=horizon)
    words += ["--cluster.address", there.address, "--quiet"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "maml_rl", *words], stderr=subprocess.PIPE, text=True
    )
    try:
        begun = tmp_path / "run" / ("metrics.csv" if horizon < 10 else "config.yaml")
        rows = 3 if horizon < 10 else 0
        while not begun.is_file() or begun.read_text().count("\n") < rows:
            assert driver.poll() is None
            time.sleep(0.5)
        time.sleep(3.0)
        there.head_node.all_processes["gcs_server"][0].process.kill()
        _, said = driver.communicate(timeout=55)
    finally:
        driver.kill()
        there.shutdown()
    assert driver.returncode == 4
    assert "the head of the Ray cluster, its first machine, has not answered in 20 s" in said
    assert f"Go on with: maml-rl resume {tmp_path / 'run'} --cluster.address" in said
    assert said.count("\n") == 1
    before = RunFolder.open(tmp_path / "run").load().state.iteration
    assert (before >= 2) == (rows > 0)
    if rows:
        resume(tmp_path / "run", iterations=before + 1)


PENDULUM = """
import gymnasium


def make_env():
    return gymnasium.make("Pendulum-v1")


def sample_tasks(count, rng):
    return rng.uniform(5.0, 15.0, (count, 1))


def set_task(env, task):
    env.unwrapped.g = float(task[0])
"""


@pytest.mark.cluster
def test_code_of_the_users_own_is_allowed_in_workers_too(tmp_path: Path) -> None:
    """A family that only a module in the working folder makes: trained side by side, and tested."""
    (tmp_path / "pendulum.py").write_text(PENDULUM)
    parts = {"make_env": "make_env", "draw_tasks": "sample_tasks", "set_task": "set_task"}
    names = {key: f"pendulum:{name}" for key, name in parts.items()}
    experiment = {
        "name": "swing",
        "family": {"name": "gymnasium", "horizon": 6, **names},
        "iterations": 1,
        "sampling": {"tasks": 4, "episodes": 4},
        "policy": {"layers": [16, 17]},
        "evaluation": {"tasks": 4, "episodes": 4, "steps": 1},
    }
    (tmp_path / "swing.yaml").write_text(yaml.safe_dump(experiment))
    compared = {"name": "small", "experiment": "swing.yaml", "candidates": [], "seeds": [0, 1]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({**compared, "methods": ["maml"]}))
    words = [sys.executable, "-m", "maml_rl", "benchmark", "both.yaml", "--allow-import", "--quiet"]
    for name, more in (("here", []), ("there", ["--cluster.address", "local:2"])):
        done = subprocess.run(
            [*words, "--out", name, *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
    tables = [(tmp_path / name / "evaluation.csv").read_bytes() for name in ("here", "there")]
    assert tables[0] == tables[1]


@pytest.mark.cluster
def test_a_test_that_breaks_down_leaves_no_cluster_behind(
    policy: TrainedPolicy, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing could be tested, its exception keeps what was not asked for; a worker that is
    ended later than the cluster must not begin another."""
    trials = [Trial(policy, held_out(policy.experiment.family, 10), HUGE)]
    with workplace_for(ClusterSettings(address=address, workers=1)) as place:
        found = iter(place.test(trials))
        assert isinstance(next(found), BrokenDown)
    assert not ray.is_initialized()
    with monkeypatch.context() as patch:
        patch.setattr(ray, "init", lambda **_: pytest.fail("another cluster"))
        found.close()  # type: ignore[attr-defined]  # a generator
    assert not ray.is_initialized()


@pytest.mark.cluster
def test_a_machine_that_is_lost_with_all_workers_of_a_run_does_not_end_the_others(
    file: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its run waits until another's worker is free, longer than patience says."""
    there = cluster_utils.Cluster(initialize_head=True, head_node_args=node(8, 1))
    there.add_node(**node(9, 1))
    true, gone = SpreadEngine.iterate, threading.Event()

    def iterate(
        self: SpreadEngine, theta: Params, iteration: int, earlier: Tensor | None
    ) -> tuple[Params, MetaReport]:
        if iteration == 1 and not gone.is_set():
            gone.set()
            there.remove_node(next(iter(there.worker_nodes)), allow_graceful=False)
        return true(self, theta, iteration, earlier)

    monkeypatch.setattr(SpreadEngine, "iterate", iterate)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["--cluster.address", there.address, "--cluster.patience", "6", "--out", str(tmp_path)]
    try:
        assert run(["benchmark", file, *words, "--quiet"]) == 0
    finally:
        ray.shutdown()
        there.shutdown()
    assert "is lost" in capsys.readouterr().err
    check_same_benchmark(tmp_path, whole)


@pytest.mark.cluster
def test_sigterm_ends_a_test_as_without_a_cluster(policy: TrainedPolicy, tmp_path: Path) -> None:
    """Ray has a handler of its own, which would end Python with a stack of C++."""
    experiment = replace(policy.experiment, family=replace(Navigation2D(), horizon=200_000))
    meta_train(replace(experiment, iterations=0), out=tmp_path / "run")
    words = ["evaluate", str(tmp_path / "run"), "--cluster.address", "local:1"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "maml_rl", *words], stderr=subprocess.PIPE, text=True
    )
    try:
        time.sleep(20.0)
        assert driver.poll() is None
        driver.terminate()
        _, said = driver.communicate(timeout=40)
    finally:
        driver.kill()
    assert (driver.returncode, said) == (143, "maml-rl: interrupted\n")
