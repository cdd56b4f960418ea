"""Simulations that break down: counted, never learned from, and seen again from a dump."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from envs import HalfCheetahDir
from envs.family import Floats
from envs.references import allow_imports
from maml_rl.adapt import broadcast
from maml_rl.cli import run
from maml_rl.config import load_experiment
from maml_rl.errors import InputError, RunStopped
from maml_rl.replay import read_dump
from maml_rl.rollout import SamplingError
from maml_rl.sampler import Sampler, task_generator, task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.train import meta_train
from maml_rl.trained import new_policy
from tests.tiny import SETTINGS, flags

TASKS, EPISODES = 2, 4
SEEDS = task_seeds(TRAINING, 0, 0, 0, TASKS)
"""Of the first batch of run seed 0."""
WILD_TASK, WILD_EPISODE = 1, 2


@dataclass(frozen=True, kw_only=True)
class WildCheetah(HalfCheetahDir):
    """A half-cheetah of which one world in eight starts with a velocity of 1e12."""

    everywhere: bool = False
    """Whether all do."""

    name: ClassVar[str] = "wild_cheetah"

    def draw_start(self, rng: np.random.Generator) -> Floats:
        """As always, but for one episode of the first batch, told by its generator's key."""
        key = rng.bit_generator.state["state"]["key"]
        start = super().draw_start(rng)
        if self.everywhere or tuple(key) == (SEEDS[WILD_TASK], WILD_EPISODE):
            start[self.state_sizes[0] :] = 1e12
        return start


