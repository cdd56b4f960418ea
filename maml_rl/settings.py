"""Settings from a file or the command line: keys, types and words, checked one by one.

tyro parses them; keys and types are checked before, so that a message names the setting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from maml_rl.errors import InputError, refusal
from maml_rl.plain_yaml import LONGEST_VALUE, leaves

C = TypeVar("C")

HELP = frozenset(("--help", "-h"))

_PARSING = threading.Lock()
"""tyro prints its complaints, and where print goes is one setting for all threads."""


class Setting(NamedTuple):
    """What a setting may be."""

    kind: object
    """Its type."""
    required: bool
    """Whether every experiment must give it."""


def settings_of(
    cls: type, chosen: type | None = None, prefix: str = ""
) -> Iterator[tuple[str, Setting]]:
    """Yield the dotted path of every setting of a class, and its type.

    `chosen` is that of an experiment's field whose type is known only now.
    """
    kinds = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = kinds[item.name]
        kind = chosen if isinstance(kind, TypeVar) and chosen is not None else kind
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from settings_of(kind, chosen, f"{prefix}{item.name}.")
        else:
            missing = dataclasses.MISSING
            required = item.default is missing and item.default_factory is missing
            yield f"{prefix}{item.name}", Setting(kind, required)


def check_keys(
    paths: Sequence[str],
    settings: Mapping[str, Setting],
    source: str,
    *,
    hint: str = "see `maml-rl train EXPERIMENT --help`",
) -> None:
    """Raise InputError, with the nearest right one or a hint, for a path that is no setting."""
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
        what = f"did you mean {near[0]!r}?" if near else hint
        raise refusal(f"{source}: there is no setting {path!r}: {what}")


def checked_settings(
    settings: Mapping[str, Setting],
    tree: Mapping[str, object],
    source: str,
    flags: Sequence[str],
    *,
    ignored: Sequence[str] = (),
) -> dict[str, object]:
    """Return what a file sets, by dotted path, having checked it and the flags that go with it.

    Args:
        settings: those there are.
        tree: what the file holds.
        source: the file's name, for messages.
        flags: words of the command line.
        ignored: flags that are no settings.

    Raises:
        InputError: for an unknown key, a value of the wrong type or a missing one.
    """
    in_file: dict[str, object] = {}
    for path, value in leaves(tree):
        if path in in_file:
            raise refusal(f"{source}: {path} stands there twice")
        in_file[path] = value
    check_keys(list(in_file), settings, source)
    for path, value in in_file.items():
        check_value(path, value, settings[path].kind, source)
    given = [(path, words) for path, words in flag_values(flags) if path not in (*ignored, "help")]
    check_keys([path for path, _ in given], settings, "command line")
    if not HELP & set(flags):
        for path, words in given:
            check_words(path, words, settings[path].kind)
        there = in_file.keys() | dict(given)
        missing = [path for path, s in settings.items() if s.required and path not in there]
        if missing:
            verb = "are" if len(missing) > 1 else "is"
            raise refusal(f"{source}: {' and '.join(missing)} {verb} missing")
    return in_file


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
        if get_origin(arms[0]) is Literal:
            return f"a list of {', '.join(map(str, get_args(arms[0])))}"
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
        wrong = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        near = [
            match
            for word in wrong
            if word not in choices
            for match in difflib.get_close_matches(word, choices, n=1)
        ]
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


class Choice(NamedTuple):
    """A section of an experiment whose settings depend on the `name` in it."""

    section: str
    """Such as "family"."""
    names: Sequence[str]
    """Those that ship."""
    find: Callable[[str], type]
    """Returns the class of a name.

    Raises:
        InputError: if there is none, naming the nearest.
    """


def split_name(words: Sequence[str], choice: Choice) -> tuple[str | None, list[str]]:
    """Take a choice's --SECTION.name out of words; return it (None if absent) and the rest."""
    name, rest, i, path = None, [], 0, f"{choice.section}.name"
    while i < len(words):
        word = words[i]
        if word.startswith("--") and normal_flag(word) == path:
            if "=" in word:
                name = word.split("=", 1)[1]
            elif i + 1 < len(words):
                i += 1
                name = words[i]
            else:
                raise refusal(f"--{path} needs a value, such as --{path} {choice.names[-1]}")
        else:
            rest.append(word)
        i += 1
    return name, rest


