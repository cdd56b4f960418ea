"""How fast this machine samples and updates, as ratios of one run (`maml-rl speed`).

Machines are shared and noisy, so a figure with a goal is the ratio of two times measured in turn
in the same run wherever it can be.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import mujoco
import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from envs.family import decided
from envs.locomotion import LocomotionFamily
from envs.physics import CpuPhysics, Physics
from maml_rl.adapt import broadcast
from maml_rl.assess import evaluate_policy
from maml_rl.checkpoints import FRESH
from maml_rl.config import load_experiment, origin_of
from maml_rl.figure import GIGABYTE, Figure
from maml_rl.loop import record
from maml_rl.runs import RunFolder
from maml_rl.sampler import task_generator, task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.supervised.speed import measure as supervised
from maml_rl.train import Local, Trainer
from maml_rl.trained import TrainedPolicy, new_policy

REPEATS = 3


@dataclass(frozen=True)
class Bench:
    """One experiment set up to be timed."""

    trainer: Trainer

    @property
    def engine(self) -> Local:
        """What does its iterations: this process."""
        assert isinstance(self.trainer.engine, Local)
        return self.trainer.engine

    @classmethod
    def of(cls, name: str, tasks: int, threads: int, **settings: object) -> Self:
        """Set up a shipped experiment with so many tasks; episodes counted, nothing subsampled."""
        loaded = load_experiment(name, sampling__tasks=tasks, threads=threads, **settings)
        experiment = replace(loaded, sampling=replace(loaded.sampling, count="episodes"))
        fresh = new_policy(experiment)
        return cls(Trainer.build(experiment, fresh.policy, fresh.params, FRESH))

    @property
    def steps(self) -> int:
        """Control steps of one batch."""
        sampling = self.trainer.experiment.sampling
        return sampling.tasks * sampling.episodes * self.trainer.experiment.family.episode_steps

    def sample(self) -> tuple[float, Tensor]:
        """Sample one batch; return seconds and actions (M, K, H, A) in the body's unit."""
        trainer = self.trainer
        experiment, tasks = trainer.experiment, trainer.experiment.sampling.tasks
        drawn = experiment.family.sample_tasks(tasks, task_generator(TRAINING, 0, 0))
        params = broadcast(trainer.theta, tasks)
        seeds = task_seeds(TRAINING, 0, 0, 0, tasks)
        began = self.now()
        episodes = self.engine.sampler.sample(params, torch.from_numpy(drawn), seeds)
        seconds = self.now() - began
        return seconds, episodes.actions / experiment.policy.action_scale

    def now(self) -> float:
        """Return the time, s, when a GPU has done what it was given."""
        if self.trainer.experiment.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def bare_physics(self, actions: Tensor) -> float:
        """Return seconds of stepping the same number of worlds through the same actions."""
        family = self.trainer.experiment.family
        assert isinstance(family, LocomotionFamily)
        M, K, H, A = actions.shape
        model = family.build_model(family.sensors)
        physics = self.make_physics(model, M * K)
        rng = np.random.default_rng(0)
        noise = torch.from_numpy(np.stack([family.draw_start(rng) for _ in range(M * K)]))
        start = torch.from_numpy(family.start_positions(model))
        controls = actions.clamp(-1, 1).reshape(M * K, H, A).transpose(0, 1).contiguous()
        controls = controls.to(physics.device)
        step = self.bare_step(physics, torch.zeros_like(controls[0]), decided(family.frame_skip))
        physics.set_state(start + noise[:, : model.nq], noise[:, model.nq :])
        began = self.now()
        for ctrl in controls:
            step(ctrl)
        return self.now() - began

    def make_physics(self, model: mujoco.MjModel, worlds: int) -> Physics:
        """Make worlds like the sampler's."""
        return CpuPhysics(model, worlds, threads=self.trainer.experiment.threads)

    def bare_step(
        self, physics: Physics, ctrl: Tensor, substeps: int
    ) -> Callable[[Tensor], object]:
        """Return what does a control step with controls (N, A); `ctrl` is room for them."""
        return lambda controls: physics.step(controls, substeps)

    def iteration(self) -> tuple[float, float, float]:
        """Do one meta-iteration; return its seconds, and those of sampling and updating."""
        began = self.now()
        row = self.trainer.step()
        seconds = self.now() - began
        return seconds, float(row["seconds_sampling"]), float(row["seconds_updating"])

    def test(self, tasks: int) -> float:
        """Return seconds to test the policy on so many tasks, by the experiment's own settings."""
        experiment, trainer = self.trainer.experiment, self.trainer
        wanted = replace(experiment.evaluation, tasks=tasks)
        policy = TrainedPolicy(
            replace(experiment, evaluation=wanted), trainer.policy, trainer.theta
        )
        began = time.perf_counter()
        evaluate_policy(policy)
        return time.perf_counter() - began

    def saving(self, folder: Path) -> float:
        """Return seconds to record an iteration in a run folder, with a new best checkpoint too."""
        trainer = self.trainer
        row = trainer.step()
        trainer.best = (trainer.theta, trainer.state, trainer.optimizer)
        run = RunFolder.create(folder, origin_of(trainer.experiment), trainer.theta)
        with run:
            record(run, trainer, row)  # begins files and imports TensorBoard
            began = time.perf_counter()
            record(run, trainer, row)
            return time.perf_counter() - began

    def close(self) -> None:
        """Release worlds and threads."""
        self.trainer.close()


