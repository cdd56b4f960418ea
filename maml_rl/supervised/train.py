"""Training in the supervised mode, from an experiment or with a network and tasks of one's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn

from maml_rl.adapt import Params
from maml_rl.checkpoints import FRESH, Checkpoint, State
from maml_rl.devices import Device
from maml_rl.errors import InputError
from maml_rl.loop import Watcher, run_iterations, state_to_go_on
from maml_rl.runs import RunFolder
from maml_rl.supervised.config import (
    OuterLoopSettings,
    SupervisedExperiment,
    origin_of,
)
from maml_rl.supervised.evaluate import check_tests
from maml_rl.supervised.learner import InnerLoopSettings
from maml_rl.supervised.memory import check_memory
from maml_rl.supervised.own import OwnTasks, TaskSampler
from maml_rl.supervised.tasks import Problem, silent
from maml_rl.supervised.trained import (
    LearnedNetwork,
    experiment_of,
    made_with,
    new_network,
    parameters_for,
    restore,
)
from maml_rl.supervised.trainer import ADAMS_MOMENTS, SupervisedTrainer


def meta_train(
    experiment: SupervisedExperiment[Problem],
    *,
    out: str | Path | None = None,
    init: str | Path | None = None,
    network: nn.Module | None = None,
    tasks: TaskSampler | None = None,
    watch: Watcher | None = None,
    say: Callable[[str], None] = silent,
) -> LearnedNetwork:
    """Train a supervised experiment.

    Args:
        experiment: all settings.
        out: a new run folder; None writes nothing.
        init: a run whose parameters to start from.
        network: a module of your own (S, ...) -> (S, Y), in place of the experiment's network.
        tasks: a function of your own that draws tasks, in place of the experiment's data.
        watch: is told of every row of metrics.
        say: is told what is about to be trained, and what takes time before.

    Returns:
        The network after the last iteration.

    Raises:
        InputError: if device, data, `out` or `init` cannot be used.
        RunStopped: if the run ended early; what was done is in `out`.
    """
    if network is None:
        check_memory(experiment)
    fresh = new_network(experiment, network=network, tasks=tasks, say=say)
    check_tests(fresh)
    say(describe(experiment))
    begun_from = None
    if init is not None:
        fresh = replace(fresh, meta=parameters_for(RunFolder.open(Path(init)).load(), fresh))
        begun_from = Path(init).resolve().name
    folder = None
    if out is not None:
        folder = RunFolder.create(
            Path(out), origin_of(experiment), fresh.meta, init=begun_from, remembered=ADAMS_MOMENTS
        )
    return _finish(fresh, FRESH, {}, folder, watch)


def meta_learn(
    network: nn.Module,
    tasks: TaskSampler,
    *,
    iterations: int,
    classes: int | None = None,
    adaptation: InnerLoopSettings | None = None,
    outer: OuterLoopSettings | None = None,
    seed: int = 0,
    device: Device = "cpu",
    record_every: int = 100,
    name: str = OwnTasks.name,
    out: str | Path | None = None,
    watch: Watcher | None = None,
) -> LearnedNetwork:
    """Meta-learn a module of your own on tasks of your own.

    Args:
        network: maps inputs (S, ...) to outputs (S, Y): values, or a score for each class. Left
            as it is; training begins with its parameters.
        tasks: draws M tasks with a generator of random numbers, as two pairs of arrays, support
            and query: inputs (M, S, ...) and targets, which are (M, S) whole numbers for classes
            or (M, S, Y) values to regress to.
        iterations: outer updates.
        classes: how many there are, if not as many as the first tasks' numbers say.
        adaptation: the inner loop; by default one step of size .01.
        outer: the outer loop; by default 25 tasks and Adam with a learning rate of .001.
        seed: of everything random, the module's own parameters aside.
        device: where the network is.
        record_every: iterations that a row of metrics stands for.
        name: of the run, for config.yaml.
        out: a new run folder; None writes nothing.
        watch: is told of every row of metrics.

    Returns:
        The network after the last iteration.

    Raises:
        InputError: if network, tasks or a setting cannot be used.
        RunStopped: if the run ended early; what was done is in `out`.
    """
    experiment = SupervisedExperiment[Problem](
        name=name,
        data=OwnTasks.of(tasks, classes),
        iterations=iterations,
        record_every=record_every,
        seed=seed,
        device=device,
        adaptation=adaptation or InnerLoopSettings(),
        outer=outer or OuterLoopSettings(),
    )
    return meta_train(experiment, out=out, network=network, tasks=tasks, watch=watch)


def resume(
    run: str | Path,
    *,
    iterations: int | None = None,
    root: str | None = None,
    device: Device | None = None,
    network: nn.Module | None = None,
    tasks: TaskSampler | None = None,
    watch: Watcher | None = None,
    say: Callable[[str], None] = silent,
) -> LearnedNetwork:
    """Go on with a run from its last checkpoint, or extend a finished one.

    Args:
        run: the run folder.
        iterations: a new total.
        root: where its images are now, if not where they were.
        device: where to go on, if not where it was.
        network: the module that it was trained with, where that was your own.
        tasks: the function that draws its tasks, where that was your own.
        watch: is told of every row of metrics.
        say: is told what takes time before.

    Raises:
        InputError: if the folder is no supervised run, or holds no checkpoint.
        RunStopped: if the run ended early again.
    """
    folder = RunFolder.open(Path(run))
    folder.lock()
    try:
        if not folder.config.is_file():
            folder.restore_config()
        own = experiment_of(folder, root)
        experiment = replace(own, device=device or own.device)
        if network is None:
            check_memory(experiment)
        learned, found = restore(folder, experiment, network=network, tasks=tasks, say=say)
        state = state_to_go_on(
            found.state, max_refused=experiment.max_refused, iterations=iterations, run=run
        )
        if iterations is not None:
            experiment = replace(experiment, iterations=iterations)
        learned = replace(learned, experiment=experiment)
        folder.go_on_from(found, origin_of(experiment), every=row_length(found, experiment))
    except BaseException:
        folder.close()
        raise
    return _finish(learned, state, found.optimizer, folder, watch)


def row_length(found: Checkpoint, experiment: SupervisedExperiment[Problem]) -> int | None:
    """Return how many iterations a row of metrics sums up, None where that has changed."""
    try:
        before = made_with(found).record_every
    except InputError:
        return None
    return before if before == experiment.record_every else None


def describe(experiment: SupervisedExperiment[Problem]) -> str:
    """Return in a sentence what is about to be trained."""
    problem, inner = experiment.data, experiment.adaptation
    shots = f"{problem.shots} shot{'s' * (problem.shots > 1)}"
    kind = f"{problem.outputs} ways, {shots}" if problem.classifies else shots
    steps = f"{inner.inner_steps} gradient step{'s' * (inner.inner_steps > 1)} to each"
    return (
        f"Training {problem.name} ({kind}): {experiment.iterations} iterations of "
        f"{experiment.outer.tasks} tasks, {steps if inner.inner_steps else 'without adaptation'}."
    )


def _finish(
    learned: LearnedNetwork,
    state: State,
    memory: Params,
    folder: RunFolder | None,
    watch: Watcher | None,
) -> LearnedNetwork:
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder)
        trainer = SupervisedTrainer.build(learned, state, memory)
        stack.callback(trainer.close)
        run_iterations(trainer, folder, watch)
        return replace(learned, meta=trainer.theta)
