"""Test the policies of runs: what each is called, what it is tested on, and what it reaches."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from envs.family import TaskFamily
from maml_rl.adapt import Params
from maml_rl.comparison import MAML, ORACLE, PRETRAINED, RANDOM, Method, Outcome
from maml_rl.config import Experiment, as_tree
from maml_rl.devices import Device, Physics
from maml_rl.episodes import Episodes
from maml_rl.errors import InputError, RunStopped, RunWarning
from maml_rl.evaluate import ALL, Evaluation, EvaluationSettings, evaluate
from maml_rl.maml import AdaptationSettings
from maml_rl.memory import check_memory, memory_to_sample
from maml_rl.plain_yaml import leaves
from maml_rl.rollout import SamplingError
from maml_rl.runs import RunFolder
from maml_rl.task_sets import Tasks, TaskSet
from maml_rl.trained import TrainedPolicy, experiment_of, placed, restore

NOT_OF_THE_METHOD = re.compile(
    r"seed|name|device|physics|warp\..*|threads|sampling\.tasks_at_once|evaluation\..*"
)
"""Settings that may differ between runs of one method: they change no expected return."""


class BrokenDown(RunStopped):
    """A test could not go on: an adapted policy's action was no number."""


def method_of(experiment: Experiment[TaskFamily], iterations: int) -> Method:
    """Return what a policy is called that was trained so for so many iterations."""
    if iterations == 0:
        return RANDOM
    if experiment.adaptation.inner_steps:
        return MAML
    return ORACLE if experiment.policy.observe_task else PRETRAINED


@dataclass(frozen=True)
class Subject:
    """A policy to be tested, and what it is called."""

    trained: TrainedPolicy
    method: Method
    path: Path
    """Its run folder."""
    iterations: int
    """Done when its checkpoint was saved."""
    env_steps: int
    """Control steps sampled by then."""
    variant: str = ""

    @property
    def seed(self) -> int:
        """Of its training."""
        return self.trained.experiment.seed

    @property
    def alpha(self) -> float:
        """Its own step size."""
        return self.trained.adaptation.step_size

    @property
    def family(self) -> TaskFamily:
        """What it was trained on."""
        return self.trained.experiment.family


def load_subject(
    run: Path,
    checkpoint: str = "latest",
    device: Device | None = None,
    physics: Physics | None = None,
) -> Subject:
    """Load a run's policy to be tested, on a device and with physics of choice; see `load`.

    Raises:
        InputError: if the folder is no run, its checkpoint is missing or damaged, or device or
            physics is not here.
    """
    folder = RunFolder.open(run)
    experiment = placed(experiment_of(folder), device, physics)
    trained, found = restore(folder, experiment, checkpoint)
    done = found.state.iteration
    method = method_of(trained.experiment, done)
    return Subject(trained, method, run, done, found.state.env_steps)


def load_subjects(
    runs: Sequence[Path],
    checkpoint: str = "latest",
    device: Device | None = None,
    physics: Physics | None = None,
) -> list[Subject]:
    """Load runs to be tested side by side, told apart where one method has several settings.

    Raises:
        InputError: if one cannot be loaded, two are the same, or their returns mean different
            things.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("a run is given twice")
    subjects = [load_subject(run, checkpoint, device, physics) for run in runs]
    first = subjects[0]
    for other in subjects[1:]:
        if not first.family.comparable(other.family):
            raise InputError(
                "returns of different families or settings of one cannot be compared: "
                f"{first.path} is {words_for(first.family, other.family)}, "
                f"{other.path} is {words_for(other.family, first.family)}; evaluate them one by one"
            )
    return told_apart(subjects)


def words_for(family: TaskFamily, other: TaskFamily) -> str:
    """Return a family's name, with the fields in which it differs from another."""
    if type(family) is not type(other):
        return family.name
    differing = [
        f"{item.name} {getattr(family, item.name)}"
        for item in fields(family)
        if item.name not in family.training_fields
        and getattr(family, item.name) != getattr(other, item.name)
    ]
    return f"{family.name} with {', '.join(differing)}"


