"""Checkpoints: whole, or refused. Nothing in one is ever run as code.

CHECKPOINT/parameters.safetensors   theta
           optimizer.safetensors    what the outer optimiser remembers, if it does: Adam's moments,
                                    the direction that momentum carries on
           state.json               counters; with the seed in the config all randomness follows
           config.yaml              the resolved experiment
           manifest.json            format, size and sha256 of each file, order of the parameters,
                                    what it was made for, versions, and a sha256 of itself

A checkpoint is written whole under a hidden name, flushed to the disk, and only then renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import warnings
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import safetensors
import safetensors.torch

from maml_rl.adapt import Params
from maml_rl.errors import CheckpointError, RunWarning

FORMAT = 1
PARAMETERS, STATE, CONFIG = "parameters.safetensors", "state.json", "config.yaml"
OPTIMIZER, MANIFEST = "optimizer.safetensors", "manifest.json"

LARGEST: Mapping[str, int] = {
    **{PARAMETERS: 2**31, OPTIMIZER: 2**32},
    **{STATE: 2**16, CONFIG: 2**20, MANIFEST: 2**20},
}
"""Bytes beyond which a file is refused unread."""

KINDS = ("latest", "previous", "best")
"""The newest checkpoint, the one before it, and that with the best return after adaptation."""
FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "latest": KINDS,
    "previous": ("previous",),
    "best": ("best",),
}
"""What is loaded for each kind: the first that is whole."""


@dataclass(frozen=True)
class State:
    """What a run continues from, beside its parameters. All randomness follows from these."""

    iteration: int
    """Iterations done."""
    env_steps: int
    """Control steps sampled for training; in supervised learning, tasks drawn."""
    best_return: float
    """Best return after adaptation of any batch, in supervised learning best accuracy, or least
    error with a minus, on the validation tasks; -inf before the first."""
    best_iteration: int
    """The iteration that it is of; -1 before the first."""
    refused_in_a_row: int = 0
    """Updates refused since the last that was accepted."""
    chunk_size: int = 0
    """Tasks that go through the update together, where memory allowed fewer; 0 is as usual."""

    @classmethod
    def from_json(cls, text: bytes) -> State:
        """Read what `asdict` gave.

        Raises:
            ValueError: if it is no state.
        """
        saved = json.loads(text)
        if not isinstance(saved, dict) or set(saved) != {f.name for f in fields(cls)}:
            raise ValueError("state.json has other entries than a state")
        best = saved.pop("best_return")
        for name, value in saved.items():
            least = -1 if name == "best_iteration" else 0
            if type(value) is not int or not least <= value < 2**63:
                raise ValueError(f"{name} in state.json must be a count, got {value!r}")
        if best is not None and type(best) not in (float, int):
            raise ValueError(f"best_return in state.json must be a number, got {best!r}")
        return cls(best_return=-math.inf if best is None else float(best), **saved)


FRESH = State(iteration=0, env_steps=0, best_return=-math.inf, best_iteration=-1)
"""Of a run that has done nothing yet."""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was made for and with, beside its numbers."""

    config: str
    """The resolved experiment, YAML."""
    made_for: Mapping[str, str | int]
    """Family, protocol, and sizes of observation and action; or problem and sizes of an example."""
    versions: Mapping[str, str]


