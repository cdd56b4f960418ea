"""Some tasks of an iteration, kept in one process, on whatever device its experiment says."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from maml_rl.config import load_experiment
from maml_rl.devices import Device
from maml_rl.shard import Shard
from maml_rl.trained import new_policy
from tests.fake_device import fake_device


def answers(device: str) -> list[Tensor]:
    """What a shard says of all tasks of the first iteration; parameters and vectors are here."""
    experiment = load_experiment(
        "navigation",
        sampling__tasks=4,
        sampling__episodes=4,
        family__horizon=6,
        policy__layers=[16],
    )
    fresh = new_policy(experiment)
    there = replace(experiment, device=cast(Device, device))
    shard = Shard(there, fresh.policy, 4, 4)
    report = shard.begin(fresh.params, 0, 0, 4)
    shard.build(int(report.batches[-1].live_steps.sum()))
    gradient = shard.gradient()
    vector = gradient.double().sum(0).float()
    found = [gradient, shard.product(vector), shard.evaluate(0.0 * vector)]
    shard.close()
    return found


def test_a_shard_elsewhere_is_given_and_answers_what_is_here() -> None:
    """As a cluster's workers on GPUs are: the same bits, all on the CPU."""
    expected = answers("cpu")
    with fake_device() as kept:
        found = answers("meta")
    # Not beside the device, where everything would be the same too.
    assert kept.crossings
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)
