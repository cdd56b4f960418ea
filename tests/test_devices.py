"""Where things run: what is not there is told, and what is there gives the CPU's bits.

No GPU is needed: tests/fake_device.py stands in for one.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import maml_rl
from envs.family import DeviceWorlds, TaskFamily, WarpSettings
from envs.navigation import Navigation2D, NavigationWorlds
from maml_rl import maml
from maml_rl.adapt import Params, broadcast
from maml_rl.assess import evaluate_policy, load_subject
from maml_rl.checkpoints import FRESH, Origin, read_checkpoint, write_checkpoint
from maml_rl.chunks import Chunks
from maml_rl.cli import run
from maml_rl.config import Experiment, load_experiment, origin_of, to_yaml
from maml_rl.curvature import InnerStep
from maml_rl.devices import (
    Device,
    Physics,
    as_it_comes,
    check_place,
    device_for,
    missing_physics,
    physics_for,
    reproducible,
)
from maml_rl.episodes import Steps
from maml_rl.errors import InputError, RunWarning
from maml_rl.evaluate import Evaluation
from maml_rl.maml import update_bytes
from maml_rl.policy import make_policy
from maml_rl.runs import Row, RunFolder
from maml_rl.supervised.config import load_experiment as load_supervised
from maml_rl.supervised.evaluate import Outcome, Subject, outcomes_of
from maml_rl.supervised.learner import MetaGradient
from maml_rl.supervised.recorded import Recorded
from maml_rl.supervised.tasks import Batch
from maml_rl.supervised.train import meta_train as train_supervised
from maml_rl.train import Local, Trainer, meta_train, resume
from maml_rl.trained import TrainedPolicy, new_policy, to_device
from maml_rl.versions import differences, versions
from tests.conftest import rows
from tests.fake_device import FAKE, TO_DEVICE, TO_HOST, DeviceMixError, fake_device, rehearsed
from tests.tiny import SETTINGS, flags
from tests.tiny_supervised import SINUSOID

pytestmark = pytest.mark.usefixtures("one_torch_thread")


# The device that stands in.


def test_tensors_of_both_devices_do_not_mix() -> None:
    """In sums, products, joins, indices and what is written in place; a number without dimensions
    may come from the CPU where each number is worked on by itself, and only there."""
    with fake_device():
        here, there = torch.ones(3, 3), torch.ones(3, 3, device=FAKE)
        index, number = torch.tensor([0, 2]), torch.tensor(2.0)
        mixes: list[Callable[[], object]] = [
            lambda: here + there,
            lambda: there.mul_(here),
            lambda: there @ here,
            lambda: torch.cat([there, here]),
            lambda: torch.stack([there[0], here[0]]),
            lambda: there[index],
            lambda: here[index.to(FAKE)],
            lambda: there.index_copy_(0, index, there[:2]),
            lambda: torch.where(there > 0, there, here),
            lambda: here.add(there.sum()),
            lambda: torch.stack([there.sum(), number]),
        ]
        for mix in mixes:
            with pytest.raises(DeviceMixError, match="tensors of both devices"):
                mix()
        assert (there * number).tolist() == (2.0 * here).tolist()
        assert torch.where(there > 1, there, number).tolist() == (2.0 * here).tolist()
        with pytest.raises(DeviceMixError, match=r"use cpu\(\) first"):
            there.numpy()
        with pytest.raises(DeviceMixError, match=r"use cpu\(\) first"):
            np.asarray(there)


def test_what_crosses_over_is_counted() -> None:
    """Each copy with its direction and size, and each wait for the device; nothing else is."""
    with fake_device() as kept:
        there = torch.arange(6.0).to(FAKE).reshape(2, 3)
        here = torch.zeros(2, 3)
        there.double().add_(1).clone().to(FAKE)
        assert kept.crossings == [(TO_DEVICE, 6)]
        there[0] = torch.tensor([7.0, 8.0, 9.0])
        here[:, :2].copy_(there[:, 1:])
        assert here.tolist() == [[8.0, 9.0, 0.0], [4.0, 5.0, 0.0]]
        assert there.cpu().device.type == "cpu"
        assert there[1].tolist() == [3.0, 4.0, 5.0]
        torch.where(there > 4, there, torch.tensor(0.0))
        assert kept.crossings[1:] == [
            *((TO_DEVICE, 3), (TO_HOST, 4), (TO_HOST, 6), (TO_HOST, 3), (TO_DEVICE, 1)),
        ]
        assert kept.waits == []
        mask = there > 4
        values = torch.zeros(2, device=FAKE)
        kept.clear()
        there.masked_fill_(mask, 1.0)
        there[mask.flip(0)] = 2.0
        assert kept.events() == 0
        mask = there == 1.0
        waits: list[Callable[[], object]] = [
            lambda: bool(mask.all()),
            lambda: float(there[0, 0]),
            lambda: there[mask],
            lambda: mask.nonzero(),
            lambda: torch.equal(there, there),
            lambda: there.index_put_((mask,), values),
        ]
        for wait in waits:
            before = len(kept.waits)
            wait()
            assert len(kept.waits) == before + 1
        assert kept.crossings == []


def test_derivatives_are_taken_on_the_device() -> None:
    """By autograd's graphs, twice, and by vmap of grad; views and steps in place stay there too."""

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(x @ w) ** 2).sum()

    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(4, 3, generator=generator), torch.randn(4, 5, 3, generator=generator)
    expected = vmap(grad(loss))(w, x)
    with fake_device():
        there, data = w.to(FAKE).requires_grad_(), x.to(FAKE)
        assert torch.equal(vmap(grad(loss))(there.detach(), data).cpu(), expected)
        (slope,) = torch.autograd.grad(loss(there[0], data[0]), there, create_graph=True)
        assert torch.equal(slope[0].detach().cpu(), expected[0])
        (bend,) = torch.autograd.grad(slope.square().sum(), there)
        assert bend.device.type == FAKE
        assert not bend[1:].any()
        step = torch.zeros(2, 3, device=FAKE)
        step[1].add_(1.0).mul_(3.0)
        assert step.tolist() == [[0.0] * 3, [3.0] * 3]


