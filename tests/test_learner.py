"""The supervised learner: against differences, a loop over tasks, torchopt and numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_rl.adapt import Params
from maml_rl.chunks import Chunks
from maml_rl.supervised.learner import InnerLoopSettings, Learner, MetaGradient
from maml_rl.supervised.networks import ConvNet, Mlp, Network, OwnNetwork
from maml_rl.supervised.sinusoid import Sinusoid
from maml_rl.supervised.tasks import Batch, Examples
from maml_rl.supervised.trainer import Adam
from tests.plain_networks import PlainConvNet, PlainMlp, filled

pytestmark = pytest.mark.usefixtures("one_torch_thread")

M, WAYS, SHOTS, Q, VALUES = 3, 4, 2, 5, 2
S = WAYS * SHOTS
WIDE, CHANNELS, SIDE = 6, 2, 9

NETWORKS: dict[str, Network] = {
    "mlp": Mlp((WIDE, 7, 10, WAYS)),
    "normalised mlp": Mlp((WIDE, 7, 10, WAYS), batch_norm=True),
    "strided": ConvNet(CHANNELS, SIDE, 2, 6, WAYS, pooled=False),
    "pooled": ConvNet(CHANNELS, SIDE, 2, 6, WAYS, pooled=True),
    "regression": Mlp((WIDE, 7, 10, VALUES)),
    "normalised regression": Mlp((WIDE, 7, 10, VALUES), batch_norm=True),
}


class Case(NamedTuple):
    """What is learned, how."""

    network: str
    settings: InnerLoopSettings
    seed: int = 0


def settings(**changed: object) -> InnerLoopSettings:
    """A step so large that its curvature matters."""
    return InnerLoopSettings(**{"step_size": 0.3, **changed})  # type: ignore[arg-type]  # by name


def make(case: Case) -> tuple[Learner, Params, Batch]:
    """A learner, meta-parameters with nothing at 0 or alike, and a batch; float64.

    Support classes are balanced, in an order of each task's own; those of the query are not.
    """
    rng = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    network = NETWORKS[case.network]
    classifies = "regression" not in case.network
    shape = (CHANNELS, SIDE, SIDE) if isinstance(network, ConvNet) else (WIDE,)
    learner = Learner(network, case.settings, classifies, SHOTS)
    start = learner.initial_parameters(0)
    scales = {name: 0.1 if name.startswith("step_size.") else 0.5 for name in start}
    meta = {name: scales[name] * draw(*p.shape) for name, p in start.items()}
    if not classifies:
        return learner, meta, Batch(*(Examples(draw(M, n, *shape), draw(M, n, 2)) for n in (S, Q)))
    each = torch.arange(WAYS).repeat(SHOTS)
    supported = torch.stack([each[torch.randperm(S, generator=rng)] for _ in range(M)])
    asked = torch.randint(WAYS, (M, Q), generator=rng)
    return (
        learner,
        meta,
        Batch(Examples(draw(M, S, *shape), supported), Examples(draw(M, Q, *shape), asked)),
    )


@pytest.fixture(scope="module")
def chunks() -> Iterator[Chunks]:
    """Two tasks of three at once."""
    with Chunks(threads=2, size=2) as made:
        yield made


def task(batch: Batch, i: int) -> Batch:
    """Task i without a task axis."""
    return Batch(*(Examples(part.inputs[i], part.targets[i]) for part in batch))


# --- What is learned, for one task, written out. `seen` are the inputs whose statistics count.


def plain_normal(hidden: Tensor, seen: Tensor, shift: Tensor) -> Tensor:
    """(h - mean) / sqrt(mean (h - mean)^2 + .001) + shift."""
    axes = (0, 2, 3)[: hidden.dim() - 1]
    mean = seen.mean(axes, keepdim=True)
    variance = (seen - mean).square().mean(axes, keepdim=True)
    return (hidden - mean) / (variance + 0.001).sqrt() + shift.reshape(mean.shape)


def plain_outputs(network: Network, theta: Params, inputs: Tensor, seen: Tensor) -> Tensor:
    """Outputs (S, Y): both kinds of inputs go side by side, and only `inputs` come back."""
    pair = inputs, seen
    if isinstance(network, Mlp):
        last = len(network.sizes) - 2
        for layer in range(last + 1):
            weight, bias = theta[f"{layer}.weight"], theta[f"{layer}.bias"]
            pair = pair[0] @ weight + bias, pair[1] @ weight + bias
            if layer < last:
                if network.batch_norm:
                    shift = theta[f"{layer}.shift"]
                    pair = plain_normal(*pair, shift), plain_normal(pair[1], pair[1], shift)
                pair = pair[0].clamp(min=0), pair[1].clamp(min=0)
        return pair[0]
    assert isinstance(network, ConvNet)
    for layer in range(network.blocks):
        weight, shift = theta[f"{layer}.weight"], theta[f"{layer}.shift"]
        stride = 1 if network.pooled else 2
        pair = (
            F.conv2d(pair[0], weight, None, stride, 1),
            F.conv2d(pair[1], weight, None, stride, 1),
        )
        pair = plain_normal(*pair, shift), plain_normal(pair[1], pair[1], shift)
        pair = pair[0].clamp(min=0), pair[1].clamp(min=0)
        if network.pooled:
            pair = F.max_pool2d(pair[0], 2), F.max_pool2d(pair[1], 2)
    hidden = pair[0].reshape(len(inputs), network.filters, -1)
    hidden = hidden.reshape(len(inputs), -1) if network.pooled else hidden.mean(2)
    return hidden @ theta["last.weight"] + theta["last.bias"]


def plain_loss(learner: Learner, outputs: Tensor, targets: Tensor) -> Tensor:
    """Squares over their number; or cross-entropies over their number, or over shots."""
    if not learner.classifies:
        return (outputs - targets).square().sum() / outputs.numel()
    right = outputs[torch.arange(len(targets)), targets] - outputs.logsumexp(1)
    return -right.sum() / (len(targets) if learner.settings.loss == "mean" else SHOTS)


def plain_theta(meta: Params) -> Params:
    return {name: p for name, p in meta.items() if not name.startswith("step_size.")}


def moving(learner: Learner, meta: Params) -> list[str]:
    """Names that the inner loop changes."""
    layers = (
        ("last.", "2.") if learner.settings.adapted == "last-layer" else ("0.", "1.", "2.", "l")
    )
    return [n for n in plain_theta(meta) if n.startswith(layers) and not n.endswith("shift")]


def plain_gradient(
    learner: Learner, meta: Params, theta: Params, support: Examples, *, graph: bool
) -> Params:
    """Of the support's loss in the parameters that move."""
    if not graph:
        theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    outputs = plain_outputs(learner.network, theta, support.inputs, support.inputs)
    loss = plain_loss(learner, outputs, support.targets)
    names = moving(learner, meta)
    slopes = torch.autograd.grad(loss, [theta[n] for n in names], create_graph=graph)
    return dict(zip(names, slopes, strict=True))


