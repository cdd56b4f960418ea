"""A policy in the hand: adapt, act, save, load; an MLP or a module of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import envs
import maml_rl
from maml_rl.adapt import flatten
from maml_rl.errors import RunWarning
from maml_rl.policy import log_std
from maml_rl.versions import versions
from tests.tiny import SETTINGS


def test_a_loaded_policy_is_the_trained_one(tmp_path: Path) -> None:
    """load(RUN) gives the same parameters and, adapted with the same seed, the same actions."""
    experiment = maml_rl.load_experiment("half_cheetah_dir", **SETTINGS)
    trained = maml_rl.meta_train(experiment, out=tmp_path / "run")
    loaded = maml_rl.load(tmp_path / "run")
    assert loaded.experiment == experiment
    observation = np.linspace(-1, 1, 20)
    for policy in (trained, loaded):
        adapted = policy.adapt(experiment.family, [-1.0], steps=2, seed=3)
        # Adapting makes another policy and leaves this one alone.
        assert torch.equal(policy.params["log_std"], trained.params["log_std"])
        assert not torch.equal(adapted.params["log_std"], policy.params["log_std"])
        np.testing.assert_array_equal(
            adapted.act(observation, deterministic=True),
            trained.adapt(experiment.family, [-1.0], steps=2, seed=3).act(
                observation, deterministic=True
            ),
        )


@pytest.mark.parametrize(
    ("package", "told"),
    [("mujoco", True), ("gymnasium", True), ("maml-rl", True), ("torch", False), ("numpy", False)],
)
def test_only_what_simulates_is_told_to_be_of_another_release(
    package: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rounding alone nobody is told, which any newer numpy brings."""
    maml_rl.meta_train(maml_rl.load_experiment("navigation", **SETTINGS), out=tmp_path / "run")
    monkeypatch.setattr("maml_rl.versions.versions", lambda: {**versions(), package: "1.2"})
    if told:
        with pytest.warns(RunWarning, match=rf"with {package} .* \(here 1.2\); it is used"):
            maml_rl.load(tmp_path / "run")
    else:
        maml_rl.load(tmp_path / "run")


def test_actions_are_in_the_bodys_unit_with_the_policys_noise() -> None:
    """Navigation: an action of 1 in the policy's unit is .1 m; at log_std -2 few are clipped."""
    experiment = maml_rl.load_experiment("navigation", **SETTINGS, policy__initial_log_std=-2.0)
    policy = maml_rl.new_policy(experiment)
    actions = policy.act(np.zeros((4000, 2)))
    assert actions.shape == (4000, 2)
    np.testing.assert_allclose(actions.std(0), 0.1 * np.exp(-2.0), rtol=0.05)
    mean = policy.act(np.zeros(2), deterministic=True)
    np.testing.assert_allclose(mean, 0.0, atol=1e-7)
    assert float(log_std(policy.params)[0]) == -2.0


def test_a_plain_gymnasium_loop_runs(tmp_path: Path) -> None:
    """With the MLP, and with a module as the mean, also after saving and loading."""
    experiment = maml_rl.load_experiment("half_cheetah_dir", **SETTINGS)
    mine = nn.Sequential(nn.Linear(20, 9), nn.ELU(), nn.Linear(9, 6))
    env = gymnasium.make("MamlRL/HalfCheetahDir-v0", task=[1.0])
    maml_rl.meta_train(experiment, out=tmp_path / "mine", mean=mine)
    for policy in (
        maml_rl.new_policy(experiment),
        maml_rl.load(tmp_path / "mine", mean=nn.Sequential(*mine)),
    ):
        adapted = policy.adapt(experiment.family, [1.0])
        observation, _ = env.reset(seed=0)
        for _ in range(5):
            action = adapted.act(observation)
            assert env.action_space.contains(action)
            observation, *_ = env.step(action)
    env.close()