WILD = replace(
    load_experiment(
        "half_cheetah_dir", **{**SETTINGS, "iterations": 1, "sampling__count": "episodes"}
    ),
    family=WildCheetah(horizon=6),
)
WILD = replace(
    WILD, sampling=replace(WILD.sampling, tasks=TASKS, episodes=EPISODES, max_diverged=0.125)
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MuJoCo logs what breaks down to the working directory."""
    monkeypatch.chdir(tmp_path)


def test_one_of_eight_worlds_breaks_down_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Counted, its step is not alive, and the update is that of seven worlds: finite.

    One of eight is not above .125, so the run goes on.
    """
    trained = meta_train(WILD, out=tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert row["diverged_worlds"] == "1"
    # 7 whole episodes before adaptation, 8 after.
    assert int(row["env_steps"]) == (7 + 8) * 6
    assert row["accepted"] == "1"
    for name, value in row.items():
        assert name == "refused_because" or np.isfinite(float(value)), name
    assert all(bool(torch.isfinite(p).all()) for p in trained.params.values())


def test_a_world_that_breaks_down_is_not_alive() -> None:
    """No step of it is, its return is NaN and left out of the mean, all others are untouched."""
    fresh = new_policy(WILD)
    tasks = torch.from_numpy(WILD.family.sample_tasks(TASKS, task_generator(TRAINING, 0, 0)))
    tame = replace(WILD, family=HalfCheetahDir(horizon=6))
    batches = []
    for family in (WILD.family, tame.family):
        with Sampler(family, fresh.policy, tasks=TASKS, episodes=EPISODES) as sampler:
            batches.append(sampler.sample(broadcast(fresh.params, TASKS), tasks, SEEDS))
    wild, calm = batches
    expected = torch.zeros(TASKS, EPISODES, dtype=torch.bool)
    expected[WILD_TASK, WILD_EPISODE] = True
    assert torch.equal(wild.diverged, expected)
    assert torch.equal(wild.alive, ~expected.unsqueeze(2).expand(-1, -1, 6))
    assert torch.equal(wild.returns().isnan(), expected)
    assert bool(wild.mean_returns().isfinite().all())
    assert torch.equal(wild.rewards[~expected], calm.rewards[~expected])


def test_too_many_end_the_run_with_a_dump_that_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of eight is above .1: exit 3, and a dump with state, action, task, seed and versions,
    which breaks down again from the very same state."""
    strict = replace(WILD, sampling=replace(WILD.sampling, max_diverged=0.1))
    with pytest.raises(RunStopped, match=r"broke down in 1 of 8 .*maml-rl replay \S+") as stopped:
        meta_train(strict, out=tmp_path / "run")
    assert stopped.value.exit_code == 3
    path = tmp_path / "run" / "dumps" / "iteration-0.json"
    assert str(path) in str(stopped.value)
    saved = json.loads(path.read_text())
    assert saved["task_seed"] == int(SEEDS[WILD_TASK])
    assert (saved["task_index"], saved["episode"]) == (WILD_TASK, WILD_EPISODE)
    assert saved["task"] in ([-1.0], [1.0])
    assert saved["state_before"]["qvel"] == [1e12] * 9
    assert (len(saved["action"]), len(saved["actions"])) == (6, 1)
    assert "mujoco" in saved["versions"]
    assert run(["replay", str(path)]) == 2
    assert "--allow-import" in capsys.readouterr().err
    assert run(["replay", str(path), "--allow-import"]) == 0
    out = capsys.readouterr().out
    assert "broke down again in this step, from the very same state" in out
    for words in ("wild_cheetah", "iteration 0, task 1", f"seed {SEEDS[1]}", "qvel: 1e+12"):
        assert words in out


def test_a_break_down_in_the_middle_of_an_episode_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with a body that ships and wild starts, after some steps."""
    words = ["train", "half_cheetah_vel", *flags(family__horizon=40, sampling__max_diverged=0)]
    words += ["--family.velocity-noise", "700", "--out", str(tmp_path / "run"), "--quiet"]
    assert run(words) == 3
    assert "Traceback" not in capsys.readouterr().err
    path = next((tmp_path / "run" / "dumps").iterdir())
    dump = read_dump(path)
    assert len(dump.divergence.actions) > 1, "the test wants one that takes some steps"
    assert run(["replay", str(path)]) == 0
    assert "broke down again in this step, from the very same state" in capsys.readouterr().out
    # Under other physics it need not: that is told, with the versions.
    saved = json.loads(path.read_text())
    saved["config"] = saved["config"].replace("timestep: 0.01", "timestep: 0.0001")
    saved["versions"]["mujoco"] = "2.1.0"
    path.write_text(json.dumps(saved))
    assert run(["replay", str(path)]) == 3
    assert "did not break down; the dump was made with mujoco 2.1.0" in capsys.readouterr().err


def test_a_run_without_a_folder_names_the_seed() -> None:
    """meta_train without `out` writes nothing, and the message still tells where to look."""
    strict = replace(WILD, sampling=replace(WILD.sampling, max_diverged=0.0))
    with pytest.raises(RunStopped, match=r"iteration 0, run seed 0: the simulation broke down"):
        meta_train(strict)
    with pytest.raises(ValueError, match="max_diverged must be between 0 and 1, got 2"):
        replace(WILD.sampling, max_diverged=2.0)


def test_when_every_world_of_a_task_breaks_down_it_cannot_go_on() -> None:
    """Whatever may diverge: nothing is left to learn from, and the divergence is kept."""
    family = WildCheetah(horizon=6, everywhere=True)
    fresh = new_policy(WILD)
    tasks = torch.ones(TASKS, 1)
    with (
        Sampler(family, fresh.policy, tasks=TASKS, episodes=EPISODES) as sampler,
        pytest.raises(SamplingError, match="first step of every episode") as caught,
    ):
        sampler.sample(broadcast(fresh.params, TASKS), tasks, SEEDS)
    assert caught.value.divergence is not None
    assert caught.value.divergence.actions.shape == (1, 6)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not a dump"),
        ("[]", "is not a dump"),
        ("{}", "is not a dump"),
        ('{"format": 2}', "format 2; this version of maml-rl reads format 1"),
        ('{"format": 1, "config": "name: ["}', "is not plain YAML"),
        ("[" * 100_000, "is not a dump"),
    ],
)
def test_what_is_no_dump_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    """One sentence, never a traceback."""
    path = tmp_path / "dump.json"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_dump(path)
    with pytest.raises(InputError, match="cannot read"):
        read_dump(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "change", [{"start": [1.0]}, {"actions": [[1.0, 2.0]]}, {"task": "x"}, {"state_before": 3}]
)
def test_a_dump_with_wrong_shapes_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    """Before any simulator sees it."""
    strict = replace(WILD, sampling=replace(WILD.sampling, max_diverged=0.0))
    with pytest.raises(RunStopped):
        meta_train(strict, out=tmp_path / "run")
    path = tmp_path / "run" / "dumps" / "iteration-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with allow_imports(), pytest.raises(InputError, match="is not a dump"):
        read_dump(path)
