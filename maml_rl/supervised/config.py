"""A supervised experiment as a tree of frozen dataclasses, from YAML and flags alike."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import yaml

from maml_rl.checkpoints import Origin
from maml_rl.config import check_name, find_experiment, is_supervised, named_tree
from maml_rl.devices import Device
from maml_rl.errors import InputError, refusal
from maml_rl.plain_yaml import read_yaml
from maml_rl.settings import Choice, as_flags, for_tyro, parse_with_tyro, words_of
from maml_rl.supervised.few_shot import DrawnCharacters, MiniImagenet, Omniglot
from maml_rl.supervised.learner import InnerLoopSettings
from maml_rl.supervised.networks import ConvNet, Mlp, NetworkSettings, make_network
from maml_rl.supervised.own import OwnTasks
from maml_rl.supervised.sinusoid import Sinusoid
from maml_rl.supervised.tasks import Problem
from maml_rl.versions import versions

P = TypeVar("P", bound=Problem)

PROBLEMS: dict[str, type[Problem]] = {
    problem.name: problem for problem in (Sinusoid, Omniglot, MiniImagenet, DrawnCharacters)
}
"""Every problem that ships, by name."""


@dataclass(frozen=True, kw_only=True)
class OuterLoopSettings:
    """The outer loop: Adam."""

    tasks: int = 25
    """Tasks a batch."""
    learning_rate: float = 1e-3
    """Of Adam."""
    clip: float | None = None
    """Largest size of each number of the gradient; larger ones are cut."""
    tasks_at_once: int = 0
    """Tasks that go through together, on one thread; 0 chooses by the sizes of batch and network.
    Gradients differ in their last digits."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.tasks <= 100_000:
            raise ValueError(f"outer.tasks must be from 1 to 100000, got {self.tasks}")
        if not 0 < self.learning_rate <= 1e3:
            raise ValueError(
                f"outer.learning_rate must be above 0 and at most 1000, got {self.learning_rate}"
            )
        if self.clip is not None and not 0 < self.clip <= 1e9:
            raise ValueError(f"outer.clip must be above 0 and at most 1e+09, got {self.clip}")
        if not 0 <= self.tasks_at_once <= 100_000:
            raise ValueError(
                f"outer.tasks_at_once must be from 0 to 100000, got {self.tasks_at_once}"
            )


@dataclass(frozen=True, kw_only=True)
class TestSettings:
    """How a network is tested."""

    __test__ = False  # pytest must not take it for a test

    tasks: int = 600
    """Test tasks, the same for every run, method and seed."""
    steps: int = 10
    """Gradient steps to each task."""
    shots: tuple[int, ...] = ()
    """Examples to adapt to, of each class where there are classes, one test each; none is as
    trained."""
    query: int = 0
    """Examples to judge by, of each class where there are classes; 0 is as many as shots."""
    step_sizes: tuple[float, ...] = ()
    """Step sizes to choose from on validation tasks; none is alpha as trained. For pretraining,
    which knows none."""
    validation_tasks: int = 40
    """Validation tasks, for the best checkpoint and for choosing."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least, most in (
            ("tasks", 1, 100_000),
            ("steps", 0, 1000),
            ("query", 0, 100_000),
            ("validation_tasks", 1, 100_000),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"evaluation.{name} must be from {least} to {most}, got {value}")
        if any(not 1 <= shots <= 100_000 for shots in self.shots):
            raise ValueError(f"evaluation.shots must all be from 1 to 100000, got {self.shots}")
        if any(not 0 < size <= 1e6 for size in self.step_sizes):
            raise ValueError(
                f"evaluation.step_sizes must all be above 0 and at most 1e+06, got "
                f"{self.step_sizes}"
            )


@dataclass(frozen=True, kw_only=True)
class SupervisedExperiment(Generic[P]):
    """Everything a supervised training run depends on."""

    name: str
    """Name of the run folder."""
    data: P
    """What is learned: `name` says which problem, the rest are its fields."""
    iterations: int
    """Outer updates."""
    record_every: int = 100
    """Iterations that a row of metrics and a checkpoint stand for."""
    seed: int = 0
    """Of everything random; the test tasks are the same for every seed."""
    device: Device = "cpu"
    """Where the network is."""
    threads: int = 0
    """Threads that chunks of tasks go through on; 0 is one a core."""
    max_refused: int = 20
    """Updates refused in a row after which the run ends."""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    adaptation: InnerLoopSettings = field(default_factory=InnerLoopSettings)
    outer: OuterLoopSettings = field(default_factory=OuterLoopSettings)
    evaluation: TestSettings = field(default_factory=TestSettings)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: naming the setting.
        """
        check_name(self.name)
        for name, least, most in (
            ("iterations", 0, 10**9),
            ("record_every", 1, 10**6),
            ("seed", 0, 2**63 - 1),
            ("threads", 0, 1024),
            ("max_refused", 1, 10**9),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise InputError(f"{name} must be from {least} to {most}, got {value}")


def query_of(experiment: SupervisedExperiment[Problem], shots: int) -> int:
    """Return how many examples (of each class) a test from so many shots judges by."""
    return experiment.evaluation.query or shots


def network_of(experiment: SupervisedExperiment[Problem]) -> Mlp | ConvNet:
    """Return an experiment's network.

    Raises:
        InputError: if its problem and network do not fit.
    """
    problem = experiment.data
    try:
        return make_network(experiment.network, problem.input_shape, problem.outputs)
    except ValueError as error:
        raise InputError(str(error)) from error


def problem_class(name: str) -> type[Problem]:
    """Return the problem of that name.

    Raises:
        InputError: if there is none, naming the nearest.
    """
    known = PROBLEMS | {OwnTasks.name: OwnTasks}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, PROBLEMS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PROBLEMS)}"
    raise refusal(f"no problem is called {name!r}: {hint}")


