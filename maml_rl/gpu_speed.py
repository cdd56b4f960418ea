"""How fast a device samples and updates, with either physics (`maml-rl speed --device cuda`).

Everything is measured at the paper's 40 tasks and at multiples of them. Sampling and iterations
are held against bare physics: as many worlds stepped through the same actions, and nothing else.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import mujoco
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from envs.physics import CpuPhysics
from envs.physics import Physics as Simulator
from maml_rl.adapt import Params, broadcast, flatten
from maml_rl.chunks import torch_threads
from maml_rl.devices import Device, Physics, reproducible
from maml_rl.episodes import Steps, pack
from maml_rl.figure import GIGABYTE, Figure
from maml_rl.maml import MetaObjective, adapt_in_chunks, estimate_in_chunks
from maml_rl.memory import is_out_of_memory
from maml_rl.sampler import task_generator, task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.speed import Bench

REPEATS = 3
TASKS, EPISODES = 40, 20
MULTIPLES = (1, 4, 16, 64)
EXPERIMENTS: Mapping[str, float] = {"half_cheetah_dir": 0.5, "ant_dir": 1.0}
"""What is measured, and the seconds that an iteration of 40 tasks x 20 episodes may take on a GPU;
the ant, too, has 20 here, so that the two can be compared."""
MANY_TASKS, MANY_EPISODES = 256, 32
"""8,192 worlds: where sampling is held to its goal."""

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure."""

    experiment: str
    physics: Physics
    device: Device
    tasks: int = TASKS
    episodes: int = EPISODES
    threads: int = 0

    def __str__(self) -> str:
        """Return it in words."""
        worlds = self.tasks * self.episodes
        return f"{self.experiment}, physics {self.physics}, {worlds:,} worlds"

    def bench(self) -> DeviceBench:
        """Set it up."""
        return DeviceBench.of(
            self.experiment,
            self.tasks,
            self.threads,
            sampling__episodes=self.episodes,
            device=self.device,
            physics=self.physics,
        )


class DeviceBench(Bench):
    """An experiment on a device, with either physics, set up to be timed."""

    def make_physics(self, model: mujoco.MjModel, worlds: int) -> Simulator:
        """Make worlds like the sampler's."""
        experiment = self.trainer.experiment
        if experiment.physics == "cpu":
            return super().make_physics(model, worlds)
        # Here alone: what it needs is an extra.
        from envs.warp import WarpPhysics

        return WarpPhysics(model, worlds, device=experiment.device, settings=experiment.warp)

    def bare_step(
        self, physics: Simulator, ctrl: Tensor, substeps: int
    ) -> Callable[[Tensor], object]:
        """Return what does a control step: of mujoco_warp its own, as one launch."""
        if isinstance(physics, CpuPhysics):
            return super().bare_step(physics, ctrl, substeps)
        from envs.warp import WarpPhysics

        assert isinstance(physics, WarpPhysics)
        launch = physics.as_graph(partial(physics.bare_step, ctrl, substeps))

        def step(controls: Tensor) -> None:
            ctrl.copy_(controls)
            launch()

        return step

    def update(self) -> Mapping[str, float]:
        """Do all of an update but the sampling; return seconds of its parts."""
        trainer, experiment = self.trainer, self.trainer.experiment
        chunks = self.engine.chunks
        parts: dict[str, float] = {}

        @contextmanager
        def part(name: str) -> Iterator[None]:
            began = self.now()
            yield
            parts[name] = parts.get(name, 0.0) + self.now() - began

        M = experiment.sampling.tasks
        inner = experiment.adaptation.at(0, trainer.theta).inner_step(trainer.policy)
        drawn = experiment.family.sample_tasks(M, task_generator(TRAINING, 0, 0))
        points: list[Params] = [broadcast(trainer.theta, M)]
        batches: list[Steps] = []
        with torch_threads(1), reproducible(experiment.device):
            for phase in range(experiment.adaptation.inner_steps + 1):
                seeds = task_seeds(TRAINING, 0, 0, phase, M)
                episodes = self.engine.sampler.sample(points[-1], torch.from_numpy(drawn), seeds)
                with part("advantages"):
                    estimated, _ = estimate_in_chunks(episodes, experiment.advantages, chunks)
                    batches.append(pack(episodes, estimated))
                del episodes
                if phase < experiment.adaptation.inner_steps:
                    with part("inner step"):
                        adapted = adapt_in_chunks(inner, points[-1], batches[-1], chunks)
                        points.append(adapted)
            with part("linearisation"):
                objective = MetaObjective(inner, points, batches[:-1], batches[-1], chunks)
            theta = flatten(trainer.theta)
            with part("gradient"):
                direction = objective.gradient().to(theta.dtype)
            with part(f"{experiment.trust_region.cg_iterations} Fisher products"):
                for _ in range(experiment.trust_region.cg_iterations):
                    objective.product(direction)
            with part("line search"):
                # The surrogate before, and one candidate; others cost the second again.
                objective.evaluate(theta)
                objective.evaluate(theta + 1e-6 * direction)
        return parts


