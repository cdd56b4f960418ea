"""Tests by the paper's protocol: many tasks never trained on, a score after every gradient step.

The test tasks are the same for every run, method and seed, and come from a stream of random
numbers, and where there are classes from classes, that training never uses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maml_rl.chunks import Chunks
from maml_rl.devices import Device
from maml_rl.errors import InputError, RunStopped, refusal
from maml_rl.memory import repeated_where_memory_fails
from maml_rl.runs import RunFolder
from maml_rl.seeds import TEST, TEST_SEED, VALIDATION
from maml_rl.supervised.config import SupervisedExperiment, TestSettings
from maml_rl.supervised.networks import OwnNetwork
from maml_rl.supervised.sinusoid import Sinusoid
from maml_rl.supervised.tasks import Batch, Problem, Split, TaskSource, task_generator
from maml_rl.supervised.trained import LearnedNetwork, experiment_of, placed, restore
from maml_rl.trained import differing

Floats = npt.NDArray[np.float64]

AT_ONCE, DRAWN = 8, 40
"""Tasks that go through together in a test, and those that are in memory."""
MAML, PRETRAINED, ORACLE, RANDOM = "maml", "pretrained", "oracle", "random"


@dataclass(frozen=True)
class Subject:
    """A trained network to be tested."""

    path: Path
    """Its run folder."""
    learned: LearnedNetwork
    iterations: int
    """Outer updates that it has had."""

    @property
    def experiment(self) -> SupervisedExperiment[Problem]:
        """Its settings."""
        return self.learned.experiment

    @property
    def method(self) -> str:
        """What it is called in tables."""
        return method_of(self.experiment, self.iterations)


def method_of(experiment: SupervisedExperiment[Problem], iterations: int) -> str:
    """Return what a method is called: maml, pretrained, oracle, random, first-order anil, ..."""
    inner = experiment.adaptation
    if is_oracle(experiment.data):
        return ORACLE
    if iterations == 0:
        return RANDOM
    if inner.inner_steps == 0:
        return PRETRAINED
    name = "anil" if inner.adapted == "last-layer" else MAML
    name = "meta-sgd" if inner.learned_step_sizes and name == MAML else name
    return " ".join(
        filter(
            None,
            [
                "first-order" if inner.first_order else "",
                name,
                "with learned step sizes" if inner.learned_step_sizes and name == "anil" else "",
                "with multi-step loss" if inner.multi_step_loss else "",
                "with the mean loss" if experiment.data.classifies and inner.loss == "mean" else "",
            ],
        )
    )


def is_oracle(problem: Problem) -> bool:
    """Whether the network is told its task."""
    return isinstance(problem, Sinusoid) and problem.observe_task


@dataclass(frozen=True)
class Outcome:
    """Scores of T tasks after 0, 1, ... n gradient steps, of one network in one kind of test."""

    subject: Subject
    shots: int
    """Examples adapted to, of each class where there are classes."""
    statistics: str
    """Of batch normalisation in the query: "batch", its own; "support"; "" where there is none."""
    step_size: float
    scores: Floats
    """(n + 1, T): accuracy, or mean squared error."""
    losses: Floats
    """(n + 1, T): the loss that training lowers."""

    @property
    def means(self) -> Floats:
        """(n + 1,): mean over tasks."""
        with np.errstate(over="ignore"):
            result: Floats = self.scores.mean(1)
        return result

    @property
    def sds(self) -> Floats:
        """(n + 1,): standard deviation over tasks; NaN where one has diverged to infinity."""
        with np.errstate(invalid="ignore", over="ignore"):
            result: Floats = self.scores.std(1)
        return result

    @property
    def half_widths(self) -> Floats:
        """(n + 1,): of the 95 % interval of the mean, 1.96 sd / sqrt(T)."""
        result: Floats = 1.96 * self.sds / math.sqrt(self.scores.shape[1])
        return result


def load_subjects(
    runs: Sequence[Path],
    checkpoint: str = "latest",
    root: str | None = None,
    device: Device | None = None,
) -> list[Subject]:
    """Load networks to be tested side by side.

    Raises:
        InputError: if one is no run, or they are not of one problem.
    """
    subjects = []
    for run in runs:
        folder = RunFolder.open(run)
        experiment = placed(experiment_of(folder, root), device)
        learned, found = restore(folder, experiment, checkpoint)
        subjects.append(Subject(run, learned, found.state.iteration))
    first, problem = subjects[0], subjects[0].experiment.data
    for subject in subjects[1:]:
        other = subject.experiment.data
        differ = different_tasks(first, subject)
        if kind_of(problem) != kind_of(other):
            differ = f"the first learns {kind_of(problem)}, the second {kind_of(other)}"
        if differ:
            raise refusal(f"{first.path} and {subject.path} cannot be compared: {differ}")
    return subjects


NOT_OF_THE_TASK = re.compile(r"shots|query|observe_task|root|cache")
"""Fields of a problem in which networks that are compared may differ."""


def different_tasks(one: Subject, other: Subject) -> str:
    """Return in what the tasks of two networks differ, "" if they do not."""
    first, second = (
        {"name": problem.name, **asdict(problem)}
        for problem in (one.experiment.data, other.experiment.data)
    )
    return differing(first, second, NOT_OF_THE_TASK)


def kind_of(problem: Problem) -> str:
    """Return what tasks are like, in words."""
    ways = f", {problem.outputs} ways" if problem.classifies else ""
    return f"{problem.name}{ways}"


def outcomes_of(subject: Subject, settings: TestSettings) -> Iterator[Outcome]:
    """Yield a network's tests: for each number of shots and kind of batch normalisation.

    Raises:
        InputError: if its tasks have not as many examples or no split to choose by.
        RunStopped: if memory does not suffice for one task.
    """
    experiment = subject.experiment
    problem, alpha = experiment.data, experiment.adaptation.step_size
    steps = 0 if is_oracle(problem) else settings.steps
    for shots in settings.shots or (problem.shots,):
        learned = with_shots(subject.learned, shots)
        with Bench(learned, settings.query or shots, steps) as bench:
            scale = bench.chosen_scale(settings)
            for statistics in kinds_of_statistics(learned):
                scores, losses = bench.measure(
                    "test", settings.tasks, statistics=statistics, scale=scale
                )
                yield Outcome(subject, shots, statistics, scale * alpha, scores, losses)


def check_tests(learned: LearnedNetwork) -> None:
    """Raise InputError where a network's own test could not be made: told before it is trained."""
    experiment = learned.experiment
    settings, problem = experiment.evaluation, experiment.data
    chooses = len(settings.step_sizes) > 1 and not is_oracle(problem)
    splits: tuple[Split, ...] = ("validation", "test") if chooses else ("test",)
    for shots in settings.shots or (problem.shots,):
        source = with_shots(learned, shots).source
        for split in splits:
            draw(source, split, 1, task_generator(TEST, TEST_SEED, 0), settings.query or shots)