MADE_FOR = (
    {"family", "protocol", "observations", "actions"},
    {"problem", "inputs", "outputs"},
)
"""What is told of a policy, and of a network of supervised learning."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    path: Path
    theta: Params
    state: State
    origin: Origin
    optimizer: Params = field(default_factory=dict)
    """What the outer optimiser remembers; nothing where it forgets."""


def write_checkpoint(
    target: Path, theta: Params, state: State, origin: Origin, optimizer: Params | None = None
) -> None:
    """Write a checkpoint into a new folder `target`, and wait until the disk has it.

    Raises:
        OSError: if it cannot be written.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    contents = {
        PARAMETERS: as_safetensors(theta),
        **({OPTIMIZER: as_safetensors(optimizer)} if optimizer else {}),
        STATE: as_json(asdict(state)).encode(),
        CONFIG: origin.config.encode(),
    }
    manifest = {
        "format": FORMAT,
        "files": {n: {"bytes": len(c), "sha256": digest(c)} for n, c in contents.items()},
        "order": list(theta),
        "made_for": dict(origin.made_for),
        "versions": dict(origin.versions),
    }
    contents[MANIFEST] = as_json(manifest | {"sha256": seal(manifest)}).encode()
    for name, content in contents.items():
        if len(content) > LARGEST[name]:
            raise OSError(errno.EFBIG, f"{name} would have {len(content)} bytes")
        with (target / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(target)


def as_safetensors(tensors: Params) -> bytes:
    """Return tensors by name as the content of a file."""
    plain = {name: p.detach().cpu().contiguous() for name, p in tensors.items()}
    content: bytes = safetensors.torch.save(plain)
    return content


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check every byte of it against its manifest.

    Raises:
        NewerFormatError: if a later version of this package wrote it.
        CheckpointError: if it is missing, damaged or not to be trusted.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    try:
        # Through the folder's handle, so that a run that renames it meanwhile does no harm.
        return _read(folder, path)
    except UNREADABLE as error:
        if isinstance(error, CheckpointError):
            raise
        what = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} is damaged: {what}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {PARAMETERS}: {error}") from error
    finally:
        os.close(folder)


UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError),
)
"""What reading a file may raise that was not written by us."""


class NewerFormatError(CheckpointError):
    """A later version of this package wrote the checkpoint."""


def _read(folder: int, path: Path) -> Checkpoint:
    manifest = json.loads(read_file(folder, MANIFEST))
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is no mapping")
    sealed = manifest.pop("sha256", None)
    if sealed != seal(manifest):
        raise ValueError(f"{MANIFEST} does not match its own sha256")
    if manifest["format"] != FORMAT:
        raise NewerFormatError(
            f"checkpoint {path} has format {manifest['format']}; this version of maml-rl reads "
            f"format {FORMAT}: install the version that wrote it, {manifest['versions']['maml-rl']}"
        )
    files = manifest["files"]
    if set(files) - {OPTIMIZER} != {PARAMETERS, STATE, CONFIG}:
        raise ValueError(f"{MANIFEST} names other files than a checkpoint's: {sorted(files)}")
    contents = {}
    for name, expected in files.items():
        content = read_file(folder, name, expected["bytes"])
        if digest(content) != expected["sha256"]:
            raise ValueError(f"{name} does not match its sha256")
        contents[name] = content
    tensors = safetensors.torch.load(contents[PARAMETERS])
    order = manifest["order"]
    if sorted(order) != sorted(tensors):
        raise ValueError(f"{PARAMETERS} holds other parameters than the manifest names")
    made_for, versions = manifest["made_for"], manifest["versions"]
    if set(made_for) not in MADE_FOR or not all(type(v) in (str, int) for v in made_for.values()):
        raise ValueError(f"{MANIFEST} does not tell what the checkpoint was made for")
    if not all(type(version) is str for version in versions.values()):
        raise ValueError(f"{MANIFEST} does not tell the versions")
    return Checkpoint(
        path,
        {name: tensors[name] for name in order},
        State.from_json(contents[STATE]),
        Origin(contents[CONFIG].decode(), made_for, versions),
        dict(sorted(safetensors.torch.load(contents[OPTIMIZER]).items()))
        if OPTIMIZER in contents
        else {},
    )


def read_file(folder: int, name: str, expected: int | None = None) -> bytes:
    """Read a plain file in an open folder, unless it is a link or of another size than it may be.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not what it should be.
    """
    try:
        # Not blocking, since a pipe would never answer.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise ValueError(f"{name} {what}") from error
    with closing(os.fdopen(handle, "rb")) as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{name} is no plain file")
        if found.st_size > LARGEST[name]:
            raise ValueError(f"{name} has {found.st_size} bytes, at most {LARGEST[name]} expected")
        if expected is not None and found.st_size != expected:
            raise ValueError(f"{name} has {found.st_size} bytes, expected {expected}")
        return file.read()