def measure(
    device: Device = "cuda",
    *,
    physics: Sequence[Physics] = ("cpu", "warp"),
    scale: float = 1.0,
    threads: int = 0,
    seconds: float = math.inf,
    say: Tell | None = None,
) -> list[tuple[str, Figure]]:
    """Measure every figure, with the case that it is of.

    Args:
        device: of policy and update, and of warp's worlds.
        physics: what simulates.
        scale: fraction of the tasks; figures are held to their goals only at 1, on a GPU.
        threads: of physics on the CPU; 0 is one a core.
        seconds: after so many nothing more is begun; what is left out is told.
        say: is told what is being measured, and each figure when it is there.
    """
    tell: Tell = (lambda _: None) if say is None else say
    began = time.monotonic()
    figures: list[tuple[str, Figure]] = []
    left_out: list[str] = []
    judged = scale == 1.0 and device == "cuda"

    def tasks(count: int) -> int:
        return max(1, round(count * scale))

    cases = [
        Case(
            experiment=name,
            physics=one,
            device=device,
            tasks=tasks(TASKS * multiple),
            threads=threads,
        )
        for multiple in MULTIPLES
        for name in EXPERIMENTS
        for one in physics
    ]
    many = Case(
        experiment="half_cheetah_dir",
        physics=physics[-1],
        device=device,
        tasks=tasks(MANY_TASKS),
        episodes=MANY_EPISODES,
        threads=threads,
    )
    # The goals first.
    paper = len(EXPERIMENTS) * len(physics)
    for case in [*cases[:paper], many, *cases[paper:]]:
        if time.monotonic() - began > seconds:
            left_out.append(f"{case}, for want of time")
            continue
        tell(f"{case} ...")
        try:
            for figure in figures_of(case, judged, sampling_only=case is many):
                figures.append((str(case), figure))
                value = f"{figure['value']:,.4g} {figure['unit']}"
                tell(f"  {figure['what']} {value}; {figure['detail']}")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            left_out.append(f"{case} from there on, for want of memory")
        if device == "cuda":
            torch.cuda.empty_cache()
    if left_out:
        tell(f"left out: {'; '.join(left_out)}")
    return figures


def figures_of(case: Case, judged: bool, *, sampling_only: bool) -> Iterator[Figure]:
    """Measure one case."""
    with ExitStack() as stack:
        bench = case.bench()
        stack.callback(bench.close)
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _, actions = bench.sample()
        # The first of both compile what they need.
        bench.bare_physics(actions)
        pairs = [(bench.bare_physics(actions), bench.sample()[0]) for _ in range(REPEATS)]
        bare = statistics.median(pair[0] for pair in pairs)
        share = statistics.median(pair[0] / pair[1] for pair in pairs)
        sampled = statistics.median(pair[1] for pair in pairs)
        del actions
        yield {
            "what": "bare physics",
            "value": bench.steps / bare,
            "unit": "control steps/s",
            "goal": "-",
            "met": None,
            "detail": f"{bare:.3f} s a batch of {bench.steps:,}",
        }
        held = sampling_only and case.physics == "warp"
        yield {
            "what": "sampling",
            "value": share,
            "unit": "of bare physics speed",
            "goal": ">= 0.7" if held else "-",
            "met": share >= 0.7 if held and judged else None,
            "detail": f"{bench.steps / sampled:,.0f} control steps/s to the horizon, "
            f"{sampled:.3f} s",
        }
        if sampling_only:
            return
        yield from update_figures(case, bench, judged, 2.0 * bare)


def update_figures(case: Case, bench: DeviceBench, judged: bool, bare: float) -> Iterator[Figure]:
    """Measure update and iteration; `bare` is the time of an iteration's physics alone, s."""
    paper = judged and case.tasks == TASKS
    bench.update()  # the first is slower: libraries are loaded, memory is taken
    updates = [bench.update() for _ in range(REPEATS)]
    parts = min(updates, key=lambda one: sum(one.values()))
    total = sum(parts.values())
    words = ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items())
    size = bench.engine.chunks.size
    chunks = "all tasks at once" if size >= case.tasks else f"{size} tasks at once"
    yield {
        "what": "update",
        "value": total,
        "unit": "s",
        "goal": "<= 0.15" if case.tasks == TASKS else "-",
        "met": total <= 0.15 if paper else None,
        "detail": f"{words}; {chunks}",
    }
    bench.iteration()
    seconds, in_sampling, _ = min(bench.iteration() for _ in range(REPEATS))
    allowed = EXPERIMENTS[case.experiment]
    held = case.physics == "warp" and case.tasks == TASKS
    peak = torch.cuda.max_memory_allocated() / GIGABYTE if case.device == "cuda" else 0.0
    memory = f"; at most {peak:.1f} GB of torch's memory" if peak else ""
    yield {
        "what": "meta-iteration",
        "value": seconds,
        "unit": "s",
        "goal": f"<= {allowed}" if held else "-",
        "met": seconds <= allowed if held and paper else None,
        "detail": f"{seconds / bare:.2f} x bare physics; sampling {in_sampling:.3f}{memory}",
    }


def table(figures: Sequence[tuple[str, Figure]]) -> Table:
    """Return the figures as a table, case by case."""
    result = Table(title="Speed on this machine", title_justify="left")
    for heading in ("what", "measured", "goal", "met", "parts"):
        result.add_column(heading)
    for case, group in itertools.groupby(figures, key=lambda pair: pair[0]):
        result.add_section()
        result.add_row(Text(case, style="bold"))
        for _, figure in group:
            met = {True: "yes", False: "no", None: "-"}[figure["met"]]
            measured = f"{figure['value']:,.4g} {figure['unit']}"
            result.add_row(figure["what"], measured, figure["goal"], met, figure["detail"])
    return result
