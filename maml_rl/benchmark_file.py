"""What a benchmark compares, read from its file and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from envs.family import TaskFamily
from maml_rl.comparison import METHODS, Method
from maml_rl.config import (
    Experiment,
    check_name,
    experiment_type,
    experiment_words,
    find_experiment,
    is_supervised,
)
from maml_rl.errors import InputError, refusal
from maml_rl.plain_yaml import leaves, read_yaml
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


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is compared, and how."""

    name: str
    """Name of the folder."""
    experiment: str
    """What is meta-trained: an experiment's file, or the name of one that ships."""
    methods: tuple[Method, ...] = METHODS
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
        check_name(self.name)
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


class Words(NamedTuple):
    """What a benchmark's file and the command line say, sorted but not yet parsed."""

    benchmark: list[str]
    """Settings of the benchmark and flags of the command, as command-line words."""
    in_file: Mapping[str, object]
    """What the file's `settings` say of the experiment."""
    on_line: list[str]
    """What the command line says of it, as words."""


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
    check_not_supervised(tree, str(file))
    overrides = tree.pop("settings", {})
    if not isinstance(overrides, dict):
        raise refusal(f"{file}: settings must hold settings of the experiment, such as `threads:`")
    settings = dict(settings_of(Benchmark))
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
            flags_too = settings | dict.fromkeys(ignored, Setting(bool, required=False))
            check_keys(
                [path], flags_too, "command line", hint=f"see `maml-rl benchmark {file} --help`"
            )
    for path in (*dict(leaves(overrides)), *(path for path, _ in flag_values(theirs))):
        if path in ("name", "seed", "iterations"):
            instead = {"seed": "seeds"}.get(path, path)
            raise refusal(f"{file}: {path} of the experiment is set by the benchmark's {instead}")
    return Words([*as_flags(in_file), *ours], overrides, theirs)


def check_not_supervised(tree: Mapping[str, object], source: str) -> None:
    """Raise InputError, with what to type instead, for an experiment of supervised learning."""
    if is_supervised(tree) and "experiment" not in tree:
        raise refusal(
            f"{source} is an experiment of supervised learning, and a benchmark is of "
            f"reinforcement learning: train runs of it (maml-rl train {source}) and test them "
            "side by side (maml-rl evaluate RUN RUN ...)"
        )


def base_experiment(benchmark: Benchmark, words: Words, file: Path) -> Experiment[TaskFamily]:
    """Return the experiment that a benchmark's runs are variants of.

    Raises:
        InputError: if a setting of it is wrong, or it has no inner step.
    """
    found = find_experiment(benchmark.experiment)
    check_not_supervised(read_yaml(found), str(found))
    source = f"{found} with the settings of {file}"
    tree = merged(read_yaml(found), words.in_file)
    family, arguments = experiment_words(tree, source, words.on_line)
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
