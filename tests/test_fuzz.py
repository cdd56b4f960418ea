"""Malformed experiments by the hundred, through the real command line: exit 2 and one sentence.

Every example takes an experiment that ships and breaks one thing in it, in a way that says which
key the message must name. Nothing may be written, no code run, no training begun.

The slow test runs at least 100 examples of each of 12 kinds, so more than 1000 in all; the fast one
a tenth of that. A kind with fewer different examples (a missing key) runs all it has. Both are the
same at every run: to search further, run the slow one with `derandomize=False` and more examples.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import envs
from maml_rl import cli
from maml_rl.config import as_tree, load_experiment, shipped_experiments
from maml_rl.plain_yaml import leaves

Tree = dict[str, object]

EXPERIMENTS = sorted(shipped_experiments())
FILE = "experiment.yaml"


class Broken(NamedTuple):
    """A malformed experiment."""

    content: bytes
    """Of the file."""
    named: str
    """What the message must name: a key's last part, or the file where all of it is damaged."""
    flags: tuple[str, ...] = ()
    """What stands on the command line after it."""


class Range(NamedTuple):
    """The numbers that a setting may hold."""

    low: float
    high: float
    open: bool = False
    """Whether the bounds themselves are out of range."""


RANGES = {
    "seed": Range(0, 2**63 - 1),
    "iterations": Range(0, 10**9),
    "threads": Range(0, 1024),
    "max_refused": Range(1, 10**9),
    "policy.layers": Range(1, 10**5),
    "policy.initial_log_std": Range(math.log(1e-6), 10.0),
    "policy.action_scale": Range(5e-324, 1e6),
    "sampling.tasks": Range(1, 10**5),
    "sampling.episodes": Range(1, 10**5),
    "sampling.tasks_at_once": Range(0, 10**5),
    "sampling.max_diverged": Range(0.0, 1.0),
    "warp.njmax": Range(0, 10**5),
    "warp.nconmax": Range(0, 10**5),
    "advantages.discount": Range(0.0, 1.0),
    "advantages.gae_lambda": Range(0.0, 1.0),
    "adaptation.inner_steps": Range(0, 100),
    "adaptation.step_size": Range(5e-324, 1e6),
    "adaptation.later_from": Range(1, 10**9),
    "adaptation.later_step_sizes": Range(5e-324, 1e6),
    "trust_region.max_kl": Range(5e-324, 1e6),
    "trust_region.later_from": Range(1, 10**9),
    "trust_region.later_max_kls": Range(5e-324, 1e6),
    "trust_region.cg_iterations": Range(1, 10**4),
    "trust_region.metric_share": Range(5e-324, 1.0),
    "trust_region.damping": Range(0.0, 1e6),
    "trust_region.backtracks": Range(1, 10**4),
    "trust_region.backtrack_ratio": Range(0.0, 1.0, open=True),
    "trust_region.momentum": Range(0.0, math.nextafter(1.0, 0.0)),
    "evaluation.tasks": Range(1, 10**5),
    "evaluation.episodes": Range(1, 10**5),
    "evaluation.steps": Range(0, 1000),
    "evaluation.later_step_scale": Range(5e-324, 1e6),
    "family.horizon": Range(1, 10**6),
    "family.frame_skip": Range(1, 1000),
    "family.timestep": Range(1e-5, 0.1),
    "family.position_noise": Range(0.0, 1e6),
    "family.velocity_noise": Range(0.0, 1e6),
    "family.control_cost": Range(0.0, 1e6),
    "family.total_mass": Range(1e-3, 1e6),
    "family.speed_low": Range(-1e6, 1e6),
    "family.speed_high": Range(-1e6, 1e6),
    "family.speed_bonus": Range(-1e6, 1e6),
    "family.alive_bonus": Range(-1e6, 1e6),
    "family.z_low": Range(-1e6, 1e6),
    "family.z_high": Range(-1e6, 1e6),
    "family.soft_solref": Range(-1e6, 1e6),
    "family.soft_solimp": Range(-1e6, 1e6),
    "family.goal_range": Range(0.0, 1e6),
    "family.max_move": Range(1e-9, 1e6),
    "family.goal_radius": Range(0.0, 1e6),
}
"""Written down here a second time, so that a bound that is lost is noticed."""
MAY_BE_EMPTY = (
    "policy.layers",
    "adaptation.later_from",
    "adaptation.later_step_sizes",
    "trust_region.later_from",
    "trust_region.later_max_kls",
)
"""Lists of any length."""


