"""What a benchmark compares, read from its file and the command line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from envs.family import TaskFamily
from maml_rl.comparison import METHODS, RANDOM, Method
from maml_rl.config import (
    Experiment,
    as_tree,
    check_name,
    experiment_type,
    experiment_words,
    find_experiment,
    is_supervised,
)
from maml_rl.errors import InputError, refusal
from maml_rl.plain_yaml import leaves, parse_yaml, read_yaml
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

OwnSettings = Mapping[Method, Mapping[str, object]]
"""Settings that only one method has: by method, and by dotted path."""

AS_A_WORD = tyro.constructors.PrimitiveConstructorSpec[OwnSettings](
    nargs=1,
    metavar="MAPPING",
    instance_from_str=lambda words: json.loads(words[0]),
    is_instance=lambda value: isinstance(value, Mapping),
    str_from_instance=lambda own: [json.dumps(own)],
)
"""How `settings_of` goes through tyro, once checked, as all that a file says does."""


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
    iteration where maml draws two or more, and has as many times the iterations; where
    `settings_of` gives either batches of another size, as many as make up as many episodes,
    rounded up."""
    tasks: Literal["test", "paper"] = "test"
    """Tasks that training never drew, or the 40 that the paper's numbers were measured on."""
    pretrained_step_size: float | None = None
    """Of the first test update of pretrained; by default maml's alpha, or its own where
    `settings_of` gives it one or alpha goes with each policy's noise."""
    random_step_size: float | None = None
    """Of the first test update of random; by default maml's alpha, or its own where alpha goes
    with each policy's noise."""
    candidates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Step sizes of which each method's best is chosen on validation tasks; may be empty."""
    validation_tasks: int = 20
    """Tasks to choose it on; no test uses them."""
    settings_of: Annotated[OwnSettings, AS_A_WORD] = field(default_factory=dict)
    """Settings of the experiment that only one method has, in its training and in its test, such as
    '{oracle: {sampling.episodes: 40}}'. A flag that is every method's wins over them."""

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
        file: the benchmark's YAML. `settings` in it are settings of the experiment, `settings_of`
            those of one method.
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
    own: object = tree.pop("settings_of", {})
    settings = dict(settings_of(Benchmark))
    # Read here, and not by tyro: it is a mapping.
    del settings["settings_of"]
    ours, theirs, of_one = sorted_flags(flags, {*settings, *ignored})
    in_file = checked_settings(settings, tree, str(file), ours, ignored=ignored)
    on_line = [path for path, _ in flag_values(theirs)]
    known = settings | dict.fromkeys(ignored, Setting(bool, required=False))
    check_of_experiment(on_line, dict(leaves(overrides)), known, file)
    # The file's and the command line's: a method that is left out for once keeps its settings.
    said = flag_values([*as_flags({"methods": METHODS, **in_file}), *ours])
    methods = [word for path, words in said if path == "methods" for word in words]
    source = str(file)
    for _, words in flag_values(of_one):
        source = "command line"
        own = parse_yaml(" ".join(words), "--settings-of")
    # A flag of the experiment is every method's.
    in_file["settings_of"] = json.dumps(
        {
            method: {path: value for path, value in settings.items() if path not in on_line}
            for method, settings in own_settings(own, methods, source).items()
        }
    )
    return Words([*as_flags(in_file), *ours], overrides, theirs)


def sorted_flags(
    flags: Sequence[str], of_benchmark: Collection[str]
) -> tuple[list[str], list[str], list[str]]:
    """Return words of the command line: the benchmark's, its experiment's, and `settings_of`."""
    ours: list[str] = []
    theirs: list[str] = []
    of_one: list[str] = []
    where = ours
    for word in flags:
        if word.startswith("-"):
            known = word in HELP or normal_flag(word) in of_benchmark
            # What a flag is given follows it, and may be a negative number.
            where = ours if known else theirs if word.startswith("--") else where
            where = of_one if normal_flag(word) == "settings_of" else where
        where.append(word)
    return ours, theirs, of_one


