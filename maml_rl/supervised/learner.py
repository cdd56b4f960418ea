"""Supervised MAML: adapt to a task's support, judge by its query (Finn et al. 2017, Algorithm 2).

Everything is a sum over tasks, which go through in chunks, each on one thread; their terms are
added in task order. The inner step is `maml_rl.adapt.adapt`, as in reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from maml_rl.adapt import Params, adapt, broadcast
from maml_rl.chunks import Chunks
from maml_rl.supervised.networks import STEP_SIZE, Network
from maml_rl.supervised.tasks import Batch, Examples


@dataclass(frozen=True, kw_only=True)
class InnerLoopSettings:
    """The inner loop."""

    inner_steps: int = 1
    """Gradient steps to each task in training; 0 learns all tasks alike: pretraining."""
    step_size: float = 0.01
    """alpha, in parameter units per unit of gradient of the loss, which `loss` scales."""
    loss: Literal["sum-over-classes", "mean"] = "sum-over-classes"
    """Of classification. sum-over-classes: cross-entropy of all examples over shots, ways times the
    mean where there are as many of each class: the paper's code. mean: a step size has to be ways
    times as large for the same step. A regression's is the mean squared error."""
    first_order: bool = False
    """Whether the outer gradient treats the inner one as a constant."""
    adapted: Literal["all", "last-layer"] = "all"
    """last-layer: only the output layer is adapted, ANIL (Raghu et al. 2020); of a module of your
    own that is the layer registered last."""
    learned_step_sizes: bool = False
    """Whether the outer loop learns a step size for every parameter, beginning with `step_size`:
    Meta-SGD (Li et al. 2017)."""
    multi_step_loss: bool = False
    """Whether the loss after each inner step is learned from, not only after the last: their sum,
    as in MAML++ (Antoniou et al. 2019) without its annealing."""
    transductive: bool = True
    """Whether batch normalisation of query examples uses their own statistics, as the paper's code;
    False: those of the task's support."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.inner_steps <= 100:
            raise ValueError(
                f"adaptation.inner_steps must be from 0 to 100, got {self.inner_steps}"
            )
        if not 0 < self.step_size <= 1e6:
            raise ValueError(
                f"adaptation.step_size must be above 0 and at most 1e+06, got {self.step_size}"
            )
        if not self.inner_steps:
            for name in ("first_order", "learned_step_sizes", "multi_step_loss"):
                if getattr(self, name):
                    raise ValueError(f"adaptation.{name} needs adaptation.inner_steps of 1 or more")


class MetaGradient(NamedTuple):
    """What an outer update learns from a batch."""

    gradient: Params
    """Of the mean of the tasks' losses; of some of the tasks, of their sum."""
    losses: Tensor
    """(M,): what is minimised."""
    scores: Tensor
    """(M,): accuracy, or mean squared error, of the query after the last inner step."""