def plain_steps(
    learner: Learner, meta: Params, support: Examples, known: list[Params] | None, *, graph: bool
) -> Iterator[Params]:
    """Parameters after 1, 2, ... inner steps; along `known` gradients if there are any."""
    theta = plain_theta(meta)
    for step in range(learner.settings.inner_steps):
        gradient = (
            plain_gradient(learner, meta, theta, support, graph=graph)
            if known is None
            else known[step]
        )
        sizes = {n: meta.get(f"step_size.{n}", learner.settings.step_size) for n in gradient}
        theta = theta | {n: theta[n] - sizes[n] * g for n, g in gradient.items()}
        yield theta


def plain_gradients(learner: Learner, meta: Params, support: Examples) -> list[Params]:
    """The gradients of all inner steps."""
    theta, found = plain_theta(meta), []
    for after in plain_steps(learner, meta, support, None, graph=False):
        found.append(plain_gradient(learner, meta, theta, support, graph=False))
        theta = after
    return found


def plain_task_loss(
    learner: Learner,
    meta: Params,
    one: Batch,
    known: list[Params] | None = None,
    *,
    graph: bool = False,
) -> Tensor:
    """What is minimised of one task."""
    support, query = one
    seen = query.inputs if learner.settings.transductive else support.inputs

    def judged(theta: Params) -> Tensor:
        outputs = plain_outputs(learner.network, theta, query.inputs, seen)
        return plain_loss(learner, outputs, query.targets)

    if learner.settings.inner_steps == 0:
        outputs = plain_outputs(learner.network, meta, support.inputs, support.inputs)
        return plain_loss(learner, outputs, support.targets) + judged(meta)
    losses = [judged(theta) for theta in plain_steps(learner, meta, support, known, graph=graph)]
    return sum(losses, torch.zeros(())) if learner.settings.multi_step_loss else losses[-1]


# --- The outer gradient.