def peak_gigabytes() -> float:
    """Return the most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGABYTE


def measure(
    threads: int = 0, scale: float = 1.0, say: Callable[[str], None] | None = None
) -> list[Figure]:
    """Measure every figure.

    Args:
        threads: of physics and of the update; 0 is one a core.
        scale: fraction of the 40 tasks; figures are held to their goals only at 1.
        say: is told what is being measured.
    """

    def tell(text: str) -> None:
        if say is not None:
            say(text)

    tasks = max(1, round(40 * scale))
    full = scale == 1.0
    # Memory first: the peak of a process never falls.
    figures = paper_figures(tasks, threads, full, tell)
    figures = gymnasium_figures(tasks, threads, full, tell) + figures
    return figures + supervised(threads, full, tell)


def gymnasium_figures(
    tasks: int, threads: int, full: bool, tell: Callable[[str], None]
) -> list[Figure]:
    """Return sampling and meta-iteration against bare physics, half-cheetah velocity."""
    tell(f"gymnasium protocol, {tasks} tasks: sampling, bare physics and iterations in turn ...")
    bench = Bench.of("half_cheetah_vel_gymnasium", tasks, threads)
    _, actions = bench.sample()
    bench.bare_physics(actions)
    sampling, whole, seconds, parts = [], [], [], []
    for _ in range(REPEATS):
        bare = bench.bare_physics(actions)
        sampled, _ = bench.sample()
        iteration, in_sampling, in_update = bench.iteration()
        sampling.append(bare / sampled)
        # Two batches are sampled in an iteration: before and after adaptation.
        whole.append(iteration / (2.0 * bare))
        seconds.append(iteration)
        parts.append((bare, in_sampling, in_update))
    bench.close()
    middle = seconds.index(statistics.median(seconds))
    bare, in_sampling, in_update = parts[middle]
    share, ratio = statistics.median(sampling), statistics.median(whole)
    return [
        {
            "what": f"sampling, half-cheetah velocity, gymnasium protocol, {tasks * 20} worlds",
            "value": share,
            "unit": "of bare physics speed",
            "goal": ">= 0.80",
            "met": share >= 0.80 if full else None,
            "detail": f"bare physics {bench.steps / bare / 1000:.1f}k control steps/s",
        },
        {
            "what": f"meta-iteration, the same, {tasks} x 20 x 100 x 2 steps",
            "value": ratio,
            "unit": "x bare physics time",
            "goal": "<= 1.8",
            "met": ratio <= 1.8 if full else None,
            "detail": f"{seconds[middle]:.2f} s: sampling {in_sampling:.2f}, "
            f"update {in_update:.2f}; bare physics {2 * bare:.2f}",
        },
        {
            "what": "the same in seconds",
            "value": seconds[middle],
            "unit": "s",
            "goal": "<= 4 on 2 quiet cores",
            "met": seconds[middle] <= 4.0 if full else None,
            "detail": "",
        },
    ]


def paper_figures(
    tasks: int, threads: int, full: bool, tell: Callable[[str], None]
) -> list[Figure]:
    """Return time and memory of a meta-iteration at the paper's scale."""
    peaks = []
    sizes = [max(1, tasks // 4), max(1, tasks // 2)]
    for size in sizes:
        tell(f"paper protocol, {size} tasks: memory ...")
        bench = Bench.of("half_cheetah_dir", size, threads)
        bench.iteration()
        bench.close()
        peaks.append(peak_gigabytes())
    tell(f"paper protocol, {tasks} tasks: {REPEATS} iterations ...")
    bench = Bench.of("half_cheetah_dir", tasks, threads)
    _, actions = bench.sample()
    episodes = bench.trainer.experiment.sampling.episodes
    runs = []
    for number in range(REPEATS):
        runs.append((*bench.iteration(), bench.bare_physics(actions)))
        if number == 0:
            first = peak_gigabytes()
    last = peak_gigabytes()
    # On the disk where runs go.
    with tempfile.TemporaryDirectory(prefix="maml-rl-speed-", dir=Path.cwd()) as folder:
        saving = bench.saving(Path(folder) / "run")
    tell(f"paper protocol, {tasks} tasks: a test ...")
    tested = bench.test(tasks)
    settings = bench.trainer.experiment.evaluation
    tell(
        f"paper protocol, {tasks} tasks: updates with all Fisher products and a quarter in turn ..."
    )
    cheap = Bench.of("half_cheetah_dir", tasks, threads, trust_region__metric_share=0.25)
    updates = [(bench.iteration()[2], cheap.iteration()[2]) for _ in range(REPEATS)]
    cheap.close()
    bench.close()
    every, quarter = sorted(updates, key=lambda pair: pair[1] / pair[0])[REPEATS // 2]
    runs.sort()
    seconds, in_sampling, in_update, bare = runs[len(runs) // 2]
    growth = ", ".join(
        f"{n} tasks {p:.2f}" for n, p in zip([*sizes, tasks], [*peaks, first], strict=True)
    )
    return [
        {
            "what": f"meta-iteration, paper protocol, {tasks} x {episodes} x 200 x 2 steps",
            "value": seconds,
            "unit": "s",
            "goal": "<= 10 on 2 quiet cores",
            "met": seconds <= 10.0 if full else None,
            "detail": f"sampling {in_sampling:.2f}, update {in_update:.2f}; "
            f"bare physics {2 * bare:.2f}",
        },
        {
            "what": "peak memory of the same",
            "value": last,
            "unit": "GB",
            "goal": "<= 4",
            "met": last <= 4.0 if full else None,
            "detail": f"by tasks: {growth}",
        },
        {
            "what": f"growth of peak memory from iteration 1 to {REPEATS}",
            "value": last - first,
            "unit": "GB",
            "goal": "0, within 5 %",
            "met": last - first <= 0.05 * first,
            "detail": "",
        },
        {
            "what": "recording an iteration: metrics and three checkpoints",
            "value": 100.0 * saving / seconds,
            "unit": "% of its time",
            "goal": "< 2",
            "met": saving < 0.02 * seconds if full else None,
            "detail": f"{saving:.3f} s",
        },
        {
            "what": f"a test, {tasks} tasks x {settings.steps + 1} step counts x "
            f"{settings.episodes} episodes",
            "value": tested,
            "unit": "s",
            "goal": "<= 15 on 2 quiet cores",
            "met": tested <= 15.0 if full else None,
            "detail": f"bare physics {(settings.steps + 1) * bare:.2f}",
        },
        {
            "what": "update with trust_region.metric_share .25 against all tasks",
            "value": quarter / every,
            "unit": "of its time",
            "goal": "<= 0.7",
            "met": quarter <= 0.7 * every if full else None,
            "detail": f"{quarter:.2f} and {every:.2f} s",
        },
    ]


def table(figures: list[Figure]) -> Table:
    """Return the figures as a table."""
    result = Table(title="Speed on this machine", title_justify="left")
    for heading in ("what", "measured", "goal", "met", "parts"):
        result.add_column(heading)
    for figure in figures:
        met = {True: "yes", False: "no", None: "-"}[figure["met"]]
        measured = f"{figure['value']:.2f} {figure['unit']}"
        result.add_row(figure["what"], measured, figure["goal"], met, figure["detail"])
    return result