def told_apart(subjects: Sequence[Subject]) -> list[Subject]:
    """Return subjects, each with its folder's name as variant where a method has several settings.

    Runs of the same settings and iterations and different seeds are one variant, named after the
    first.
    """
    kinds: list[tuple[object, ...]] = []
    for s in subjects:
        tree = leaves(as_tree(s.trained.experiment))
        settings = [(k, str(v)) for k, v in tree if not NOT_OF_THE_METHOD.fullmatch(k)]
        seen = [k for k, other in zip(kinds, subjects, strict=False) if other.seed == s.seed]
        kind: tuple[object, ...] = (s.method, s.iterations, *settings)
        # The same seed again is no further seed, but a run of its own.
        kinds.append((*kind, sum(k[: len(kind)] == kind for k in seen)))
    names: dict[tuple[object, ...], str] = {}
    for s, kind in zip(subjects, kinds, strict=True):
        names.setdefault(kind, re.sub(r"-seed\d+$", "", s.path.name))
    result = []
    for s, kind in zip(subjects, kinds, strict=True):
        rivals = [name for other, name in names.items() if other[0] == s.method]
        clear = names[kind] if rivals.count(names[kind]) == 1 else str(s.path)
        result.append(replace(s, variant=clear if len(rivals) > 1 else ""))
    return result


def evaluate_policy(
    trained: TrainedPolicy,
    *,
    tasks: TaskSet | None = None,
    step_size: float | None = None,
    part: slice = ALL,
    see: Callable[[Params, Episodes], object] = lambda _, __: None,
) -> Evaluation:
    """Test a policy by its experiment's evaluation settings.

    Args:
        trained: the policy.
        tasks: to use in place of the test tasks.
        step_size: of the first update, in place of alpha.
        part: those of the tasks to test, whose figures are as if all had been.
        see: is given parameters (T, ...) and episodes of each step.

    Raises:
        InputError: for a step size out of its range.
        BrokenDown: if an adapted policy's action is not finite.
        RunStopped: if memory does not suffice.
    """
    experiment = trained.experiment
    settings, adaptation = experiment.evaluation, trained.adaptation
    if tasks is not None:
        settings = replace(settings, tasks=len(tasks.tasks))
    kept = replace(settings, tasks=len(range(settings.tasks)[part]))
    experiment = replace(experiment, evaluation=kept)
    if step_size is not None:
        adaptation = with_step_size(adaptation, step_size)
    check_memory(experiment, "evaluation")
    try:
        with memory_to_sample(experiment, "evaluation"):
            return evaluate(
                trained.policy,
                trained.params,
                experiment.family,
                settings=settings,
                adaptation=adaptation,
                advantages=experiment.advantages,
                action_scale=experiment.policy.action_scale,
                threads=experiment.threads,
                tasks_at_once=experiment.sampling.tasks_at_once,
                physics=experiment.physics,
                warp=experiment.warp,
                tasks=tasks,
                part=part,
                see=see,
            )
    except SamplingError as error:
        raise BrokenDown(f"the test was stopped: {error}", 3) from error


@dataclass(frozen=True)
class Trial:
    """A test that is to be done."""

    trained: TrainedPolicy
    tasks: TaskSet
    step_size: float | None = None
    """Of the first update; None is alpha."""


Tester = Callable[[Sequence[Trial]], Iterable[Evaluation | BrokenDown]]
"""Does tests, and gives what each came to, in order, each as soon as it can."""


def trials_here(trials: Sequence[Trial]) -> Iterator[Evaluation | BrokenDown]:
    """Do tests in this process; see `Tester` and `evaluate_policy`."""
    for trial in trials:
        try:
            yield evaluate_policy(trial.trained, tasks=trial.tasks, step_size=trial.step_size)
        except BrokenDown as error:
            yield error


def with_step_size(adaptation: AdaptationSettings, size: float) -> AdaptationSettings:
    """Return settings of the inner step with another alpha, in every iteration.

    Raises:
        InputError: if it is out of its range.
    """
    try:
        return adaptation.with_alpha(size)
    except ValueError as error:
        raise InputError(str(error)) from error


