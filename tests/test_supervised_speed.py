"""The yardstick of `maml-rl speed`: a plain loop that does the same work, and memory that is told
before it is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maml_rl.chunks import Chunks
from maml_rl.errors import InputError
from maml_rl.supervised import load_experiment, memory
from maml_rl.supervised.memory import check_memory
from maml_rl.supervised.networks import NetworkSettings, make_network
from maml_rl.supervised.speed import (
    Setup,
    measure,
    plain_conv_net,
    plain_loop,
    plain_mlp,
)
from maml_rl.supervised.train import meta_train
from tests.tiny_supervised import sinusoid

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        scale = float(value.abs().max()) + 1e-8
        torch.testing.assert_close(b[name] / scale, value / scale, rtol=0, atol=2e-5)


def test_the_loop_over_tasks_computes_the_same_gradient() -> None:
    """For sine curves, and for Omniglot's network by torch's own batch normalisation."""
    curves = Setup.of("sinusoid")
    batch = curves.experiment.data.open().sample("train", 4, np.random.default_rng(3))
    with Chunks(1, 0) as chunks:
        ours = curves.learner.meta_gradient(curves.meta, batch, chunks).gradient
    sizes = dict.fromkeys(curves.meta, 0.001)
    close(ours, plain_loop(plain_mlp, F.mse_loss, curves.meta, batch, sizes))

    pictures = Setup.of("omniglot_5way_1shot", outer__tasks=3)
    batch = pictures.pictures(1)
    with Chunks(1, 0) as chunks:
        ours = pictures.learner.meta_gradient(pictures.meta, batch, chunks).gradient
    moved = {n: 0.4 for n in pictures.meta if n not in pictures.learner.network.shared}
    close(ours, plain_loop(plain_conv_net, pictures.learner.loss, pictures.meta, batch, moved))


@pytest.mark.slow
def test_every_figure_is_measured() -> None:
    """Cut down: two ratios of time to the loop, and what first order saves of time and memory."""
    said: list[str] = []
    figures = measure(1, False, said.append)
    assert [figure["unit"] for figure in figures] == [
        *("x a loop over tasks", "x a loop over tasks"),
        *("of second order's", "of second order's"),
    ]
    assert all(figure["value"] > 0 for figure in figures)
    assert {figure["met"] for figure in figures} == {None}
    assert len(said) == 2


@pytest.mark.parametrize(
    ("settings", "shape", "outputs"),
    [
        (NetworkSettings(layers=(7, 5)), (3,), 2),
        (NetworkSettings(layers=(7, 5), batch_norm=True), (1, 4, 4), 3),
        (NetworkSettings(kind="strided-conv", blocks=3, filters=5), (2, 9, 9), 4),
        (NetworkSettings(kind="pooled-conv", blocks=2, filters=6), (3, 11, 11), 5),
    ],
)
def test_parameters_are_counted_without_making_them(
    settings: NetworkSettings, shape: tuple[int, ...], outputs: int
) -> None:
    network = make_network(settings, shape, outputs)
    made = network.initial_parameters(torch.Generator())
    assert network.parameter_count == sum(p.numel() for p in made.values())


def test_what_must_be_in_memory_at_once_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny sine curves: a network 1-8-7-1 is 87 numbers, four times; examples are one number each:
    3 tasks of 4 + 5, 5 validation tasks and 6 test tasks of 4 + 100."""
    taken = 16 * 87 + 4 * (3 * 9 + 5 * 104 + 6 * 104)
    monkeypatch.setattr(memory, "physical_memory", lambda: taken)
    check_memory(sinusoid())
    monkeypatch.setattr(memory, "physical_memory", lambda: taken - 1)
    with pytest.raises(InputError, match=r"test tasks of 4 shots take at least .* lower evaluat"):
        meta_train(sinusoid())


def test_a_test_of_more_shots_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9 in place of 4: 5 numbers more for each of 6 tasks."""
    taken = 16 * 87 + 4 * (3 * 9 + 5 * 104 + 6 * 109)
    more = sinusoid(evaluation__shots=[4, 9])
    monkeypatch.setattr(memory, "physical_memory", lambda: taken)
    check_memory(more)
    monkeypatch.setattr(memory, "physical_memory", lambda: taken - 1)
    with pytest.raises(InputError, match="test tasks of 9 shots"):
        check_memory(more)


@pytest.mark.parametrize(
    ("changed", "lower"),
    [
        ({"network__layers": [10**5] * 50}, "lower network.layers"),
        ({"outer__tasks": 10**5, "data__shots": 10**5}, "lower outer.tasks, data.shots"),
        ({"evaluation__validation_tasks": 10**5, "data__shots": 10**5}, "lower evaluation.valid"),
    ],
)
def test_absurd_sizes_are_refused(changed: dict[str, object], lower: str) -> None:
    with pytest.raises(InputError, match=lower):
        meta_train(sinusoid(**changed))


def test_the_papers_experiments_fit_in_8_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "physical_memory", lambda: 8 * 10**9)
    for name in ("omniglot_20way_5shot", "omniglot_5way_1shot_mlp", "miniimagenet_5way_5shot"):
        check_memory(load_experiment(name))