ORDERS = [
    Case(network, settings(inner_steps=steps, first_order=first_order), seed=steps)
    for network in NETWORKS
    for steps in (1, 3)
    for first_order in (False, True)
]
SPECIAL = [
    Case("mlp", settings(loss="mean", inner_steps=2)),
    Case("strided", settings(loss="mean", first_order=True)),
    Case("mlp", settings(multi_step_loss=True, inner_steps=3)),
    Case("normalised mlp", settings(multi_step_loss=True, inner_steps=3, first_order=True)),
    Case("normalised mlp", settings(transductive=False, inner_steps=2)),
    Case("normalised regression", settings(transductive=False, inner_steps=2)),
    Case("strided", settings(transductive=False)),
    Case("pooled", settings(transductive=False, inner_steps=2)),
    Case("normalised mlp", settings(adapted="last-layer", inner_steps=3)),
    Case("pooled", settings(adapted="last-layer", inner_steps=2)),
    Case("regression", settings(adapted="last-layer", first_order=True)),
    Case("mlp", settings(learned_step_sizes=True, inner_steps=3)),
    Case("regression", settings(learned_step_sizes=True, inner_steps=2, first_order=True)),
    Case("strided", settings(learned_step_sizes=True, inner_steps=2)),
    Case("mlp", settings(inner_steps=0)),
    Case("regression", settings(inner_steps=0)),
    Case("strided", settings(inner_steps=0, transductive=False)),
    Case(
        "strided",
        settings(
            learned_step_sizes=True,
            adapted="last-layer",
            multi_step_loss=True,
            transductive=False,
            inner_steps=2,
        ),
    ),
]


def name_of(case: Case) -> str:
    """The network and the settings that differ from the default."""
    default = InnerLoopSettings(step_size=0.3)
    changed = {n: v for n, v in vars(case.settings).items() if v != getattr(default, n)}
    return " ".join([case.network, *(f"{name}={value}" for name, value in changed.items())])


@pytest.mark.parametrize("case", ORDERS + SPECIAL, ids=name_of)
def test_the_meta_gradient_is_the_slope_of_the_loss_after_adapting(
    case: Case, chunks: Chunks
) -> None:
    """<gradient, e> against [f(p + h e) - f(p - h e)] / 2h, in a direction of every parameter.

    f is the mean over tasks of `plain_task_loss`. First order: along inner gradients that were
    taken at p, and stay.
    """
    learner, meta, batch = make(case)
    known = [
        plain_gradients(learner, meta, task(batch, i).support)
        if case.settings.first_order
        else None
        for i in range(M)
    ]

    def f(at: Params) -> float:
        return (
            sum(float(plain_task_loss(learner, at, task(batch, i), known[i])) for i in range(M)) / M
        )

    found = learner.meta_gradient(meta, batch, chunks)
    assert found.gradient.keys() == meta.keys()
    assert float(found.losses.mean()) == pytest.approx(f(meta), rel=1e-12)
    rng, h = torch.Generator().manual_seed(8), 1e-6
    for name, p in meta.items():
        direction = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        above, below = (f(meta | {name: p + side * h * direction}) for side in (1, -1))
        slope = float((found.gradient[name] * direction).sum())
        assert slope == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("network", ["mlp", "strided", "pooled"])
def test_first_order_is_another_gradient(network: str, chunks: Chunks) -> None:
    """Else the tests of one order would pass with the other."""
    second, first = (
        learner.meta_gradient(meta, batch, chunks).gradient["0.weight"]
        for learner, meta, batch in (
            make(Case(network, settings(first_order=first_order))) for first_order in (False, True)
        )
    )
    assert (second - first).abs().max() > 0.01 * second.abs().max()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("transductive", [True, False])
def test_tasks_together_are_each_task_alone(
    network: str, transductive: bool, chunks: Chunks
) -> None:
    """Adapted parameters, outputs, losses and gradient against a loop with autograd.grad."""
    learner, meta, batch = make(Case(network, settings(inner_steps=2, transductive=transductive)))
    *_, adapted = learner.along(meta, batch.support, 2)
    outputs = learner.predict(adapted, batch, transductive=transductive)
    found = learner.meta_gradient(meta, batch, chunks)
    leaves = {name: p.clone().requires_grad_() for name, p in meta.items()}
    losses = []
    for i in range(M):
        support, query = one = task(batch, i)
        *_, theta = plain_steps(learner, leaves, support, None, graph=True)
        for name, p in theta.items():
            torch.testing.assert_close(adapted[name][i], p.detach(), rtol=1e-10, atol=1e-12)
        seen = (query if transductive else support).inputs
        expected = plain_outputs(learner.network, theta, query.inputs, seen)
        torch.testing.assert_close(outputs[i], expected, rtol=1e-10, atol=1e-12)
        score = (
            (expected.argmax(1) == query.targets).sum() / Q
            if learner.classifies
            else (expected - query.targets).square().sum() / (Q * VALUES)
        )
        assert float(found.scores[i]) == pytest.approx(float(score.detach()), rel=1e-6)
        losses.append(plain_task_loss(learner, leaves, one, graph=True))
    torch.testing.assert_close(found.losses, torch.stack(losses).detach(), rtol=1e-10, atol=0)
    gradient = torch.autograd.grad(sum(losses, torch.zeros(())) / M, list(leaves.values()))
    for (name, mine), plain in zip(found.gradient.items(), gradient, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12, msg=name)


