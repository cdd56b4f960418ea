"""Tests by the paper's protocol: many tasks never trained on, a score after every gradient step.

The test tasks are the same for every run, method and seed, and come from a stream of random
numbers, and where there are classes from classes, that training never uses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from maml_rl.chunks import Chunks
from maml_rl.errors import InputError, refusal
from maml_rl.runs import RunFolder
from maml_rl.seeds import TEST, TEST_SEED, VALIDATION
from maml_rl.supervised.config import SupervisedExperiment, TestSettings
from maml_rl.supervised.networks import OwnNetwork
from maml_rl.supervised.sinusoid import Sinusoid
from maml_rl.supervised.tasks import Problem, Split, TaskSource, task_generator
from maml_rl.supervised.trained import LearnedNetwork, experiment_of, restore

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
    runs: Sequence[Path], checkpoint: str = "latest", root: str | None = None
) -> list[Subject]:
    """Load networks to be tested side by side.

    Raises:
        InputError: if one is no run, or they are not of one problem.
    """
    subjects = []
    for run in runs:
        folder = RunFolder.open(run)
        learned, found = restore(folder, experiment_of(folder, root), checkpoint)
        subjects.append(Subject(run, learned, found.state.iteration))
    first = kind_of(subjects[0].experiment.data)
    for subject in subjects[1:]:
        other = kind_of(subject.experiment.data)
        if other != first:
            raise refusal(
                f"{subjects[0].path} and {subject.path} cannot be compared: the first learns "
                f"{first}, the second {other}"
            )
    return subjects


def kind_of(problem: Problem) -> str:
    """Return what tasks are like, in words; tests of the same kind can be compared."""
    ways = f", {problem.outputs} ways" if problem.classifies else ""
    return f"{problem.name}{ways}"


def outcomes_of(subject: Subject, settings: TestSettings) -> Iterator[Outcome]:
    """Yield a network's tests: for each number of shots and kind of batch normalisation."""
    experiment = subject.experiment
    problem, alpha = experiment.data, experiment.adaptation.step_size
    steps = 0 if is_oracle(problem) else settings.steps
    with Bench(subject.learned, settings.query, steps) as bench:
        for shots in settings.shots or (problem.shots,):
            source = with_shots(subject.learned, shots)
            scale = bench.chosen_scale(source, shots, settings)
            for statistics in kinds_of_statistics(subject.learned):
                scores, losses = bench.measure(
                    source, "test", shots, settings.tasks, statistics=statistics, scale=scale
                )
                yield Outcome(subject, shots, statistics, scale * alpha, scores, losses)


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


def with_shots(learned: LearnedNetwork, shots: int) -> TaskSource:
    """Return what draws a network's tasks, with another number of examples to adapt to.

    Raises:
        InputError: if there are not as many, or tasks are drawn by a function.
    """
    problem = learned.experiment.data
    if shots == problem.shots:
        return learned.source
    try:
        # Which kinds of problem have shots as a setting only they know.
        return replace(problem, **{"shots": shots}).open()
    except (TypeError, ValueError) as error:
        raise InputError(f"a test of {shots} shots: {error}") from error


class Bench(Chunks):
    """Measures one network; tasks are drawn and go through a few at a time."""

    def __init__(self, learned: LearnedNetwork, query: int, steps: int) -> None:
        """Set up.

        Args:
            learned: the network.
            query: examples to judge by; 0 is as many as shots.
            steps: gradient steps n.
        """
        experiment = learned.experiment
        super().__init__(experiment.threads, AT_ONCE if experiment.device == "cpu" else 0)
        self._learned = learned
        self._query = query
        self._steps = steps

    def measure(
        self,
        source: TaskSource,
        split: Split,
        shots: int,
        tasks: int,
        *,
        statistics: str,
        scale: float,
    ) -> tuple[Floats, Floats]:
        """Return score and loss after 0 to n gradient steps on tasks of a split, each (n + 1, T).

        Args:
            source: draws the tasks.
            split: whose they are.
            shots: examples that they adapt to.
            tasks: how many T.
            statistics: of batch normalisation in the query: batch, support or "".
            scale: of the step sizes trained with.

        Raises:
            InputError: if there is nothing in that split.
        """
        if split not in source.splits:
            raise InputError(f"there are no {split} classes: raise data.{split}_classes")
        learned, stream = self._learned, {"validation": VALIDATION, "test": TEST}[split]
        parts = []
        for number, start in enumerate(range(0, tasks, DRAWN)):
            rng = task_generator(stream, TEST_SEED, number)
            count = min(DRAWN, tasks - start)
            batch = source.sample(split, count, rng, query=self._query or shots)
            parts.append(
                learned.learner.test(
                    learned.meta,
                    batch.to(learned.experiment.device),
                    self._steps,
                    self,
                    transductive=statistics != "support",
                    scale=scale,
                )
            )
        scores, losses = (torch.cat(part, 1).double().cpu() for part in zip(*parts, strict=True))
        return scores.numpy(), losses.numpy()

    def chosen_scale(self, source: TaskSource, shots: int, settings: TestSettings) -> float:
        """Return what to multiply step sizes by: 1, or what is best on validation tasks.

        Best is the score after the last step; the test tasks have no part in it.
        """
        alpha = self._learned.experiment.adaptation.step_size
        scales = [size / alpha for size in settings.step_sizes] if self._steps else []
        if len(scales) < 2:
            return scales[0] if scales else 1.0
        found: dict[float, float] = {}
        statistics = kinds_of_statistics(self._learned)[0]
        for scale in scales:
            scores, _ = self.measure(
                source,
                "validation",
                shots,
                settings.validation_tasks,
                statistics=statistics,
                scale=scale,
            )
            last = float(scores[-1].mean())
            high_is_good = last if self._learned.learner.classifies else -last
            found[scale] = high_is_good if math.isfinite(last) else -math.inf
        return max(found, key=lambda scale: found[scale])