DATA = Choice("data", list(PROBLEMS), problem_class)
"""How an experiment names its problem."""


def supervised_type(problem: type[Problem], *marks: object) -> type[SupervisedExperiment[Problem]]:
    """Return the experiment's type for a problem that is known only now, annotated for tyro."""
    return for_tyro(SupervisedExperiment[problem], *marks)  # type: ignore[valid-type]


def supervised_words(
    tree: Mapping[str, object], source: str, flags: Sequence[str], *, ignored: Sequence[str] = ()
) -> tuple[type[Problem], list[str]]:
    """Return an experiment's problem and all its settings as words; see `settings.words_of`.

    Raises:
        InputError: if they are wrong, or are those of reinforcement learning.
    """
    if not is_supervised(tree):
        raise refusal(f"{source} is no experiment of supervised learning: it has no `data`")
    return words_of(SupervisedExperiment, DATA, tree, source, flags, ignored=ignored)


def load_experiment(name: str | Path, **overrides: object) -> SupervisedExperiment[Problem]:
    """Load a supervised experiment by path or shipped name; keywords override settings.

    Nested settings are written with two underscores: `outer__tasks=8`.

    Raises:
        InputError: if the file or an override is wrong.
    """
    path = find_experiment(str(name))
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return experiment_from(read_yaml(path), str(path), **changed)


def experiment_from(
    tree: Mapping[str, object], source: str, **overrides: object
) -> SupervisedExperiment[Problem]:
    """Build an experiment from nested mappings and overrides by dotted path.

    Raises:
        InputError: if either is wrong, naming the source.
    """
    problem, arguments = supervised_words(tree, source, as_flags(overrides))
    return parse_with_tyro(supervised_type(problem), arguments, "maml-rl")


def as_tree(experiment: SupervisedExperiment[Problem]) -> dict[str, object]:
    """Return all settings as plain nested mappings: a valid experiment file."""
    return named_tree(experiment, DATA.section, experiment.data.name)


def made_for(problem: Problem) -> Mapping[str, str | int]:
    """Return what must be equal for a network of one problem to be of use for another."""
    inputs = " x ".join(map(str, problem.input_shape))
    return {"problem": problem.name, "inputs": inputs, "outputs": problem.outputs}


def origin_of(experiment: SupervisedExperiment[Problem]) -> Origin:
    """Return what checkpoints of an experiment are made for, here and now."""
    text = yaml.safe_dump(as_tree(experiment), sort_keys=False)
    return Origin(text, made_for(experiment.data), versions())
