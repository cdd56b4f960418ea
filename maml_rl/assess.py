"""Test the policies of runs: what each is called, what it is tested on, and what it reaches."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.family import TaskFamily
from maml_rl.comparison import ORACLE, Outcome
from maml_rl.config import Experiment, as_tree
from maml_rl.episodes import Episodes
from maml_rl.errors import InputError, RunStopped
from maml_rl.evaluate import Evaluation, evaluate
from maml_rl.memory import check_memory, memory_to_sample
from maml_rl.plain_yaml import leaves
from maml_rl.runs import RunFolder
from maml_rl.sampler import SamplingError
from maml_rl.task_sets import TaskSet
from maml_rl.trained import TrainedPolicy, experiment_of, restore

MAML, PRETRAINED, RANDOM = "maml", "pretrained", "random"
METHODS = (MAML, PRETRAINED, ORACLE, RANDOM)
"""What a policy may be, in the order of tables and figures."""

NOT_OF_THE_METHOD = re.compile(r"seed|name|device|threads|sampling\.tasks_at_once|evaluation\..*")
"""Settings that may differ between runs of one method: they change no expected return."""


class BrokenDown(RunStopped):
    """A test could not go on: an adapted policy's action was no number."""


def method_of(experiment: Experiment[TaskFamily], iterations: int) -> str:
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
    method: str
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
    def family(self) -> TaskFamily:
        """What it was trained on."""
        return self.trained.experiment.family


def load_subject(run: Path, checkpoint: str = "latest") -> Subject:
    """Load a run's policy to be tested.

    Raises:
        InputError: if the folder is no run, or its checkpoint is missing or damaged.
    """
    folder = RunFolder.open(run)
    trained, found = restore(folder, experiment_of(folder), checkpoint)
    done = found.state.iteration
    method = method_of(trained.experiment, done)
    return Subject(trained, method, run, done, found.state.env_steps)


def load_subjects(runs: Sequence[Path], checkpoint: str = "latest") -> list[Subject]:
    """Load runs to be tested side by side, told apart where one method has several settings.

    Raises:
        InputError: if one cannot be loaded, two are the same, or their returns mean different
            things.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("a run is given twice")
    subjects = [load_subject(run, checkpoint) for run in runs]
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
        for item in dataclasses.fields(family)
        if item.name not in family.training_fields
        and getattr(family, item.name) != getattr(other, item.name)
    ]
    return f"{family.name} with {', '.join(differing)}"


def told_apart(subjects: Sequence[Subject]) -> list[Subject]:
    """Return subjects, each with its folder's name as variant where a method has several settings.

    Runs of the same settings and different seeds are one variant, named after the first.
    """
    kinds: list[tuple[object, ...]] = []
    for s in subjects:
        tree = leaves(as_tree(s.trained.experiment))
        settings = [(k, str(v)) for k, v in tree if not NOT_OF_THE_METHOD.fullmatch(k)]
        seen = [k for k, other in zip(kinds, subjects, strict=False) if other.seed == s.seed]
        kind: tuple[object, ...] = (s.method, *settings)
        # The same seed again is no further seed, but a run of its own.
        kinds.append((*kind, sum(k[: len(kind)] == kind for k in seen)))
    names: dict[tuple[object, ...], str] = {}
    for s, kind in zip(subjects, kinds, strict=True):
        names.setdefault(kind, re.sub(r"-seed\d+$", "", s.path.name))
    result = []
    for s, kind in zip(subjects, kinds, strict=True):
        rivals = [name for other, name in names.items() if other[0] == s.method]
        clear = names[kind] if rivals.count(names[kind]) == 1 else str(s.path)
        result.append(dataclasses.replace(s, variant=clear if len(rivals) > 1 else ""))
    return result


def evaluate_policy(
    trained: TrainedPolicy,
    *,
    tasks: TaskSet | None = None,
    step_size: float | None = None,
    steps: int | None = None,
    episodes: int | None = None,
    see: Callable[[Episodes], object] = lambda _: None,
) -> Evaluation:
    """Test a policy by its experiment's evaluation settings, or others given here.

    Args:
        trained: the policy.
        tasks: to use in place of the test tasks.
        step_size: of the first update, in place of alpha.
        steps: gradient steps.
        episodes: for every figure and every update.
        see: is given the episodes of each step.

    Raises:
        InputError: for a setting out of its range.
        BrokenDown: if an adapted policy's action is not finite.
        RunStopped: if memory does not suffice.
    """
    experiment = with_settings(trained.experiment, step_size, steps, episodes)
    if tasks is not None:
        settings = dataclasses.replace(experiment.evaluation, tasks=len(tasks.tasks))
        experiment = dataclasses.replace(experiment, evaluation=settings)
    check_memory(experiment, "evaluation")
    try:
        with memory_to_sample(experiment, "evaluation"):
            return evaluate(
                trained.policy,
                trained.params,
                experiment.family,
                settings=experiment.evaluation,
                adaptation=experiment.adaptation,
                advantages=experiment.advantages,
                action_scale=experiment.policy.action_scale,
                threads=experiment.threads,
                tasks_at_once=experiment.sampling.tasks_at_once,
                tasks=tasks,
                see=see,
            )
    except SamplingError as error:
        raise BrokenDown(f"the test was stopped: {error}", 3) from error


def with_settings(
    experiment: Experiment[TaskFamily],
    step_size: float | None,
    steps: int | None,
    episodes: int | None,
) -> Experiment[TaskFamily]:
    """Return an experiment with other settings of its test, where they are given.

    Raises:
        InputError: for one out of its range.
    """
    given = {"steps": steps, "episodes": episodes}
    changed = {name: value for name, value in given.items() if value is not None}
    try:
        evaluation = dataclasses.replace(experiment.evaluation, **changed)
        adaptation = experiment.adaptation
        if step_size is not None:
            adaptation = dataclasses.replace(adaptation, step_size=step_size)
    except ValueError as error:
        raise InputError(str(error)) from error
    return dataclasses.replace(experiment, evaluation=evaluation, adaptation=adaptation)


def outcomes_of(
    subjects: Sequence[Subject],
    *,
    tasks: TaskSet,
    step_sizes: Sequence[float] = (),
    steps: int | None = None,
    episodes: int | None = None,
) -> list[Outcome]:
    """Test policies on the same tasks, with the same episodes' randomness for each.

    Args:
        subjects: whose policies.
        tasks: which every one of them meets.
        step_sizes: of the first update, to be tried one after the other; each run's own if empty.
        steps: gradient steps; by default as the first's experiment says, and none for an oracle.
        episodes: for every figure and update, likewise.

    Raises:
        InputError: for a setting out of its range.
        RunStopped: if a test cannot be done.
    """
    repeated = sorted({size for size in step_sizes if step_sizes.count(size) > 1})
    if repeated:
        raise InputError(f"step size {repeated[0]:g} is given twice")
    first = subjects[0].trained.experiment.evaluation
    result = []
    for subject in subjects:
        alpha = subject.trained.experiment.adaptation.step_size
        # An oracle knows its task, and has nothing to learn of it.
        taken = (0 if subject.method == ORACLE else first.steps) if steps is None else steps
        # Without a step its size means nothing.
        for size in step_sizes if taken and step_sizes else [alpha]:
            evaluation = evaluate_policy(
                subject.trained,
                tasks=tasks,
                step_size=size,
                steps=taken,
                episodes=first.episodes if episodes is None else episodes,
            )
            who = (subject.method, subject.variant, subject.seed)
            result.append(Outcome(*who, size, tasks.source, evaluation))
    return result
