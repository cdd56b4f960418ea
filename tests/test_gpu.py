"""What only a GPU can show: run with `pytest -m gpu` on a machine that has one.

`MAML_RL_GPU_TESTS=cpu` rehearses the tests themselves on the CPU.
"""

from __future__ import annotations

import gc
import os
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import maml_rl
from envs import HalfCheetahDir, TaskFamily, make
from envs.family import WarpSettings
from maml_rl.adapt import Params, broadcast
from maml_rl.checkpoints import FRESH
from maml_rl.chunks import Chunks
from maml_rl.config import Experiment, load_experiment
from maml_rl.device_rollout import DeviceRollout
from maml_rl.devices import Physics
from maml_rl.episodes import Episodes
from maml_rl.errors import RunStopped, RunWarning
from maml_rl.maml import MetaReport, meta_iteration
from maml_rl.rollout import Loop, Wave
from maml_rl.sampler import Sampler, task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.train import Local, Trainer, meta_train, resume
from maml_rl.trained import new_policy, to_device

DEVICE = os.environ.get("MAML_RL_GPU_TESTS", "cuda")
ON_GPU = DEVICE == "cuda"

pytestmark = pytest.mark.gpu

TASKS, EPISODES, HORIZON = 6, 4, 30
PHYSICS = get_args(Physics)


def experiment_of(name: str = "half_cheetah_dir", **changed: object) -> Experiment[TaskFamily]:
    """A shipped experiment, small, on the device."""
    sizes = {
        "iterations": 2,
        "sampling__tasks": TASKS,
        "sampling__episodes": EPISODES,
        "family__horizon": HORIZON,
        "evaluation__tasks": 3,
        "evaluation__episodes": 3,
        "evaluation__steps": 1,
        "device": DEVICE,
    }
    return load_experiment(name, **{**sizes, **changed})


def on(device: str, episodes: Episodes) -> Episodes:
    """Episodes elsewhere."""
    return Episodes(**{name: value.to(device) for name, value in vars(episodes).items()})


def between(some: Params, others: Params) -> float:
    """Distance of all parameters together, wherever they are."""
    return float(torch.cat([(some[n].cpu() - others[n].cpu()).flatten() for n in some]).norm())


@pytest.mark.parametrize("loss", ["log-prob", "likelihood-ratio", "dice"])
@pytest.mark.parametrize("name", ["half_cheetah_dir", "ant_dir"])
def test_an_update_from_the_same_episodes_is_the_cpus(name: str, loss: str) -> None:
    """Parameters after one update agree to 1e-3 of the step's own length, KL and surrogate too.

    To 1e-2 with dice, which adds in another order each time.
    """
    experiment = experiment_of(name, adaptation__inner_loss=loss, device="cpu")
    fresh = new_policy(experiment)
    trainer = Trainer.build(experiment, fresh.policy, fresh.params, FRESH)
    batches: list[Episodes] = []
    tasks = torch.from_numpy(experiment.family.sample_tasks(TASKS, np.random.default_rng(0)))

    def sample(params: Params, phase: int) -> Episodes:
        seeds = task_seeds(TRAINING, 0, 0, phase, TASKS)
        assert isinstance(trainer.engine, Local)
        batches.append(trainer.engine.sampler.sample(params, tasks, seeds))
        return batches[-1]

    def update(device: str) -> tuple[Params, MetaReport]:
        def again(params: Params, phase: int) -> Episodes:
            return on(device, batches[phase])

        with Chunks(1, 2 if device == "cpu" else 0) as chunks, warnings.catch_warnings():
            # dice adds in no fixed order there.
            warnings.filterwarnings("ignore", message=".*does not have a deterministic")
            return meta_iteration(
                to_device(fresh.params, device),
                fresh.policy,
                sample if not batches else again,
                TASKS,
                adaptation=experiment.adaptation,
                advantages=experiment.advantages,
                trust_region=experiment.trust_region,
                chunks=chunks,
                clock=lambda: 0.0,
            )

    there, report = update("cpu")
    here, other = update(DEVICE)
    trainer.close()
    assert report.step.accepted
    assert other.step.accepted
    width = 1e-2 if loss == "dice" else 1e-3
    assert between(there, here) <= width * between(there, fresh.params)
    assert other.step.kl == pytest.approx(report.step.kl, rel=width)
    assert other.step.surrogate_after == pytest.approx(
        report.step.surrogate_after, rel=width, abs=1e-5
    )