def torchopt_training(
    module: PlainMlp | PlainConvNet, batches: list[Batch], *, shots: int | None, steps: int
) -> None:
    """Meta-train a module in place with inner steps by torchopt, as its documentation does.

    shots: of classification; None is regression.
    """
    torchopt = pytest.importorskip("torchopt")
    params: Params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    inner = torchopt.sgd(lr=0.2)
    # Not torchopt.Adam, which corrects its moments in float32.
    adam = torch.optim.Adam(list(params.values()), lr=0.01)

    def loss(theta: Params, examples: Examples) -> Tensor:
        outputs = torch.func.functional_call(module, params | theta, (examples.inputs,))
        if shots is None:
            return F.mse_loss(outputs, examples.targets)
        return F.cross_entropy(outputs, examples.targets, reduction="sum") / shots

    for batch in batches:
        losses = []
        for i in range(len(batch.support.inputs)):
            support, query = task(batch, i)
            theta = {name: p for name, p in params.items() if not name.startswith("norms.")}
            state = inner.init(theta)
            for _ in range(steps):
                slopes = torch.autograd.grad(
                    loss(theta, support), list(theta.values()), create_graph=True
                )
                updates, state = inner.update(
                    dict(zip(theta, slopes, strict=True)), state, params=theta, inplace=False
                )
                theta = torchopt.apply_updates(theta, updates, inplace=False)
            losses.append(loss(theta, query))
        slopes = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
        for p, slope in zip(params.values(), slopes, strict=True):
            p.grad = slope
        adam.step()


def in_float64(batch: Batch) -> Batch:
    parts = (
        Examples(
            part.inputs.double(),
            part.targets.double() if part.targets.is_floating_point() else part.targets,
        )
        for part in batch
    )
    return Batch(*parts)


def outer_steps(learner: Learner, meta: Params, batches: list[Batch], chunks: Chunks) -> Params:
    """Meta-parameters after a step of training's Adam on each batch."""
    adam = Adam(meta, 0.01, {})
    for batch in batches:
        now = {name: p.detach() for name, p in adam.params.items()}
        adam.step(learner.meta_gradient(now, batch, chunks).gradient)
    return {name: p.detach() for name, p in adam.params.items()}


def check_same(plain: PlainMlp | PlainConvNet, learned: Params, start: Params) -> None:
    """Every parameter moved, and to where torchopt moved it."""
    for name, p in plain.named().items():
        torch.testing.assert_close(learned[name], p.detach(), rtol=0, atol=1e-10, msg=name)
        assert (learned[name] - start[name]).abs().max() > 1e-3, name


def test_outer_steps_on_sinusoids_are_torchopts(chunks: Chunks) -> None:
    """Two of them: Adam's first step knows only the gradient's sign."""
    source = Sinusoid(shots=5, query=7).open()
    rng = np.random.default_rng(3)
    batches = [in_float64(source.sample("train", 3, rng)) for _ in range(2)]
    learner = Learner(Mlp((1, 8, 6, 1)), settings(step_size=0.2, inner_steps=2), False, 5)
    draws = torch.Generator().manual_seed(1)
    meta = {
        name: torch.randn(p.shape, generator=draws, dtype=torch.float64) / 2
        for name, p in learner.initial_parameters(0).items()
    }
    plain = filled(PlainMlp((1, 8, 6, 1)), meta)
    torchopt_training(plain, batches, shots=None, steps=2)
    check_same(plain, outer_steps(learner, meta, batches, chunks), meta)


@pytest.mark.parametrize("network", ["strided", "pooled"])
def test_outer_steps_on_pictures_are_torchopts(network: str, chunks: Chunks) -> None:
    """As above, for convolutions with batch normalisation, whose shifts are not adapted."""
    case = Case(network, settings(step_size=0.2, inner_steps=2))
    learner, meta, _ = make(case)
    batches = [make(case._replace(seed=seed))[2] for seed in (1, 2)]
    features = 6 * (4 if network == "pooled" else 1)
    plain = filled(PlainConvNet(CHANNELS, 6, 2, features, WAYS, pooled=network == "pooled"), meta)
    torchopt_training(plain, batches, shots=SHOTS, steps=2)
    check_same(plain, outer_steps(learner, meta, batches, chunks), meta)


