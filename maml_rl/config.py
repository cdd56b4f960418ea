"""One experiment as a tree of frozen dataclasses, read from YAML and command-line flags alike.

A file is turned into flags, and tyro parses both together; what comes later wins. Each setting, and
the check of its range, lives beside the code that reads it; this module only assembles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import yaml

import envs
from envs import TaskFamily
from envs.family import WarpSettings
from maml_rl.advantages import AdvantageSettings
from maml_rl.checkpoints import Origin
from maml_rl.devices import Device, Physics
from maml_rl.errors import InputError, refusal
from maml_rl.evaluate import EvaluationSettings
from maml_rl.maml import AdaptationSettings
from maml_rl.plain_yaml import read_yaml
from maml_rl.policy import PolicySettings
from maml_rl.sampler import SamplingSettings
from maml_rl.schedule import MAX_ITERATION
from maml_rl.settings import Choice, as_flags, for_tyro, parse_with_tyro, words_of
from maml_rl.trust_region import TrustRegionSettings
from maml_rl.versions import versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

F = TypeVar("F", bound=TaskFamily)


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
    device: Device = "cpu"
    """Where the policy is evaluated and updated."""
    physics: Physics = "cpu"
    """What simulates: `cpu` is MuJoCo on CPU threads; `warp` is mujoco_warp, on the device of the
    policy (extra gpu)."""
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
    warp: WarpSettings = field(default_factory=WarpSettings)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: naming the setting.
        """
        check_name(self.name)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be between 0 and 2^63 - 1, got {self.seed}")
        for name, least, most in (
            ("iterations", 0, MAX_ITERATION),
            ("threads", 0, 1024),
            ("max_refused", 1, 10**9),
        ):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
            if value > most:
                raise InputError(f"{name} must be at most {most}, got {value}")


def check_name(name: str) -> None:
    """Raise InputError unless a folder may be called so."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(
            "name must be at most 100 letters, digits, '.', '_' and '-', beginning with a "
            f"letter or digit, since a folder is named after it; got {name!r}"
        )


def observation_size(experiment: Experiment[TaskFamily]) -> int:
    """Return how many numbers the policy observes: O, and P more where it observes the task."""
    family = experiment.family
    told = len(family.task_columns) if experiment.policy.observe_task else 0
    return len(family.observation_columns) + told


def experiment_type(family: type[TaskFamily], *marks: object) -> type[Experiment[TaskFamily]]:
    """Return the experiment's type for a family that is known only now, annotated for tyro."""
    return for_tyro(Experiment[family], *marks)  # type: ignore[valid-type]  # known only now


def is_supervised(tree: Mapping[str, object]) -> bool:
    """Whether an experiment file is one of supervised learning."""
    return "data" in tree and "family" not in tree


def shipped_folder() -> Path:
    """Return the folder of what travels with the package: inside it, or beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "experiments"
    return inside if inside.is_dir() else here.parent / "experiments"


@functools.cache
def shipped_files() -> Mapping[str, Path]:
    """Return the files of both kinds of experiment that travel with the package, by name."""
    benchmarks = shipped_benchmarks()
    files = sorted(shipped_folder().glob("*.yaml"))
    return {p.stem: p for p in files if p.stem not in benchmarks}


@functools.cache
def shipped_experiments() -> Mapping[str, Path]:
    """Return the experiments of reinforcement learning among them."""
    return {name: p for name, p in shipped_files().items() if not is_supervised(read_yaml(p))}


def shipped_supervised() -> Mapping[str, Path]:
    """Return the experiments of supervised learning among them."""
    return {n: p for n, p in shipped_files().items() if n not in shipped_experiments()}


def shipped_benchmarks() -> dict[str, Path]:
    """Return the benchmark files that travel with the package, by name."""
    return {p.stem: p for p in sorted(shipped_folder().glob("benchmark_*.yaml"))}


def shipped_policies() -> dict[str, Path]:
    """Return the run folders of trained policies that travel with the package, by name."""
    found = sorted((shipped_folder() / "checkpoints").glob("*/config.yaml"))
    return {path.parent.name: path.parent for path in found}


def nearest(path: Path) -> Path:
    """Return a path as one would type it: from the working directory where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def find_run(path: Path) -> Path:
    """Return a run folder given as a path, or by the name of a policy that ships.

    What is none is returned as it is, to be refused where it is opened.

    Raises:
        InputError: if it is nearly the name of one that ships.
    """
    name = str(path)
    # A name may be too long for a path.
    with contextlib.suppress(OSError):
        if path.exists():
            return path
    shipped = shipped_policies()
    if name not in shipped and (near := difflib.get_close_matches(name, shipped, 1, cutoff=0.8)):
        raise refusal(
            f"there is no run folder {name!r}, and no policy of that name ships: "
            f"did you mean {near[0]!r}?"
        )
    return nearest(shipped[name]) if name in shipped else path


