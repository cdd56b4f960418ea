"""A network to hold in the hand, of this package or of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maml_rl import supervised
from maml_rl.errors import InputError, RunWarning
from maml_rl.runs import RunFolder
from maml_rl.supervised.own import Arrays, OwnTasks
from maml_rl.supervised.trained import load
from tests.tiny_supervised import characters, sinusoid

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def draw_lines(count: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Tasks are lines: five points to adapt to, four to be judged by."""
    slope, offset = rng.normal(size=(2, count, 1, 1))
    x = rng.uniform(-1, 1, (count, 9, 1))
    y = slope * x + offset
    return (x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:])


def draw_sides(count: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Tasks are directions in the plane; classes are 0 to 2, of points along them."""
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    classes = np.tile(np.arange(3), (count, 4))
    where = (angle + classes[..., None] * 2 * np.pi / 3)[..., 0]
    points = np.stack([np.cos(where), np.sin(where)], 2) + rng.normal(0, 0.1, (count, 12, 2))
    return (points[:, :6], classes[:, :6]), (points[:, 6:], classes[:, 6:])


def module(inputs: int = 1, outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs))


def test_adapting_is_the_inner_step_and_asking_leaves_it_alone() -> None:
    """One step of alpha .001 on given points, by hand through torch's autograd."""
    learned = supervised.meta_train(sinusoid())
    x = np.array([[0.5], [-1.0], [2.0]])
    y = np.sin(x)
    adapted = learned.adapt(x, y)
    leaves = {name: p.clone().requires_grad_() for name, p in learned.meta.items()}
    outputs = learned.learner.network(leaves, torch.tensor(x, dtype=torch.float32))
    loss = (outputs - torch.tensor(y, dtype=torch.float32)).square().mean()
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    for (name, p), slope in zip(leaves.items(), slopes, strict=True):
        torch.testing.assert_close(adapted.params[name], p.detach() - 0.001 * slope)
    assert adapted(x).shape == (3, 1)
    np.testing.assert_array_equal(learned.adapt(x, y, steps=0)(x), outputs.detach().numpy())
    two = learned.adapt(x, y, steps=2)(x)
    assert np.abs(two - adapted(x)).max() > 0
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        learned.adapt(x, y[:2])
    with pytest.raises(ValueError, match="steps must be at least 0"):
        learned.adapt(x, y, steps=-1)
    with pytest.raises(ValueError, match=r"an input must be of shape \(1,\), got \(2,\)"):
        learned.adapt(np.zeros((3, 2)), y)
    with pytest.raises(ValueError, match="a target must be 1 numbers, got 2"):
        learned.adapt(x, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="inputs must be"):
        adapted(np.zeros((3, 2)))


@pytest.mark.slow
def test_a_module_of_ones_own_learns_lines(tmp_path: Path) -> None:
    """The error after adapting falls to a fifth; the module given is left as it was."""
    network = module()
    before = [p.clone() for p in network.parameters()]
    rows: list[dict[str, float]] = []
    learned = supervised.meta_learn(
        network,
        draw_lines,
        iterations=200,
        adaptation=supervised.InnerLoopSettings(inner_steps=2, step_size=0.1),
        outer=supervised.OuterLoopSettings(tasks=10, learning_rate=0.01),
        record_every=50,
        out=tmp_path / "run",
        watch=lambda row, total: rows.append({k: float(v or 0) for k, v in row.items()}),
    )
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert rows[-1]["validation_error_2"] < 0.2 * rows[-1]["validation_error_0"]
    line = learned.adapt([[-0.5], [0.0], [0.5]], [[0.0], [1.0], [2.0]], steps=5)
    assert line([[0.25]])[0, 0] == pytest.approx(1.5, abs=0.3)
    # Kept, loaded and gone on with; a run folder holds no code.
    again = load(tmp_path / "run", network=module(), tasks=draw_lines)
    assert all(torch.equal(p, learned.meta[name]) for name, p in again.meta.items())
    with pytest.raises(InputError, match="trained on tasks of your own"):
        load(tmp_path / "run")
    more = supervised.resume(tmp_path / "run", iterations=201, network=module(), tasks=draw_lines)
    assert not torch.equal(more.meta["0.weight"], learned.meta["0.weight"])


def test_classes_are_told_by_whole_numbers() -> None:
    learned = supervised.meta_learn(
        module(2, 3),
        draw_sides,
        iterations=60,
        adaptation=supervised.InnerLoopSettings(step_size=0.3),
        outer=supervised.OuterLoopSettings(tasks=8, learning_rate=0.02),
    )
    assert learned.experiment.data == OwnTasks(inputs=(2,), targets=3, support=2, classes=True)
    (x, y), (new, wanted) = draw_sides(1, np.random.default_rng(1))
    adapted = learned.adapt(np.asarray(x)[0], np.asarray(y)[0], steps=3)
    found = adapted(np.asarray(new)[0]).argmax(1)
    assert (found == np.asarray(wanted)[0]).mean() > 0.8
    with pytest.raises(ValueError, match="classes must be from 0 to 2, got 0 to 7"):
        learned.adapt(np.asarray(x)[0], [0, 1, 2, 0, 1, 7])


@pytest.mark.slow
def test_asked_one_by_one_or_together_by_the_supports_statistics(tmp_path: Path) -> None:
    """Where not transductive an answer does not depend on what else is asked; else it does."""
    for transductive in (False, True):
        learned = supervised.meta_train(
            characters(tmp_path / "set", adaptation__transductive=transductive)
        )
        batch = learned.source.sample("test", 1, np.random.default_rng(0), query=3)
        adapted = learned.adapt(batch.support.inputs[0].numpy(), batch.support.targets[0].numpy())
        asked = batch.query.inputs[0].numpy()
        together, alone = adapted(asked)[:1], adapted(asked[:1])
        assert np.allclose(together, alone, atol=1e-5) is not transductive


@pytest.mark.slow
def test_more_examples_are_a_step_of_the_same_scale(tmp_path: Path) -> None:
    """Each twice is the same task, and the same step down the loss over shots."""
    learned = supervised.meta_train(characters(tmp_path / "set"))
    batch = learned.source.sample("test", 1, np.random.default_rng(0))
    x, y = batch.support.inputs[0].numpy(), batch.support.targets[0].numpy()
    once, twice = learned.adapt(x, y), learned.adapt(np.tile(x, (2, 1, 1, 1)), np.tile(y, 2))
    for name, p in once.params.items():
        torch.testing.assert_close(twice.params[name], p, rtol=1e-4, atol=1e-5)


Sampler = Callable[[int, np.random.Generator], tuple[Arrays, Arrays]]


def beyond(count: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Classes from 1, of which the query has one that the support has not."""
    (x, y), (new, wanted) = draw_sides(count, rng)
    return (x, y), (new, np.asarray(wanted) - 1)


def nothing(count: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    return None  # type: ignore[return-value]  # wrong on purpose


def unequal(count: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    (x, y), (new, wanted) = draw_lines(count, rng)
    return (x, y), (np.repeat(new, 2, 2), wanted)


def flat(count: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    return (np.zeros((count, 5)), np.zeros((count, 5))), (np.zeros((count, 5)), np.zeros(5))


def too_few(count: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    return draw_lines(count - 1, rng)


@pytest.mark.parametrize(
    ("network", "sampler", "classes", "words"),
    [
        (module(), flat, None, "targets .* values"),
        (module(), nothing, None, "tasks must draw"),
        (module(), unequal, None, "support and query must be of one shape"),
        (module(2, 3), beyond, None, "classes must be from 0 to 2, got -1 to 2"),
        (module(2, 2), draw_sides, 2, "classes must be from 0 to 1, got 0 to 2"),
        (module(), too_few, None, "64 tasks were wanted, got inputs"),
        (module(), draw_lines, 3, "are values to regress to, not classes"),
        (module(2), draw_lines, None, "cannot map several tasks' inputs"),
        (
            module(1, 2),
            draw_lines,
            None,
            r"must map 3 .* to \(3, 1\) outputs, it gave \(3, 2\)",
        ),
        (nn.Tanh(), draw_lines, None, "no parameters to learn"),
        (
            nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),
            draw_lines,
            None,
            "track_running_stats=False",
        ),
        (
            nn.Sequential(nn.Linear(1, 3), nn.Dropout(), nn.Linear(3, 1)),
            draw_lines,
            None,
            "random",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(
    network: nn.Module, sampler: Sampler, classes: int | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        supervised.meta_learn(network, sampler, iterations=1, classes=classes)


def test_a_layer_of_torchs_normalises_by_what_goes_through_it() -> None:
    """So the support's statistics cannot be asked for."""
    network = nn.Sequential(
        nn.Linear(1, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1)
    )
    supervised.meta_learn(network, draw_lines, iterations=1)
    inner = supervised.InnerLoopSettings(transductive=False)
    with pytest.raises(InputError, match="needs a network of this package"):
        supervised.meta_learn(network, draw_lines, iterations=1, adaptation=inner)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    """With both descriptions below each other; other versions are only told."""
    supervised.meta_train(sinusoid(), out=tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("- 8\n", "- 9\n"))
    with pytest.raises(InputError, match=r"checkpoint: .*\(1, 8\).*\n  expected: .*\(1, 9\)"):
        load(tmp_path / "run")
    config.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maml_rl.supervised.trained.differences", lambda saved: sorted(saved))
        with pytest.warns(RunWarning, match="maml-rl, numpy, torch; it is used all the same"):
            load(tmp_path / "run")


@pytest.mark.slow
def test_images_may_move(tmp_path: Path) -> None:
    learned = supervised.meta_train(characters(tmp_path / "set"), out=tmp_path / "run")
    (tmp_path / "set").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="there is no folder"):
        load(tmp_path / "run")
    again = load(tmp_path / "run", root=str(tmp_path / "moved"))
    assert all(torch.equal(p, again.meta[name]) for name, p in learned.meta.items())
    found = RunFolder.open(tmp_path / "run").load()
    made_for = {"problem": "drawn_characters", "inputs": "1 x 28 x 28", "outputs": 3}
    assert found.origin.made_for == made_for


def test_the_public_names_are_there() -> None:
    for name in supervised.__all__:
        assert getattr(supervised, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'train_fast'"):
        _ = supervised.train_fast