# --- Chunks.


def chunked(threads: int, size: int) -> MetaGradient:
    """The gradient of 5 tasks in float32."""
    learner, meta, one = make(Case("strided", settings(inner_steps=2)))
    other = make(Case("strided", settings(inner_steps=2), seed=5))[2]
    parts = [
        Examples(torch.cat([a.inputs, b.inputs])[:5].float(), torch.cat([a.targets, b.targets])[:5])
        for a, b in zip(one, other, strict=True)
    ]
    with Chunks(threads, size) as some:
        return learner.meta_gradient({n: p.float() for n, p in meta.items()}, Batch(*parts), some)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_change_the_last_bits_alone(size: int) -> None:
    """5 tasks by 1, 2 or 3 against all at once; losses and scores stay in task order."""
    whole, part = chunked(1, 0), chunked(1, size)
    assert len({float(loss) for loss in whole.losses}) == 5
    torch.testing.assert_close(part.losses, whole.losses, rtol=1e-5, atol=1e-6)
    assert torch.equal(part.scores, whole.scores)
    for name, g in whole.gradient.items():
        torch.testing.assert_close(part.gradient[name], g, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_threads_change_no_bit(size: int) -> None:
    one, two = chunked(1, size), chunked(2, size)
    assert torch.equal(one.losses, two.losses)
    assert torch.equal(one.scores, two.scores)
    assert all(torch.equal(g, two.gradient[name]) for name, g in one.gradient.items())


# --- What is easily got wrong.


def linear_learner(shots: int = SHOTS, outputs: int = 1, /, **changed: object) -> Learner:
    """y = x W + b: nothing hidden, and derivatives that fit on a line."""
    return Learner(Mlp((1, outputs)), settings(**changed), outputs > 1, shots)


def line_task() -> tuple[Params, Batch]:
    """w = 2, b = 0. Support (x, y) = (1, 5), (-1, -5): dL/dw = 2 (w - 5), dL/db = 2 b = 0.

    Query (2, 1), whose loss is (2 w + b - 1)^2.
    """
    meta = {"0.weight": torch.tensor([[2.0]]), "0.bias": torch.zeros(1)}
    support = Examples(torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[[5.0], [-5.0]]]))
    return meta, Batch(support, Examples(torch.tensor([[[2.0]]]), torch.tensor([[[1.0]]])))


@pytest.mark.parametrize(
    ("changed", "loss", "slope"),
    [
        # w' = 2 - .25 * 2 * (2 - 5) = 3.5, dw'/dw = .5: (7 - 1)^2 = 36, 2 * 6 * 2 * .5 = 12.
        ({"inner_steps": 1}, 36.0, 12.0),
        ({"inner_steps": 1, "first_order": True}, 36.0, 24.0),
        # w'' = 4.25: (8.5 - 1)^2 = 56.25, 2 * 7.5 * 2 * .25 = 7.5.
        ({"inner_steps": 2}, 56.25, 7.5),
        # 36 + 56.25, 12 + 7.5; the loss before any step, 9, does not count.
        ({"inner_steps": 2, "multi_step_loss": True}, 92.25, 19.5),
        # Query (4 - 1)^2 = 9 and support (2 - 5)^2 = 9: 12 - 6.
        ({"inner_steps": 0}, 18.0, 6.0),
    ],
)
def test_a_line_by_hand(
    changed: dict[str, object], loss: float, slope: float, chunks: Chunks
) -> None:
    meta, batch = line_task()
    learner = linear_learner(step_size=0.25, **changed)
    found = learner.meta_gradient(meta, batch, chunks)
    assert found.losses.tolist() == pytest.approx([loss])
    assert found.gradient["0.weight"].item() == pytest.approx(slope)
    # The score is of the query, after the last step, alone.
    last = {0: 9.0, 1: 36.0, 2: 56.25}[learner.settings.inner_steps]
    assert found.scores.tolist() == pytest.approx([last])


def test_the_gradient_is_of_the_tasks_mean(chunks: Chunks) -> None:
    """Three times the same task has the gradient of once."""
    meta, batch = line_task()
    thrice = Batch(
        *(Examples(p.inputs.expand(3, -1, 1), p.targets.expand(3, -1, 1)) for p in batch)
    )
    found = linear_learner(step_size=0.25).meta_gradient(meta, thrice, chunks)
    assert found.gradient["0.weight"].item() == pytest.approx(12.0)
    assert found.losses.tolist() == pytest.approx([36.0] * 3)


