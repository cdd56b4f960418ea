"""The scripts that measure how much of a gradient is noise, on what is known."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maml_rl.adapt import flatten
from maml_rl.config import load_experiment
from maml_rl.train import meta_train
from tests.tiny import SETTINGS

RESULTS = Path(__file__).parent.parent / "experiments" / "results"


def script(name: str) -> dict[str, Any]:
    """A script's names, without running its last lines."""
    return runpy.run_path(str(RESULTS / f"{name}.py"), run_name=name)


def test_what_belongs_to_a_task_is_what_is_there_again_in_it_alone() -> None:
    """Gradients 3 e_i + 2 c + noise of length 1, all orthogonal: 9 of 9 + 4 + 1."""
    parts: Callable[..., tuple[float, float]] = script("inner_signal")["parts"]
    axes = torch.eye(16, dtype=torch.float64)
    common = 2.0 * axes[4]
    one, other = (3.0 * axes[:4] + common + axes[begin : begin + 4] for begin in (5, 9))
    assert [*parts(one, other)] == pytest.approx([9.0, 14.0])
    # The same tasks in another order have nothing in common but c.
    assert [*parts(one, other[[1, 2, 3, 0]])] == pytest.approx([-3.0, 14.0])


def test_the_share_of_every_discount_and_lambda_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = script("inner_signal")
    words = ["navigation", "--sampling.episodes", "2", "--family.horizon", "5"]
    found["main"]([*words, "--policy.layers", "4"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "share"
    assert len(lines) == len(found["SEEDS"]) * len(found["VARIANTS"])
    for line in lines:
        *_, task, whole, share = line.split()
        assert float(share.rstrip("%")) == pytest.approx(
            100 * float(task) / float(whole), abs=0.1 + 0.01 / float(whole)
        )


def test_a_steps_slope_is_what_the_surrogate_falls_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a short step: its KL is max_kl, and its own surrogate falls by the slope; on batches that
    it was not computed from the slope is smaller."""
    experiment = load_experiment(
        "navigation",
        **{**SETTINGS, "iterations": 1, "sampling__episodes": 8},
        trust_region__max_kl=1e-6,
        trust_region__damping=1e-3,
        # No kinks: at the start, where all is 0, each relu of a new policy has one.
        policy__nonlinearity="tanh",
    )
    trained = meta_train(experiment, out=tmp_path / "run")
    found = script("outer_signal")
    gradients, steps, natural, one, summed = found["measure"](tmp_path / "run", 3)
    own, *others = found["variants"](experiment)
    assert own == (1.0, 1e-3, 10, 1.0)
    assert len(steps) == 1 + len(others)
    theta = flatten(trained.params)
    batches = found["adapted_batches"](tmp_path / "run", 3)
    for number, (adapted, inner, chunks) in enumerate(batches):
        gradient, step = gradients[number], steps[own][number]
        objective = adapted.objective(inner, chunks)
        before, _ = objective.evaluate(theta)
        after, kl = objective.evaluate(theta + step.float())
        assert kl == pytest.approx(1e-6, rel=0.05)
        assert after - before == pytest.approx(float(gradient @ step), rel=0.05)
        if number:
            earlier = natural[:number]
            falls = []
            for direction in (*earlier, earlier.sum(0)):
                # Short, so that its divergence is that of the metric.
                short = direction * (step.norm() / direction.norm())
                _, kl = objective.evaluate(theta + short.float())
                falls.append(float(gradient @ short) * (1e-6 / kl) ** 0.5)
            assert one[number - 1] == pytest.approx(sum(falls[:-1]) / number, rel=0.05)
            assert summed[number - 1] == pytest.approx(falls[-1], rel=0.05)
    slopes = gradients @ steps[own].T
    assert bool((slopes.diagonal() < 0).all())
    assert slopes.diagonal().mean() < (slopes.sum() - slopes.diagonal().sum()) / 6
    # Steepest for its length: no other way of computing it does better on its own batch.
    for variant in others:
        if variant.gae_lambda == 1.0 and variant.cg_iterations < 10:
            assert (gradients @ steps[variant].T).trace() >= slopes.trace()
    found["main"](tmp_path / "run", 2)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("lambda  damping  products  share")
    assert lines[0].split()[:4] == ["1.00", "0.001", "10", "1.00"]
    assert [line.split(":")[0].split()[1] for line in lines[-2:]] == ["one", "the"]
