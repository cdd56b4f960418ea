"""Training: deterministic, resumable, and never past a number that is none."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import maml_rl
from envs.family import TaskFamily
from maml_rl.adapt import Params, flatten
from maml_rl.assess import evaluate_policy, load_subjects
from maml_rl.checkpoints import FRESH, State, read_checkpoint, write_checkpoint
from maml_rl.cli_evaluate import with_first_step_size
from maml_rl.config import Experiment, load_experiment, to_yaml
from maml_rl.errors import InputError, RunStopped, RunWarning
from maml_rl.maml import MetaObjective, chunk_size
from maml_rl.runs import Row, RunFolder
from maml_rl.train import Trainer, meta_train, resume
from maml_rl.trained import TrainedPolicy
from maml_rl.trust_region import Refusal
from tests.conftest import rows
from tests.tiny import SETTINGS


def same(a: Params, b: Params) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", ["navigation", "half_cheetah_dir", "ant_vel"])
def test_the_same_seed_gives_the_same_parameters_bit_for_bit(name: str) -> None:
    """At any number of threads, and whatever number of tasks is simulated at once."""
    experiment = load_experiment(name, **SETTINGS)
    first = meta_train(experiment).params
    assert same(first, meta_train(replace(experiment, threads=1)).params)
    split = replace(experiment, sampling=replace(experiment.sampling, tasks_at_once=3))
    assert same(first, meta_train(split).params)
    assert not same(first, meta_train(replace(experiment, seed=1)).params)


@pytest.mark.parametrize(("tasks", "size"), [(40, 4), (6, 3), (10, 2), (7, 1), (1, 1)])
def test_chunks_divide_the_tasks_evenly(tasks: int, size: int) -> None:
    """On a CPU the largest of 4, 3, 2, 1 that divides them; on a GPU all at once."""
    assert chunk_size(tasks, "cpu") == size
    assert chunk_size(tasks, "cpu", 10**15) == size
    assert chunk_size(tasks, "cuda") == tasks


@pytest.mark.parametrize(
    ("task_bytes", "size"), [(1, 40), (20, 40), (21, 20), (41, 14), (799, 1), (10**9, 1)]
)
def test_on_a_gpu_chunks_fit_in_its_free_memory(
    task_bytes: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 tasks in four fifths of 1000 bytes, in chunks as alike as can be."""
    monkeypatch.setattr("maml_rl.maml.free_bytes", lambda device: 1000)
    assert chunk_size(40, "cuda", task_bytes) == size


def test_parameters_change_and_metrics_add_up(tmp_path: Path) -> None:
    """One row an iteration, env steps = M K H a phase, columns of DESIGN's table, KL bounded."""
    experiment = load_experiment("half_cheetah_vel", **SETTINGS)
    policy = meta_train(experiment, out=tmp_path / "run")
    assert not same(policy.params, maml_rl.new_policy(experiment).params)
    table = rows(tmp_path / "run")
    assert [r["iteration"] for r in table] == ["0", "1", "2"]
    assert [int(r["env_steps"]) for r in table] == [144 * n for n in (1, 2, 3)]
    assert list(table[0]) == [
        *("iteration", "env_steps", "return_0", "return_0_sd", "return_1", "return_1_sd"),
        *("surrogate_before", "surrogate_after", "kl", "accepted", "refused_because"),
        *("backtracks", "cg_residual", "entropy"),
        *("explained_variance_0", "explained_variance_1", "diverged_worlds"),
    ]
    assert "1" in {row["accepted"] for row in table}
    for row in table:
        assert float(row["kl"]) <= experiment.trust_region.max_kl
        fell = float(row["surrogate_after"]) < float(row["surrogate_before"])
        assert fell == (row["accepted"] == "1")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_best_holds_the_parameters_that_earned_the_best_return(tmp_path: Path) -> None:
    """After one iteration that is the initial theta, which sampled the batch, not the updated."""
    experiment = load_experiment("navigation", **{**SETTINGS, "iterations": 1})
    trained = meta_train(experiment, out=tmp_path / "run")
    best = maml_rl.load(tmp_path / "run", checkpoint="best")
    assert same(best.params, maml_rl.new_policy(experiment).params)
    assert not same(best.params, trained.params)


