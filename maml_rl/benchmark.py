"""Train and test the methods of the paper's comparison side by side, each on the same budget.

maml         the meta-policy
pretrained   the same trainer without inner step, new tasks in every batch; fine-tuned in the test
oracle       that, with the task in the observation; no gradient step
random       the initial policy, fine-tuned in the test

No method has a trainer of its own: they differ in `adaptation.inner_steps`,
`policy.observe_task` and `iterations`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from envs.family import TaskFamily
from envs.navigation import Navigation2D
from maml_rl.assess import (
    MAML,
    NOT_OF_THE_METHOD,
    PRETRAINED,
    RANDOM,
    BrokenDown,
    Subject,
    evaluate_policy,
    load_subject,
    outcome_of,
)
from maml_rl.comparison import ORACLE, Outcome
from maml_rl.config import Experiment, experiment_type, experiment_words, find_experiment
from maml_rl.errors import InputError, RunStopped, RunWarning, refusal
from maml_rl.plain_yaml import leaves, read_yaml
from maml_rl.runs import RunFolder
from maml_rl.settings import (
    HELP,
    Setting,
    as_flags,
    check_keys,
    checked_settings,
    flag_values,
    normal_flag,
    parse_with_tyro,
    settings_of,
)
from maml_rl.task_sets import TaskSet, held_out, papers_own, validation
from maml_rl.train import Watcher, meta_train, resume
from maml_rl.trained import differing, experiment_of

Method = Literal["maml", "pretrained", "oracle", "random"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is compared, and how."""

    name: str
    """Name of the folder."""
    experiment: str
    """What is meta-trained: an experiment's file, or the name of one that ships."""
    methods: tuple[Method, ...] = get_args(Method)
    """Which of maml, pretrained, oracle and random."""
    seeds: tuple[int, ...] = (0,)
    """Each method is trained once with each."""
    iterations: int | None = None
    """Of maml; by default the experiment's. A method without inner steps draws one batch an
    iteration where maml draws two or more, and has as many times the iterations."""
    tasks: Literal["test", "paper"] = "test"
    """Tasks that training never drew, or the 40 that the paper's numbers were measured on."""
    pretrained_step_size: float | None = None
    """Of the first test update of pretrained; by default alpha."""
    random_step_size: float | None = None
    """Of the first test update of random; by default alpha."""
    candidates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Step sizes of which each method's best is chosen on validation tasks; may be empty."""
    validation_tasks: int = 20
    """Tasks to choose it on; no test uses them."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: naming the setting.
        """
        for name in ("methods", "seeds", "candidates"):
            values: tuple[object, ...] = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"{name} must all be different, got {list(values)}")
            if not values and name != "candidates":
                raise InputError(f"{name} must not be empty")
        for name, size in (
            ("pretrained_step_size", self.pretrained_step_size),
            ("random_step_size", self.random_step_size),
            *(("candidates", size) for size in self.candidates),
        ):
            if size is not None and not 0 < size <= 1e6:
                raise InputError(f"{name} must be above 0 and at most 1e+06, got {size}")
        if self.iterations is not None and self.iterations < 1:
            raise InputError(f"iterations must be at least 1, got {self.iterations}")
        if not 1 <= self.validation_tasks <= 100_000:
            raise InputError(
                f"validation_tasks must be between 1 and 100000, got {self.validation_tasks}"
            )


@dataclass(frozen=True)
class Planned:
    """One training run of a benchmark."""

    method: Method
    experiment: Experiment[TaskFamily]
    path: Path

    @property
    def name(self) -> str:
        """The run in words."""
        return f"{self.method}, seed {self.experiment.seed}"


SWITCH = Setting(bool, required=False)
"""What a flag of the command counts as where only its name matters."""


class Words(NamedTuple):
    """What a benchmark's file and the command line say, sorted but not yet parsed."""

    ours: list[str]
    """Settings of the benchmark and flags of the command, as command-line words."""
    tree: Mapping[str, object]
    """What the file's `settings` say of the experiment."""
    theirs: list[str]
    """The same of the command line."""