def test_a_step_size_is_learned_by_hand(chunks: Chunks) -> None:
    """w' = w - a * 2 (w - 5), so dL/da = 2 (2 w' - 1) * 2 * -2 (w - 5) = 2 * 6 * 2 * 6 = 144."""
    meta, batch = line_task()
    learner = linear_learner(learned_step_sizes=True)
    meta |= {"step_size.0.weight": torch.tensor([[0.25]]), "step_size.0.bias": torch.tensor([0.5])}
    found = learner.meta_gradient(meta, batch, chunks)
    assert found.gradient["step_size.0.weight"].item() == pytest.approx(144.0)
    assert found.gradient["step_size.0.bias"].item() == pytest.approx(0.0)
    assert found.gradient["0.weight"].item() == pytest.approx(12.0)


def test_the_sum_over_classes_is_ways_times_the_mean() -> None:
    """5 ways of 2 shots: a step of .4 down the one is a step of 2 down the other."""
    rng = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 10, 1, generator=rng)
    support = Examples(inputs, torch.arange(5).repeat(3, 2))
    meta = linear_learner(2, 5).initial_parameters(2)

    def adapted(loss: str, step_size: float) -> Params:
        learner = linear_learner(2, 5, loss=loss, step_size=step_size)
        *_, params = learner.along(meta, support, 3)
        return params

    by_sum = adapted("sum-over-classes", 0.4)
    by_mean, too_small = adapted("mean", 2.0), adapted("mean", 0.4)
    for name, p in by_sum.items():
        torch.testing.assert_close(by_mean[name], p)
        assert (too_small[name] - p).abs().max() > 0.1


def test_the_losses_of_a_network_that_knows_nothing() -> None:
    """Cross-entropy log 3 each: 6 examples over 2 shots are 3 log 3, also of the query."""
    nothing, targets = torch.zeros(6, 3), torch.tensor([0, 0, 1, 2, 2, 2])
    over_shots = linear_learner(2, 3).loss(nothing, targets)
    assert float(over_shots) == pytest.approx(3 * math.log(3))
    mean = linear_learner(2, 3, loss="mean").loss(nothing, targets)
    assert float(mean) == pytest.approx(math.log(3))


@pytest.mark.parametrize(("loss", "expected"), [("sum-over-classes", 9 / 5), ("mean", 1.0)])
def test_the_query_is_judged_over_the_shots_of_the_support(
    loss: str, expected: float, chunks: Chunks
) -> None:
    """9 query examples and 5 shots, and inputs of 0, from which nothing but a bias is learned.

    Support of 2 classes alike leaves the bias at 0, so each costs log 2.
    """
    support = Examples(torch.zeros(1, 10, 1), torch.arange(2).repeat(1, 5))
    query = Examples(torch.zeros(1, 9, 1), torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1]]))
    learner = linear_learner(5, 2, loss=loss)
    found = learner.meta_gradient(learner.initial_parameters(0), Batch(support, query), chunks)
    assert found.losses.tolist() == pytest.approx([expected * math.log(2)])


def test_a_regression_has_the_mean_over_examples_and_values() -> None:
    """(1 + 4 + 0 + 9) / 4, whatever `loss` and `shots` are."""
    learner = Learner(Mlp((1, 2)), settings(), classifies=False, shots=7)
    outputs, targets = (
        torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [3.0, 3.0]]),
    )
    assert float(learner.loss(outputs, targets)) == 3.5
    assert learner.score(outputs[None], targets[None]).tolist() == [3.5]


def test_accuracy_by_hand() -> None:
    """Two tasks of four; right are 3 and 1. Greatest, not least, output; task by task."""
    outputs = torch.tensor(
        [
            [[5.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 3.0], [4.0, 2.0, 0.0]],
            [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [0.0, 9.0, 1.0], [1.0, 2.0, 3.0]],
        ]
    )
    targets = torch.tensor([[0, 1, 2, 1], [0, 1, 1, 0]])
    assert linear_learner(1, 3).score(outputs, targets).tolist() == [0.75, 0.25]


def test_squared_errors_are_of_each_task() -> None:
    """Two tasks of one example of 3 values: (0 + 1 + 4) / 3 and (9 + 0 + 0) / 3."""
    outputs = torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    targets = torch.tensor([[[1.0, 1.0, 1.0]], [[1.0, 5.0, 6.0]]])
    learner = Learner(Mlp((1, 3)), settings(), classifies=False, shots=1)
    assert learner.score(outputs, targets).tolist() == pytest.approx([5 / 3, 3.0])