def chosen_class(
    choice: Choice, tree: Mapping[str, object], override: str | None, source: str
) -> type:
    """Return the class that a flag names, or else a file.

    Raises:
        InputError: if neither names one, or there is none of that name.
    """
    section, path = tree.get(choice.section, {}), f"{choice.section}.name"
    if not isinstance(section, dict):
        raise refusal(f"{source}: {choice.section} must hold settings of its own, such as `name:`")
    name = override if override is not None else section.get("name")
    if name is None:
        raise refusal(f"{source}: {path} is missing; one of {', '.join(choice.names)}")
    check_value(path, name, str, source)
    try:
        return choice.find(str(name))
    except InputError as error:
        raise refusal(f"{path}: {error}") from error


def words_of(
    experiment: type,
    choice: Choice,
    tree: Mapping[str, object],
    source: str,
    flags: Sequence[str],
    *,
    ignored: Sequence[str] = (),
) -> tuple[type, list[str]]:
    """Return the class that was chosen and all settings as command-line words, flags last.

    Args:
        experiment: a dataclass with one field of a type that is known only now.
        choice: how that type is named.
        tree: what the YAML file holds.
        source: the file's name, for messages.
        flags: what stands on the command line after it.
        ignored: flags of the command that are no settings of the experiment.

    Raises:
        InputError: for an unknown name or key, a value of the wrong type or a missing one.
    """
    override, rest = split_name(flags, choice)
    chosen, path = chosen_class(choice, tree, override, source), f"{choice.section}.name"
    settings = dict(settings_of(experiment, chosen)) | {path: Setting(str, False)}
    in_file = checked_settings(settings, tree, source, rest, ignored=ignored)
    in_file.pop(path, None)
    return chosen, [*as_flags(in_file), *rest]


def for_tyro(kind: type[C], *marks: object) -> type[C]:
    """Return an experiment's type, known only now, annotated for tyro."""
    marked = (kind, tyro.conf.FlagConversionOff, *marks)
    result: type[C] = Annotated.__class_getitem__(marked)  # type: ignore[attr-defined]
    return result


def parse_command(
    experiment: type, options: type[C], words: Sequence[str], prog: str
) -> tuple[Any, C]:
    """Parse words into an experiment, whose type is known only now, and a command's own options.

    Args:
        experiment: its type, annotated by `for_tyro(..., tyro.conf.arg(name=""))`.
        options: the class of the command's options.
        words: of the command line.
        prog: the command, for its help.

    Raises:
        InputError: in one sentence that names the flag.
    """
    # The experiment decides the flags, so what they are no static type can say, hence Any.
    both: type[Any] = dataclasses.make_dataclass(
        "Command",
        [
            ("experiment", experiment),
            ("options", Annotated.__class_getitem__((options, tyro.conf.arg(name="")))),  # type: ignore[attr-defined]
        ],
        frozen=True,
    )
    parsed = parse_with_tyro(both, words, prog)
    return parsed.experiment, parsed.options


def parse_options(cls: type[C], words: Sequence[str], prog: str) -> C:
    """Parse a command's words into its options, having checked each flag and what it is given.

    Raises:
        InputError: in one sentence that names the flag.
    """
    settings = dict(settings_of(cls))
    if not HELP & set(words):
        for path, values in flag_values(words):
            check_keys([path], settings, "command line", hint=f"see `{prog} --help`")
            # A switch needs no word.
            if values or settings[path].kind is not bool:
                check_words(path, values, settings[path].kind)
    return parse_with_tyro(cls, words, prog)


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


def check_words(path: str, words: list[str], kind: object) -> None:
    """Raise InputError for words of the command line that are no value of the setting's type."""
    takes_list = tuple in (get_origin(kind), *map(get_origin, get_args(kind)))
    if not words and not takes_list:
        raise refusal(f"command line: --{path} needs a value")
    single = len(words) == 1 and not takes_list
    check_value(path, words[0] if single else words, kind, "command line")