class Checkpoints:
    """A run's checkpoints."""

    def __init__(self, path: Path) -> None:
        """Look at RUN/checkpoints, which need not exist yet."""
        self.path = path

    def save(
        self,
        theta: Params,
        state: State,
        origin: Origin,
        *,
        best: tuple[Params, State, Params] | None = None,
        optimizer: Params | None = None,
    ) -> None:
        """Save a checkpoint as `latest`, and what was `latest` as `previous`.

        At every instant at least one whole checkpoint can be loaded, and the folder holds the
        one before as well, under one name or another.

        Args:
            theta: parameters after `state.iteration` iterations.
            state: all else.
            origin: what it is made for and with.
            best: theta, counters and optimizer to save as `best`, if the best batch so far is new.
            optimizer: what the outer optimiser remembers at theta.

        Raises:
            OSError: if it cannot be written; the old ones are kept.
        """
        self.path.mkdir(exist_ok=True)
        for name in KINDS:
            self._settle(name)
        if best is not None:
            best_theta, best_state, best_optimizer = best
            write_checkpoint(self._hidden("best"), best_theta, best_state, origin, best_optimizer)
            self._replace("best", keep_as=None)
        write_checkpoint(self._hidden("latest"), theta, state, origin, optimizer)
        self._replace("latest", keep_as="previous")

    def _settle(self, name: str) -> None:
        """Finish what a kill between two renames left unfinished, before its files are reused."""
        present, hidden = self.path / name, self._hidden(name)
        if not present.exists() and hidden.exists():
            with suppress(CheckpointError):
                read_checkpoint(hidden)
                os.replace(hidden, present)

    def _hidden(self, name: str) -> Path:
        return self.path / f".{name}"

    def _replace(self, name: str, keep_as: str | None) -> None:
        """Let the hidden new checkpoint take its place, and keep or remove the one before."""
        present = self.path / name
        # What goes: the old best, or what was kept until now, which counts until the end.
        going = self.path / f".{name}.old" if keep_as is None else self._hidden(keep_as)
        shutil.rmtree(going, ignore_errors=True)
        if present.exists():
            if keep_as is None:
                os.replace(present, going)
            else:
                kept = self.path / keep_as
                if kept.exists():
                    os.replace(kept, going)
                os.replace(present, kept)
        os.replace(self._hidden(name), present)
        sync_folder(self.path)
        shutil.rmtree(going, ignore_errors=True)

    def find(self, name: str) -> Path:
        """Return where a checkpoint lies: under its name, or as a kill between renames left it."""
        present, hidden = self.path / name, self._hidden(name)
        return hidden if not present.exists() and hidden.exists() else present

    def load(self, which: str = "latest") -> Checkpoint:
        """Load a checkpoint; for `latest`, the newest that is whole, with a RunWarning.

        Raises:
            CheckpointError: if there is no such kind, or none is whole.
        """
        if which not in FALLBACKS:
            raise CheckpointError(f"checkpoint must be one of {', '.join(KINDS)}, got {which!r}")
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path.parent} has no checkpoints")
        complaints = []
        for name in FALLBACKS[which]:
            try:
                found = read_checkpoint(self.find(name))
            except NewerFormatError:
                raise
            except CheckpointError as error:
                complaints.append(str(error))
                continue
            if complaints:
                warnings.warn(
                    f"{complaints[0]}; {name!r} of iteration {found.state.iteration} is taken "
                    "in its place",
                    RunWarning,
                    stacklevel=2,
                )
            return found
        others = f", and neither of {', '.join(FALLBACKS[which][1:])} is good"
        raise CheckpointError(complaints[0] + (others if len(complaints) > 1 else ""))

    def set_aside(self, loaded: Checkpoint) -> None:
        """Move damaged checkpoints newer than the one loaded out of the way of new ones."""
        for name in KINDS[: KINDS.index(loaded.path.name.removeprefix("."))]:
            if (damaged := self.path / name).exists():
                kept = self.path / f"{name}.damaged"
                shutil.rmtree(kept, ignore_errors=True)
                os.replace(damaged, kept)


def digest(content: bytes) -> str:
    """Return a sha256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def seal(manifest: Mapping[str, object]) -> str:
    """Return the sha256 of a manifest, whatever its spaces and order."""
    return digest(json.dumps(manifest, sort_keys=True).encode())


def as_json(value: object) -> str:
    """Return strict JSON: numbers that are not finite, which it cannot hold, become null."""

    def finite(part: object) -> object:
        if isinstance(part, dict):
            return {key: finite(v) for key, v in part.items()}
        if isinstance(part, list | tuple):
            return [finite(v) for v in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def sync_folder(path: Path) -> None:
    """Make a folder's entries last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
