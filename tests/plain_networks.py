"""The supervised networks once more, out of torch's own layers, to hold the package's to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class PlainMlp(nn.Module):
    """Linear, perhaps BatchNorm1d, ReLU; and linear."""

    def __init__(self, sizes: Sequence[int], *, batch_norm: bool = False) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        hidden = sizes[1:-1] if batch_norm else ()
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width, eps=1e-3, track_running_stats=False) for width in hidden
        )

    def named(self) -> dict[str, Tensor]:
        """The package's names, and weights (in, out)."""
        found: dict[str, Tensor] = {}
        for layer, linear in enumerate(self.linears):
            assert isinstance(linear, nn.Linear)
            found |= {f"{layer}.weight": linear.weight.T, f"{layer}.bias": linear.bias}
        return found | shifts(self.norms)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.reshape(len(inputs), -1)
        for layer, linear in enumerate(self.linears):
            if layer:
                hidden = nn.functional.relu(hidden)
            hidden = linear(hidden)
            if layer < len(self.norms):
                hidden = self.norms[layer](hidden)
        return hidden


class PlainConvNet(nn.Module):
    """Conv2d, BatchNorm2d, ReLU and perhaps MaxPool2d; all places or their mean; linear."""

    def __init__(
        self, channels: int, filters: int, blocks: int, features: int, outputs: int, *, pooled: bool
    ) -> None:
        super().__init__()
        widths = [channels, *[filters] * blocks]
        stride = 1 if pooled else 2
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
            for n_in, n_out in pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(filters, eps=1e-3, track_running_stats=False) for _ in range(blocks)
        )
        self.pool = nn.MaxPool2d(2) if pooled else nn.Identity()
        self.places = nn.Identity() if pooled else nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(features, outputs)

    def named(self) -> dict[str, Tensor]:
        """The package's names, and the last weight (in, out)."""
        found = {"last.weight": self.last.weight.T, "last.bias": self.last.bias}
        for layer, convolution in enumerate(self.convolutions):
            assert isinstance(convolution, nn.Conv2d)
            found[f"{layer}.weight"] = convolution.weight
        return found | shifts(self.norms)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = self.pool(nn.functional.relu(norm(convolution(hidden))))
        outputs: Tensor = self.last(self.places(hidden).flatten(1))
        return outputs


def shifts(norms: nn.ModuleList) -> dict[str, Tensor]:
    """Shifts by the package's names; the scale is left at 1."""
    found: dict[str, Tensor] = {}
    for layer, norm in enumerate(norms):
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        norm.weight.requires_grad_(False)
        found[f"{layer}.shift"] = norm.bias
    return found


def filled(module: PlainMlp | PlainConvNet, params: dict[str, Tensor]) -> PlainMlp | PlainConvNet:
    """Give a module the package's parameters, of which it must have every one and no more."""
    places = module.to(next(iter(params.values())).dtype).named()
    assert places.keys() == params.keys()
    with torch.no_grad():
        for name, place in places.items():
            assert place.shape == params[name].shape, name
            place.copy_(params[name])
    return module