def draw(
    source: TaskSource, split: Split, count: int, rng: np.random.Generator, query: int
) -> Batch:
    """Draw tasks of a split, unless there is nothing in it.

    Raises:
        InputError: if so.
    """
    if split not in source.splits:
        raise InputError(f"there are no {split} classes: raise data.{split}_classes")
    return source.sample(split, count, rng, query=query)


def own_step_sizes(settings: TestSettings, subject: Subject) -> TestSettings:
    """Return settings with the step sizes that a network's own experiment chooses from."""
    return replace(settings, step_sizes=subject.experiment.evaluation.step_sizes)


def kinds_of_statistics(learned: LearnedNetwork) -> tuple[str, ...]:
    """Return what batch normalisation can go by in a test; what was trained with comes first."""
    network = learned.learner.network
    if not network.normalises:
        return ("",)
    if isinstance(network, OwnNetwork):
        return ("batch",)
    both = ("batch", "support")
    return both if learned.experiment.adaptation.transductive else both[::-1]


def with_shots(learned: LearnedNetwork, shots: int) -> LearnedNetwork:
    """Return a network for tasks with another number of examples to adapt to.

    Raises:
        InputError: if there are not as many, or tasks are drawn by a function.
    """
    problem = learned.experiment.data
    if shots == problem.shots:
        return learned
    try:
        # Which kinds of problem have shots as a setting only they know.
        source = replace(problem, **{"shots": shots}).open()
    except (TypeError, ValueError) as error:
        raise InputError(f"a test of {shots} shots: {error}") from error
    # A loss summed over classes is over these shots.
    return replace(learned, source=source, learner=replace(learned.learner, shots=shots))