@pytest.mark.parametrize("network", ["normalised mlp", "strided", "pooled"])
@pytest.mark.parametrize("adapted", ["all", "last-layer"])
def test_what_the_inner_loop_changes(network: str, adapted: str, chunks: Chunks) -> None:
    """Shifts never, though the outer loop learns them; with last-layer only that."""
    learner, meta, batch = make(Case(network, settings(inner_steps=2, adapted=adapted)))
    *_, after = learner.along(meta, batch.support, 2)
    changed = {n for n, p in meta.items() if not torch.equal(after[n], p.expand(M, *p.shape))}
    last = {"2.weight", "2.bias"} if network == "normalised mlp" else {"last.weight", "last.bias"}
    rest = {"0.weight", "1.weight", "0.bias", "1.bias"} & meta.keys()
    assert changed == (last if adapted == "last-layer" else last | rest)
    gradient = learner.meta_gradient(meta, batch, chunks).gradient
    for name in ("0.shift", "1.shift", "0.weight", "1.weight", *last):
        assert gradient[name].abs().max() > 1e-3, name


@pytest.mark.parametrize("network", ["normalised mlp", "strided", "pooled"])
def test_whose_statistics_a_query_is_normalised_by(network: str) -> None:
    """Not transductive: the support's alone, so that an answer depends on no other question."""
    learner, meta, batch = make(Case(network, settings()))
    params = {name: p.expand(M, *p.shape) for name, p in meta.items()}
    support, query = batch
    other = query.inputs.clone()
    other[:, 1:] += torch.randn(other[:, 1:].shape, generator=torch.Generator().manual_seed(4))
    asked = Batch(support, Examples(other, query.targets))
    backwards = Batch(Examples(support.inputs + support.inputs.roll(1, 1), support.targets), query)

    def answers(batch: Batch, transductive: bool) -> Tensor:
        return learner.predict(params, batch, transductive=transductive)

    def first(batch: Batch, transductive: bool) -> Tensor:
        return answers(batch, transductive)[:, 0]

    torch.testing.assert_close(first(asked, False), first(batch, False), rtol=1e-12, atol=1e-12)
    assert (first(asked, True) - first(batch, True)).abs().min() > 1e-4
    # And the other way about with another support.
    assert (first(backwards, False) - first(batch, False)).abs().min() > 1e-4
    torch.testing.assert_close(first(backwards, True), first(batch, True), rtol=0, atol=0)
    assert answers(batch, False).shape == (M, Q, WAYS)


def test_without_normalisation_there_is_no_difference() -> None:
    learner, meta, batch = make(Case("mlp", settings()))
    params = {name: p.expand(M, *p.shape) for name, p in meta.items()}
    one, other = (learner.predict(params, batch, transductive=t) for t in (True, False))
    assert torch.equal(one, other)


# --- Tests after 0 to n steps.


@pytest.mark.parametrize("transductive", [True, False])
def test_a_test_is_of_every_step(transductive: bool, chunks: Chunks) -> None:
    """Row n holds each task's loss and accuracy after n steps, in task order."""
    learner, meta, batch = make(Case("pooled", settings(inner_steps=3)))
    scores, losses = learner.test(meta, batch, 3, chunks, transductive=transductive)
    assert scores.shape == losses.shape == (4, M)
    for i in range(M):
        support, query = task(batch, i)
        walk = [meta, *plain_steps(learner, meta, support, None, graph=False)]
        for step, theta in enumerate(walk):
            seen = (query if transductive else support).inputs
            outputs = plain_outputs(learner.network, theta, query.inputs, seen)
            expected = float(plain_loss(learner, outputs, query.targets))
            assert float(losses[step, i]) == pytest.approx(expected, rel=1e-9)
            right = [int(o.argmax()) == int(t) for o, t in zip(outputs, query.targets, strict=True)]
            assert float(scores[step, i]) == pytest.approx(sum(right) / Q)
    assert len({round(float(loss), 6) for loss in losses.flatten()}) == 4 * M


@pytest.mark.parametrize("learned", [False, True])
def test_step_sizes_are_scaled(learned: bool, chunks: Chunks) -> None:
    """A step twice as long: w' = 2 - .5 * 2 * (2 - 5) = 5, and (10 - 1)^2 = 81."""
    meta, batch = line_task()
    learner = linear_learner(step_size=0.25, learned_step_sizes=learned)
    if learned:
        meta |= {"step_size.0.weight": torch.full((1, 1), 0.25), "step_size.0.bias": torch.ones(1)}
    _, losses = learner.test(meta, batch, 1, chunks, transductive=True, scale=2.0)
    assert losses.flatten().tolist() == pytest.approx([9.0, 81.0])


def test_nothing_that_is_given_is_changed(chunks: Chunks) -> None:
    """And what comes back belongs to no graph."""
    learner, meta, batch = make(Case("strided", settings(inner_steps=2, learned_step_sizes=True)))
    given = [*meta.values(), *batch.support, *batch.query]
    before = [p.clone() for p in given]
    found = learner.meta_gradient(meta, batch, chunks)
    scores, losses = learner.test(meta, batch, 2, chunks, transductive=True)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    kept = [*found.gradient.values(), found.losses, found.scores, scores, losses, *meta.values()]
    assert not any(p.requires_grad for p in kept)


# --- Meta-parameters and settings.


@pytest.mark.parametrize("network", ["normalised mlp", "strided"])
@pytest.mark.parametrize("adapted", ["all", "last-layer"])
def test_learned_step_sizes_begin_with_step_size(network: str, adapted: str) -> None:
    """One for every number that is adapted, and none for a shift."""
    changed = settings(learned_step_sizes=True, adapted=adapted, step_size=0.07)
    learner = Learner(NETWORKS[network], changed, True, SHOTS)
    meta = learner.initial_parameters(6)
    theta = learner.network.initial_parameters(torch.Generator().manual_seed(6))
    assert learner.theta(meta).keys() == theta.keys()
    assert all(torch.equal(meta[name], p) for name, p in theta.items())
    sizes = {n.removeprefix("step_size."): p for n, p in meta.items() if n not in theta}
    assert sizes.keys() == set(moving(learner, theta))
    for name, size in sizes.items():
        assert torch.equal(size, torch.full(theta[name].shape, 0.07))


def test_a_module_of_ones_own_learns_like_ours(chunks: Chunks) -> None:
    """Linear, tanh, linear: the last layer alone is adapted, both are learned, by differences."""
    module = nn.Sequential(nn.Linear(WIDE, 7), nn.Tanh(), nn.Linear(7, WAYS)).double()
    learner = Learner(
        OwnNetwork(module), settings(adapted="last-layer", inner_steps=2), True, SHOTS
    )
    batch = make(Case("mlp", settings()))[2]
    meta = learner.initial_parameters(0)
    *_, after = learner.along(meta, batch.support, 2)
    changed = {n for n, p in meta.items() if not torch.equal(after[n], p.expand(M, *p.shape))}
    assert changed == {"2.weight", "2.bias"}
    gradient = learner.meta_gradient(meta, batch, chunks).gradient
    h = 1e-5
    for name, p in meta.items():
        direction = torch.linspace(-1, 2, p.numel(), dtype=torch.float64).reshape(p.shape)
        above, below = (
            float(learner.meta_losses(meta | {name: p + side * direction}, batch)[0].mean())
            for side in (h, -h)
        )
        slope = float((gradient[name] * direction).sum())
        assert slope == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-9), name


def test_two_threads_share_no_module_of_ones_own() -> None:
    """Each task's parameters are put into a module while it runs; no other task may see them."""
    module = nn.Sequential(nn.Linear(WIDE, 70), nn.Tanh(), nn.Linear(70, WAYS)).double()
    learner = Learner(OwnNetwork(module), settings(inner_steps=3), True, SHOTS)
    batch = make(Case("mlp", settings()))[2]
    many = Batch(*(Examples(p.inputs.repeat(4, 1, 1), p.targets.repeat(4, 1)) for p in batch))
    meta = learner.initial_parameters(0)
    with Chunks(1, 1) as one, Chunks(3, 1) as three:
        expected = learner.meta_gradient(meta, many, one)
        for _ in range(5):
            found = learner.meta_gradient(meta, many, three)
            assert torch.equal(found.losses, expected.losses)
            assert all(torch.equal(g, found.gradient[n]) for n, g in expected.gradient.items())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"inner_steps": -1}, "adaptation.inner_steps must be from 0 to 100, got -1"),
        ({"inner_steps": 101}, "adaptation.inner_steps must be from 0 to 100, got 101"),
        ({"step_size": 0.0}, r"adaptation.step_size must be above 0 and at most 1e\+06, got 0.0"),
        ({"step_size": math.nan}, "adaptation.step_size must be above 0 .* got nan"),
        ({"step_size": 2e6}, "adaptation.step_size must be above 0 .* got 2000000.0"),
        *(
            ({"inner_steps": 0, name: True}, f"{name} needs adaptation.inner_steps of 1 or more")
            for name in ("first_order", "learned_step_sizes", "multi_step_loss")
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InnerLoopSettings(**changed)  # type: ignore[arg-type]  # by name
