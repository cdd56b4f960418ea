"""The supervised training loop: its numbers, its run folder, and what goes wrong."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from maml_rl.adapt import Params
from maml_rl.checkpoints import FRESH, OPTIMIZER, read_checkpoint
from maml_rl.chunks import Chunks
from maml_rl.errors import CheckpointError, InputError, RunStopped, RunWarning
from maml_rl.runs import Row, RunFolder
from maml_rl.seeds import TRAINING
from maml_rl.supervised.config import SupervisedExperiment
from maml_rl.supervised.learner import Learner, MetaGradient
from maml_rl.supervised.recorded import Recorded
from maml_rl.supervised.tasks import Batch, Problem, task_generator
from maml_rl.supervised.train import meta_train, resume
from maml_rl.supervised.trained import load, new_network
from maml_rl.supervised.trainer import Adam, SupervisedTrainer, chunk_size
from tests.conftest import rows
from tests.tiny_supervised import characters, sinusoid

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def same(a: Params, b: Params) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def trainer_of(experiment: SupervisedExperiment[Problem]) -> SupervisedTrainer:
    return SupervisedTrainer.build(new_network(experiment), FRESH, {})


def test_a_step_is_adams_on_the_meta_gradient() -> None:
    """Two iterations by torch's Adam and the learner's own gradient give the same bits."""
    experiment = sinusoid()
    trainer = trainer_of(experiment)
    row = trainer.step()
    trainer.close()
    fresh = new_network(experiment)
    leaves = [p.clone().requires_grad_() for p in fresh.meta.values()]
    adam = torch.optim.Adam(leaves, 1e-3, fused=True)
    losses, scores = [], []
    with Chunks(1, 0) as chunks:
        for iteration in range(2):
            batch = fresh.source.sample("train", 3, task_generator(TRAINING, 0, iteration))
            meta = dict(zip(fresh.meta, leaves, strict=True))
            found = fresh.learner.meta_gradient(meta, batch, chunks)
            for leaf, name in zip(leaves, fresh.meta, strict=True):
                leaf.grad = found.gradient[name]
            adam.step()
            losses.append(float(found.losses.mean()))
            scores.append(float(found.scores.mean()))
    expected = {n: leaf.detach() for n, leaf in zip(fresh.meta, leaves, strict=True)}
    assert same(trainer.theta, expected)
    assert not same(trainer.theta, fresh.meta)
    assert row["loss"] == float(np.mean(losses))
    assert row["error"] == float(np.mean(scores))
    assert (row["iteration"], row["tasks"], row["refused"]) == (1, 6, 0)


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """After 4 of 6 iterations: parameters, Adam's memory, metrics and TensorBoard's steps."""
    whole = meta_train(sinusoid(), out=tmp_path / "whole")
    meta_train(sinusoid(iterations=4), out=tmp_path / "parts")
    again = resume(tmp_path / "parts", iterations=6)
    assert same(again.meta, whole.meta)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    ends = [read_checkpoint(tmp_path / n / "checkpoints" / "latest") for n in ("whole", "parts")]
    assert same(ends[0].optimizer, ends[1].optimizer)
    assert ends[0].state == ends[1].state
    assert float(ends[0].optimizer["step.0.weight"]) == 6.0
    steps = []
    for name in ("whole", "parts"):
        events = EventAccumulator(str(tmp_path / name / "tensorboard"))
        events.Reload()
        steps.append([(e.step, e.value) for e in events.Scalars("loss")])
    assert steps[0] == steps[1]
    assert [step for step, _ in steps[0]] == [1, 3, 5]


def test_adams_memory_matters(tmp_path: Path) -> None:
    """The test above would pass without it if the steps were of another kind."""
    meta_train(sinusoid(iterations=4), out=tmp_path / "run")
    found = RunFolder.open(tmp_path / "run").load()
    gradient = {name: torch.ones_like(p) for name, p in found.theta.items()}
    ends = []
    for memory in (found.optimizer, {}):
        adam = Adam(found.theta, 1e-3, memory)
        adam.step(gradient)
        ends.append({name: p.detach() for name, p in adam.params.items()})
    assert not same(*ends)


@pytest.mark.slow
def test_a_run_that_ends_between_rows_can_be_extended(tmp_path: Path) -> None:
    """5 iterations, two a row: the last row is of one; then on to 7 without a word of warning."""
    meta_train(sinusoid(iterations=5), out=tmp_path / "run")
    resume(tmp_path / "run", iterations=7)
    assert [row["iteration"] for row in rows(tmp_path / "run")] == ["1", "3", "4", "5", "6"]
    assert same(load(tmp_path / "run").meta, meta_train(sinusoid(iterations=7)).meta)


@pytest.mark.slow
def test_ctrl_c_ends_with_the_row_and_resuming_gives_the_same_run(tmp_path: Path) -> None:
    """The signal comes in iteration 2 of 6; iterations 2 and 3 are finished and saved."""
    whole = meta_train(sinusoid())
    experiment = sinusoid()
    draw = SupervisedTrainer.draw

    def interrupted(self: SupervisedTrainer, iteration: int) -> Batch:
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedTrainer, "draw", interrupted)
        with pytest.raises(RunStopped, match="stopped after 4 of 6") as stopped:
            meta_train(experiment, out=tmp_path / "run")
    assert stopped.value.exit_code == 130
    assert same(resume(tmp_path / "run").meta, whole.meta)


@pytest.mark.slow
def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    """Convolutions: two chunks of one task, on one thread or two."""
    root = tmp_path / "set"
    ends = [meta_train(characters(root, threads=n)) for n in (1, 2)]
    assert same(ends[0].meta, ends[1].meta)
    assert not same(ends[0].meta, meta_train(characters(root, seed=1)).meta)


def test_chunks_follow_from_batch_and_network_alone() -> None:
    """All tasks of a small network, or on a GPU; else up to eight, and two chunks at least."""
    assert chunk_size(25, 1761, "cpu") == 25
    assert chunk_size(32, 112_000, "cuda") == 32
    assert [chunk_size(m, 112_000, "cpu") for m in (32, 16, 4, 3, 1)] == [8, 8, 2, 2, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"adaptation__first_order": True},
        {"adaptation__learned_step_sizes": True, "adaptation__inner_steps": 2},
        {"adaptation__multi_step_loss": True, "adaptation__inner_steps": 3},
        {"adaptation__adapted": "last-layer"},
        {"adaptation__inner_steps": 0},
        {"network__batch_norm": True, "adaptation__transductive": False},
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_recording_gives_the_same_bits(changed: dict[str, object]) -> None:
    """Of new numbers of the same shapes, and of other shapes."""
    fresh = new_network(sinusoid(**changed))
    recorded = Recorded(fresh.learner.terms)
    meta = {name: p + 0.1 for name, p in fresh.meta.items()}
    for number, tasks in enumerate((3, 3, 2)):
        batch = fresh.source.sample("train", tasks, np.random.default_rng(number))
        meta = {name: p * 1.1 for name, p in meta.items()}
        played, plain = recorded(meta, batch), fresh.learner.terms(meta, batch)
        assert same(played.gradient, plain.gradient)
        assert torch.equal(played.losses, plain.losses)
        assert torch.equal(played.scores, plain.scores)
    assert len(recorded._recordings) == 2


def test_the_best_checkpoint_is_that_of_the_validation_tasks(tmp_path: Path) -> None:
    """The lowest error after the inner step, whatever training's own error was."""
    meta_train(sinusoid(iterations=8, outer__learning_rate=0.3), out=tmp_path / "run")
    found = rows(tmp_path / "run")
    errors = [float(row["validation_error_1"]) for row in found]
    best = RunFolder.open(tmp_path / "run").load("best")
    assert best.state.best_return == -min(errors)
    assert best.state.iteration == 2 * (errors.index(min(errors)) + 1)
    assert best.state.best_iteration == best.state.iteration - 1
    assert min(errors) != errors[-1]
    (score,) = fresh_validation(sinusoid(), best.theta)
    assert score == min(errors)