@lru_cache
def whole(name: str) -> Tree:
    """A shipped experiment with all its settings; not to be written to."""
    return as_tree(load_experiment(name))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def last(path: str) -> str:
    return path.rpartition(".")[2]


def section(tree: Tree, name: str) -> Tree:
    found = tree[name]
    assert isinstance(found, dict)
    return found


def put(tree: Tree, path: str, value: object) -> Tree:
    """A copy of the tree with another value, or a new one, at a dotted path."""
    changed = copy.deepcopy(tree)
    holder, _, key = path.rpartition(".")
    (section(changed, holder) if holder else changed)[key] = value
    return changed


def without(tree: Tree, path: str) -> Tree:
    """A copy of the tree without what stands at a dotted path."""
    changed = copy.deepcopy(tree)
    holder, _, key = path.rpartition(".")
    del (section(changed, holder) if holder else changed)[key]
    return changed


def dump(tree: Tree) -> bytes:
    """A file, one setting a line."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.encode("utf-8", "surrogatepass")


def may_be_null(tree: Tree, path: str) -> bool:
    """Whether null means that the family's protocol decides."""
    holder, _, key = path.rpartition(".")
    if holder != "family":
        return False
    cls = envs.family_class(str(section(tree, "family")["name"]))
    return any(f.name == key and f.default is None for f in dataclasses.fields(cls))


def reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


TEXTS = st.text(max_size=60).filter(
    lambda text: not reads_as_number(text) and text not in ("None", "True", "False")
)
TREES = st.sampled_from(EXPERIMENTS).map(whole)
DATES = st.dates().map(str) | st.datetimes().map(str)
MAPPINGS = st.dictionaries(st.sampled_from(("a", "tasks", "name")), st.integers(), max_size=2)


@st.composite
def unknown_keys(draw: st.DrawFn) -> Broken:
    """A key too many, at any level: a slip of the pen or any word."""
    tree = draw(TREES)
    holder = draw(st.sampled_from(["", *(k for k, v in tree.items() if isinstance(v, dict))]))
    known = [*(section(tree, holder) if holder else tree)]
    right = draw(st.sampled_from(known))
    spot = draw(st.integers(0, len(right) - 1))
    slips = (right[:spot] + right[spot + 1 :], right[:spot] + "q" + right[spot:], right.upper())
    key = draw(st.sampled_from(slips) | st.from_regex(r"[a-z][a-z0-9_-]{0,40}", fullmatch=True))
    if (
        not key
        or key in known
        or key.lower() in ("null", "true", "false", "on", "off", "yes", "no")
    ):
        key = "unheard_of"
    value = draw(st.integers() | TEXTS | st.lists(st.integers(), max_size=3) | MAPPINGS)
    return Broken(dump(put(tree, f"{holder}.{key}" if holder else key, value)), key)


@st.composite
def hostile_keys(draw: st.DrawFn) -> Broken:
    """A key of any characters, or no text at all."""
    tree = copy.deepcopy(draw(TREES))
    odd: st.SearchStrategy[object] = st.none() | st.booleans() | st.integers() | st.floats()
    key = draw(TEXTS | st.integers(10, 1000).map(lambda n: "k" * n) | odd)
    broken: dict[object, object] = dict(tree.items())
    broken[key] = draw(st.integers())
    text = yaml.safe_dump(broken, sort_keys=False, width=math.inf)
    return Broken(text.encode("utf-8", "surrogatepass"), FILE)


@st.composite
def wrong_types(draw: st.DrawFn) -> Broken:
    """What is no number where a number stands, and so on for every setting."""
    tree = draw(TREES)
    path, value = draw(st.sampled_from(list(leaves(tree))))
    wrong: st.SearchStrategy[object] = (
        MAPPINGS | st.just([value]) | st.just([[value]]) | st.lists(TEXTS, min_size=1, max_size=3)
    )
    if not may_be_null(tree, path):
        wrong |= st.none()
    if is_number(value):
        wrong |= TEXTS | DATES | st.booleans() | st.lists(st.integers(), max_size=3)
    if isinstance(value, int) and not isinstance(value, bool):
        wrong |= st.floats()
    if isinstance(value, bool):
        wrong |= TEXTS | st.integers() | st.floats()
    if isinstance(value, str):
        wrong |= st.integers() | st.floats() | st.booleans()
    if isinstance(value, list):
        wrong = TEXTS | st.integers() | st.booleans() | st.just([value]) | st.just([None])
        wrong |= st.lists(TEXTS, min_size=1, max_size=3) | st.just([*value, "x"])
    if isinstance(value, str) and path != "name":
        wrong |= TEXTS
    return Broken(dump(put(tree, path, draw(wrong))), last(path))