def test_a_run_is_never_shortened(tmp_path: Path) -> None:
    """resume refuses a total below what is done, and leaves the folder as it was."""
    experiment = load_experiment("navigation", **{**SETTINGS, "iterations": 2})
    meta_train(experiment, out=tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(InputError, match="has done 2 iterations"):
        resume(tmp_path / "run", iterations=1)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: exit code 3 and a sentence."""
    experiment = load_experiment("navigation", **SETTINGS)
    good = RunFolder.save

    def full(
        self: RunFolder,
        theta: Params,
        state: State,
        *,
        best: tuple[Params, State, Params] | None,
        optimizer: Params | None = None,
    ) -> None:
        if state.iteration == 2:
            raise OSError(28, "No space left on device")
        good(self, theta, state, best=best, optimizer=optimizer)

    monkeypatch.setattr(RunFolder, "save", full)
    with pytest.raises(RunStopped, match="No space left") as stopped:
        meta_train(experiment, out=tmp_path / "run")
    assert stopped.value.exit_code == 3
    assert RunFolder.open(tmp_path / "run").load().state.iteration == 1


@pytest.mark.parametrize("inner_steps", [0, 2])
def test_any_number_of_inner_steps(inner_steps: int, tmp_path: Path) -> None:
    """0 is plain TRPO with one batch an iteration; 2 samples three."""
    experiment = load_experiment("navigation", **SETTINGS, adaptation__inner_steps=inner_steps)
    policy = meta_train(experiment, out=tmp_path / "run")
    names = [n for n in rows(tmp_path / "run")[0] if n.startswith("return_")]
    assert len(names) == 2 * (inner_steps + 1)
    assert len(evaluate_policy(policy).returns) == 2


def test_a_resumed_run_equals_one_never_interrupted(tmp_path: Path) -> None:
    """Stopped after 1 of 3 iterations and resumed: same parameters, same rows."""
    experiment = load_experiment("navigation", **SETTINGS)
    whole = meta_train(experiment, out=tmp_path / "whole")
    meta_train(replace(experiment, iterations=1), out=tmp_path / "parts")
    parts = resume(tmp_path / "parts", iterations=3)
    assert same(whole.params, parts.params)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert load_experiment(tmp_path / "parts" / "config.yaml").iterations == 3


def scheduled_and_by_hand(
    path: Path, later: Mapping[str, object], now: Mapping[str, object], told: str
) -> tuple[TrainedPolicy, TrainedPolicy, TrainedPolicy]:
    """Check that a run with a schedule is the run whose config was changed by hand meanwhile.

    Args:
        path: for `whole`, the run with settings `later` of iteration 2, and `changed`.
        later: the schedule.
        now: what is written into the config of `changed` after two iterations.
        told: what the warning says of it.

    Returns:
        The policies of the whole run, of the other one before the change, and at its end.
    """
    experiment = load_experiment("navigation", **{**SETTINGS, **later, "iterations": 4})
    whole = meta_train(experiment, out=path / "whole")
    plain = {**SETTINGS, "iterations": 2}
    run = path / "changed"
    early = meta_train(load_experiment("navigation", **plain), out=run)
    (run / "config.yaml").write_text(to_yaml(load_experiment("navigation", **{**plain, **now})))
    with pytest.warns(RunWarning, match=re.escape(told)):
        changed = resume(run, iterations=4)
    assert same(whole.params, changed.params)
    assert rows(path / "whole") == rows(run)
    return whole, early, changed


def test_alpha_is_what_its_iteration_says(tmp_path: Path) -> None:
    """In training as in a run whose config was changed by hand; in tests as in the next batch."""
    whole, early, changed = scheduled_and_by_hand(
        tmp_path,
        {"adaptation__later_from": [2], "adaptation__later_step_sizes": [0.1]},
        {"adaptation__step_size": 0.1},
        "adaptation.step_size 0.5 -> 0.1",
    )
    experiment, plain = whole.experiment, early.experiment
    first = resume(tmp_path / "whole")
    assert [p.adaptation.step_size for p in (whole, first, early)] == [0.1, 0.1, 0.5]
    (loaded,) = load_subjects([tmp_path / "whole"])
    assert loaded.alpha == 0.1
    assert loaded.trained.experiment == experiment
    by_hand = evaluate_policy(changed).returns
    for policy in (whole, loaded.trained):
        assert all(map(np.array_equal, evaluate_policy(policy).returns, by_hand))
    told = evaluate_policy(whole, step_size=0.5).returns
    changed_back = replace(changed, experiment=plain)
    assert all(map(np.array_equal, told, evaluate_policy(changed_back).returns))
    assert not np.array_equal(told[1], by_hand[1])
    (rendered,) = with_first_step_size([loaded], [0.2])
    assert rendered.alpha == 0.2
    adapted = [p.adapt(experiment.family, [0.1, 0.2]).params for p in (whole, changed)]
    assert same(*adapted)


def test_alpha_that_goes_with_the_noise_is_that_of_a_schedule_made_of_it(tmp_path: Path) -> None:
    """Bit for bit: metrics.csv tells it, and the policy adapts by the noise that it has now."""
    plain = {**SETTINGS, "iterations": 3, "policy__initial_log_std": -0.2}
    changed = {"adaptation__times_variance": True, "adaptation__step_size": 0.3}
    whole = meta_train(load_experiment("navigation", **plain, **changed), out=tmp_path / "run")
    told = rows(tmp_path / "run")
    sizes = [float(row["step_size"]) for row in told]
    for row, size in zip(told, sizes, strict=True):
        log_std = float(row["entropy"]) / 2 - math.log(2 * math.pi * math.e) / 2
        assert size == pytest.approx(0.3 * math.exp(2 * log_std), rel=1e-5)
    assert len(set(sizes)) == 3
    schedule = {
        "adaptation__step_size": sizes[0],
        "adaptation__later_from": [1, 2],
        "adaptation__later_step_sizes": sizes[1:],
    }
    by_hand = load_experiment("navigation", **plain, **schedule)
    assert same(whole.params, meta_train(by_hand, out=tmp_path / "by_hand").params)
    assert "step_size" not in rows(tmp_path / "by_hand")[0]
    now = 0.3 * math.exp(2 * float(whole.params["log_std"].mean()))
    (loaded,) = load_subjects([tmp_path / "run"])
    assert loaded.alpha == whole.adaptation.step_size == pytest.approx(now)
    found, expected = (
        evaluate_policy(policy).returns
        for policy in (loaded.trained, replace(whole, experiment=by_hand_at(by_hand, now)))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A further step has the same alpha, though the first changed the noise.
    adapted = whole.adapt(whole.experiment.family, [0.1, 0.2])
    assert not torch.equal(adapted.params["log_std"], whole.params["log_std"])
    assert adapted.adaptation == whole.adaptation


def by_hand_at(experiment: Experiment[TaskFamily], alpha: float) -> Experiment[TaskFamily]:
    return replace(experiment, adaptation=experiment.adaptation.with_alpha(alpha))


HEAVY = {**SETTINGS, "trust_region__momentum": 0.9, "iterations": 4}


def test_momentum_is_carried_on_by_a_resumed_run(tmp_path: Path) -> None:
    """From the newest checkpoint and from the best alike: the bits of a run never interrupted."""
    experiment = load_experiment("navigation", **HEAVY)
    whole = meta_train(experiment, out=tmp_path / "whole")
    plain = load_experiment("navigation", **{**HEAVY, "trust_region__momentum": 0.0})
    assert not same(whole.params, meta_train(plain).params)
    meta_train(replace(experiment, iterations=2), out=tmp_path / "parts")
    assert same(whole.params, resume(tmp_path / "parts", iterations=4).params)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    checkpoints = tmp_path / "whole" / "checkpoints"
    best = read_checkpoint(checkpoints / "best").state.best_iteration
    assert 0 < best < 3, "the seed's best batch has to lie where something is carried on"
    shutil.rmtree(checkpoints / "latest")
    shutil.rmtree(checkpoints / "previous")
    with pytest.warns(RunWarning, match="'best'"):
        again = resume(tmp_path / "whole")
    assert same(whole.params, again.params)


def test_a_direction_of_other_parameters_is_not_carried_on(tmp_path: Path) -> None:
    """Nor one that is not finite, nor what another optimiser remembers."""
    experiment = load_experiment("navigation", **{**HEAVY, "iterations": 1})
    size = flatten(meta_train(experiment, out=tmp_path / "run").params).numel()
    found = RunFolder.open(tmp_path / "run").load()
    latest = tmp_path / "run" / "checkpoints" / "latest"
    for wrong in (
        {"direction": torch.zeros(size + 1)},
        {"direction": torch.full((size,), torch.nan)},
        {"moment": torch.zeros(size)},
    ):
        write_checkpoint(latest, found.theta, found.state, found.origin, wrong)
        with pytest.raises(InputError, match=f"no step of its {size} parameters"):
            resume(tmp_path / "run", iterations=2)
    write_checkpoint(latest, found.theta, found.state, found.origin, {})
    resume(tmp_path / "run", iterations=2)


def test_where_momentum_may_be_why_the_surrogate_rises_it_is_named(tmp_path: Path) -> None:
    """And only there: a run without momentum has none to lower."""
    for momentum, named in ((0.9, True), (0.0, False)):
        experiment = load_experiment("navigation", **{**HEAVY, "trust_region__momentum": momentum})
        policy = maml_rl.new_policy(experiment)
        trainer = Trainer.build(experiment, policy.policy, policy.params, FRESH)
        row: Row = {"iteration": 0, "refused_because": str(Refusal.DID_NOT_FALL)}
        advice = trainer.advice(row)
        assert ("trust_region.momentum (now 0.9)" in advice) == named
        other: Row = {"iteration": 0, "refused_because": str(Refusal.KL_TOO_LARGE)}
        assert "momentum" not in trainer.advice(other)
        trainer.close()


@pytest.mark.parametrize(
    ("later", "reason", "setting", "values"),
    [
        (
            {"adaptation__later_from": [2], "adaptation__later_step_sizes": [0.1]},
            Refusal.LOSS_NOT_FINITE,
            "adaptation.step_size",
            ("0.5", "0.1"),
        ),
        (
            {"trust_region__later_from": [2], "trust_region__later_max_kls": [0.001]},
            Refusal.DID_NOT_FALL,
            "trust_region.max_kl",
            ("0.01", "0.001"),
        ),
    ],
)
def test_what_advice_names_is_the_iterations(
    later: dict[str, object], reason: Refusal, setting: str, values: Sequence[str]
) -> None:
    experiment = load_experiment("navigation", **{**SETTINGS, **later})
    policy = maml_rl.new_policy(experiment)
    trainer = Trainer.build(experiment, policy.policy, policy.params, FRESH)
    for iteration, value in zip((1, 2), values, strict=True):
        row: Row = {"iteration": iteration, "refused_because": str(reason)}
        assert f"{setting} (now {value})" in trainer.advice(row)
    trainer.close()


def test_the_trust_region_is_what_its_iteration_says(tmp_path: Path) -> None:
    scheduled_and_by_hand(
        tmp_path,
        {"trust_region__later_from": [2], "trust_region__later_max_kls": [0.001]},
        {"trust_region__max_kl": 0.001},
        "trust_region.max_kl 0.01 -> 0.001",
    )


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_products_are_of_as_many_tasks_as_the_settings_say(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twelve tasks, three chunks, one chunk in each product of conjugate gradient; and once all,
    for the step's length."""
    asked = list[int]()

    def counted(name: str) -> None:
        true = getattr(MetaObjective, name)

        def terms(self: MetaObjective, vector: Tensor) -> Tensor:
            found: Tensor = true(self, vector)
            asked.append(int((found != 0).any(1).sum()))
            return found

        monkeypatch.setattr(MetaObjective, name, terms)

    counted("metric_terms")
    counted("product_terms")
    sizes = {**SETTINGS, "sampling__tasks": 12, "iterations": 1}
    meta_train(
        load_experiment(
            "navigation",
            **sizes,
            trust_region__metric_share=share,
            trust_region__cg_iterations=3,
        )
    )
    assert asked == ([12] * 3 if share == 1 else [4] * 3 + [12])


def test_a_run_starts_from_another_ones_parameters(tmp_path: Path) -> None:
    """--init takes parameters and refuses those of another shape, both shapes in the message."""
    experiment = load_experiment("navigation", **SETTINGS)
    first = meta_train(experiment, out=tmp_path / "first")
    second = meta_train(replace(experiment, iterations=0), init=tmp_path / "first")
    assert same(first.params, second.params)
    other = load_experiment("half_cheetah_dir", **SETTINGS)
    with pytest.raises(
        InputError, match=r"(?s)navigation.*\(2, 8\).*expected.*half_cheetah_dir.*\(20, 8\)"
    ):
        meta_train(other, out=tmp_path / "other", init=tmp_path / "first")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_saving(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """The running iteration is finished and saved; the old handlers are back afterwards."""
    before = signal.getsignal(number)

    def interrupt(row: Row, total: int) -> None:
        if row["iteration"] == 0:
            # Falls into the middle of the second iteration or at its latest just after it.
            threading.Timer(0.02, os.kill, (os.getpid(), number)).start()

    experiment = load_experiment("navigation", **{**SETTINGS, "iterations": 400})
    with pytest.raises(RunStopped, match=r"after \d+ of 400 iterations") as stopped:
        meta_train(experiment, out=tmp_path / "run", watch=interrupt)
    assert stopped.value.exit_code == code
    done = RunFolder.open(tmp_path / "run").load().state.iteration
    assert 1 <= done < 400
    assert len(rows(tmp_path / "run")) == done
    assert signal.getsignal(number) is before


def test_not_even_a_second_signal_interrupts_what_is_written(tmp_path: Path) -> None:
    """Two at once while an iteration is being recorded and shown: that is finished first."""
    finished = []

    def watch(row: Row, total: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        finished.append(row["iteration"])

    experiment = load_experiment("navigation", **SETTINGS)
    with pytest.raises(RunStopped, match="after 1 of 3 iterations"):
        meta_train(experiment, out=tmp_path / "run", watch=watch)
    assert finished == [0]
    assert RunFolder.open(tmp_path / "run").load().state.iteration == 1


class Broken(nn.Module):
    """A mean that turns to NaN for observations that have moved."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x / (x.abs().sum(-1, keepdim=True) * 0.0)


def test_an_action_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    """Exit code 3, with task, iteration and seed in the message; the last good state is saved."""
    experiment = load_experiment("navigation", **SETTINGS, seed=9)
    with pytest.raises(RunStopped, match=r"iteration 0, run seed 9.*task 0 \(seed \d+\)") as caught:
        meta_train(experiment, out=tmp_path / "run", mean=Broken())
    assert caught.value.exit_code == 3
    assert RunFolder.open(tmp_path / "run").load().state.iteration == 0


@pytest.mark.slow
def test_navigation_is_learned_in_seconds() -> None:
    """After 30 small iterations one step gains at least 10, where the new policy gains less."""
    experiment = load_experiment(
        "navigation",
        iterations=30,
        sampling__tasks=15,
        sampling__episodes=10,
        policy__layers=[32, 32],
        trust_region__max_kl=0.03,
        evaluation__tasks=20,
        evaluation__episodes=20,
    )
    before = evaluate_policy(maml_rl.new_policy(experiment)).returns.mean(1)
    after = evaluate_policy(meta_train(experiment)).returns.mean(1)
    assert after[1] > before[1] + 10.0
    assert after[1] > after[0] + 10.0


def test_a_chunk_that_fitted_elsewhere_says_nothing_of_here(tmp_path: Path) -> None:
    """Where memory once did not suffice on one device, another begins anew."""
    experiment = load_experiment("navigation", **SETTINGS)
    meta_train(experiment, out=tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    found = folder.load()
    with folder:
        folder.lock()
        folder.go_on_from(found, found.origin)
        halved = replace(found.state, chunk_size=1)
        folder.save(found.theta, halved, best=None, optimizer={})
    resume(tmp_path / "run", iterations=4)
    assert RunFolder.open(tmp_path / "run").load().state.chunk_size == 1
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("device: cpu", "device: cuda"))
    resume(tmp_path / "run", iterations=5, device="cpu")
    assert RunFolder.open(tmp_path / "run").load().state.chunk_size == 0
