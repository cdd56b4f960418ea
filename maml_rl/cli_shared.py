"""What several commands of the command line share."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tyro

from envs.references import allow_imports
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.config import is_supervised
from maml_rl.devices import Device, Physics
from maml_rl.errors import NOBODY_LEFT, InputError, RunStopped, RunWarning, refusal
from maml_rl.plain_yaml import parse_yaml, read_yaml
from maml_rl.runs import RunFolder
from maml_rl.signals import exit_code

Switch = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every command that runs an experiment takes."""

    quiet: Switch = False
    """Print nothing but errors."""
    allow_import: Switch = False
    """Let the experiment import code of yours, named package.module:Class or :function."""


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """What every command takes whose work can be spread."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)


CLUSTER_FLAGS = [f"cluster.{item.name}" for item in fields(ClusterSettings)]


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where a run's policy goes on, or is tested."""

    device: Device | None = None
    """Where policy or network are evaluated and updated; by default as the run says."""
    physics: Physics | None = None
    """What simulates: `cpu` is MuJoCo on CPU threads, `warp` is mujoco_warp on the device; by
    default likewise."""


class Importing(ExitStack):
    """Allows an experiment's own code to be imported while open, if the user said so."""

    def __init__(self, allowed: bool) -> None:
        super().__init__()
        if allowed:
            # A module beside the user is found even from a console script.
            if "" not in sys.path and os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            self.enter_context(allow_imports())


def split_target(words: Sequence[str], what: str, example: str) -> tuple[str, list[str]]:
    """Take the first word, which must be no flag, off a command's words."""
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            return example.split()[-1], list(words)
        raise InputError(f"expected {what} first, as in `{example}`")
    return words[0], list(words[1:])


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where a supervised run's data are."""

    root: str | None = None
    """Where a supervised run's images are, if no longer where they were."""


def command_line(
    command: str,
    target: Path,
    options: RunOptions | None = None,
    cluster: ClusterSettings | None = None,
) -> str:
    """Return what to type for a command on a file or folder."""
    allow = ["--allow-import"] if options is not None and options.allow_import else []
    given = asdict(cluster) if cluster is not None else {}
    usual = asdict(ClusterSettings())
    words = (
        (f"--cluster.{name.replace('_', '-')}", str(value))
        for name, value in given.items()
        if value != usual[name]
    )
    return shlex.join(["maml-rl", command, str(target), *allow, *itertools.chain(*words)])


@contextmanager
def going_on(line: str, run: Path | None = None) -> Iterator[None]:
    """Add the line to type to go on, where a run or its test ends, and not by a fault.

    By a signal, or since no worker is left.

    Args:
        line: what to type.
        run: the folder that must be a run's for there to be anything to go on with.

    Raises:
        RunStopped: in place of KeyboardInterrupt, where there is something to go on with.
    """

    def there() -> bool:
        return run is None or (run / "config.yaml").exists()

    try:
        yield
    except RunStopped as stopped:
        mendable = stopped.exit_code >= 128 or stopped.exit_code == NOBODY_LEFT
        if not mendable or not there():
            raise
        raise RunStopped(f"{stopped}. Go on with: {line}", stopped.exit_code) from stopped
    except KeyboardInterrupt as interrupt:
        if not there():
            raise
        raise RunStopped(f"interrupted. Go on with: {line}", exit_code(interrupt)) from interrupt


def supervised_run(run: Path) -> bool:
    """Whether a folder is a run of supervised learning; one that cannot be read is not.

    Raises:
        InputError: if it is no run folder.
    """
    folder = RunFolder.open(run)
    try:
        if folder.config.is_file():
            return is_supervised(read_yaml(folder.config))
        # Lost: a checkpoint has a copy.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)
            found = folder.load()
        return is_supervised(parse_yaml(found.origin.config, str(found.path)))
    except InputError:
        # Told where it is used.
        return False


def supervised_runs(runs: Sequence[Path]) -> bool:
    """Whether runs are of supervised learning.

    Raises:
        InputError: if some are and some are not.
    """
    kinds = [supervised_run(run) for run in runs]
    if any(kinds) and not all(kinds):
        names = [str(runs[kinds.index(kind)]) for kind in (True, False)]
        raise refusal(
            f"{names[0]} is a run of supervised learning and {names[1]} one of reinforcement "
            "learning: they cannot be compared"
        )
    return any(kinds)


def refuse_options(given: Mapping[str, bool], kind: str) -> None:
    """Raise InputError where a flag is given that means nothing for a kind of run."""
    wrong = [flag for flag, is_given in given.items() if is_given]
    if wrong:
        raise refusal(f"{' and '.join(wrong)} means nothing for a run of {kind} learning")
