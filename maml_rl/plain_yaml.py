"""Experiment files: YAML without anything that could run code, fill the memory or be overlooked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from maml_rl.errors import refusal

LARGEST_FILE = 2**17
"""Bytes of an experiment file; a longer one is refused and not read to its end."""
TOO_LARGE = f"is too large for an experiment: more than {LARGEST_FILE} bytes"
DEEPEST = 20
"""Mappings and lists within one another in an experiment file; its settings take 2."""
LONGEST_VALUE = 1000
"""Characters of one value."""


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
        raise refusal(
            f"{source} holds no settings; expected `name:`, `family:` or `data:`, and so on"
        )
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