def fresh_validation(experiment: SupervisedExperiment[Problem], theta: Params) -> list[float]:
    trainer = trainer_of(experiment)
    assert trainer.validation is not None
    scores, _ = trainer.learner.test(
        theta, trainer.validation, 1, trainer.chunks, transductive=True
    )
    trainer.close()
    return [float(scores[-1].mean())]


@pytest.mark.slow
def test_numbers_that_are_not_finite_change_nothing_and_end_the_run(tmp_path: Path) -> None:
    """A step size that makes the adapted network overflow: exit 3, with what to try."""
    experiment = sinusoid(adaptation__step_size=1e6, adaptation__inner_steps=9, max_refused=3)
    start = {name: p + 3.0 for name, p in new_network(experiment).meta.items()}
    trainer = SupervisedTrainer.build(
        dataclasses.replace(new_network(experiment), meta=start), FRESH, {}
    )
    first = trainer.step()
    assert (first["refused"], first["iteration"]) == (2, 1)
    assert same(trainer.theta, start)
    row = trainer.step()
    assert (row["refused"], row["iteration"], trainer.state.refused_in_a_row) == (1, 2, 3)
    assert same(trainer.theta, start)
    assert trainer.optimizer == {}
    assert math.isnan(float(row["loss"]))
    trainer.close()