def benchmark_words(file: Path, flags: Sequence[str], *, ignored: Sequence[str] = ()) -> Words:
    """Sort what a benchmark's file and the command line say, having checked it.

    Args:
        file: the benchmark's YAML. `settings` in it are settings of the experiment.
        flags: words of the command line: settings of the benchmark or of its experiment.
        ignored: flags of the command that are neither.

    Raises:
        InputError: for an unknown key, a value of the wrong type or a missing one.
    """
    tree = dict(read_yaml(file))
    if "family" in tree and "experiment" not in tree:
        raise refusal(f"{file} is an experiment: maml-rl train {file}")
    overrides = tree.pop("settings", {})
    if not isinstance(overrides, dict):
        raise refusal(f"{file}: settings must hold settings of the experiment, such as `threads:`")
    # No field of it depends on the family.
    settings = dict(settings_of(Benchmark, Navigation2D))
    ours: list[str] = []
    theirs: list[str] = []
    where = ours
    for word in flags:
        if word.startswith("-"):
            known = word in HELP or normal_flag(word) in (*settings, *ignored)
            # What a flag is given follows it, and may be a negative number.
            where = ours if known else theirs if word.startswith("--") else where
        where.append(word)
    in_file = checked_settings(settings, tree, str(file), ours, ignored=ignored)
    sections = {item.name for item in fields(Experiment)}
    for path, _ in flag_values(theirs):
        if path.partition(".")[0] not in sections:
            check_keys([path], settings | dict.fromkeys(ignored, SWITCH), "command line")
    for path in (*dict(leaves(overrides)), *(path for path, _ in flag_values(theirs))):
        if path in ("name", "seed", "iterations"):
            instead = {"seed": "seeds"}.get(path, path)
            raise refusal(f"{file}: {path} of the experiment is set by the benchmark's {instead}")
    return Words([*as_flags(in_file), *ours], overrides, theirs)


def base_experiment(benchmark: Benchmark, words: Words, file: Path) -> Experiment[TaskFamily]:
    """Return the experiment that a benchmark's runs are variants of.

    Raises:
        InputError: if a setting of it is wrong, or it has no inner step.
    """
    found = find_experiment(benchmark.experiment)
    source = f"{found} with the settings of {file}"
    tree = merged(read_yaml(found), words.tree)
    family, arguments = experiment_words(tree, source, words.theirs)
    experiment = parse_with_tyro(experiment_type(family), arguments, "maml-rl benchmark")
    if experiment.adaptation.inner_steps < 1 or experiment.policy.observe_task:
        raise refusal(
            f"{source}: baselines are derived from a meta-policy, so adaptation.inner_steps must "
            "be at least 1 and policy.observe_task False"
        )
    return experiment


