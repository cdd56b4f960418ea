"""Networks as functions of parameters: their numbers, where they begin, and what they compute."""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from maml_rl.supervised.networks import (
    ConvNet,
    Mlp,
    Network,
    NetworkSettings,
    OwnNetwork,
    make_network,
    normalise,
)
from tests.plain_networks import PlainConvNet, PlainMlp, filled

pytestmark = pytest.mark.usefixtures("one_torch_thread")

OMNIGLOT = make_network(NetworkSettings(kind="strided-conv"), (1, 28, 28), 5)
MINI_IMAGENET = make_network(NetworkSettings(kind="pooled-conv", filters=32), (3, 84, 84), 5)
FULLY_CONNECTED = make_network(
    NetworkSettings(layers=(256, 128, 64, 64), batch_norm=True), (1, 28, 28), 5
)
SINE = make_network(NetworkSettings(), (1,), 1)


def initial(network: Network, seed: int = 1) -> dict[str, Tensor]:
    return network.initial_parameters(torch.Generator().manual_seed(seed))


# --- The paper's networks.

SHAPES: list[tuple[Network, Mapping[str, tuple[int, ...]], int]] = [
    (
        OMNIGLOT,
        {
            "0.weight": (64, 1, 3, 3),
            **{f"{layer}.weight": (64, 64, 3, 3) for layer in (1, 2, 3)},
            **{f"{layer}.shift": (64,) for layer in range(4)},
            "last.weight": (64, 5),
            "last.bias": (5,),
        },
        # 9 * 64 + 3 * 9 * 64^2, 4 * 64, 64 * 5 + 5.
        111_168 + 256 + 325,
    ),
    (
        MINI_IMAGENET,
        {
            "0.weight": (32, 3, 3, 3),
            **{f"{layer}.weight": (32, 32, 3, 3) for layer in (1, 2, 3)},
            **{f"{layer}.shift": (32,) for layer in range(4)},
            # 84, 42, 21, 10, 5 pixels: 25 places of 32 channels.
            "last.weight": (800, 5),
            "last.bias": (5,),
        },
        # 9 * 3 * 32 + 3 * 9 * 32^2, 4 * 32, 800 * 5 + 5.
        28_512 + 128 + 4_005,
    ),
    (
        FULLY_CONNECTED,
        {
            "0.weight": (784, 256),
            "1.weight": (256, 128),
            "2.weight": (128, 64),
            "3.weight": (64, 64),
            "4.weight": (64, 5),
            **{f"{layer}.bias": (n,) for layer, n in enumerate((256, 128, 64, 64, 5))},
            **{f"{layer}.shift": (n,) for layer, n in enumerate((256, 128, 64, 64))},
        },
        # Weights; biases; shifts.
        200_704 + 32_768 + 8_192 + 4_096 + 320 + 517 + 512,
    ),
    (
        SINE,
        {
            **{"0.weight": (1, 40), "1.weight": (40, 40), "2.weight": (40, 1)},
            **{"0.bias": (40,), "1.bias": (40,), "2.bias": (1,)},
        },
        40 + 1600 + 40 + 81,
    ),
]


@pytest.mark.parametrize(("network", "shapes", "count"), SHAPES)
def test_the_papers_networks_have_its_parameters(
    network: Network, shapes: Mapping[str, tuple[int, ...]], count: int
) -> None:
    theta = initial(network)
    assert {name: tuple(p.shape) for name, p in theta.items()} == shapes
    assert sum(p.numel() for p in theta.values()) == count
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in theta.values())
    assert network.shared == {name for name in theta if name.endswith("shift")}
    last = "last" if "last.bias" in theta else f"{len(theta) // 3 if network.shared else 2}"
    assert network.last_layer == {f"{last}.weight", f"{last}.bias"}
    assert network.normalises == bool(network.shared)