def test_a_thread_that_does_not_know_the_device_is_found() -> None:
    """There a tensor of torch's own "meta" comes of it, which must not go unnoticed."""
    with fake_device():
        made: list[Tensor] = []
        thread = threading.Thread(target=lambda: made.append(torch.zeros(2, device=FAKE)))
        thread.start()
        thread.join()
        with pytest.raises(DeviceMixError, match=r"made outside fake_device\(\)"):
            made[0] + 1.0


# Iterations on it.


class Scaled(nn.Module):
    """A mean of one's own, with a buffer and a part that is not adapted by any formula here."""

    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, 6)
        self.head = nn.Linear(6, outputs)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, inputs))

    def forward(self, observations: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.hidden(observations * self.scale)))
        return out


def iterations(
    experiment: Experiment[TaskFamily],
    device: Device,
    count: int = 1,
    *,
    physics: Physics = "cpu",
    own: bool = False,
    size: int = 0,
) -> tuple[Params, list[Row], int]:
    """Do some iterations of a fresh trainer.

    Args:
        experiment: all settings but the place.
        device: where.
        count: how many.
        physics: what simulates; need not be what `check_place` knows.
        own: whether the policy's mean is a module.
        size: tasks that go through the update together; 0 is as many as the device wants.

    Returns:
        Parameters on the CPU, each iteration's metrics, and the tasks that went together.
    """
    torch.manual_seed(0)
    family = experiment.family
    mean = Scaled(len(family.observation_columns), len(family.action_columns)) if own else None
    there = replace(experiment, device=device)
    fresh = new_policy(there, mean)
    state = replace(FRESH, chunk_size=size)
    trainer = Trainer.build(replace(there, physics=physics), fresh.policy, fresh.params, state)
    engine = trainer.engine
    assert isinstance(engine, Local)
    found: list[Row] = []
    for _ in range(count):
        row = trainer.step()
        found.append({k: v for k, v in row.items() if not k.startswith("seconds")})
    trainer.close()
    assert {p.device.type for p in trainer.theta.values()} == {torch.device(device).type}
    assert [row["accepted"] for row in found] == [1] * count
    return to_device(trainer.theta, "cpu"), found, engine.chunks.size