def test_a_module_as_the_mean_trains_as_the_mlp_does_at_any_number_of_threads() -> None:
    """The same weights in a Sequential give the MLP's update, though threads share the module."""
    # Few CG iterations, well damped: ten would magnify rounding between the two products.
    experiment = maml_rl.load_experiment(
        "half_cheetah_dir", **SETTINGS, trust_region__cg_iterations=2, trust_region__damping=0.1
    )
    mlp = maml_rl.new_policy(experiment)
    layers = [nn.Linear(20, 8), nn.Linear(8, 5), nn.Linear(5, 6)]
    module = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight.copy_(mlp.params[f"mean.{number}.weight"].T)
            layer.bias.copy_(mlp.params[f"mean.{number}.bias"])
    given = [p.detach().clone() for p in module.parameters()]
    once = replace(experiment, iterations=1)
    expected = maml_rl.meta_train(once).params
    for threads in (1, 3):
        trained = maml_rl.meta_train(replace(once, threads=threads), mean=module).params
        for number in range(3):
            torch.testing.assert_close(
                trained[f"mean.{2 * number}.weight"].T,
                expected[f"mean.{number}.weight"],
                rtol=1e-4,
                atol=1e-5,
            )
    assert all(torch.equal(a, b) for a, b in zip(given, module.parameters(), strict=True))


def test_adapting_counts_what_a_test_does() -> None:
    """By steps, more of the short episodes of a point that arrives, and so other parameters; where
    none ends early there is no difference."""
    for radius, alike in ((0.25, False), (0.0, True)):
        adapted = []
        for count in ("episodes", "steps"):
            experiment = maml_rl.load_experiment(
                "navigation",
                **{**SETTINGS, "family__horizon": 30},
                family__goal_radius=radius,
                evaluation__count=count,
            )
            policy = maml_rl.new_policy(experiment).adapt(experiment.family, [0.2, 0.1])
            adapted.append(flatten(policy.params))
        assert torch.equal(*adapted) == alike


def test_adapting_to_nonsense_is_refused() -> None:
    """A task of no family, another body, negative steps."""
    experiment = maml_rl.load_experiment("half_cheetah_dir", **SETTINGS)
    policy = maml_rl.new_policy(experiment)
    with pytest.raises(envs.FamilyError, match="direction"):
        policy.adapt(experiment.family, [0.5])
    with pytest.raises(ValueError, match=r"20 observations.*41"):
        policy.adapt(envs.make("ant_dir"), [1.0])
    with pytest.raises(maml_rl.InputError, match=r"to \(3, 6\) actions, it gave \(3, 1\)"):
        maml_rl.new_policy(experiment, nn.Linear(20, 1))
    with pytest.raises(ValueError, match="at least 0"):
        policy.adapt(experiment.family, [1.0], steps=-1)


def test_the_public_interface_is_there() -> None:
    """Every name of __all__ can be imported, and every one is documented."""
    for name in maml_rl.__all__:
        value = getattr(maml_rl, name)
        assert isinstance(value, str) or value.__doc__


def test_a_policy_that_observes_its_task_is_told_it(tmp_path: Path) -> None:
    """Trained, loaded and adapted by no step it acts on O numbers; before, it asks for a task."""
    experiment = maml_rl.load_experiment(
        "navigation", **SETTINGS, policy__observe_task=True, adaptation__inner_steps=0
    )
    maml_rl.meta_train(experiment, out=tmp_path / "run")
    oracle = maml_rl.load(tmp_path / "run")
    assert tuple(oracle.params["mean.0.weight"].shape) == (4, 8)
    with pytest.raises(ValueError, match="observes its task"):
        oracle.act(np.zeros(2))
    goals = ([0.4, 0.0], [-0.4, 0.0])
    first, second = (oracle.adapt(experiment.family, g, steps=0) for g in goals)
    assert torch.equal(first.params["log_std"], oracle.params["log_std"])
    several = first.act(np.zeros((3, 2)), deterministic=True)
    assert several.shape == (3, 2)
    np.testing.assert_array_equal(several[0], first.act(np.zeros(2), deterministic=True))
    assert not np.array_equal(several[0], second.act(np.zeros(2), deterministic=True))