def find_experiment(name: str) -> Path:
    """Return the file of an experiment given as a path, or by the name of one that ships.

    Raises:
        InputError: if there is none, naming the nearest.
    """
    if name in shipped_benchmarks():
        raise refusal(f"{name!r} is a benchmark: maml-rl benchmark {name}")
    return find_file(name, shipped_files(), "experiment")


def find_file(name: str, shipped: Mapping[str, Path], what: str) -> Path:
    """Return a YAML file given as a path, or by the name of one that ships.

    Args:
        name: path or name.
        shipped: those that ship, by name.
        what: "experiment" or "benchmark", for messages.

    Raises:
        InputError: if there is none, naming the nearest.
    """
    path = Path(name)
    # A name may be too long for a path.
    with contextlib.suppress(OSError):
        if path.is_file():
            return path
        if path.is_dir() and name not in shipped:
            raise refusal(f"{name!r} is a folder; expected a YAML file, such as its config.yaml")
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(path.stem, shipped, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "`maml-rl list` shows those that ship"
    raise refusal(f"there is no {what} file {name!r}, and none of that name ships: {hint}")


def find_family(name: str) -> type[TaskFamily]:
    """Return the family of that name.

    Raises:
        InputError: if there is none, or it may not be imported.
    """
    try:
        return envs.family_class(name)
    except envs.FamilyError as error:
        raise refusal(str(error)) from error


FAMILY = Choice("family", list(envs.FAMILIES), find_family)
"""How an experiment names its task family."""


def experiment_words(
    tree: Mapping[str, object], source: str, flags: Sequence[str], *, ignored: Sequence[str] = ()
) -> tuple[type[TaskFamily], list[str]]:
    """Return an experiment's family and all its settings as words; see `settings.words_of`.

    Raises:
        InputError: if they are wrong, or are those of supervised learning.
    """
    if is_supervised(tree):
        raise refusal(f"{source} is an experiment of supervised learning: it has `data`, no family")
    return words_of(Experiment, FAMILY, tree, source, flags, ignored=ignored)


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
    return named_tree(experiment, FAMILY.section, family_name(experiment.family))


def named_tree(experiment: DataclassInstance, section: str, name: str) -> dict[str, object]:
    """Return all settings as plain nested mappings; one section begins with its `name`."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    tree: dict[str, object] = {}
    for key, value in vars(experiment).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            first = {"name": name} if key == section else {}
            value = {**first, **{k: plain(v) for k, v in dataclasses.asdict(value).items()}}
        tree[key] = value
    return tree


def to_yaml(experiment: Experiment[TaskFamily]) -> str:
    """Return all settings, resolved, as YAML."""
    return yaml.safe_dump(as_tree(experiment), sort_keys=False)


def made_for(family: TaskFamily) -> Mapping[str, str | int]:
    """Return what must be equal for a policy of one family to be of use for another."""
    return {
        "family": family_name(family),
        "protocol": family.protocol_name,
        "observations": len(family.observation_columns),
        "actions": len(family.action_columns),
    }


def origin_of(experiment: Experiment[TaskFamily]) -> Origin:
    """Return what checkpoints of an experiment are made for, here and now."""
    return Origin(to_yaml(experiment), made_for(experiment.family), versions(experiment.physics))