def check_of_experiment(
    on_line: Collection[str],
    overrides: Collection[str],
    of_benchmark: Mapping[str, Setting],
    file: Path,
) -> None:
    """Raise InputError for a setting that is neither's, or that the benchmark sets itself.

    Args:
        on_line: paths of what the command line says of the experiment.
        overrides: paths of what the file says of it.
        of_benchmark: settings of the benchmark and flags of the command.
        file: the benchmark's.
    """
    sections = {item.name for item in fields(Experiment)}
    for path in on_line:
        if path.partition(".")[0] == "settings_of":
            raise refusal(
                "command line: --settings-of takes all that it sets as one word, such as "
                "'{oracle: {sampling.episodes: 40}}'"
            )
        if path.partition(".")[0] not in sections:
            hint = f"see `maml-rl benchmark {file} --help`"
            check_keys([path], of_benchmark, "command line", hint=hint)
    for path in (*overrides, *on_line):
        if path in ("name", "seed", "iterations"):
            instead = {"seed": "seeds"}.get(path, path)
            raise refusal(f"{file}: {path} of the experiment is set by the benchmark's {instead}")


NOT_OF_ONE: Mapping[str, str] = {
    r"name|seed|iterations": "the benchmark sets it for each method",
    r"adaptation\.inner_steps|policy\.observe_task": "it is what makes the method what it is",
    r"(family|warp)(\..*)?|physics": "all methods meet the same tasks and physics",
    # How later steps shrink goes with alpha, which each method has its own.
    r"evaluation(\.(?!later_step_scale$).*)?": "all methods are tested alike",
    r"sampling\.count": "what all methods sample is counted alike",
}
"""Settings that no method may have of its own, as patterns, and why."""


def own_settings(
    tree: object, methods: Collection[str], source: str
) -> dict[str, dict[str, object]]:
    """Return what a benchmark's `settings_of` says, by method and dotted path.

    Whether there are such settings and what they may be is not known without the family.

    Args:
        tree: what stands under it.
        methods: those of the benchmark.
        source: the file's name, for messages.

    Raises:
        InputError: for a method that may have none, or a setting that is all methods'.
    """
    usage = "must hold settings of the experiment, such as `sampling.episodes:`"
    if not isinstance(tree, dict):
        raise refusal(f"{source}: settings_of must hold methods, such as `oracle:`, with settings")
    own: dict[str, dict[str, object]] = {}
    for where, value in leaves(tree):
        method, _, path = where.partition(".")
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(METHODS)}"
            raise refusal(f"{source}: settings_of: there is no method {method!r}: {hint}")
        if method == RANDOM:
            raise refusal(
                f"{source}: settings_of.random: random is not trained, so it has the settings of "
                "the experiment; the step size of its test is random_step_size"
            )
        if method not in methods:
            raise refusal(f"{source}: settings_of.{method}: {method} is not among the methods")
        if not path:
            raise refusal(f"{source}: settings_of.{method} {usage}")
        for pattern, reason in NOT_OF_ONE.items():
            if re.fullmatch(pattern, path):
                raise refusal(f"{source}: settings_of must not set {where}, since {reason}")
        if path in own.setdefault(method, {}):
            raise refusal(f"{source}: settings_of.{where} stands there twice")
        own[method][path] = value
    return own


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


def with_own_settings(
    base: Experiment[TaskFamily], benchmark: Benchmark, method: Method
) -> Experiment[TaskFamily]:
    """Return the experiment with the settings that only this method has.

    Raises:
        InputError: if one is unknown, of the wrong type or out of its range.
    """
    own = benchmark.settings_of.get(method, {})
    if not own:
        return base
    source = f"settings_of.{method}"
    family, words = experiment_words(merged(as_tree(base), own), source, ())
    try:
        return parse_with_tyro(experiment_type(family), words, "maml-rl benchmark")
    except InputError as error:
        raise refusal(f"{source}: {error}") from error


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