@dataclass(frozen=True)
class Learner:
    """How a network adapts to a task and is judged. Meta-parameters are theta and, where they are
    learned, the step sizes."""

    network: Network
    settings: InnerLoopSettings
    classifies: bool
    """Whether targets are classes."""
    shots: int
    """Support examples of each class; of no matter in regression."""

    def initial_parameters(self, seed: int) -> Params:
        """Draw meta-parameters from a seed; on the CPU, float32."""
        theta = self.network.initial_parameters(torch.Generator().manual_seed(seed))
        if not self.settings.learned_step_sizes:
            return theta
        alpha = self.settings.step_size
        sizes = {f"{STEP_SIZE}{n}": torch.full_like(theta[n], alpha) for n in self._moved(theta)}
        return theta | sizes

    def _moved(self, theta: Params) -> list[str]:
        """Return the names of the parameters that are adapted."""
        last_only = self.settings.adapted == "last-layer"
        wanted = self.network.last_layer if last_only else theta.keys() - self.network.shared
        return [name for name in theta if name in wanted]

    def theta(self, meta: Params) -> Params:
        """Return the network's parameters of the meta-parameters."""
        return {name: p for name, p in meta.items() if not name.startswith(STEP_SIZE)}

    def step_sizes(self, meta: Params, scale: float = 1.0) -> Mapping[str, float | Tensor]:
        """Return the step size of each parameter that is adapted, times `scale`."""
        if self.settings.learned_step_sizes:
            own = {n: p for n, p in meta.items() if n.startswith(STEP_SIZE)}
            return {n.removeprefix(STEP_SIZE): scale * p for n, p in own.items()}
        return dict.fromkeys(self._moved(self.theta(meta)), scale * self.settings.step_size)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of one task's outputs (S, Y), a scalar."""
        if not self.classifies:
            return F.mse_loss(outputs, targets)
        if self.settings.loss == "mean":
            return F.cross_entropy(outputs, targets)
        return F.cross_entropy(outputs, targets, reduction="sum") / self.shots

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return accuracy or mean squared error of M tasks' outputs (M, S, Y), (M,)."""
        if self.classifies:
            return (outputs.argmax(-1) == targets).float().mean(1)
        return (outputs - targets).square().flatten(1).mean(1)

    def adapt(
        self, params: Params, support: Examples, step_sizes: Mapping[str, float | Tensor]
    ) -> Params:
        """Take one inner step for M tasks, (M, ...)."""

        def support_loss(theta: Params, examples: Examples) -> Tensor:
            return self.loss(self.network(theta, examples.inputs), examples.targets)

        first_order = self.settings.first_order
        return adapt(support_loss, params, support, step_sizes, first_order=first_order)

    def predict(self, params: Params, batch: Batch, *, transductive: bool) -> Tensor:
        """Return outputs (M, Q, Y) of the query with parameters (M, ...)."""
        support, query = batch.support.inputs, batch.query.inputs
        if transductive or not self.network.normalises:
            return vmap(self.network)(params, query)
        S = support.shape[1]

        def both(theta: Params, inputs: Tensor) -> Tensor:
            return self.network(theta, inputs, S)[S:]

        return vmap(both)(params, torch.cat([support, query], 1))

    def along(
        self, meta: Params, support: Examples, steps: int, scale: float = 1.0
    ) -> Iterator[Params]:
        """Yield parameters of M tasks (M, ...) after 0, 1, ... `steps` inner steps."""
        params = broadcast(self.theta(meta), len(support.inputs))
        sizes = self.step_sizes(meta, scale)
        yield params
        for _ in range(steps):
            params = self.adapt(params, support, sizes)
            yield params

    def meta_losses(self, meta: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what is minimised of each task (M,), and outputs after the last step (M, Q, Y)."""
        settings, targets = self.settings, batch.query.targets
        losses: list[Tensor] = []
        outputs = torch.empty(0)
        for step, params in enumerate(self.along(meta, batch.support, settings.inner_steps)):
            if step == settings.inner_steps or (settings.multi_step_loss and step > 0):
                outputs = self.predict(params, batch, transductive=settings.transductive)
                losses.append(vmap(self.loss)(outputs, targets))
            if settings.inner_steps == 0:
                # Nothing is adapted to: the support is there to be learned from as well.
                seen = vmap(self.network)(params, batch.support.inputs)
                losses.append(vmap(self.loss)(seen, batch.support.targets))
        return torch.stack(losses).sum(0), outputs

    def terms(self, meta: Params, batch: Batch) -> MetaGradient:
        """Return the gradient of the sum of some tasks' losses, all in one batched call."""
        leaves = {name: p.detach().requires_grad_() for name, p in meta.items()}
        losses, outputs = self.meta_losses(leaves, batch)
        slopes = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        scores = self.score(outputs.detach(), batch.query.targets)
        return MetaGradient(dict(zip(leaves, slopes, strict=True)), losses.detach(), scores)

    def meta_gradient(
        self,
        meta: Params,
        batch: Batch,
        chunks: Chunks,
        terms: Callable[[Params, Batch], MetaGradient] | None = None,
    ) -> MetaGradient:
        """Return the gradient of the mean of M tasks' losses, at the meta-parameters.

        Args:
            meta: meta-parameters.
            batch: the tasks.
            chunks: how they are divided.
            terms: what does as `self.terms` does, if not that.
        """
        tasks, of_chunk = len(batch.support.inputs), terms or self.terms
        parts = chunks.map(lambda start, stop: of_chunk(meta, batch.of_tasks(start, stop)), tasks)
        total = parts[0].gradient
        for part in parts[1:]:
            total = {name: g + part.gradient[name] for name, g in total.items()}
        return MetaGradient(
            {name: g / tasks for name, g in total.items()},
            torch.cat([part.losses for part in parts]),
            torch.cat([part.scores for part in parts]),
        )

    def test(
        self,
        meta: Params,
        batch: Batch,
        steps: int,
        chunks: Chunks,
        *,
        transductive: bool,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return score and loss of M tasks' queries after 0 to `steps` inner steps, (n + 1, M).

        Args:
            meta: meta-parameters.
            batch: the tasks.
            steps: inner steps n.
            chunks: how tasks are divided.
            transductive: whether batch normalisation of the query uses its own statistics.
            scale: of the step sizes trained with.
        """

        def part(start: int, stop: int) -> tuple[Tensor, Tensor]:
            some = batch.of_tasks(start, stop)
            scores, losses = [], []
            for params in self.along(meta, some.support, steps, scale):
                with torch.no_grad():
                    outputs = self.predict(params, some, transductive=transductive)
                    scores.append(self.score(outputs, some.query.targets))
                    losses.append(vmap(self.loss)(outputs, some.query.targets))
            return torch.stack(scores), torch.stack(losses)

        scores, losses = zip(*chunks.map(part, len(batch.support.inputs)), strict=True)
        return torch.cat(scores, 1), torch.cat(losses, 1)
