"""How fast the supervised mode is, against a loop over tasks as anybody would write it."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from maml_rl.adapt import Params, flatten
from maml_rl.chunks import Chunks, torch_threads
from maml_rl.figure import GIGABYTE, Figure
from maml_rl.seeds import TRAINING
from maml_rl.supervised.config import SupervisedExperiment, load_experiment, network_of
from maml_rl.supervised.learner import Learner
from maml_rl.supervised.networks import EPSILON
from maml_rl.supervised.recorded import Recorded
from maml_rl.supervised.tasks import Batch, Examples, Problem, task_generator
from maml_rl.supervised.trainer import Adam, chunk_size

REPEATS = 5


@dataclass(frozen=True)
class Setup:
    """One experiment's learner and meta-parameters."""

    experiment: SupervisedExperiment[Problem]
    learner: Learner
    meta: Params

    @classmethod
    def of(cls, name: str, **overrides: object) -> Setup:
        """Set up a shipped experiment."""
        experiment = load_experiment(name, **overrides)
        problem = experiment.data
        learner = Learner(
            network_of(experiment), experiment.adaptation, problem.classifies, problem.shots
        )
        return cls(experiment, learner, learner.initial_parameters(0))

    def chunks(self, threads: int) -> Chunks:
        """Return threads and chunks as in training."""
        tasks = self.experiment.outer.tasks
        return Chunks(threads, chunk_size(tasks, flatten(self.meta).numel(), "cpu"))

    def pictures(self, query: int) -> Batch:
        """Return a batch of noise in the shape of the experiment's pictures."""
        problem, rng = self.experiment.data, torch.Generator().manual_seed(0)

        def examples(shots: int) -> Examples:
            M, N = self.experiment.outer.tasks, problem.outputs
            inputs = torch.rand(M, N * shots, *problem.input_shape, generator=rng)
            return Examples(inputs, torch.arange(N).repeat_interleave(shots).expand(M, -1))

        return Batch(examples(problem.shots), examples(query))


def plain_mlp(params: Params, inputs: Tensor) -> Tensor:
    """Map inputs through a fully connected network without batch normalisation."""
    hidden = torch.relu(F.linear(inputs, params["0.weight"].T, params["0.bias"]))
    hidden = torch.relu(F.linear(hidden, params["1.weight"].T, params["1.bias"]))
    return F.linear(hidden, params["2.weight"].T, params["2.bias"])


def plain_conv_net(params: Params, inputs: Tensor) -> Tensor:
    """Map pictures through Omniglot's network, by torch's own batch normalisation."""
    hidden = inputs
    for layer in range(4):
        hidden = F.conv2d(hidden, params[f"{layer}.weight"], stride=2, padding=1)
        shift = params[f"{layer}.shift"]
        hidden = F.batch_norm(hidden, None, None, None, shift, training=True, eps=EPSILON)
        hidden = torch.relu(hidden)
    return F.linear(hidden.mean((2, 3)), params["last.weight"].T, params["last.bias"])