class Bench(Chunks):
    """Measures one network; tasks are drawn and go through a few at a time."""

    def __init__(self, learned: LearnedNetwork, query: int, steps: int) -> None:
        """Set up.

        Args:
            learned: the network.
            query: examples to judge by, of each class where there are classes.
            steps: gradient steps n.
        """
        experiment = learned.experiment
        super().__init__(experiment.threads, AT_ONCE if experiment.device == "cpu" else DRAWN)
        self._learned = learned
        self._query = query
        self._steps = steps

    def measure(
        self, split: Split, tasks: int, *, statistics: str, scale: float
    ) -> tuple[Floats, Floats]:
        """Return score and loss after 0 to n gradient steps on tasks of a split, each (n + 1, T).

        Args:
            split: whose they are.
            tasks: how many T.
            statistics: of batch normalisation in the query: batch, support or "".
            scale: of the step sizes trained with.

        Raises:
            InputError: if there is nothing in that split.
            RunStopped: if memory does not suffice for one task.
        """
        learned, stream = self._learned, {"validation": VALIDATION, "test": TEST}[split]

        def piece(number: int, count: int) -> tuple[Tensor, Tensor]:
            rng = task_generator(stream, TEST_SEED, number)
            batch = draw(learned.source, split, count, rng, self._query)
            return learned.learner.test(
                learned.meta,
                batch.to(learned.experiment.device),
                self._steps,
                self,
                transductive=statistics != "support",
                scale=scale,
            )

        counts = [min(DRAWN, tasks - start) for start in range(0, tasks, DRAWN)]
        parts = [
            repeated_where_memory_fails(partial(piece, number, count), self.halve)
            for number, count in enumerate(counts)
        ]
        scores, losses = (torch.cat(part, 1).double().cpu() for part in zip(*parts, strict=True))
        return scores.numpy(), losses.numpy()

    def halve(self) -> None:
        """Let fewer tasks go through together.

        Raises:
            RunStopped: if they go one by one already.
        """
        if self.size == 1:
            raise RunStopped(
                "the memory does not suffice for the test: lower evaluation.query, "
                f"evaluation.shots or threads (now {self.threads})",
                3,
            )
        self.size //= 2

    def chosen_scale(self, settings: TestSettings) -> float:
        """Return what to multiply step sizes by: 1, or what is best on validation tasks.

        Best is the score after the last step; the test tasks have no part in it.
        """
        learned = self._learned
        alpha = learned.experiment.adaptation.step_size
        scales = [size / alpha for size in settings.step_sizes] if self._steps else []
        if len(scales) < 2:
            return scales[0] if scales else 1.0
        found: dict[float, float] = {}
        statistics = kinds_of_statistics(learned)[0]
        for scale in scales:
            scores, _ = self.measure(
                "validation", settings.validation_tasks, statistics=statistics, scale=scale
            )
            last = float(scores[-1].mean())
            high_is_good = last if learned.learner.classifies else -last
            found[scale] = high_is_good if math.isfinite(last) else -math.inf
        return max(found, key=lambda scale: found[scale])