@pytest.mark.parametrize("physics", PHYSICS)
def test_a_seeded_run_is_the_same_bit_for_bit(physics: str) -> None:
    """Two runs, half-cheetah and ant, whose contacts are many."""
    for name in ("half_cheetah_dir", "ant_dir"):
        experiment = experiment_of(name, physics=physics)
        first, second = (meta_train(experiment).params for _ in range(2))
        assert all(torch.equal(first[n], second[n]) for n in first), name


@pytest.mark.parametrize("physics", PHYSICS)
def test_how_tasks_are_split_changes_nothing(physics: str) -> None:
    """Starts and noise are the same; products of other batch sizes may round otherwise.

    So does an episode's first control step to rounding; later steps follow.
    """
    experiment = experiment_of(physics=physics)
    fresh = new_policy(experiment)
    tasks = torch.from_numpy(experiment.family.sample_tasks(TASKS, np.random.default_rng(0)))
    made = []
    for at_once in (TASKS, 4, 1):
        with Sampler(
            experiment.family,
            fresh.policy,
            tasks=at_once,
            episodes=EPISODES,
            device=DEVICE,
            physics=experiment.physics,
        ) as sampler:
            params = broadcast(fresh.params, TASKS)
            made.append(sampler.sample(params, tasks, task_seeds(TRAINING, 0, 0, 0, TASKS)))
    for other in made[1:]:
        torch.testing.assert_close(other.observations[:, :, 0], made[0].observations[:, :, 0])
        torch.testing.assert_close(other.actions[:, :, :3], made[0].actions[:, :, :3])
        torch.testing.assert_close(other.log_probs, made[0].log_probs)


def test_a_policy_on_the_device_moves_bodies_on_the_cpu_as_one_there_does() -> None:
    """The first control steps agree to rounding, in both lanes."""
    experiment = experiment_of()
    fresh = new_policy(replace(experiment, device="cpu"))
    tasks = torch.from_numpy(experiment.family.sample_tasks(TASKS, np.random.default_rng(0)))
    made = []
    for device in ("cpu", DEVICE):
        with Sampler(
            experiment.family, fresh.policy, tasks=TASKS, episodes=EPISODES, device=device
        ) as sampler:
            params = broadcast(to_device(fresh.params, device), TASKS)
            seeds = task_seeds(TRAINING, 0, 0, 0, TASKS)
            made.append(on("cpu", sampler.sample(params, tasks, seeds)))
    torch.testing.assert_close(made[1].actions[:, :, :10], made[0].actions[:, :, :10])
    torch.testing.assert_close(
        made[1].rewards[:, :, :10], made[0].rewards[:, :, :10], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["half_cheetah_vel", "ant_dir", "navigation"])