@pytest.mark.slow
def test_refused_updates_end_a_run_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SupervisedTrainer, batch: Batch) -> MetaGradient:
        nothing = {name: torch.full_like(p, math.inf) for name, p in self.theta.items()}
        return MetaGradient(nothing, torch.ones(3), torch.ones(3))

    monkeypatch.setattr(SupervisedTrainer, "gradient", broken)
    with pytest.raises(RunStopped, match=r"smaller adaptation\.step_size \(now 0\.001\)") as stop:
        meta_train(sinusoid(max_refused=2), out=tmp_path / "run")
    assert stop.value.exit_code == 3
    monkeypatch.undo()
    # Tried anew, and from the parameters that nothing has changed.
    assert same(resume(tmp_path / "run").meta, learned_from(2))


def learned_from(iteration: int) -> Params:
    """What six iterations give of which the first two were refused."""
    experiment = sinusoid()
    state = dataclasses.replace(FRESH, iteration=iteration, env_steps=3 * iteration)
    trainer = SupervisedTrainer.build(new_network(experiment), state, {})
    while trainer.state.iteration < 6:
        trainer.step()
    trainer.close()
    return trainer.theta


def test_gradients_are_cut_number_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clip of .5: what Adam is given is between -.5 and .5, what is smaller stays."""
    trainer = trainer_of(sinusoid(outer__clip=0.5))
    given: list[Params] = []
    monkeypatch.setattr(trainer.adam, "step", given.append)
    gradient = {name: torch.full_like(p, 0.25) for name, p in trainer.theta.items()}
    gradient["0.bias"] = torch.linspace(-2.0, 2.0, 8)
    norm = trainer._update(MetaGradient(gradient, torch.ones(3), torch.ones(3)))
    expected = gradient | {"0.bias": gradient["0.bias"].clamp(-0.5, 0.5)}
    assert same(given[0], expected)
    total = sum(float(g.square().sum()) for g in gradient.values())
    assert norm == pytest.approx(math.sqrt(total))
    trainer.close()


def test_a_good_update_between_bad_ones_is_none_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second update is refused, of six, and two in a row would end the run."""
    good = SupervisedTrainer.gradient
    calls = iter(range(100))

    def sometimes(self: SupervisedTrainer, batch: Batch) -> MetaGradient:
        found = good(self, batch)
        bad = next(calls) % 2
        return found._replace(losses=found.losses * math.inf) if bad else found

    monkeypatch.setattr(SupervisedTrainer, "gradient", sometimes)
    seen: list[Row] = []
    meta_train(sinusoid(max_refused=2), watch=lambda row, total: seen.append(row))
    assert [row["refused"] for row in seen] == [1, 1, 1]
    assert {row["refused_because"] for row in seen} == {"loss or gradient not finite"}
    assert all(math.isfinite(float(row["loss"])) for row in seen)


def test_validation_tasks_are_the_same_for_every_seed(tmp_path: Path) -> None:
    """And are judged as training is set to: by the support's statistics, if so."""
    one, two = (trainer_of(sinusoid(seed=seed)) for seed in (0, 1))
    assert one.validation is not None
    assert two.validation is not None
    assert torch.equal(one.validation.query.inputs, two.validation.query.inputs)
    assert one.validation.query.inputs.shape[:2] == (5, 100)
    one.close()
    two.close()
    root = tmp_path / "set"
    less = {"adaptation__transductive": False, "adaptation__step_size": 0.4}
    trainer = trainer_of(characters(root, evaluation__validation_tasks=30, **less))
    row = trainer._validation()
    assert trainer.validation is not None
    expected, _ = trainer.learner.test(
        trainer.theta, trainer.validation, 1, trainer.chunks, transductive=False
    )
    other, _ = trainer.learner.test(
        trainer.theta, trainer.validation, 1, trainer.chunks, transductive=True
    )
    assert row["validation_accuracy_1"] == float(expected.mean(1)[-1])
    assert not torch.equal(expected, other)
    trainer.close()


def test_a_module_of_ones_own_is_never_recorded() -> None:
    """What it does may change from call to call: here it forgets its bias after the first."""

    class Fickle(nn.Linear):
        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(inputs)

    network = Fickle(1, 1)
    experiment = sinusoid()
    trainer = SupervisedTrainer.build(new_network(experiment, network=network), FRESH, {})
    trainer.step()
    first = Fickle.calls
    trainer.step()
    assert Fickle.calls >= 2 * first - 2
    assert not trainer.recorded._recordings
    trainer.close()


