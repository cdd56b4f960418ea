"""One experiment as a tree of frozen dataclasses, read from YAML and command-line flags alike.

A file is turned into flags, and tyro parses both together; what comes later wins. Keys and types
are checked before, so that a message names the setting; ranges are checked by the settings.
Each setting lives beside the code that reads it; this module only assembles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
import yaml

import envs
from envs import TaskFamily
from maml_rl.advantages import AdvantageSettings
from maml_rl.errors import InputError
from maml_rl.evaluate import EvaluationSettings
from maml_rl.maml import AdaptationSettings
from maml_rl.policy import PolicySettings
from maml_rl.sampler import SamplingSettings
from maml_rl.trust_region import TrustRegionSettings

F = TypeVar("F", bound=TaskFamily)
C = TypeVar("C")

FAMILY_NAME = "family.name"
HELP = frozenset(("--help", "-h"))

LARGEST_FILE = 2**17
"""Bytes of an experiment file; a longer one is refused and not read to its end."""
TOO_LARGE = f"is too large for an experiment: more than {LARGEST_FILE} bytes"
DEEPEST = 20
"""Mappings and lists within one another in an experiment file; its settings take 2."""
LONGEST_VALUE = 1000
"""Characters of one value."""

_PARSING = threading.Lock()
"""tyro prints its complaints, and where print goes is one setting for all threads."""


@dataclass(frozen=True, kw_only=True)
class Experiment(Generic[F]):
    """Everything a training run depends on."""

    name: str
    """Name of the run folder."""
    family: F
    """What is learned: `name` says which family, the rest are its fields."""
    iterations: int
    """Meta-iterations."""
    seed: int = 0
    """Of everything random; the test tasks are the same for every seed."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the policy is evaluated and updated; physics runs on the CPU."""
    threads: int = 0
    """Threads of physics and of the update; 0 is one a core."""
    max_refused: int = 20
    """Updates refused in a row after which the run ends."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    advantages: AdvantageSettings = field(default_factory=AdvantageSettings)
    adaptation: AdaptationSettings = field(default_factory=AdaptationSettings)
    trust_region: TrustRegionSettings = field(default_factory=TrustRegionSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        """Check ranges, and that it fits in memory.

        Raises:
            InputError: naming the setting.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise InputError(
                "name must be at most 100 letters, digits, '.', '_' and '-', beginning with a "
                f"letter or digit, since a folder is named after it; got {self.name!r}"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be between 0 and 2^63 - 1, got {self.seed}")
        for name, least, most in (
            ("iterations", 0, 10**9),
            ("threads", 0, 1024),
            ("max_refused", 1, 10**9),
        ):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
            if value > most:
                raise InputError(f"{name} must be at most {most}, got {value}")
        check_memory(self, physical_memory())


def physical_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(experiment: Experiment[F], available: int) -> None:
    """Raise InputError where more must be in memory at once than the machine has.

    Counts only arrays that are made in any case: the episodes that an update or a test keeps, to
    their full horizon, the adapted parameters of every task, and what the family says of its
    worlds. So what is refused cannot fit; what is not refused may still not fit.

    Args:
        experiment: with every setting in its own range.
        available: bytes.

    Raises:
        InputError: with what to lower, and what it takes, GB.
    """
    family, sampling, test = experiment.family, experiment.sampling, experiment.evaluation
    inner = experiment.adaptation.inner_steps
    A = len(family.action_columns)
    widths = (len(family.observation_columns), *experiment.policy.layers, A)
    parameters = sum((i + 1) * o for i, o in itertools.pairwise(widths)) + A
    # Observation, action, measures, reward and log-probability of a step.
    numbers = widths[0] + A + len(family.measure_columns) + 2
    # On a GPU, one batch at a time is here, and the parameters are there.
    on_cpu = experiment.device == "cpu"
    for section, tasks, episodes, updates in (
        ("sampling", sampling.tasks, sampling.episodes, inner),
        ("evaluation", test.tasks, test.episodes, min(1, test.steps)),
    ):
        batches, adapted = (updates + 1, tasks * updates + 1) if on_cpu else (1, 1)
        at_once = min(sampling.tasks_at_once or tasks, tasks)
        parts = (
            (
                4 * numbers * tasks * episodes * family.episode_steps * batches,
                f"{tasks} tasks x {episodes} episodes x {family.episode_steps} steps",
                f"{section}.tasks, {section}.episodes or family.horizon",
            ),
            (
                4 * parameters * adapted,
                f"policies of {parameters} parameters for {tasks} tasks",
                f"policy.layers or {section}.tasks",
            ),
            (
                family.world_bytes * at_once * episodes,
                f"simulations of {at_once} tasks x {episodes} episodes",
                f"sampling.tasks_at_once, {section}.tasks or {section}.episodes",
            ),
        )
        total = sum(part[0] for part in parts)
        if total > available:
            _, what, lower = max(parts)
            raise InputError(
                f"{section}: {what} take at least {total / 1e9:,.1f} GB of memory at once, and "
                f"this machine has {available / 1e9:,.1f} GB: lower {lower}"
            )


def experiment_type(family: type[TaskFamily], *marks: object) -> type[Experiment[TaskFamily]]:
    """Return the experiment's type for a family that is known only now, annotated for tyro."""
    marked = (Experiment[family], tyro.conf.FlagConversionOff, *marks)  # type: ignore[valid-type]
    result: type[Experiment[TaskFamily]] = Annotated.__class_getitem__(marked)  # type: ignore[attr-defined]
    return result


def shipped_experiments() -> dict[str, Path]:
    """Return the YAML files that travel with the package, by name."""
    here = Path(__file__).parent
    folder = next(
        (f for f in (here / "experiments", here.parent / "experiments") if f.is_dir()), None
    )
    return {} if folder is None else {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def one_line(text: str) -> str:
    """Return a message for a terminal: no control characters, and long values cut in the middle."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    plain = re.sub(
        r"\w{61,}", lambda m: f"{m[0][:20]}...{m[0][-10:]} ({len(m[0])} characters)", plain
    )
    return plain if len(plain) <= 1000 else f"{plain[:700]} ... {plain[-200:]}"


def refusal(text: str) -> InputError:
    """Return the error to raise for wrong input, whatever the input put into its message."""
    return InputError(one_line(text))


def find_experiment(name: str) -> Path:
    """Return the file of an experiment given as a path, or by the name of one that ships.

    Raises:
        InputError: if there is none, naming the nearest.
    """
    path = Path(name)
    # A name may be too long for a path.
    with contextlib.suppress(OSError):
        if path.is_file():
            return path
        if path.is_dir():
            raise refusal(f"{name!r} is a folder; expected a YAML file, such as its config.yaml")
    shipped = shipped_experiments()
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "`maml-rl list` shows those that ship"
    raise refusal(f"there is no experiment file {name!r}, and none of that name ships: {hint}")


PLAIN_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))


class PlainLoader(yaml.SafeLoader):
    """Reads YAML without tags, aliases and repeated keys, and not to any depth.

    An alias lets a small file unfold into one that fills the memory; of two equal keys one would
    be ignored. A word is null, true or false, a number, or text: there are no dates.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML declares it so
        first: [(tag, pattern) for tag, pattern in kinds if tag in PLAIN_TAGS]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._keys: list[str] = []

    def compose_node(
        self, parent: yaml.Node | None, index: yaml.Node | int | None
    ) -> yaml.Node | None:
        """Refuse aliases, tags and depth; `index` is the key's node where the parent is a mapping.

        Raises:
            MarkedYAMLError: naming the key.
        """
        self._keys.append(index.value if isinstance(index, yaml.ScalarNode) else "")
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's
        what = ""
        if isinstance(event, yaml.AliasEvent):
            what = f"aliases (*{event.anchor}) are not allowed"
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag:
            what = f"tags ({event.tag.replace('tag:yaml.org,2002:', '!!')}) are not allowed"
        elif len(self._keys) > DEEPEST:
            what = "nested too deeply"
        if what:
            key = ".".join(filter(None, self._keys))
            problem = f"{key}: {what}" if key else what
            mark = event.start_mark
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)  # type: ignore[arg-type]  # either kind of mark will do
        node = super().compose_node(parent, index)  # type: ignore[arg-type]  # int alone is wrong
        self._keys.pop()
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Refuse keys that are no words, and repeated ones.

        Raises:
            MarkedYAMLError: naming the key.
        """
        keys = set()
        for key, _ in node.value:
            problem = ""
            if not isinstance(key, yaml.ScalarNode):
                problem = "a list or mapping stands where a key is expected"
            elif key.value in keys:
                problem = f"{key.value} stands there twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> object:
        """Return a number, or its text where that is none, such as 0b_, or too long to be one."""
        numbers = {PLAIN_TAGS[2]: self.construct_yaml_int, PLAIN_TAGS[3]: self.construct_yaml_float}
        if len(node.value) > LONGEST_VALUE:
            return node.value
        try:
            return numbers[node.tag](node)
        except (ValueError, OverflowError):
            return node.value


for _tag in PLAIN_TAGS[2:]:
    PlainLoader.add_constructor(_tag, PlainLoader.construct_number)


def read_yaml(path: Path) -> dict[str, object]:
    """Read an experiment file into nested mappings.

    Raises:
        InputError: if it is no readable YAML mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise refusal(f"{path} {TOO_LARGE}")
        text = content.decode("utf-8")
    except OSError as error:
        raise refusal(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise refusal(f"{path} is not a text file (UTF-8)") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, object]:
    """Read an experiment's text into nested mappings.

    Raises:
        InputError: if it is no YAML mapping, naming the source.
    """
    if len(text) > LARGEST_FILE:
        raise refusal(f"{source} {TOO_LARGE}")
    try:
        # A subclass of SafeLoader: no tag makes it run code.
        content = yaml.load(text, PlainLoader)
    except yaml.YAMLError as error:
        raise refusal(f"{source} is not plain YAML: {yaml_complaint(error, text)}") from error
    if not isinstance(content, dict):
        raise refusal(f"{source} holds no settings; expected `name:`, `family:` and so on")
    return content


def yaml_complaint(error: yaml.YAMLError, text: str) -> str:
    """Return what is wrong with a text and in which line, without the picture of the line."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: character #x{error.character:04x} is not allowed"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = ", ".join(filter(None, (error.context, error.problem)))
        return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    return str(error)


def leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value of a nested mapping with its dotted path; an empty mapping is a value."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


class Setting(NamedTuple):
    """What a setting may be."""

    kind: object
    """Its type."""
    required: bool
    """Whether every experiment must give it."""


def settings_of(
    cls: type, family: type[TaskFamily], prefix: str = ""
) -> Iterator[tuple[str, Setting]]:
    """Yield the dotted path of every setting of an experiment with that family, and its type."""
    kinds = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = family if kinds[item.name] is F else kinds[item.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from settings_of(kind, family, f"{prefix}{item.name}.")
        else:
            missing = dataclasses.MISSING
            required = item.default is missing and item.default_factory is missing
            yield f"{prefix}{item.name}", Setting(kind, required)


def check_keys(paths: Sequence[str], settings: Mapping[str, Setting], source: str) -> None:
    """Raise InputError, with the nearest right one, for a path that is no setting."""
    sections = {k.rpartition(".")[0] for k in settings if "." in k}
    for path in paths:
        if path in settings:
            continue
        if path in sections:
            raise refusal(f"{source}: {path} must hold settings of its own, one a line")
        owner = next((k for k in settings if path.startswith(f"{k}.")), "")
        if owner:
            wanted = expectation(settings[owner].kind)
            raise refusal(f"{source}: {owner} must be {wanted}, so there is no setting {path!r}")
        near = difflib.get_close_matches(path, settings, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "see `maml-rl train EXPERIMENT --help`"
        raise refusal(f"{source}: there is no setting {path!r}: {hint}")


EXPECTATIONS: Mapping[object, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("True or False", "True or False"),
}
"""What is expected of one value of a type, and of several."""


def expectation(kind: object) -> str:
    """Return in words what a setting of that type must be."""
    origin, arms = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(expectation(arm) for arm in arms if arm is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, arms))}"
    if origin is tuple and arms:
        count = "" if arms[-1] is ... else f"{len(arms)} "
        return f"a list of {count}{EXPECTATIONS.get(arms[0], ('', 'values'))[1]}"
    return EXPECTATIONS.get(kind, (str(kind), ""))[0]


def fits(value: object, kind: object) -> bool:
    """Whether a value, from YAML or a word of the command line, can be read as that type.

    Checked here and not left to tyro so that the message is a sentence. A type that is not known
    here is left to tyro.
    """
    origin, arms = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, arm) for arm in arms)
    if origin is Literal:
        return str(value) in map(str, arms)
    if origin is tuple and arms:
        if not isinstance(value, list):
            return False
        kinds = arms[:1] * len(value) if arms[-1] is ... else arms
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if kind is NoneType or kind is bool:
        return str(value) in {NoneType: ("None",), bool: ("True", "False")}[kind]
    if kind is int or kind is float:
        try:
            kind(str(value))
        except ValueError:
            return False
    return isinstance(value, str) if kind is str else True


def check_value(path: str, value: object, kind: object, source: str) -> None:
    """Raise InputError, with what is expected, for a value that is not of the setting's type."""
    length = max((len(str(v)) for v in (value if isinstance(value, list) else [value])), default=0)
    if length > LONGEST_VALUE:
        raise refusal(
            f"{source}: {path} must be at most {LONGEST_VALUE} characters long, got {length}"
        )
    if not fits(value, kind):
        choices = [str(c) for arm in (kind, *get_args(kind)) for c in get_args(arm)]
        near = difflib.get_close_matches(value if isinstance(value, str) else "", choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        got = "null" if value is None else repr(value) if isinstance(value, str) else str(value)
        raise refusal(f"{source}: {path} must be {expectation(kind)}, got {got}{hint}")


def normal_flag(word: str) -> str:
    """Return the dotted path that a flag such as --family.frame-skip=5 sets."""
    return word.removeprefix("--").split("=", 1)[0].replace("-", "_")


def flag_values(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the dotted path of every flag among command-line words, with the words it is given."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            _, equals, value = word.partition("=")
            found.append((normal_flag(word), [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found


def as_flags(flags: Mapping[str, object]) -> list[str]:
    """Return settings by dotted path as command-line words."""
    words: list[str] = []
    for path, value in flags.items():
        try:
            parts = [str(v) for v in (value if isinstance(value, list | tuple) else [value])]
        except ValueError as error:
            raise refusal(f"{path} is too large a number") from error
        if not isinstance(value, list | tuple):
            words.append(f"--{path}={parts[0]}")
            continue
        for part in parts:
            if part.startswith("-") and not fits(part, float):
                raise refusal(f"{path} holds {part!r}, which would be read as a flag")
        words += [f"--{path}", *parts]
    return words


def split_family_name(words_: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take --family.name out of command-line words; return it (None if absent) and the rest."""
    name, rest, i = None, [], 0
    while i < len(words_):
        word = words_[i]
        if word.startswith("--") and normal_flag(word) == FAMILY_NAME:
            if "=" in word:
                name = word.split("=", 1)[1]
            elif i + 1 < len(words_):
                i += 1
                name = words_[i]
            else:
                raise refusal("--family.name needs a value, such as --family.name ant_dir")
        else:
            rest.append(word)
        i += 1
    return name, rest


def parse_with_tyro(cls: type[C], arguments: Sequence[str], prog: str) -> C:
    """Parse command-line words into a dataclass, or print its help and exit 0.

    Raises:
        InputError: in one sentence, where tyro would print a box.
    """
    wants_help = bool(HELP & set(arguments))
    complaint = io.StringIO()
    try:
        with _PARSING, contextlib.ExitStack() as stack:
            if not wants_help:
                stack.enter_context(contextlib.redirect_stderr(complaint))
                stack.enter_context(contextlib.redirect_stdout(complaint))
            return tyro.cli(cls, args=list(arguments), prog=prog)
    except ValueError as error:
        # From the outermost settings' own checks, which tyro passes on as they are.
        raise refusal(str(error)) from error
    except SystemExit as stop:
        if wants_help:
            raise
        own = complaint_of_settings(stop)
        raise refusal(own or plain_sentence(complaint.getvalue())) from stop


def complaint_of_settings(stop: BaseException) -> str:
    """Return what the settings' own checks complained of before tyro put it in a box, or "".

    tyro breaks a long number in the box into several lines, which nothing can join again.
    """
    error: BaseException | None = stop
    while error is not None and not isinstance(error, ValueError):
        error = error.__context__
    # A ValueError from the conversion of a word does not name the setting; the box does.
    frames = [] if error is None else list(traceback.walk_tb(error.__traceback__))
    built = any(frame.f_code.co_name == "__post_init__" for frame, _ in frames)
    return str(error) if built else ""


def plain_sentence(box: str) -> str:
    """Take the complaint out of one of tyro's boxes, drawn with lines or with plain hyphens."""
    paragraphs: list[list[str]] = [[]]
    for line in box.strip().splitlines():
        text = line.strip("│| ")
        if re.fullmatch(r"[╭╰].*|[-─]{5,}", text):
            paragraphs.append([])
        else:
            paragraphs[-1].append(text)
    # A box carries its title in the line above; without one the title is a paragraph. Either way
    # the complaint is the second.
    complaint = " ".join(paragraphs[1] if len(paragraphs) > 1 else paragraphs[0])
    # Our own checks name the setting themselves.
    complaint = re.sub(r"^Error parsing \S+: (?=.* must (all )?be )", "", complaint)
    for python, wanted in (
        (r"invalid literal for int\(\) with base 10", "a whole number"),
        ("could not convert string to float", "a number"),
    ):
        pattern = rf"^Error parsing --(\S+): .*{python}: ('.*')$"
        complaint = re.sub(pattern, rf"\1 must be {wanted}, got \2", complaint)
    return complaint


def family_from(tree: Mapping[str, object], override: str | None, source: str) -> str:
    """Return the family's name from a flag, or else from a file.

    Raises:
        InputError: if neither names one.
    """
    section = tree.get("family", {})
    if not isinstance(section, dict):
        raise refusal(f"{source}: family must hold settings of its own, such as `name:`")
    name = override if override is not None else section.get("name")
    if name is None:
        raise refusal(f"{source}: family.name is missing; one of {', '.join(envs.FAMILIES)}")
    check_value(FAMILY_NAME, name, str, source)
    return str(name)


def experiment_words(
    tree: Mapping[str, object], source: str, flags: Sequence[str], *, ignored: Sequence[str] = ()
) -> tuple[type[TaskFamily], list[str]]:
    """Return an experiment's family and all its settings as command-line words, flags last.

    Args:
        tree: what the YAML file holds.
        source: the file's name, for messages.
        flags: what stands on the command line after it.
        ignored: flags of the command that are no settings of the experiment.

    Raises:
        InputError: for an unknown family or key, a value of the wrong type or a missing one.
    """
    override, rest = split_family_name(flags)
    try:
        family = envs.family_class(family_from(tree, override, source))
    except envs.FamilyError as error:
        raise refusal(f"family.name: {error}") from error
    settings = dict(settings_of(Experiment, family)) | {FAMILY_NAME: Setting(str, False)}
    in_file: dict[str, object] = {}
    for path, value in leaves(tree):
        if path in in_file:
            raise refusal(f"{source}: {path} stands there twice")
        in_file[path] = value
    check_keys(list(in_file), settings, source)
    for path, value in in_file.items():
        check_value(path, value, settings[path].kind, source)
    in_file.pop(FAMILY_NAME, None)
    given = [(path, words) for path, words in flag_values(rest) if path not in (*ignored, "help")]
    check_keys([path for path, _ in given], settings, "command line")
    if not HELP & set(rest):
        for path, words in given:
            check_words(path, words, settings[path].kind)
        there = in_file.keys() | dict(given)
        missing = [path for path, s in settings.items() if s.required and path not in there]
        if missing:
            verb = "are" if len(missing) > 1 else "is"
            raise refusal(f"{source}: {' and '.join(missing)} {verb} missing")
    return family, [*as_flags(in_file), *rest]


def check_words(path: str, words: list[str], kind: object) -> None:
    """Raise InputError for words of the command line that are no value of the setting's type."""
    takes_list = tuple in (get_origin(kind), *map(get_origin, get_args(kind)))
    if not words and not takes_list:
        raise refusal(f"command line: --{path} needs a value")
    single = len(words) == 1 and not takes_list
    check_value(path, words[0] if single else words, kind, "command line")


def load_experiment(name: str | Path, **overrides: object) -> Experiment[TaskFamily]:
    """Load an experiment by path or shipped name; keywords override settings.

    Nested settings are written with two underscores: `sampling__tasks=8`.

    Raises:
        InputError: if the file or an override is wrong.
    """
    path = find_experiment(str(name))
    return experiment_from(
        read_yaml(path), str(path), **{k.replace("__", "."): v for k, v in overrides.items()}
    )


def experiment_from(
    tree: Mapping[str, object], source: str, **overrides: object
) -> Experiment[TaskFamily]:
    """Build an experiment from nested mappings and overrides by dotted path.

    Raises:
        InputError: if either is wrong, naming the source.
    """
    family, arguments = experiment_words(tree, source, as_flags(overrides))
    return parse_with_tyro(experiment_type(family), arguments, "maml-rl")


def family_name(family: TaskFamily) -> str:
    """Return the name that `envs.family_class` finds this family's class by."""
    cls = type(family)
    with contextlib.suppress(envs.FamilyError):
        if envs.family_class(cls.name) is cls:
            return cls.name
    return f"{cls.__module__}:{cls.__qualname__}"


def as_tree(experiment: Experiment[TaskFamily]) -> dict[str, object]:
    """Return all settings, resolved, as plain nested mappings: a valid experiment file."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    tree = {f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment)}
    family = experiment.family
    return {
        key: {"name": family_name(family), **_plain_dict(plain(dataclasses.asdict(family)))}
        if key == "family"
        else plain(dataclasses.asdict(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
        for key, value in tree.items()
    }


def _plain_dict(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value


def to_yaml(experiment: Experiment[TaskFamily]) -> str:
    """Return all settings, resolved, as YAML."""
    return yaml.safe_dump(as_tree(experiment), sort_keys=False)