def beyond(limits: Range, whole_number: bool) -> st.SearchStrategy[float]:
    """Numbers out of a range, near and far."""
    low, high = limits.low, limits.high
    if whole_number:
        near = st.sampled_from((int(low) - 1, int(high) + 1))
        return near | st.integers(max_value=int(low) - 1) | st.integers(int(high) + 1, 10**400)
    below = st.floats(max_value=low, exclude_max=not limits.open, allow_infinity=False)
    above = st.floats(min_value=high, exclude_min=not limits.open, allow_infinity=False)
    return below | above


def numbers(tree: Tree) -> list[tuple[str, bool, int]]:
    """Path of every number, whether it is a whole one, and how long its list is, or 0."""
    found = []
    for path, value in leaves(tree):
        parts = value if isinstance(value, list) else [value]
        if all(map(is_number, parts)):
            counts = path in RANGES and isinstance(RANGES[path].high, int)
            found.append((path, counts, len(parts) if isinstance(value, list) else 0))
    return found


def in_list(draw: st.DrawFn, value: float, length: int) -> object:
    """The value, or a list of such a length that holds it among ones."""
    if not length:
        return value
    listed: list[float] = [1] * length
    listed[draw(st.integers(0, length - 1))] = value
    return listed


@st.composite
def wrong_ranges(draw: st.DrawFn) -> Broken:
    """Zero, negative, too large: whatever a number must not be."""
    tree = draw(TREES)
    path, counts, length = draw(st.sampled_from(numbers(tree)))
    value = in_list(draw, draw(beyond(RANGES[path], counts)), length)
    return Broken(dump(put(tree, path, value)), last(path))


@st.composite
def huge_numbers(draw: st.DrawFn) -> Broken:
    """10^6 to 10^400, 1e308, infinity and NaN, and numbers of more digits than Python converts."""
    tree = draw(TREES)
    path, _, length = draw(st.sampled_from(numbers(tree)))
    sizes = st.integers(6, 400).map(lambda n: 10**n).filter(lambda n: n > RANGES[path].high)
    floats = st.sampled_from((1e308, -1e308, math.inf, -math.inf, math.nan))
    content = dump(put(tree, path, in_list(draw, draw(sizes | floats), length)))
    if draw(st.integers(0, 3)) == 0:
        long = draw(st.sampled_from(("9" * 5000, "0x" + "f" * 5000, "1" + ":59" * 2000, "0b_")))
        long = draw(st.sampled_from((long, f"-{long}", f"{long}.5", f'"{long}"')))
        content = dump(put(tree, path, "HERE")).replace(b"HERE", long.encode())
    return Broken(content, last(path))


@st.composite
def wrong_nesting(draw: st.DrawFn) -> Broken:
    """A section that is none, a setting that is a section, a section inside another."""
    tree = draw(TREES)
    name = draw(st.sampled_from([k for k, v in tree.items() if isinstance(v, dict)]))
    path, value = draw(st.sampled_from(list(leaves(tree))))
    how = draw(st.sampled_from(("no section", "a section", "deeper", "within", "all", "a list")))
    if how == "no section":
        odd: st.SearchStrategy[object] = st.none() | st.integers() | TEXTS
        odd |= st.lists(st.integers()) | st.just([tree[name]]) | st.just({})
        return Broken(dump(put(tree, name, draw(odd))), name)
    if how == "a section":
        return Broken(dump(put(tree, path, {last(path): value})), last(path))
    if how == "deeper":
        return Broken(dump(put(tree, path, {"a": {"b": value}})), last(path))
    if how == "within":
        return Broken(dump(put(tree, f"{name}.within", tree[name])), "within")
    if how == "all":
        return Broken(dump({"experiment": tree}), "family.name")
    return Broken(yaml.safe_dump([tree]).encode(), FILE)