def merged(tree: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """Return nested mappings in which the second's values stand in place of the first's.

    Either may write a path with dots, as in `sampling.tasks: 4`.
    """
    result: dict[str, Any] = {}
    for path, value in (*leaves(tree), *leaves(over)):
        *sections, name = path.split(".")
        where = result
        for section in sections:
            if not isinstance(where.get(section), dict):
                where[section] = {}
            where = where[section]
        where[name] = value
    return result


def plan(benchmark: Benchmark, base: Experiment[TaskFamily], out: Path) -> list[Planned]:
    """Return every training run, method by method.

    Raises:
        InputError: if a setting that follows from the benchmark is out of its range.
    """
    total = base.iterations if benchmark.iterations is None else benchmark.iterations
    if total < 1:
        raise InputError(f"iterations must be at least 1, got {total}")
    # As many batches as maml draws, so as many control steps.
    batches = total * (base.adaptation.inner_steps + 1)
    plain = replace(base.adaptation, inner_steps=0)
    changes: Mapping[Method, dict[str, Any]] = {
        "maml": {"iterations": total},
        "pretrained": {"iterations": batches, "adaptation": plain},
        "oracle": {
            "iterations": batches,
            "adaptation": plain,
            "policy": replace(base.policy, observe_task=True),
        },
        "random": {"iterations": 0},
    }
    return [
        Planned(method, replace(base, seed=seed, **changes[method]), out / f"{method}-seed{seed}")
        for method in benchmark.methods
        for seed in benchmark.seeds
    ]


def check_plan(planned: Sequence[Planned], given: Sequence[Path]) -> dict[str, Path]:
    """Return the run folders to use as they are, by the planned run's name.

    Args:
        planned: every training run.
        given: run folders to use in place of training, besides those that are at their place.

    Raises:
        InputError: if a folder given or at a planned place is another run's.
    """
    found: dict[str, Path] = {}
    for path in given:
        subject = load_subject(path)
        match = next(
            (
                one
                for one in planned
                if (one.method, one.experiment.seed) == (subject.method, subject.seed)
            ),
            None,
        )
        who = f"{subject.method}, seed {subject.seed}"
        if match is None:
            raise InputError(f"{path} is {who}, which this benchmark has not")
        if who in found:
            raise InputError(f"{found[who]} and {path} are both {who}")
        check_same(match, path)
        if subject.iterations != match.experiment.iterations:
            raise InputError(
                f"{path} has done {subject.iterations} iterations, and the benchmark wants "
                f"{match.experiment.iterations}"
            )
        found[who] = path
    for one in planned:
        if one.name in found:
            continue
        if (one.path / "config.yaml").is_file():
            check_same(one, one.path)
        else:
            RunFolder.check_free(one.path)
    return found


def check_same(one: Planned, path: Path) -> None:
    """Raise InputError where a run folder was trained with other settings than are planned."""
    there = experiment_of(RunFolder.open(path))
    ours = one.experiment
    if there.seed != ours.seed:
        raise InputError(f"{path} has seed {there.seed}, and {one.name} is to be there")
    if changed := differing(there, ours, NOT_OF_THE_RUN):
        raise InputError(
            f"{path} was trained with other settings than the benchmark's for {one.name}: "
            f"{changed}; choose another folder with --out DIR"
        )
    if there.iterations > ours.iterations:
        raise InputError(
            f"{path} is to be trained for {there.iterations} iterations, and the benchmark wants "
            f"{ours.iterations}"
        )


NOT_OF_THE_RUN = re.compile(rf"iterations|{NOT_OF_THE_METHOD.pattern}")
"""Settings that a run may be reused with others of."""


def train_planned(one: Planned, watch: Watcher | None) -> None:
    """Train a planned run, or go on with it where it stopped; nothing where it is done.

    Raises:
        InputError: if its folder cannot be used.
        RunStopped: if the run ended early; what was done is kept.
    """
    wanted = one.experiment.iterations
    if not (one.path / "config.yaml").is_file():
        meta_train(one.experiment, out=one.path, watch=watch)
    elif iterations_done(one.path) < wanted:
        resume(one.path, iterations=wanted, watch=watch)


def progress(one: Planned) -> str:
    """Return in words where a planned run is and how far."""
    return f"{one.path}, {iterations_done(one.path)} of {one.experiment.iterations} iterations done"


def iterations_done(path: Path) -> int:
    """Return how many iterations a run has done; 0 where there is none.

    Raises:
        CheckpointError: if no checkpoint of it is whole.
    """
    there = (path / "config.yaml").is_file()
    return RunFolder.open(path).load().state.iteration if there else 0


@dataclass(frozen=True)
class StepSizes:
    """The step sizes that a method is tested with."""

    own: float
    """The paper's, or alpha."""
    best: float | None
    """The best on validation tasks; None where none was tried."""
    validation: Mapping[float, float]
    """Mean return on them after the last step, by candidate; NaN where the test broke down."""


def choose_step_sizes(
    benchmark: Benchmark, subjects: Sequence[Subject], say: Callable[[str], None]
) -> dict[str, StepSizes]:
    """Try candidates on validation tasks, and return each adapting method's step sizes.

    A method's runs are taken together, and the return after the last gradient step decides.

    Raises:
        InputError: for tasks that the family cannot give.
        RunStopped: if memory does not suffice.
    """
    alpha = subjects[0].trained.experiment.adaptation.step_size
    own = {
        MAML: alpha,
        PRETRAINED: benchmark.pretrained_step_size or alpha,
        RANDOM: benchmark.random_step_size or alpha,
    }
    tasks = validation(subjects[0].family, benchmark.validation_tasks)
    result: dict[str, StepSizes] = {}
    for method in benchmark.methods:
        if method == ORACLE:
            continue
        runs = [s for s in subjects if s.method == method]
        found = {}
        for size in benchmark.candidates:
            found[size] = validated(runs, size, tasks)
            say(f"{method}, step size {size:g}: {found[size]:.1f} on validation tasks")
        whole = {size: value for size, value in found.items() if not math.isnan(value)}
        best = max(whole, key=whole.__getitem__) if whole else None
        result[method] = StepSizes(own[method], best, found)
    return result


def validated(runs: Sequence[Subject], size: float, tasks: TaskSet) -> float:
    """Return the mean return of runs on validation tasks after the last gradient step."""
    try:
        returns = [
            evaluate_policy(run.trained, tasks=tasks, step_size=size).returns[-1].mean()
            for run in runs
        ]
    except BrokenDown:
        return math.nan
    return float(sum(returns) / len(returns))


def tasks_to_test(benchmark: Benchmark, base: Experiment[TaskFamily]) -> TaskSet:
    """Return the tasks that every method meets.

    Raises:
        FamilyError: if the paper has none for this family.
    """
    if benchmark.tasks == "paper":
        return papers_own(base.family)
    return held_out(base.family, base.evaluation.tasks)


def outcomes_with(
    tasks: TaskSet, subjects: Sequence[Subject], sizes: Mapping[str, StepSizes]
) -> list[Outcome]:
    """Test every policy: the oracle before any step, the others with each of their step sizes.

    Where a step size breaks a method, that is told in a RunWarning, and it is left out.

    Raises:
        RunStopped: if a test cannot be done.
    """
    outcomes: list[Outcome] = []
    for method in dict.fromkeys(subject.method for subject in subjects):
        chosen = sizes.get(method)
        tried: list[float | None] = [None] if chosen is None else [chosen.own, chosen.best]
        # Each once, where the best is the paper's.
        for size in dict.fromkeys(s for s in tried if chosen is None or s is not None):
            try:
                outcomes += [outcome_of(s, tasks, size) for s in subjects if s.method == method]
            except BrokenDown as error:
                warnings.warn(
                    f"{method} with step size {size:g} is left out: {error}",
                    RunWarning,
                    stacklevel=2,
                )
    if not outcomes:
        raise RunStopped("every method broke down in its test", 3)
    return outcomes