def test_a_launched_graph_does_what_its_kernels_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same episodes bit for bit, twice over, and no warning that it could not be captured."""
    family = replace(make(name), horizon=HORIZON)
    experiment = experiment_of(name)
    fresh = new_policy(experiment)
    loop = Loop(family=family, policy=fresh.policy, tasks=TASKS, episodes=EPISODES, device=DEVICE)
    tasks = torch.from_numpy(family.sample_tasks(TASKS, np.random.default_rng(0)))
    wave = Wave(
        broadcast(fresh.params, TASKS),
        tasks,
        task_seeds(TRAINING, 0, 0, 0, TASKS),
        torch.zeros(TASKS, dtype=torch.int64),
        torch.full((TASKS,), EPISODES),
        0,
    )

    def episodes() -> list[Episodes]:
        rollout = DeviceRollout(loop)
        with torch.no_grad():
            made = [rollout.run(wave) for _ in range(2)]
        rollout.close()
        return made

    captured = episodes()
    if name != "navigation":
        monkeypatch.setattr("envs.warp.WarpPhysics.as_graph", lambda self, body: body)
    plain = episodes()
    for one in captured:
        for field, value in vars(plain[0]).items():
            assert torch.equal(getattr(one, field), value), field


@pytest.mark.skipif(not ON_GPU, reason="a CPU is never waited for")
def test_nothing_is_waited_for_within_an_episode() -> None:
    """As many synchronisations in 60 control steps as in 20."""

    def waits(horizon: int) -> int:
        family = HalfCheetahDir(horizon=horizon)
        fresh = new_policy(experiment_of(family__horizon=horizon))
        with Sampler(
            family, fresh.policy, tasks=2, episodes=3, device=DEVICE, physics="warp"
        ) as sampler:
            tasks = torch.from_numpy(family.sample_tasks(2, np.random.default_rng(0)))
            params, seeds = broadcast(fresh.params, 2), task_seeds(TRAINING, 0, 0, 0, 2)
            sampler.sample(params, tasks, seeds)
            try:
                with warnings.catch_warnings(record=True) as noticed:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    sampler.sample(params, tasks, seeds)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # Not what torch says of the mode itself, once.
        return len([w for w in noticed if "called a synchronizing" in str(w.message)])

    assert waits(60) == waits(20)


@pytest.mark.parametrize("physics", PHYSICS)
def test_a_run_goes_on_elsewhere(physics: str, tmp_path: Path) -> None:
    """From the device to the CPU and back, either physics; the parameters are the checkpoint's."""
    start = experiment_of(physics=physics, iterations=1)
    there = meta_train(start, out=tmp_path / "run").params
    loaded = maml_rl.load(tmp_path / "run", device="cpu", physics="cpu")
    assert all(torch.equal(loaded.params[n], there[n].cpu()) for n in there)
    on_cpu = resume(tmp_path / "run", iterations=2, device="cpu", physics="cpu").params
    assert all(p.device.type == "cpu" for p in on_cpu.values())
    back = resume(tmp_path / "run", iterations=3, device=start.device, physics=start.physics)
    assert all(p.device.type == DEVICE for p in back.params.values())
    assert not all(torch.equal(back.params[n].cpu(), on_cpu[n]) for n in on_cpu)
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU's own memory")
def test_where_the_gpus_memory_does_not_suffice_chunks_are_halved() -> None:
    """Smaller chunks give the same step; where one task is too large, a sentence says so.

    There is less than the update of all tasks takes, and more than that of one. Many short
    episodes: a GPU rounds chunks of other sizes otherwise, and within 200 control steps that would
    become other episodes.
    """
    experiment = experiment_of(
        iterations=1, sampling__tasks=16, sampling__episodes=200, family__horizon=20
    )
    fresh = new_policy(experiment)

    def trainer(chunk_size: int) -> Trainer:
        # What earlier tests have left behind is not to be counted.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        state = replace(FRESH, chunk_size=chunk_size)
        return Trainer.build(experiment, fresh.policy, fresh.params, state)

    def step(chunk_size: int) -> tuple[Params, int]:
        """Parameters after one step, and the bytes that it took."""
        with closing(trainer(chunk_size)) as at_work:
            at_work.step()
            return at_work.theta, torch.cuda.max_memory_reserved()

    # What is made once, such as cuBLAS's workspace.
    step(1)
    whole, most = step(16)
    _, least = step(1)
    before = torch.cuda.memory_allocated()
    assert before < least < most
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        with closing(trainer(0)) as at_work:
            assert isinstance(at_work.engine, Local)
            assert at_work.engine.chunks.size == 16
            torch.cuda.set_per_process_memory_fraction((least + most) / 2 / total)
            with pytest.warns(RunWarning, match="is repeated with"):
                at_work.step()
            assert at_work.engine.chunks.size < 16
            moved = between(whole, fresh.params)
            assert between(at_work.theta, whole) <= 1e-2 * moved
        with closing(trainer(0)) as at_work, warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)
            torch.cuda.set_per_process_memory_fraction((before + least) / 2 / total)
            with pytest.raises(RunStopped, match="the memory does not suffice"):
                at_work.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_worlds_without_room_are_told_of_on_the_device() -> None:
    """The warning names the setting to raise; nothing but those worlds is lost."""
    family = HalfCheetahDir(horizon=HORIZON)
    fresh = new_policy(experiment_of())
    tasks = torch.from_numpy(family.sample_tasks(TASKS, np.random.default_rng(0)))
    with Sampler(
        family,
        fresh.policy,
        tasks=TASKS,
        episodes=EPISODES,
        device=DEVICE,
        physics="warp",
        warp=WarpSettings(njmax=8),
    ) as sampler:
        seeds = task_seeds(TRAINING, 0, 0, 0, TASKS)
        expected = pytest.warns(RunWarning, match=r"raise warp\.njmax \(now 8\)")
        with expected:
            episodes = sampler.sample(broadcast(fresh.params, TASKS), tasks, seeds)
    assert bool(episodes.diverged.any())
    assert bool(torch.isfinite(episodes.rewards[episodes.alive]).all())