@st.composite
def missing_keys(draw: st.DrawFn) -> Broken:
    """What every experiment must say."""
    path = draw(st.sampled_from(("name", "iterations", "family", "family.name")))
    return Broken(dump(without(draw(TREES), path)), last(path))


ODD_NAMES = ("..", "../up", "/etc", "a/b", "a\n", "\x00", "\x1b[31m", "\ud800", "-x", "a b", "")


@st.composite
def odd_names(draw: st.DrawFn) -> Broken:
    """Names that make no folder, or not one inside runs/."""
    long = st.sampled_from((101, 255, 1000, 10**5)).map(lambda length: "a" * length)
    names = (st.text(max_size=30) | st.sampled_from(ODD_NAMES) | long).filter(
        lambda name: not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)
    )
    path = draw(st.sampled_from(("name", "family.name")))
    return Broken(dump(put(draw(TREES), path, draw(names))), "name")


TAGGED = (
    *("!!python/object/apply:os.system ['touch hacked']", "!!python/name:os.system x"),
    *("!!python/object/new:os.system ['touch hacked']", "!!python/module:antigravity x"),
    *("!!int '4'", "!!set {a, b}", "!!binary aGk=", "!!timestamp 2020-01-01", "!own 3", "! 3"),
)
LAUGHS = "l0: &l0 [lol]\n" + "".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@st.composite
def repeated_keys_tags_and_aliases(draw: st.DrawFn) -> Broken:
    """What YAML can do and an experiment has no need of."""
    text = dump(draw(TREES)).decode()
    above = {LAUGHS: "l1", "<<: {seed: 3}\n": "<<", "sampling.tasks: 3\n": "sampling.tasks"}
    if draw(st.integers(0, 3)) == 0:
        first = draw(st.sampled_from(list(above)))
        return Broken((first + text).encode(), above[first])
    lines = text.splitlines()
    at = draw(st.sampled_from([i for i, line in enumerate(lines) if re.match(r" *\w+: \S", line)]))
    key = lines[at].partition(":")[0]
    aliases = ("*a", "[*a]", "{x: *a}", "[&a x, *a]")
    changed = draw(st.sampled_from((*TAGGED, *aliases)).map(lambda value: [f"{key}: {value}"]))
    twice = [lines[at], lines[at]]
    lines[at : at + 1] = draw(st.sampled_from((changed, twice)))
    return Broken("\n".join(lines).encode(), key.strip())


WHOLE_FILES = (
    *(b"", b"\n\n", b"# nothing\n", b"null", b"3", b"text", b"[]", b"{}", b"---\n---\n"),
    *(b"\xff\xfe", b"PK\x03\x04" + bytes(range(256)), b"\x00" * 100, "name: x".encode("utf-16")),
    *(b"[" * 5000, b"{a: " * 5000, b"- " * 5000, b"? " * 5000, b"a: {b: " * 15 + b"}" * 15),
    *(b"#" * 5_000_000, b"a: " + b"x" * 5_000_000, b"%TAG ! x\n" * 9),
)
ADDED = (b"---\nname: x\n", b"x: [\n", b"\tx: 1\n", b"x: `a`\n", b"? [a]\n: 1\n", b"%YAML 9\n")
NO_TEXT = (b"\x00", b"\x01", b"\x1b", b"\x7f", b"\xff", b"\xc3(", b"\xed\xa0\x80")


@st.composite
def damaged_files(draw: st.DrawFn) -> Broken:
    """Empty, binary, far too long, nested without end, or with one byte that is no text."""
    good = dump(draw(TREES))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(good)))
        return Broken(good[:at] + draw(st.sampled_from(NO_TEXT)) + good[at:], FILE)
    texts = st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
    added = st.sampled_from(ADDED).map(lambda line: good + line)
    return Broken(
        draw(st.sampled_from(WHOLE_FILES) | added | st.binary(max_size=200) | texts), FILE
    )


