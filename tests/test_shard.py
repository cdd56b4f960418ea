"""Some tasks of an iteration, kept in one process, on whatever device its experiment says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from envs import TaskFamily
from maml_rl.adapt import flatten
from maml_rl.config import Experiment, load_experiment
from maml_rl.devices import Device
from maml_rl.shard import Shard
from maml_rl.trained import new_policy
from tests.fake_device import fake_device


def small(**settings: object) -> Experiment[TaskFamily]:
    """Navigation with four episodes of six steps a task."""
    sizes = {"sampling__episodes": 4, "family__horizon": 6, "policy__layers": [16]}
    return load_experiment("navigation", **sizes, **settings)


def test_parts_add_up_to_the_metric_of_the_whole_batch() -> None:
    """Of twelve tasks, three chunks, a share of .3 is the first: a shard that does not have it adds
    nothing, and what all come to is three times its share of the product."""
    experiment = small(sampling__tasks=12, trust_region__metric_share=0.3)
    fresh = new_policy(experiment)
    vector = flatten(fresh.params) + 1.0
    found = {}
    for start, stop in ((0, 12), (0, 4), (4, 12)):
        shard = Shard(experiment, fresh.policy, stop - start, 4)
        shard.begin(fresh.params, 0, start, stop)
        shard.build(12 * 4 * 6)
        found[start, stop] = [shard.metric(vector).sum(0), shard.product(vector).sum(0)]
        shard.close()
    whole, first, rest = found.values()
    torch.testing.assert_close(whole[0], 3.0 * first[1], rtol=1e-5, atol=1e-9)
    assert torch.equal(whole[0], first[0])
    assert rest[0].abs().max() == 0
    assert rest[1].abs().max() > 0


def test_a_shard_has_the_alpha_of_each_iteration() -> None:
    """One that began with another finds what one finds that has had it all along."""
    later = {"adaptation__later_from": [3], "adaptation__later_step_sizes": [0.05]}
    gradients = []
    for settings in (later, {"adaptation__step_size": 0.05}, {}):
        experiment = small(sampling__tasks=4, **settings)
        fresh = new_policy(experiment)
        shard = Shard(experiment, fresh.policy, 4, 4)
        for iteration in (2, 3):
            report = shard.begin(fresh.params, iteration, 0, 4)
        shard.build(int(report.batches[-1].live_steps.sum()))
        gradients.append(shard.gradient())
        shard.close()
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_a_shard_has_the_alpha_of_its_thetas_noise() -> None:
    """As one process has it."""
    gradients = []
    for settings in (
        {"adaptation__times_variance": True, "adaptation__step_size": 0.4},
        {"adaptation__step_size": 0.4 * math.exp(-1.0)},
    ):
        experiment = small(sampling__tasks=4, policy__initial_log_std=-0.5, **settings)
        fresh = new_policy(experiment)
        shard = Shard(experiment, fresh.policy, 4, 4)
        report = shard.begin(fresh.params, 0, 0, 4)
        shard.build(int(report.batches[-1].live_steps.sum()))
        gradients.append(shard.gradient())
        shard.close()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def answers(device: str) -> list[Tensor]:
    """What a shard says of all tasks of the first iteration; parameters and vectors are here."""
    experiment = small(sampling__tasks=4)
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