@pytest.mark.parametrize("network", [OMNIGLOT, MINI_IMAGENET, FULLY_CONNECTED, SINE])
def test_biases_and_shifts_begin_at_0_and_a_seed_decides_the_rest(network: Network) -> None:
    theta, again, other = initial(network), initial(network), initial(network, seed=2)
    for name, p in theta.items():
        assert torch.equal(p, again[name])
        if name.endswith("weight"):
            assert not torch.equal(p, other[name])
        else:
            assert not p.any()


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "4.weight"])
def test_a_fully_connected_weight_is_a_truncated_normal(name: str) -> None:
    """N(0, .01^2) within .02: its standard deviation is .01 sqrt(1 - 4 phi(2) / (1 - 2 Q(2)))."""
    weight = initial(FULLY_CONNECTED)[name].flatten()
    assert weight.abs().max() <= 0.02
    assert weight.abs().max() > 0.019
    density, within = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    std = 0.01 * math.sqrt(1 - 4 * density / within)
    assert float(weight.std()) == pytest.approx(std, rel=2 / math.sqrt(len(weight)))
    assert float(weight.mean()) == pytest.approx(0, abs=4 * std / math.sqrt(len(weight)))


@pytest.mark.parametrize(
    ("network", "name", "n_in", "n_out"),
    [
        (OMNIGLOT, "0.weight", 9 * 1, 9 * 64),
        (OMNIGLOT, "1.weight", 9 * 64, 9 * 64),
        (MINI_IMAGENET, "0.weight", 9 * 3, 9 * 32),
        (MINI_IMAGENET, "3.weight", 9 * 32, 9 * 32),
        (MINI_IMAGENET, "last.weight", 800, 5),
    ],
)
def test_a_convolution_is_xavier_uniform(
    network: Network, name: str, n_in: int, n_out: int
) -> None:
    """U(-b, b) with b = sqrt(6 / (n_in + n_out)), whose standard deviation is b / sqrt(3)."""
    weight, bound = initial(network)[name].flatten(), math.sqrt(6 / (n_in + n_out))
    assert 0.98 * bound < weight.abs().max() <= bound
    spread = 3 / math.sqrt(len(weight))
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=spread)
    assert float(weight.mean()) == pytest.approx(0, abs=spread * bound)


def test_the_last_layer_after_a_mean_is_a_unit_normal() -> None:
    """320 numbers: the 3 standard errors of a standard deviation are 3 / sqrt(640)."""
    weight = initial(OMNIGLOT)["last.weight"].flatten()
    assert float(weight.std()) == pytest.approx(1, abs=3 / math.sqrt(640))
    assert float(weight.mean()) == pytest.approx(0, abs=3 / math.sqrt(320))
    # Not truncated, nor uniform.
    assert weight.abs().max() > 2.3


# --- What they compute.