@st.composite
def more_than_memory(draw: st.DrawFn) -> Broken:
    """Settings each of which is in its range, and which together no machine holds."""
    tree = draw(TREES)
    large = st.integers(9 * 10**4, 10**5)
    if draw(st.booleans()):
        layers = draw(st.lists(large, min_size=90, max_size=100))
        return Broken(dump(put(tree, "policy.layers", layers)), "policy.layers")
    name = draw(st.sampled_from(("sampling", "evaluation")))
    for path in (f"{name}.tasks", f"{name}.episodes"):
        tree = put(tree, path, draw(large))
    tree = put(tree, "family.horizon", draw(st.integers(100, 1000)))
    return Broken(dump(tree), f"{name}.tasks")


NO_NUMBERS = ("", "nan", "inf", "1e400", "-1e400", "0x10", "1,5", "[3]", "-h", "9" * 10**4, "x=y")


@st.composite
def wrong_flags(draw: st.DrawFn) -> Broken:
    """The same mistakes on the command line, after a file that is right."""
    tree = draw(TREES)
    path, counts, length = draw(st.sampled_from(numbers(tree)))
    out = beyond(RANGES[path], counts).map(str)
    value = draw(TEXTS | out | st.sampled_from(NO_NUMBERS))
    flag = f"--{draw(st.sampled_from((path, path.replace('_', '-'))))}"
    uses = {
        (f"{flag}={value}", *["1"] * (length - 1)): last(path),
        (flag, "--seed=1"): last(path) if path not in MAY_BE_EMPTY else "",
        (f"{flag}.deeper={value}",): last(path),
        (f"{flag}s={value}",): f"{last(path)}s",
        (f"--family.name={value}",): "family.name",
    }
    flags = draw(st.sampled_from([words for words, named in uses.items() if named]))
    return Broken(dump(tree), uses[flags], flags)


KINDS: dict[str, Callable[[], st.SearchStrategy[Broken]]] = {
    strategy.__name__: strategy
    for strategy in (
        unknown_keys,
        hostile_keys,
        wrong_types,
        wrong_ranges,
        huge_numbers,
        wrong_nesting,
        missing_keys,
        odd_names,
        repeated_keys_tags_and_aliases,
        damaged_files,
        more_than_memory,
        wrong_flags,
    )
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working directory, where a training that would begin fails the test."""

    def accepted(experiment: object, **options: object) -> NoReturn:
        raise AssertionError(f"accepted, and training would begin: {experiment}")

    # Not within a strategy, where Hypothesis wants no random numbers drawn but its own.
    for name in EXPERIMENTS:
        whole(name)
    with pytest.MonkeyPatch.context() as patch:
        here = tmp_path_factory.mktemp("fuzz")
        patch.chdir(here)
        patch.setattr(cli, "meta_train", accepted)
        yield here


def check_refused(broken: Broken) -> str:
    """Run `maml-rl train` on it, check all that holds of every refusal, and return the message."""
    Path(FILE).write_bytes(broken.content)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(["train", FILE, "--out", "run", *broken.flags])
    message = err.getvalue()
    assert (code, out.getvalue()) == (2, "")
    assert re.fullmatch(r"maml-rl: [^\n]+\n", message), message
    assert "Traceback" not in message
    assert message[:-1].isprintable()
    assert len(message) < 1200
    assert broken.named in message
    assert [p.name for p in Path().iterdir()] == [FILE]
    return message


COMMON = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("kind", KINDS)
@settings(COMMON, max_examples=10)
@given(data=st.data())
def test_a_malformed_experiment_is_refused(kind: str, data: st.DataObject) -> None:
    """10 examples of each kind."""
    check_refused(data.draw(KINDS[kind]()))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "ant_vel" else pytest.mark.slow) for n in EXPERIMENTS],
)
def test_not_a_number_is_refused_by_every_setting(name: str) -> None:
    """NaN is no word, no list, no name and not in any range."""
    for path, _ in leaves(whole(name)):
        check_refused(Broken(dump(put(whole(name), path, math.nan)), last(path)))


def test_the_ranges_here_are_those_of_all_numbers() -> None:
    """No number can be added without its range."""
    found = {path for name in EXPERIMENTS for path, _, _ in numbers(whole(name))}
    assert found == RANGES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(COMMON, max_examples=100)
@given(data=st.data())
def test_many_malformed_experiments_are_refused(kind: str, data: st.DataObject) -> None:
    """100 examples of each kind, more than 1000 in all."""
    check_refused(data.draw(KINDS[kind]()))