def check_same(one: Params, other: Params) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "log-prob": ("navigation", {}),
    "likelihood-ratio": ("half_cheetah_vel", {"adaptation__inner_loss": "likelihood-ratio"}),
    "dice": ("navigation", {"adaptation__inner_loss": "dice", "sampling__count": "steps"}),
    "no step": ("half_cheetah_dir", {"adaptation__inner_steps": 0}),
    "two steps": ("half_cheetah_dir", {"adaptation__inner_steps": 2}),
    "two steps of dice": (
        "ant_vel",
        {"adaptation__inner_steps": 2, "adaptation__inner_loss": "dice"},
    ),
    "first order": ("navigation", {"adaptation__first_order": True}),
    "tanh, told its task": (
        "half_cheetah_vel",
        {"policy__nonlinearity": "tanh", "policy__observe_task": True},
    ),
    "three at a time": ("navigation", {"sampling__tasks_at_once": 3, "policy__action_scale": 2}),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c == "two steps of dice" else c for c in CASES],
)
def test_an_iteration_on_the_device_is_that_of_the_cpu(case: str) -> None:
    """Same parameters and metrics, bit for bit, where as many tasks go together: all five."""
    name, changes = CASES[case]
    experiment = load_experiment(name, **{**SETTINGS, "sampling__tasks": 5, **changes})
    expected, metrics, _ = iterations(experiment, "cpu", size=5)
    with fake_device():
        found, seen, size = iterations(experiment, FAKE)
    assert size == 5
    check_same(found, expected)
    assert seen == metrics


@pytest.mark.slow
def test_iterations_in_little_memory_are_those_of_the_cpu() -> None:
    """Room for two of four tasks in four fifths of what is free: two at a time, twice over."""
    experiment = load_experiment("navigation", **SETTINGS)
    one = update_bytes(new_policy(experiment).policy, 3 * 6, 1)
    expected, metrics, _ = iterations(experiment, "cpu", 2, size=2)
    with fake_device(free_bytes=3 * one):
        found, seen, size = iterations(experiment, FAKE, 2)
    assert size == 2
    check_same(found, expected)
    assert seen == metrics


@pytest.mark.parametrize(
    ("inner_steps", "loss"),
    [(0, "log-prob"), (1, "log-prob"), (1, "likelihood-ratio"), (1, "dice"), (2, "dice")],
)
@pytest.mark.slow
def test_an_iteration_of_a_module_on_the_device_is_that_of_the_cpu(
    inner_steps: int, loss: str
) -> None:
    """A mean of one's own, through torch's graphs, its buffer included."""
    changes = {"adaptation__inner_loss": loss, "adaptation__inner_steps": inner_steps}
    experiment = load_experiment("navigation", **{**SETTINGS, **changes})
    expected, metrics, _ = iterations(experiment, "cpu", own=True)
    with fake_device():
        found, seen, _ = iterations(experiment, FAKE, own=True)
    check_same(found, expected)
    assert seen == metrics


def test_a_module_of_ones_own_is_left_where_it_was() -> None:
    """What is moved is a copy; and one that nobody moved is of use on the device all the same."""
    experiment = load_experiment("navigation", **SETTINGS)
    mean = Scaled(2, 2)
    theta = make_policy(experiment.policy, 2, 2, mean).initial_parameters(0)
    rows = torch.linspace(-1.0, 1.0, 2 * 3 * 2).reshape(2, 3, 2)
    with fake_device():
        moved = new_policy(replace(experiment, device=FAKE), mean)
        assert {p.device.type for p in moved.params.values()} == {FAKE}
        assert {t.device.type for t in mean.state_dict().values()} == {"cpu"}
        check_same(to_device(moved.params, "cpu"), theta)
        params = broadcast(moved.params, 2)
        expected = moved.policy.network.of_tasks(params, rows.to(FAKE))
        unmoved = make_policy(experiment.policy, 2, 2, mean).network
        assert torch.equal(unmoved.of_tasks(params, rows.to(FAKE)).cpu(), expected.cpu())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("count", ["episodes", "steps"])