def generic(network: Network, seed: int = 3) -> dict[str, Tensor]:
    """Parameters none of which is 0; float64."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: 0.4 * torch.randn(p.shape, generator=rng, dtype=torch.float64)
        for name, p in initial(network).items()
    }


def inputs_of(*shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(4)
    return 2 * torch.randn(*shape, generator=rng, dtype=torch.float64) + 1


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
def test_an_mlp_is_torchs_layers(batch_norm: bool, shape: tuple[int, ...]) -> None:
    """Linear, batch normalisation, ReLU; a picture is read row by row."""
    network = make_network(NetworkSettings(layers=(5, 8), batch_norm=batch_norm), shape, 4)
    theta, inputs = generic(network), inputs_of(7, *shape)
    plain = filled(PlainMlp((math.prod(shape), 5, 8, 4), batch_norm=batch_norm), theta)
    outputs = network(theta, inputs)
    assert outputs.shape == (7, 4)
    torch.testing.assert_close(outputs, plain(inputs).detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "side", "features"),
    [
        ("strided-conv", 9, 5),  # 9, 5, 3 pixels; the mean of them.
        ("strided-conv", 8, 5),
        ("pooled-conv", 9, 5 * 4),  # 9, 4, 2 pixels.
        ("pooled-conv", 12, 5 * 9),
        ("pooled-conv", 4, 5),
    ],
)
def test_a_convolutional_network_is_torchs_layers(kind: str, side: int, features: int) -> None:
    """Conv2d, BatchNorm2d, ReLU, MaxPool2d or a mean, Linear; pictures of 2 channels, 5 filters."""
    settings = NetworkSettings(kind=kind, blocks=2, filters=5)  # type: ignore[arg-type]  # of two
    network = make_network(settings, (2, side, side), 3)
    theta, inputs = generic(network), inputs_of(7, 2, side, side)
    plain = filled(PlainConvNet(2, 5, 2, features, 3, pooled=kind == "pooled-conv"), theta)
    outputs = network(theta, inputs)
    assert outputs.shape == (7, 3)
    torch.testing.assert_close(outputs, plain(inputs).detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("network", "plain", "shape"),
    [
        (OMNIGLOT, PlainConvNet(1, 64, 4, 64, 5, pooled=False), (1, 28, 28)),
        (MINI_IMAGENET, PlainConvNet(3, 32, 4, 800, 5, pooled=True), (3, 84, 84)),
        (FULLY_CONNECTED, PlainMlp((784, 256, 128, 64, 64, 5), batch_norm=True), (1, 28, 28)),
        (SINE, PlainMlp((1, 40, 40, 1)), (1,)),
    ],
)
def test_the_papers_networks_are_torchs_layers(
    network: Network, plain: PlainMlp | PlainConvNet, shape: tuple[int, ...]
) -> None:
    """Where they begin, in float64."""
    theta = {name: p.double() for name, p in initial(network).items()}
    inputs = inputs_of(3, *shape)
    expected = filled(plain, theta)(inputs).detach()
    torch.testing.assert_close(network(theta, inputs), expected, rtol=1e-9, atol=1e-11)
    assert expected.std() > 0


# --- Batch normalisation.


def test_normalisation_by_hand() -> None:
    """0, 2, 4: mean 2, variance 8 / 3 and not 4. Channels apart; shifts -1 and 10; scale 1."""
    hidden = torch.tensor([[0.0, 7.0], [2.0, 7.0], [4.0, 7.0]])
    found = normalise(hidden, torch.tensor([-1.0, 10.0]), None)
    far = 2 / math.sqrt(8 / 3 + 0.001)
    torch.testing.assert_close(
        found, torch.tensor([[-1 - far, 10.0], [-1.0, 10.0], [-1 + far, 10.0]])
    )


def test_the_epsilon_is_a_thousandth() -> None:
    """0 and .02: the variance .0001 is small beside .001, (x - .01) / sqrt(.0011)."""
    found = normalise(torch.tensor([[0.0], [0.02]]), torch.zeros(1), None)
    assert found.flatten().tolist() == pytest.approx([-0.30151134, 0.30151134], rel=1e-5)


def test_the_first_examples_are_the_reference() -> None:
    """Mean 1 and variance 1 of 0 and 2; the third, 99, is measured by them and changes nothing."""
    found = normalise(torch.tensor([[0.0], [2.0], [99.0]]), torch.tensor([5.0]), 2)
    unit = 1 / math.sqrt(1.001)
    torch.testing.assert_close(found.flatten(), 5 + unit * torch.tensor([-1.0, 1.0, 98.0]))


def test_places_are_examples_too() -> None:
    """A picture of 1x3 pixels 0, 2, 4, in one of two channels, has the mean 2 over its places."""
    hidden = torch.zeros(1, 2, 1, 3)
    hidden[0, 1, 0] = torch.tensor([0.0, 2.0, 4.0])
    found = normalise(hidden, torch.tensor([3.0, 0.0]), None)
    far = 2 / math.sqrt(8 / 3 + 0.001)
    assert found[0, 0, 0].tolist() == [3.0, 3.0, 3.0]
    torch.testing.assert_close(found[0, 1, 0], torch.tensor([-far, 0.0, far]))


@pytest.mark.parametrize(
    "network",
    [
        Mlp((18, 5, 8, 4), batch_norm=True),
        ConvNet(2, 3, 1, 5, 4, pooled=False),
        ConvNet(2, 3, 1, 5, 4, pooled=True),
    ],
    ids=["mlp", "strided", "pooled"],
)
def test_nothing_is_remembered_from_one_call_to_the_next(network: Network) -> None:
    """No running averages: the same examples have the same outputs whatever came between."""
    theta, inputs = generic(network), inputs_of(7, 2, 3, 3)
    kept = {name: p.clone() for name, p in theta.items()}
    before = network(theta, inputs)
    network(theta, 50 * inputs + 9)
    assert torch.equal(network(theta, inputs), before)
    assert all(torch.equal(p, theta[name]) for name, p in kept.items())
    # Each example's outputs depend on which others there are, unless those are the reference.
    assert (network(theta, inputs[:4]) - before[:4]).abs().max() > 1e-3
    torch.testing.assert_close(network(theta, inputs, 4)[:4], network(theta, inputs[:4]))


# --- What cannot be built.


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layers": ()}, "network.layers must be 1 to 100 widths, got 0"),
        ({"layers": (3,) * 101}, "network.layers must be 1 to 100 widths, got 101"),
        ({"layers": (3, 0)}, r"network.layers must all be from 1 to 100000, got \(3, 0\)"),
        ({"layers": (100_001,)}, r"network.layers must all be from 1 to 100000, got \(100001,\)"),
        ({"blocks": 0}, "network.blocks must be from 1 to 20, got 0"),
        ({"blocks": 21}, "network.blocks must be from 1 to 20, got 21"),
        ({"filters": 0}, "network.filters must be from 1 to 10000, got 0"),
        ({"filters": 10_001}, "network.filters must be from 1 to 10000, got 10001"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NetworkSettings(**changed)  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("kind", ["strided-conv", "pooled-conv"])
def test_convolutions_want_pictures(kind: str) -> None:
    for shape in ((3,), (28, 28)):
        words = f"network.kind {kind} wants pictures, and an input is of shape {shape}: use mlp"
        with pytest.raises(ValueError, match=re.escape(words)):
            make_network(NetworkSettings(kind=kind), shape, 2)  # type: ignore[arg-type]  # of two
    with pytest.raises(ValueError, match="wants square pictures, got 28 by 30"):
        make_network(NetworkSettings(kind=kind), (1, 28, 30), 2)  # type: ignore[arg-type]  # same


def test_a_layer_of_ones_own_is_not_taken_for_learned_step_sizes() -> None:
    """It would be left out of theta, and never learned."""
    module = nn.Sequential(OrderedDict(step_size=nn.Linear(2, 3), head=nn.Linear(3, 1)))
    with pytest.raises(ValueError, match="a layer called step_size"):
        OwnNetwork(module)


def test_a_picture_that_pooling_would_halve_to_nothing_is_refused() -> None:
    """8 pixels are 4, 2, 1; a fourth time there is nothing left. Strides round up."""
    with pytest.raises(ValueError, match=r"network\.blocks 4 halve a picture of 15 pixels to noth"):
        make_network(NetworkSettings(kind="pooled-conv"), (1, 15, 15), 2)
    smallest = make_network(NetworkSettings(kind="pooled-conv", filters=3), (1, 16, 16), 2)
    assert smallest(initial(smallest), torch.zeros(5, 1, 16, 16)).shape == (5, 2)
    strided = make_network(NetworkSettings(kind="strided-conv", filters=3), (1, 2, 2), 2)
    assert strided(initial(strided), torch.zeros(5, 1, 2, 2)).shape == (5, 2)


# --- A module of one's own.


class Own(nn.Module):
    """Convolution, batch normalisation without averages, tanh, linear; and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.head = nn.Linear(12, 5)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.convolution(inputs)))
        outputs: Tensor = self.scale * self.head(hidden.flatten(1))
        return outputs