def test_a_run_short_of_memory_goes_on_with_as_few_tasks_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as if it had not been interrupted, though memory would suffice again."""
    terms = Learner.terms

    def small(self: Learner, meta: Params, batch: Batch) -> MetaGradient:
        if len(batch.support.inputs) > 1:
            raise torch.OutOfMemoryError("no memory")
        return terms(self, meta, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "terms", small)
        with pytest.warns(RunWarning, match="does not suffice"):
            whole = meta_train(sinusoid())
        with pytest.warns(RunWarning, match="does not suffice"):
            meta_train(sinusoid(iterations=4), out=tmp_path / "run")
    assert same(resume(tmp_path / "run", iterations=6).meta, whole.meta)
    assert RunFolder.open(tmp_path / "run").load().state.chunk_size == 1


@pytest.mark.slow
def test_another_length_of_rows_loses_none(tmp_path: Path) -> None:
    """Rows of two, and from iteration 4 on of three: no warning that some are lacking."""
    meta_train(sinusoid(iterations=4), out=tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("record_every: 2", "record_every: 3"))
    resume(tmp_path / "run", iterations=9)
    assert [row["iteration"] for row in rows(tmp_path / "run")] == ["1", "3", "5", "8"]


def test_where_memory_fails_fewer_tasks_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks do not fit, one does: the same gradient but for its last digits, and a word."""
    whole = meta_train(sinusoid())
    terms = Learner.terms

    def small(self: Learner, meta: Params, batch: Batch) -> MetaGradient:
        if len(batch.support.inputs) > 1:
            raise torch.OutOfMemoryError("no memory")
        return terms(self, meta, batch)

    monkeypatch.setattr(Learner, "terms", small)
    with pytest.warns(RunWarning, match="does not suffice for 3 tasks together"):
        parts = meta_train(sinusoid())
    for name, p in whole.meta.items():
        torch.testing.assert_close(parts.meta[name], p, rtol=1e-4, atol=1e-6)

    def none(self: Learner, meta: Params, batch: Batch) -> MetaGradient:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Learner, "terms", none)
    with (
        pytest.warns(RunWarning, match="does not suffice"),
        pytest.raises(RunStopped, match=r"for one task after 0 iterations: lower data\.query"),
    ):
        meta_train(sinusoid())


def test_a_damaged_memory_of_the_optimiser_is_noticed(tmp_path: Path) -> None:
    """A flipped bit in optimizer.safetensors: the checkpoint before is taken, or none is good."""
    meta_train(sinusoid(), out=tmp_path / "run")
    for kind in ("latest", "previous", "best"):
        file = tmp_path / "run" / "checkpoints" / kind / OPTIMIZER
        if file.is_file():
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{OPTIMIZER} does not match its sha256"):
        resume(tmp_path / "run")


def test_a_run_can_begin_with_anothers_parameters(tmp_path: Path) -> None:
    first = meta_train(sinusoid(), out=tmp_path / "first")
    second = meta_train(sinusoid(iterations=0), init=tmp_path / "first")
    assert same(first.meta, second.meta)
    with pytest.raises(InputError, match="another problem or network"):
        meta_train(sinusoid(network__layers=[5]), init=tmp_path / "first")


@pytest.mark.slow
def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    meta_train(sinusoid(), out=tmp_path / "run")
    with pytest.raises(InputError, match="has done 6 iterations"):
        resume(tmp_path / "run", iterations=5)
    with pytest.raises(InputError, match="exists and is not empty"):
        meta_train(sinusoid(), out=tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(
        text.replace("step_size: 0.001", "step_size: 0.5")
    )
    with pytest.warns(RunWarning, match=r"adaptation\.step_size 0\.001 -> 0\.5"):
        resume(tmp_path / "run", iterations=7)


def test_metrics_tell_everything(tmp_path: Path) -> None:
    """One row of the columns that the README names, in pictures too."""
    seen: list[Row] = []
    experiment = characters(tmp_path / "set", iterations=1)
    meta_train(experiment, watch=lambda row, total: seen.append(row))
    (row,) = seen
    assert list(row) == [
        *("iteration", "tasks", "loss", "accuracy", "gradient_norm", "refused", "refused_because"),
        *("validation_accuracy_0", "validation_accuracy_1"),
        *("seconds_sampling", "seconds_updating", "seconds_validating"),
    ]
    assert 0.0 <= float(row["validation_accuracy_1"]) <= 1.0
    assert float(row["gradient_norm"]) > 0.0


def test_without_validation_classes_training_itself_decides(tmp_path: Path) -> None:
    experiment = characters(tmp_path / "set", data__validation_classes=0)
    trainer = trainer_of(experiment)
    row = trainer.step()
    assert not [name for name in row if name.startswith("validation")]
    assert trainer.state.best_return == row["accuracy"]
    trainer.close()