def under_settings(
    subjects: Sequence[Subject], settings: EvaluationSettings, *, oracle_steps: int = 0
) -> list[Subject]:
    """Return policies to be tested all by the same settings.

    An oracle knows its task, and has nothing to learn of it: it takes no step unless told to.
    """
    result = []
    for subject in subjects:
        own = replace(settings, steps=oracle_steps) if subject.method == ORACLE else settings
        experiment = replace(subject.trained.experiment, evaluation=own)
        result.append(replace(subject, trained=replace(subject.trained, experiment=experiment)))
    return result


def common_alpha(runs: Sequence[Subject]) -> float:
    """Return the alpha that runs of one method are tested with: theirs.

    Where it goes with each run's noise, their mean.
    """
    alphas = [run.alpha for run in runs]
    return alphas[0] if len(set(alphas)) == 1 else sum(alphas) / len(alphas)


def outcomes_of(
    subjects: Sequence[Subject],
    tasks: TaskSet,
    sizes: Mapping[Method, Sequence[float]],
    tester: Tester = trials_here,
) -> list[Outcome]:
    """Test policies on the same tasks, with the same episodes' randomness for each.

    Where a step size breaks a method's policies a RunWarning tells it, and it is left out.

    Args:
        subjects: whose policies.
        tasks: which every one of them meets.
        sizes: step sizes of the first update to be tried, by method; alpha where there are none.
        tester: does the tests.

    Raises:
        InputError: for a step size out of its range, or given twice.
        RunStopped: if no test can be done.
    """
    for method, given in sizes.items():
        for one in given:
            with_step_size(subjects[0].trained.experiment.adaptation, one)
            if given.count(one) > 1:
                raise InputError(f"step size {one:g} is given twice for {method}")
    groups: list[tuple[list[Subject], float]] = []
    for kind in dict.fromkeys((s.method, s.variant) for s in subjects):
        runs = [s for s in subjects if (s.method, s.variant) == kind]
        # Without a gradient step its size means nothing.
        adapts = runs[0].trained.experiment.evaluation.steps > 0
        tried = (sizes.get(kind[0]) if adapts else None) or [common_alpha(runs)]
        groups += [(runs, size) for size in tried]
    found = iter(tester([Trial(s.trained, tasks, size) for runs, size in groups for s in runs]))
    result: list[Outcome] = []
    for runs, size in groups:
        tested = [next(found) for _ in runs]
        if (broken := next((t for t in tested if isinstance(t, BrokenDown)), None)) is not None:
            warnings.warn(
                f"{runs[0].method} with step size {size:g} is left out: {broken}",
                RunWarning,
                stacklevel=2,
            )
            continue
        result += [
            Outcome(
                run.method,
                run.variant,
                run.seed,
                size,
                tasks.source,
                one,
                run.family.outside_training(tasks.tasks),
            )
            for run, one in zip(runs, tested, strict=True)
            if isinstance(one, Evaluation)
        ]
    if not result:
        raise RunStopped("no policy could be tested: each broke down", 3)
    return result


@dataclass(frozen=True)
class Ways:
    """The episodes of some test tasks before and after each gradient step."""

    outcome: Outcome
    """The test that they are from."""
    tasks: Tasks
    """(T, P)."""
    episodes: list[Episodes]
    """Of T tasks, for each number of steps."""


def ways_of(subjects: Sequence[Subject], outcomes: Sequence[Outcome], tasks: int) -> Ways:
    """Return the episodes of a test's first tasks: of the first meta-policy, or else the first.

    Args:
        subjects: the policies, with the settings of the test.
        outcomes: their tests.
        tasks: how many.
    """
    tested = {(o.method, o.variant, o.seed): o for o in reversed(outcomes)}
    able = [s for s in subjects if (s.method, s.variant, s.seed) in tested]
    subject = next((s for s in able if s.method == MAML), able[0])
    outcome = tested[subject.method, subject.variant, subject.seed]
    first = TaskSet(outcome.source, outcome.evaluation.tasks[:tasks])
    seen: list[Episodes] = []
    evaluate_policy(
        subject.trained,
        tasks=first,
        step_size=outcome.step_size,
        see=lambda _, episodes: seen.append(episodes),
    )
    return Ways(outcome, first.tasks, seen)
