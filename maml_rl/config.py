"""One experiment as a tree of frozen dataclasses, read from YAML and command-line flags alike.

A file is turned into flags, and tyro parses and checks both together; what comes later wins.
Each setting lives beside the code that reads it; this module only assembles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

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

LARGEST_FILE = 2**20
"""Bytes of an experiment file beyond which it is refused unread."""

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
        """Check ranges."""
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {self.iterations}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2^63 - 1, got {self.seed}")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        if self.max_refused < 1:
            raise ValueError(f"max_refused must be at least 1, got {self.max_refused}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                "name must be letters, digits, '.', '_' and '-', since a folder is named after "
                f"it; got {self.name!r}"
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


def find_experiment(name: str) -> Path:
    """Return the file of an experiment given as a path, or by the name of one that ships.

    Raises:
        InputError: if there is none, naming the nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_experiments()
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise InputError(f"{name} is a folder; expected a YAML file, such as its config.yaml")
    near = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "`maml-rl list` shows those that ship"
    raise InputError(f"there is no experiment file {name!r}, and none of that name ships: {hint}")


class PlainLoader(yaml.SafeLoader):
    """Reads YAML without tags, aliases and repeated keys.

    An alias lets a small file unfold into one that fills the memory; of two equal keys one would
    be ignored.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem="aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Refuse repeated keys."""
        keys = [str(key.value) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} stands there twice", node.value[number][0].start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, object]:
    """Read an experiment file into nested mappings.

    Raises:
        InputError: if it is no readable YAML mapping.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(f"{path} is too large for an experiment: {path.stat().st_size} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, object]:
    """Read an experiment's text into nested mappings.

    Raises:
        InputError: if it is no YAML mapping, naming the source.
    """
    try:
        # A subclass of SafeLoader: no tag makes it run code.
        content = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = " ".join(str(error).split())
        raise InputError(f"{source} is not plain YAML: {first}") from error
    if not isinstance(content, dict):
        raise InputError(f"{source} holds no settings; expected `name:`, `family:` and so on")
    return content


def leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value of a nested mapping with its dotted path."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def field_paths(cls: type, family: type[TaskFamily], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every setting of an experiment with that family."""
    nested: dict[str, type] = {
        "family": family,
        "policy": PolicySettings,
        "sampling": SamplingSettings,
        "advantages": AdvantageSettings,
        "adaptation": AdaptationSettings,
        "trust_region": TrustRegionSettings,
        "evaluation": EvaluationSettings,
    }
    for item in dataclasses.fields(cls):
        if cls is Experiment and item.name in nested:
            yield from field_paths(nested[item.name], family, f"{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def check_keys(paths: Sequence[str], family: type[TaskFamily], source: str) -> None:
    """Raise InputError, with the nearest right one, for a path that is no setting."""
    known = [FAMILY_NAME, *field_paths(Experiment, family)]
    sections = {k.split(".")[0] for k in known if "." in k}
    for path in paths:
        if path in known:
            continue
        if path in sections:
            raise InputError(f"{source}: {path} must hold settings of its own, one a line")
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "see `maml-rl train EXPERIMENT --help`"
        raise InputError(f"{source}: there is no setting {path!r}: {hint}")


def normal_flag(word: str) -> str:
    """Return the dotted path that a flag such as --family.frame-skip=5 sets."""
    return word.removeprefix("--").split("=", 1)[0].replace("-", "_")


def as_flags(flags: Mapping[str, object]) -> list[str]:
    """Return settings by dotted path as command-line words."""
    words: list[str] = []
    for path, value in flags.items():
        if isinstance(value, list | tuple):
            for part in value:
                if str(part).startswith("--"):
                    raise InputError(f"{path} holds {part!r}, which would be read as a flag")
            words += [f"--{path}", *map(str, value)]
        else:
            words.append(f"--{path}={value}")
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
                raise InputError("--family.name needs a value, such as --family.name ant_dir")
        else:
            rest.append(word)
        i += 1
    return name, rest


def parse_with_tyro(cls: type[C], arguments: Sequence[str], prog: str) -> C:
    """Parse command-line words into a dataclass, or print its help and exit 0.

    Raises:
        InputError: in one sentence, where tyro would print a box.
    """
    wants_help = bool({"--help", "-h"} & set(arguments))
    complaint = io.StringIO()
    try:
        with _PARSING, contextlib.ExitStack() as stack:
            if not wants_help:
                stack.enter_context(contextlib.redirect_stderr(complaint))
                stack.enter_context(contextlib.redirect_stdout(complaint))
            return tyro.cli(cls, args=list(arguments), prog=prog)
    except ValueError as error:
        # From the outermost settings' own checks, which tyro passes on as they are.
        raise InputError(str(error)) from error
    except SystemExit as stop:
        if wants_help:
            raise
        raise InputError(plain_sentence(complaint.getvalue())) from stop


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
    return re.sub(r"^Error parsing \S+: (?=.* must (all )?be )", "", complaint)


def family_from(tree: Mapping[str, object], override: str | None, source: str) -> str:
    """Return the family's name from a flag, or else from a file.

    Raises:
        InputError: if neither names one.
    """
    section = tree.get("family", {})
    if not isinstance(section, dict):
        raise InputError(f"{source}: family must hold settings of its own, such as `name:`")
    name = override if override is not None else section.get("name")
    if name is None:
        raise InputError(f"{source}: family.name is missing; one of {', '.join(envs.FAMILIES)}")
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
        InputError: for an unknown family or key.
    """
    override, rest = split_family_name(flags)
    try:
        family = envs.family_class(family_from(tree, override, source))
    except envs.FamilyError as error:
        raise InputError(str(error)) from error
    in_file = {str(key): value for key, value in leaves(tree)}
    check_keys(list(in_file), family, source)
    in_file.pop(FAMILY_NAME, None)
    given = [normal_flag(w) for w in rest if w.startswith("--")]
    check_keys([g for g in given if g not in (*ignored, "help")], family, "command line")
    return family, [*as_flags(in_file), *rest]


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