def plain_loop(
    network: Callable[[Params, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    meta: Params,
    batch: Batch,
    sizes: dict[str, float],
) -> Params:
    """Return the meta-gradient of one inner step by a loop over tasks with torch.autograd.grad."""
    leaves = {name: p.detach().requires_grad_() for name, p in meta.items()}
    total = torch.zeros(())
    tasks = len(batch.support.inputs)
    for task in range(tasks):
        inner = loss(network(leaves, batch.support.inputs[task]), batch.support.targets[task])
        moving = [leaves[name] for name in sizes]
        slopes = torch.autograd.grad(inner, moving, create_graph=True)
        steps = zip(sizes.items(), moving, slopes, strict=True)
        adapted = leaves | {name: p - alpha * g for (name, alpha), p, g in steps}
        outputs = network(adapted, batch.query.inputs[task])
        total = total + loss(outputs, batch.query.targets[task])
    gradient = torch.autograd.grad(total / tasks, list(leaves.values()))
    return dict(zip(leaves, gradient, strict=True))


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Return the seconds of one of several repetitions."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def in_turn(
    ours: Callable[[], object], theirs: Callable[[], object], times: int
) -> tuple[float, float]:
    """Return the median seconds of each, measured in turn so that a busy machine slows both."""
    ours(), theirs()
    pairs = [(seconds_of(ours, times), seconds_of(theirs, times)) for _ in range(REPEATS)]
    ratios = [b / a for a, b in pairs]
    return pairs[ratios.index(statistics.median(ratios))]


def sinusoid_figure(full: bool) -> Figure:
    """Return whole iterations of sinusoid a second over those of the loop."""
    setup = Setup.of("sinusoid")
    source, M = setup.experiment.data.open(), setup.experiment.outer.tasks
    sizes = {name: 0.001 for name in setup.meta}
    mine, plain = (Adam(setup.meta, 1e-3, {}) for _ in range(2))
    learner = setup.learner
    terms = Recorded(learner.terms)
    rng = task_generator(TRAINING, 0, 0)
    with setup.chunks(1) as chunks, torch_threads(1):

        def ours() -> None:
            batch = source.sample("train", M, rng)
            mine.step(learner.meta_gradient(mine.params, batch, chunks, terms).gradient)

        def theirs() -> None:
            batch = source.sample("train", M, rng)
            plain.step(plain_loop(plain_mlp, F.mse_loss, plain.params, batch, sizes))

        fast, slow = in_turn(ours, theirs, 50 if full else 2)
    return {
        "what": "supervised: sinusoid, iterations a second",
        "value": slow / fast,
        "unit": "x a loop over tasks",
        "goal": ">= 5",
        "met": slow >= 5 * fast if full else None,
        "detail": f"{1 / fast:.0f} and {1 / slow:.0f} a second, one thread each",
    }


def omniglot_figure(threads: int, full: bool) -> Figure:
    """Return meta-gradients of Omniglot's network a second over those of the loop."""
    setup = Setup.of("omniglot_5way_1shot", **({} if full else {"outer__tasks": 2}))
    batch, loss = setup.pictures(1), setup.learner.loss
    sizes = {n: 0.4 for n in setup.meta if n not in setup.learner.network.shared}
    with setup.chunks(threads) as chunks:

        def ours() -> None:
            with torch_threads(1):
                setup.learner.meta_gradient(setup.meta, batch, chunks)

        def theirs() -> None:
            # With torch's own threads, which such a loop would have.
            with torch_threads(chunks.threads):
                plain_loop(plain_conv_net, loss, setup.meta, batch, sizes)

        fast, slow = in_turn(ours, theirs, 3 if full else 1)
        tasks = setup.experiment.outer.tasks
    return {
        "what": f"supervised: Omniglot 5-way 1-shot, {tasks} tasks, outer gradients a second",
        "value": slow / fast,
        "unit": "x a loop over tasks",
        "goal": ">= 1.5 on 2 cores",
        "met": slow >= 1.5 * fast if full else None,
        "detail": f"{fast:.3f} and {slow:.3f} s each, {chunks.threads} threads each",
    }


ORDERED = "miniimagenet_5way_1shot"
"""The experiment that first and second order are compared on: five inner steps."""


def order_setup(first_order: bool, full: bool) -> tuple[Setup, Batch]:
    """Return what is needed for outer gradients of one order."""
    less: dict[str, object] = {} if full else {"network__blocks": 2, "network__filters": 4}
    setup = Setup.of(ORDERED, adaptation__first_order=first_order, **less)
    return setup, setup.pictures(15)


def peak_bytes() -> int:
    """Return the most memory that this program has held; 0 where the system does not tell."""
    # Not getrusage, which begins with what the process that started this one held.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def print_memory(first_order: bool, threads: int, full: bool) -> None:
    """Print by how many bytes one outer gradient raised this process's peak of memory."""
    setup, batch = order_setup(first_order, full)

    with setup.chunks(threads) as chunks:
        before = peak_bytes()
        setup.learner.meta_gradient(setup.meta, batch, chunks)
        print(peak_bytes() - before)


def memory_of(first_order: bool, threads: int, full: bool) -> float:
    """Return the gigabytes that one outer gradient takes, in a process of its own."""
    call = f"print_memory({first_order}, {threads}, {full})"
    code = f"from maml_rl.supervised.speed import print_memory; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) / GIGABYTE


def order_figures(threads: int, full: bool) -> list[Figure]:
    """Return what first order saves of second order's time and memory."""
    (one, batch), (other, _) = (order_setup(first_order, full) for first_order in (True, False))
    with one.chunks(threads) as chunks, torch_threads(1):
        first, second = in_turn(
            lambda: one.learner.meta_gradient(one.meta, batch, chunks),
            lambda: other.learner.meta_gradient(other.meta, batch, chunks),
            1,
        )
    small, large = (memory_of(first_order, threads, full) for first_order in (True, False))
    what = "supervised: first order against second, MiniImagenet 5-way 1-shot, 5 inner steps"
    return [
        {
            "what": f"{what}, time of an outer gradient",
            "value": first / second,
            "unit": "of second order's",
            "goal": "< 1",
            "met": first < second if full else None,
            "detail": f"{first:.2f} and {second:.2f} s",
        },
        {
            "what": f"{what}, its memory",
            "value": small / large if large else math.nan,
            "unit": "of second order's",
            "goal": "< 1",
            "met": small < large if full else None,
            "detail": f"{small:.2f} and {large:.2f} GB",
        },
    ]


def measure(threads: int, full: bool, tell: Callable[[str], None]) -> list[Figure]:
    """Measure every figure of the supervised mode.

    Args:
        threads: that chunks of tasks go through on; 0 is one a core.
        full: whether at full size; figures are held to their goals only then.
        tell: is told what is being measured.
    """
    tell("supervised: sinusoid and Omniglot against a loop over tasks, in turn ...")
    figures = [sinusoid_figure(full), omniglot_figure(threads, full)]
    tell("supervised: first order against second order ...")
    return figures + order_figures(threads, full)