def test_a_module_of_ones_own_is_called_as_it_is_and_left_alone() -> None:
    torch.manual_seed(5)
    module = Own()
    before = copy.deepcopy(module.state_dict())
    network = OwnNetwork(module)
    theta = initial(network)
    inputs = torch.randn(7, 2, 3, 3)
    assert torch.equal(network(theta, inputs), module(inputs))
    assert theta.keys() == dict(module.named_parameters()).keys()
    assert network.last_layer == {"head.weight", "head.bias"}
    assert network.shared == frozenset()
    assert network.normalises
    # Other parameters give what the module would give with them; its own are copies.
    other = {name: p + 0.1 for name, p in theta.items()}
    found = network(other, inputs)
    for p in theta.values():
        p.fill_(99.0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    for name, p in module.named_parameters():
        p.data = other[name]
    assert torch.equal(found, module(inputs))


def test_a_module_of_ones_own_knows_no_reference() -> None:
    """Unless it normalises nothing, where there is no difference."""
    with pytest.raises(ValueError, match="a module of your own has no statistics of the support"):
        OwnNetwork(Own())(dict(Own().named_parameters()), torch.zeros(7, 2, 3, 3), 4)
    plain = OwnNetwork(nn.Linear(3, 2))
    assert not plain.normalises
    assert plain.last_layer == {"weight", "bias"}
    inputs = torch.randn(7, 3)
    assert torch.equal(plain(initial(plain), inputs, 4), plain(initial(plain), inputs))


def test_running_averages_are_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    words = "the network's layer '1' keeps running averages: build it with track_running_stats=F"
    with pytest.raises(ValueError, match=words):
        OwnNetwork(module)


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="the network has no parameters to learn"):
        OwnNetwork(nn.Sequential(nn.Flatten(), nn.ReLU()))