@pytest.mark.slow
def test_an_iteration_whose_worlds_are_there_too_is_that_of_the_cpu(
    count: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points need no simulator: `physics: warp` on either device gives the same bits. On the device
    a control step is captured: it copies nothing, a module's buffer included."""
    changes = {"sampling__count": count, "sampling__tasks_at_once": 3}
    experiment = load_experiment("navigation", **{**SETTINGS, **changes})
    expected, metrics, _ = iterations(experiment, "cpu", physics="warp", own=own)
    monkeypatch.setattr(NavigationWorlds, "as_graph", lambda self, body: rehearsed(body))
    with fake_device():
        found, seen, _ = iterations(experiment, FAKE, physics="warp", own=own)
    check_same(found, expected)
    assert seen == metrics


@pytest.mark.slow
def test_worlds_are_made_where_and_as_the_experiment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `physics: warp` both training and a test make worlds on the policy's device, with the
    experiment's own settings; otherwise neither does."""
    experiment = load_experiment("navigation", **{**SETTINGS, "warp__njmax": 7})
    made: list[tuple[int, str, WarpSettings]] = []
    good = Navigation2D.make_device_worlds

    def spy(
        self: Navigation2D, count: int, *, device: str | torch.device, settings: WarpSettings
    ) -> DeviceWorlds:
        made.append((count, torch.device(device).type, settings))
        return good(self, count, device=device, settings=settings)

    monkeypatch.setattr(Navigation2D, "make_device_worlds", spy)
    with fake_device():
        for physics in ("cpu", "warp"):
            iterations(experiment, FAKE, physics=physics)
            fresh = new_policy(replace(experiment, device=FAKE))
            evaluate_policy(replace(fresh, experiment=replace(fresh.experiment, physics=physics)))
    # 4 training tasks and 2 of the test, 3 episodes each.
    assert made == [(count, FAKE, WarpSettings(njmax=7)) for count in (12, 6)]


def test_where_memory_fails_tasks_go_in_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: all four at once have no room, two at a time have, and the same iteration comes
    of it."""
    experiment = load_experiment("navigation", **SETTINGS)
    expected, metrics, _ = iterations(experiment, "cpu", size=2)
    good = maml.adapt_in_chunks

    def cramped(inner: InnerStep, params: Params, steps: Steps, chunks: Chunks) -> Params:
        if chunks.size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return good(inner, params, steps, chunks)

    monkeypatch.setattr(maml, "adapt_in_chunks", cramped)
    with fake_device(), pytest.warns(RunWarning, match="is repeated with 2 at a time"):
        found, seen, _ = iterations(experiment, FAKE)
    check_same(found, expected)
    assert seen == metrics


def check_same_test(one: Evaluation, other: Evaluation) -> None:
    for name in ("tasks", "returns", "return_sds", "measures"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("physics", ["cpu", "warp"])
def test_a_test_on_the_device_is_that_on_the_cpu(physics: Physics) -> None:
    """Returns, their spread and measures after each gradient step."""
    experiment = load_experiment("navigation", **SETTINGS)

    def test(device: Device) -> Evaluation:
        fresh = new_policy(replace(experiment, device=device))
        placed = replace(fresh, experiment=replace(fresh.experiment, physics=physics))
        return evaluate_policy(placed)

    expected = test("cpu")
    with fake_device():
        check_same_test(test(FAKE), expected)


def test_a_policy_on_the_device_adapts_and_acts_as_on_the_cpu() -> None:
    """To the same parameters, which stay there, and the same actions, which come here."""
    experiment = load_experiment("navigation", **SETTINGS)
    task, seen = [0.3, -0.2], np.array([[0.1, 0.0], [0.0, 0.2], [0.1, 0.1]])

    def adapted(device: Device) -> TrainedPolicy:
        fresh = new_policy(replace(experiment, device=device))
        return fresh.adapt(experiment.family, task, steps=2, episodes=3)

    expected = adapted("cpu")
    actions = expected.act(seen)
    with fake_device():
        found = adapted(FAKE)
        assert {p.device.type for p in found.params.values()} == {FAKE}
        np.testing.assert_array_equal(found.act(seen), actions)
        check_same(to_device(found.params, "cpu"), expected.params)


def test_updates_on_the_device_are_made_the_same_way_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In training, in a test, and of a policy in the hand: what would differ from one time to the
    next would warn; on the CPU nothing is asked for."""
    experiment = load_experiment("navigation", **SETTINGS)
    asked: list[bool] = []
    good = maml.adapt_in_chunks

    def spy(inner: InnerStep, params: Params, steps: Steps, chunks: Chunks) -> Params:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return good(inner, params, steps, chunks)

    def update_everywhere(device: Device) -> None:
        there = replace(experiment, device=device)
        iterations(experiment, device)
        evaluate_policy(new_policy(there))
        new_policy(there).adapt(experiment.family, [0.3, -0.2], episodes=3)

    for module in ("maml", "evaluate"):
        monkeypatch.setattr(f"maml_rl.{module}.adapt_in_chunks", spy)
    update_everywhere("cpu")
    assert asked == [False] * 3
    asked.clear()
    with fake_device():
        update_everywhere(FAKE)
    assert asked == [True] * 3


@pytest.mark.slow
def test_supervised_learning_on_the_device_is_that_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sine curves: parameters after six iterations, and scores after each gradient step."""
    experiment = load_supervised("sinusoid", **SINUSOID)

    def not_recorded(self: Recorded[MetaGradient], meta: Params, batch: Batch) -> MetaGradient:
        return self._function({name: p.detach() for name, p in meta.items()}, batch)

    # torch's recorder takes a tensor that is no plain one for a constant.
    monkeypatch.setattr(Recorded, "__call__", not_recorded)

    def trained(device: Device) -> tuple[Params, list[Outcome]]:
        learned = train_supervised(replace(experiment, device=device))
        tested = outcomes_of(Subject(Path("run"), learned, 6), experiment.evaluation)
        return to_device(learned.meta, "cpu"), list(tested)

    expected, outcomes = trained("cpu")
    with fake_device():
        found, again = trained(FAKE)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    for one, other in zip(again, outcomes, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_parameters_on_the_device_holds_their_bits(tmp_path: Path) -> None:
    """Parameters and what an optimiser remembers are read on the CPU, in the same order."""
    experiment = load_experiment("half_cheetah_dir", **SETTINGS)
    theta = new_policy(experiment).params
    with fake_device():
        there = to_device(theta, FAKE)
        write_checkpoint(tmp_path / "there", there, FRESH, origin_of(experiment), there)
    write_checkpoint(tmp_path / "here", theta, FRESH, origin_of(experiment), theta)
    check_same(read_checkpoint(tmp_path / "there").theta, theta)
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes(), file.name


# What is not there.


@pytest.fixture
def no_warp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which mujoco-warp is not installed."""
    found = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("mujoco-warp", "warp-lang"):
            raise importlib.metadata.PackageNotFoundError(package)
        return found(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, "envs.warp", raising=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for the CPU, on a machine whatever it has."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


CPU_BUILD = (
    "device cuda is not there: this torch is a CPU build, and one for CUDA is at pytorch.org"
)
NO_DEVICE = "device cuda is not there: torch finds no CUDA device"
NO_WARP = r"physics warp needs mujoco-warp, which is not installed: pip install mujoco-warp==[\d.]+"


@pytest.mark.parametrize(("build", "why"), [(None, CPU_BUILD), ("12.8", NO_DEVICE)])
def test_a_device_that_is_not_there_is_told_with_the_cure(
    build: str | None, why: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because of torch's build, or of the machine: refused where it was asked for, and replaced
    with a warning where a run was made with it."""
    monkeypatch.setattr(torch.version, "cuda", build)
    with pytest.raises(InputError, match=f"^{re.escape(why)}; use --device cpu$"):
        check_place("cuda")
    with pytest.raises(InputError, match=f"^{re.escape(why)}; use --device cpu$"):
        device_for("cpu", "cuda")
    with pytest.warns(RunWarning, match=f"^{re.escape(why)}; the CPU is used instead$"):
        assert device_for("cuda", None) == "cpu"
    assert device_for("cuda", "cpu") == device_for("cpu", None) == "cpu"


def test_a_device_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is asked for, or as the run's own; the CPU where that is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_place("cuda")
    assert device_for("cuda", None) == device_for("cpu", "cuda") == "cuda"
    assert device_for("cpu", None) == device_for("cuda", "cpu") == "cpu"


@pytest.mark.usefixtures("no_warp")
def test_physics_that_is_not_there_is_told_with_the_cure() -> None:
    """One sentence of which package to install; refused, or replaced with a warning."""
    with pytest.raises(InputError, match=f"^{NO_WARP}; or use --physics cpu$"):
        check_place("cpu", "warp")
    with pytest.raises(InputError, match=f"^{NO_WARP}; or use --physics cpu$"):
        physics_for("cpu", "warp")
    with pytest.warns(RunWarning, match=f"^{NO_WARP}; physics cpu is used instead$"):
        assert physics_for("warp", None) == "cpu"
    assert physics_for("warp", "cpu") == physics_for("cpu", None) == "cpu"


def test_physics_whose_module_cannot_be_imported_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the reason, it is told and no traceback comes of it."""
    monkeypatch.setitem(sys.modules, "envs.warp", None)
    assert "envs.warp" in missing_physics("warp")
    assert missing_physics("cpu") == ""
    with pytest.raises(InputError, match=r"; or use --physics cpu$"):
        check_place("cpu", "warp")


@pytest.mark.usefixtures("no_warp")
def test_a_package_that_is_not_here_differs() -> None:
    """Of what a run on a GPU was made with."""
    assert differences({**versions(), "mujoco-warp": "3.17.0.1"}) == [
        "mujoco-warp 3.17.0.1 (here absent)"
    ]


# Bits that are the same every time.


def settings_of_torch() -> tuple[bool, bool, str]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
    )


@pytest.fixture
def as_before() -> object:
    """Whatever a test does to torch's settings is undone."""
    before = settings_of_torch()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.set_float32_matmul_precision(before[2])


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize(("wanted", "warns"), [(False, False), (True, False), (True, True)])
def test_settings_of_torch_are_put_back(
    wanted: bool, warns: bool, precision: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `reproducible` and `as_it_comes` within it, whatever they were, also where the block
    fails; within, sums are the same every time in full float32, and what cannot be warns."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(wanted, warn_only=warns)
    torch.set_float32_matmul_precision(precision)
    before = settings_of_torch()
    seen = []
    try:
        with reproducible("cuda"):
            seen.append(settings_of_torch())
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            try:
                with as_it_comes():
                    seen.append(settings_of_torch())
                    if fails:
                        raise ArithmeticError
            finally:
                seen.append(settings_of_torch())
    except ArithmeticError:
        assert fails
    assert settings_of_torch() == before
    assert seen[0] == seen[2] == (True, True, "highest")
    assert (seen[1][0], seen[1][2]) == (False, "highest")


@pytest.mark.usefixtures("as_before")
def test_on_a_cpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the user's own choice for cuBLAS ever replaced."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.set_float32_matmul_precision("high")
    before = settings_of_torch()
    with reproducible("cpu"), as_it_comes():
        assert settings_of_torch() == before
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert settings_of_torch() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with reproducible("cuda"):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


# Runs that were made on a GPU, here.


@pytest.fixture
def from_a_gpu(tmp_path: Path, no_gpu: None, no_warp: None) -> Path:
    """A run of two iterations, whose files all say that it was made on a GPU, physics too."""
    folder = tmp_path / "run"

    def origin(experiment: Experiment[TaskFamily]) -> Origin:
        there = replace(experiment, device="cuda", physics="warp")
        return replace(origin_of(experiment), config=to_yaml(there))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maml_rl.train.origin_of", origin)
        meta_train(load_experiment("navigation", **{**SETTINGS, "iterations": 2}), out=folder)
    for config in (folder, folder / "checkpoints" / "latest", folder / "checkpoints" / "best"):
        text = (config / "config.yaml").read_text()
        assert "device: cuda" in text
        assert "physics: warp" in text
    return folder


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after))


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_from_a_gpu_is_loaded_and_tested_here(from_a_gpu: Path) -> None:
    """With a warning for each of the two that are not here, and no other; its parameters are what
    they were, and they test as those of a run that never saw a GPU."""
    with pytest.warns(RunWarning) as warned:
        policy = maml_rl.load(from_a_gpu)
    assert [str(w.message).split(";")[-1] for w in warned] == [
        " the CPU is used instead",
        " physics cpu is used instead",
    ]
    assert (policy.experiment.device, policy.experiment.physics) == ("cpu", "cpu")
    with pytest.warns(RunWarning, match="is used instead") as warned:
        subject = load_subject(from_a_gpu)
    assert len(warned) == 2
    # A warning would be an error.
    quiet = load_subject(from_a_gpu, device="cpu", physics="cpu")
    check_same(policy.params, quiet.trained.params)
    edit(from_a_gpu / "config.yaml", "device: cuda", "device: cpu")
    edit(from_a_gpu / "config.yaml", "physics: warp", "physics: cpu")
    own = load_subject(from_a_gpu)
    check_same(policy.params, own.trained.params)
    check_same_test(evaluate_policy(subject.trained), evaluate_policy(own.trained))
    for given in ({"device": "cuda"}, {"physics": "warp"}):
        with pytest.raises(InputError, match=r"; (use --device|or use --physics) cpu$"):
            maml_rl.load(from_a_gpu, **given)  # type: ignore[arg-type]  # as they are written


def test_a_run_from_a_gpu_is_not_resumed_here_unless_told_to(from_a_gpu: Path) -> None:
    """A sentence that names the flag, and nothing is touched; told to, it goes on with the bits of
    a run on the CPU, and says from then on that it is one."""
    before = contents(from_a_gpu)
    with pytest.raises(InputError, match=f"^{re.escape(CPU_BUILD)}; use --device cpu$"):
        resume(from_a_gpu, iterations=4)
    with pytest.raises(InputError, match=f"^{NO_WARP}; or use --physics cpu$"):
        resume(from_a_gpu, iterations=4, device="cpu")
    assert contents(from_a_gpu) == before
    resume(from_a_gpu, iterations=4, device="cpu", physics="cpu")
    whole = from_a_gpu.parent / "whole"
    meta_train(load_experiment("navigation", **{**SETTINGS, "iterations": 4}), out=whole)
    assert rows(from_a_gpu) == rows(whole)
    for kind in ("latest", "previous", "best"):
        ours, theirs = (RunFolder(f).load(kind) for f in (from_a_gpu, whole))
        check_same(ours.theta, theirs.theta)
        assert ours.state == theirs.state
    assert (from_a_gpu / "config.yaml").read_text() == (whole / "config.yaml").read_text()
    # Where it is not told again.
    resume(from_a_gpu, iterations=5)


def test_a_run_from_a_gpu_on_the_command_line(
    from_a_gpu: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused: exit code 2, one sentence on stderr and nothing else. Resumed as told: nothing is
    said. Tested: a sentence that the CPU is used, exit code 0."""
    name = str(from_a_gpu)
    monkeypatch.setattr("maml_rl.figures.draw", lambda *_: [])
    for words, complaint in (
        (["resume", name], "; use --device cpu"),
        (["resume", name, "--device", "cpu"], "; or use --physics cpu"),
        (["evaluate", name, "--device", "cuda"], "; use --device cpu"),
        (["evaluate", name, "--device", "cpu", "--physics", "warp"], "; or use --physics cpu"),
        (["resume", name, "--device", "cuad"], "did you mean 'cuda'?"),
    ):
        before = contents(from_a_gpu)
        assert run(words) == 2
        printed = capsys.readouterr()
        assert complaint in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
        assert contents(from_a_gpu) == before
    place = ["--device", "cpu", "--physics", "cpu"]
    assert run(["resume", name, *place, "--iterations", "3", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    edit(from_a_gpu / "config.yaml", "device: cpu", "device: cuda")
    assert run(["evaluate", name, "--quiet", "--out", str(from_a_gpu.parent / "test")]) == 0
    assert capsys.readouterr().err == f"maml-rl: {CPU_BUILD}; the CPU is used instead\n"


@pytest.mark.usefixtures("no_gpu", "no_warp")
@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        (["--device", "cuda"], f"maml-rl: {CPU_BUILD}; use --device cpu\n"),
        (["--physics", "warp"], "; or use --physics cpu\n"),
    ],
)
def test_what_is_not_there_is_not_begun(
    place: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2 and a sentence, and no folder is made."""
    monkeypatch.chdir(tmp_path)
    assert run(["train", "navigation", *flags(), *place]) == 2
    printed = capsys.readouterr()
    assert printed.err.endswith(complaint)
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []
