"""Networks of the supervised mode, as functions of one task's parameters.

Batch normalisation always uses statistics of the examples that go through together, also in a
test, has no running averages, and its scale is fixed at 1; its shift is learned by the outer loop
and is the same for every task. So did the code of Finn et al. 2017.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_rl.adapt import Params
from maml_rl.stateless import StatelessModule

STEP_SIZE = "step_size."
"""Before a parameter's name: its learned step sizes, which are meta-parameters too."""
EPSILON = 1e-3
"""Added to a variance before it divides; TensorFlow's, which the paper's code used."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The network."""

    kind: Literal["mlp", "strided-conv", "pooled-conv"] = "mlp"
    """mlp: fully connected. strided-conv: 3x3 convolutions of stride 2 and a mean over places, the
    paper's for Omniglot. pooled-conv: of stride 1 with 2x2 max-pooling, the paper's for
    MiniImagenet."""
    layers: tuple[int, ...] = (40, 40)
    """Width of each hidden layer, of an mlp."""
    blocks: int = 4
    """Convolutions."""
    filters: int = 64
    """Channels of each convolution."""
    batch_norm: bool = False
    """Whether each hidden layer is batch-normalised, of an mlp; convolutions always are."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < len(self.layers) <= 100:
            raise ValueError(f"network.layers must be 1 to 100 widths, got {len(self.layers)}")
        if any(not 1 <= width <= 100_000 for width in self.layers):
            raise ValueError(f"network.layers must all be from 1 to 100000, got {self.layers}")
        for name, most in (("blocks", 20), ("filters", 10_000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"network.{name} must be from 1 to {most}, got {getattr(self, name)}"
                )


class Network(Protocol):
    """Inputs to outputs, as a function of one task's parameters."""

    @property
    def shared(self) -> frozenset[str]:
        """Names of the parameters that only the outer loop learns."""

    @property
    def last_layer(self) -> frozenset[str]:
        """Names of the last layer's parameters."""

    @property
    def normalises(self) -> bool:
        """Whether outputs depend on which examples go through together."""

    def initial_parameters(self, generator: torch.Generator) -> Params:
        """Draw theta."""

    def __call__(self, params: Params, inputs: Tensor, reference: int | None = None) -> Tensor:
        """Map one task's inputs (S, ...) to outputs (S, Y).

        Statistics of batch normalisation are those of the first `reference` examples, or of all.
        """


def normalise(hidden: Tensor, shift: Tensor, reference: int | None) -> Tensor:
    """Give every channel mean `shift` and variance 1 over examples and places.

    Args:
        hidden: (S, C, ...).
        shift: (C,).
        reference: the number of first examples whose mean and variance count; None is all.
    """
    if reference is None:
        # torch's own, which is faster; by its plain name, since the one in torch.nn.functional
        # refuses a single example.
        return torch.batch_norm(hidden, None, shift, None, None, True, 0.0, EPSILON, False)
    axes = [0, *range(2, hidden.dim())]
    variance, mean = torch.var_mean(hidden[:reference], dim=axes, correction=0, keepdim=True)
    places = (1, -1, *[1] * (hidden.dim() - 2))
    return (hidden - mean) * torch.rsqrt(variance + EPSILON) + shift.view(places)


def truncated_normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Draw normal numbers, none beyond two standard deviations."""
    return nn.init.trunc_normal_(
        torch.empty(shape), 0.0, std, -2.0 * std, 2.0 * std, generator=generator
    )


@dataclass(frozen=True)
class Mlp:
    """Fully connected with ReLU: weights (in, out) named `L.weight`, `L.bias`, and `L.shift`."""

    sizes: tuple[int, ...]
    """Numbers of an input, hidden widths, outputs."""
    batch_norm: bool = False

    @property
    def shared(self) -> frozenset[str]:
        """Shifts."""
        return frozenset(f"{layer}.shift" for layer in self._hidden)

    @property
    def last_layer(self) -> frozenset[str]:
        """Weight and bias of the output."""
        return frozenset(f"{len(self.sizes) - 2}.{part}" for part in ("weight", "bias"))

    @property
    def normalises(self) -> bool:
        """Whether hidden layers are normalised."""
        return self.batch_norm

    @property
    def _hidden(self) -> range:
        """Hidden layers that are normalised."""
        return range(len(self.sizes) - 2 if self.batch_norm else 0)

    @property
    def parameter_count(self) -> int:
        """Numbers that the parameters are."""
        widths = self.sizes
        normalised = sum(widths[1:-1]) if self.batch_norm else 0
        return sum((i + 1) * o for i, o in itertools.pairwise(widths)) + normalised

    def initial_parameters(self, generator: torch.Generator) -> Params:
        """Draw weights from a truncated normal of .01, as the paper's code; biases are 0."""
        params = {}
        for layer, (n_in, n_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            params[f"{layer}.weight"] = truncated_normal((n_in, n_out), 0.01, generator)
            params[f"{layer}.bias"] = torch.zeros(n_out)
            if layer in self._hidden:
                params[f"{layer}.shift"] = torch.zeros(n_out)
        return params

    def __call__(self, params: Params, inputs: Tensor, reference: int | None = None) -> Tensor:
        """Map one task's inputs (S, ...) to outputs (S, Y)."""
        hidden = inputs.flatten(1)
        last = len(self.sizes) - 2
        for layer in range(last + 1):
            hidden = torch.addmm(params[f"{layer}.bias"], hidden, params[f"{layer}.weight"])
            if layer in self._hidden:
                hidden = normalise(hidden, params[f"{layer}.shift"], reference)
            if layer < last:
                hidden = torch.relu(hidden)
        return hidden


@dataclass(frozen=True)
class ConvNet:
    """Blocks of 3x3 convolution, batch normalisation, ReLU and perhaps max-pooling, then linear.

    Convolutions have no bias, which the normalisation would take off again. Weights are named
    `L.weight` (out, in, 3, 3), shifts `L.shift`, the last layer `last.weight` (in, out).
    """

    channels: int
    """Of an input."""
    side: int
    """Of an input, pixels."""
    blocks: int
    filters: int
    outputs: int
    pooled: bool
    """Stride 1, max-pooling over 2x2 and all places to the last layer; else stride 2 and their
    mean."""

    normalises = True

    @property
    def shared(self) -> frozenset[str]:
        """Shifts."""
        return frozenset(f"{layer}.shift" for layer in range(self.blocks))

    @property
    def last_layer(self) -> frozenset[str]:
        """Weight and bias of the linear layer."""
        return frozenset(("last.weight", "last.bias"))

    @property
    def features(self) -> int:
        """Numbers that the last layer sees."""
        side = self.side
        for _ in range(self.blocks):
            side = side // 2 if self.pooled else (side + 1) // 2
        return self.filters * (side**2 if self.pooled else 1)

    @property
    def parameter_count(self) -> int:
        """Numbers that the parameters are."""
        inner = 9 * self.filters * (self.channels + (self.blocks - 1) * self.filters)
        return inner + self.blocks * self.filters + (self.features + 1) * self.outputs

    def initial_parameters(self, generator: torch.Generator) -> Params:
        """Draw weights Xavier-uniform; the last layer's after a mean N(0, 1), as the paper's."""
        params, n_in = {}, self.channels
        for layer in range(self.blocks):
            weight = torch.empty(self.filters, n_in, 3, 3)
            params[f"{layer}.weight"] = nn.init.xavier_uniform_(weight, generator=generator)
            params[f"{layer}.shift"] = torch.zeros(self.filters)
            n_in = self.filters
        last = torch.empty(self.features, self.outputs)
        params["last.weight"] = (
            nn.init.xavier_uniform_(last, generator=generator)
            if self.pooled
            else nn.init.normal_(last, generator=generator)
        )
        params["last.bias"] = torch.zeros(self.outputs)
        return params

    def __call__(self, params: Params, inputs: Tensor, reference: int | None = None) -> Tensor:
        """Map one task's images (S, C, side, side) to outputs (S, Y)."""
        hidden = inputs
        for layer in range(self.blocks):
            weight, shift = params[f"{layer}.weight"], params[f"{layer}.shift"]
            hidden = F.conv2d(hidden, weight, stride=1 if self.pooled else 2, padding=1)
            hidden = torch.relu(normalise(hidden, shift, reference))
            if self.pooled:
                hidden = F.max_pool2d(hidden, 2)
        features = hidden.flatten(1) if self.pooled else hidden.mean((2, 3))
        return torch.addmm(params["last.bias"], features, params["last.weight"])


class OwnNetwork:
    """Any module from a batch of inputs (S, ...) to outputs (S, Y); every parameter is adapted."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a module.

        Raises:
            ValueError: if it keeps running averages, which no task may leave to the next, or has
                no parameters.
        """
        kept = [name for name, one in module.named_modules() if has_running_averages(one)]
        if kept:
            raise ValueError(
                f"the network's layer {kept[0]!r} keeps running averages: build it with "
                "track_running_stats=False"
            )
        self._function = StatelessModule(module)
        names = list(self._function.parameters())
        if not names:
            raise ValueError("the network has no parameters to learn")
        if any(name.startswith(STEP_SIZE) for name in names):
            raise ValueError(
                "the network has a layer called step_size, as learned step sizes are: rename it"
            )
        owner = names[-1].rpartition(".")[0]
        self.last_layer = frozenset(n for n in names if n.rpartition(".")[0] == owner)
        self.shared: frozenset[str] = frozenset()
        self.normalises = any(hasattr(one, "track_running_stats") for one in module.modules())

    def initial_parameters(self, generator: torch.Generator) -> Params:
        """Return the module's own parameters; the generator is not used."""
        return self._function.parameters()

    def __call__(self, params: Params, inputs: Tensor, reference: int | None = None) -> Tensor:
        """Map one task's inputs (S, ...) to outputs (S, Y).

        Raises:
            ValueError: for a `reference` that a layer of the module's own cannot keep to.
        """
        if reference is not None and self.normalises:
            raise ValueError("a module of your own has no statistics of the support alone")
        return self._function(params, inputs)


def has_running_averages(module: nn.Module) -> bool:
    """Whether a layer updates buffers as it is used."""
    return bool(getattr(module, "track_running_stats", False))


def _mlp(settings: NetworkSettings, shape: tuple[int, ...], outputs: int) -> Mlp | ConvNet:
    return Mlp((math.prod(shape), *settings.layers, outputs), settings.batch_norm)


def _strided(settings: NetworkSettings, shape: tuple[int, ...], outputs: int) -> Mlp | ConvNet:
    channels, side, _ = shape
    return ConvNet(channels, side, settings.blocks, settings.filters, outputs, pooled=False)


def _pooled(settings: NetworkSettings, shape: tuple[int, ...], outputs: int) -> Mlp | ConvNet:
    channels, side, _ = shape
    return ConvNet(channels, side, settings.blocks, settings.filters, outputs, pooled=True)


BUILDERS: Mapping[str, Callable[[NetworkSettings, tuple[int, ...], int], Mlp | ConvNet]] = {
    "mlp": _mlp,
    "strided-conv": _strided,
    "pooled-conv": _pooled,
}


def make_network(settings: NetworkSettings, shape: tuple[int, ...], outputs: int) -> Mlp | ConvNet:
    """Build a network for inputs of a shape.

    Raises:
        ValueError: where convolutions are wanted of what is no picture, or one that is too small.
    """
    if settings.kind != "mlp":
        if len(shape) != 3:
            raise ValueError(
                f"network.kind {settings.kind} wants pictures, and an input is of shape "
                f"{shape}: use mlp"
            )
        if shape[1] != shape[2]:
            raise ValueError(
                f"network.kind {settings.kind} wants square pictures, got {shape[1]} by {shape[2]}"
            )
        if settings.kind == "pooled-conv" and shape[1] < 2**settings.blocks:
            raise ValueError(
                f"network.blocks {settings.blocks} halve a picture of {shape[1]} pixels to nothing"
            )
    return BUILDERS[settings.kind](settings, shape, outputs)
