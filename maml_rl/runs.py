"""Run folders: the only module that writes them.

RUN/config.yaml                   resolved settings, a valid experiment
RUN/versions.json                 what it was made with
RUN/metrics.csv                   one row an iteration
RUN/tensorboard/                  the same numbers as events
RUN/checkpoints/latest, previous, best
RUN/dumps/                        simulations that broke down, for `maml-rl replay`
RUN/evaluation/                   evaluation.csv, summary.json
RUN/.lock                         while a process trains here

Holds no link, and no path but that of a supervised run's images, as it was given: a run folder may
be copied, moved or committed.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import socket
import struct
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from maml_rl.adapt import Params
from maml_rl.checkpoints import (
    FRESH,
    KINDS,
    Checkpoint,
    Checkpoints,
    Origin,
    State,
    as_json,
    sync_folder,
)
from maml_rl.errors import InputError, RunWarning
from maml_rl.locks import NAME as LOCK
from maml_rl.locks import FolderLock, holder
from maml_rl.versions import versions

Row = Mapping[str, float | int | str | bool]


class RunFolder:
    """One run's folder. Close it, or use it in a `with` statement, where it is written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock: FolderLock | None = None
        self._origin: Origin | None = None
        self._events: Events | None = None
        self._saved = 0
        # Not written yet: to metrics.csv, to TensorBoard.
        self._rows: list[Row] = []
        self._points: list[Row] = []

    @property
    def config(self) -> Path:
        """The resolved experiment."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One row an iteration."""
        return self.path / "metrics.csv"

    @staticmethod
    def default_path(name: str, seed: int) -> Path:
        """Return runs/NAME-seedS, or the next free runs/NAME-seedS-2, -3, ..."""
        base = Path("runs") / f"{name}-seed{seed}"
        path, number = base, 1
        while path.exists():
            number += 1
            path = base.with_name(f"{base.name}-{number}")
        return path

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raise InputError where `path` cannot become a new run folder."""
        try:
            above = next(p for p in (path, *path.absolute().parents) if p.exists())
            if not above.is_dir():
                where = f"{path} cannot be made: " if above != path else ""
                raise InputError(f"{where}{above} is a file; choose another folder with --out DIR")
            if path.is_dir() and not is_unused(path):
                user = holder(path)
                what = f"is in use by {user}" if user else "exists and is not empty"
                raise InputError(f"{path} {what}; choose another folder with --out DIR")
        except OSError as error:
            raise cannot_write(path, error, elsewhere=True) from error

    @classmethod
    def create(
        cls,
        path: Path,
        origin: Origin,
        theta: Params,
        *,
        init: str | None = None,
        remembered: int = 0,
    ) -> RunFolder:
        """Make a new run folder with a first checkpoint, and lock it.

        Args:
            path: where.
            origin: the experiment and what it is for.
            theta: parameters that it begins with.
            init: name of the run whose parameters they are, if they are no new ones.
            remembered: numbers that its optimiser will remember for each of them.

        Raises:
            InputError: if it exists and is not empty, or cannot be written.
        """
        cls.check_free(path)
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error, elsewhere=True) from error
        folder.lock()
        try:
            if not is_unused(path):
                raise InputError(f"{path} has just been taken; choose another with --out DIR")
            check_space(path, theta, 1 + remembered)
            folder._origin = origin
            folder.save(theta, FRESH, best=None)
            begun = {} if init is None else {INIT: init}
            write_whole(path / "versions.json", as_json({**versions(), **begun}))
            # Last, since it is what makes a folder a run's.
            folder.rewrite_config(origin)
        except BaseException as error:
            if not isinstance(error, InputError):
                # The folder was empty and is locked: all that is in it is ours, and of no use.
                shutil.rmtree(path, ignore_errors=True)
            folder.close()
            if isinstance(error, OSError):
                raise cannot_write(path, error, elsewhere=True) from error
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run folder.

        Raises:
            InputError: if it is none.
        """
        try:
            known = (path / "config.yaml").is_file()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        folder = cls(path)
        if not known and not folder.checkpoints.path.is_dir():
            raise InputError(f"{path} is not a run folder: it has no config.yaml")
        return folder

    def restore_config(self) -> None:
        """Write the config that the newest whole checkpoint was made with in place of a lost one.

        For the holder of the lock: a run that is just being made has no config yet.

        Raises:
            InputError: if none is whole, or the folder cannot be written.
        """
        found = self.load()
        try:
            write_whole(self.config, found.origin.config)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        warnings.warn(
            f"{self.config} was missing and is that of checkpoint {found.path.name!r} again",
            RunWarning,
            stacklevel=2,
        )

    def lock(self) -> None:
        """Keep other processes from training here until closed.

        Raises:
            InputError: if one does already, naming it, or if the folder cannot be written.
        """
        try:
            for entry in self.path.iterdir():
                check_no_link(entry)
            self._lock = FolderLock(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def rewrite_config(self, origin: Origin) -> None:
        """Replace the resolved experiment, as when a run is extended.

        Raises:
            OSError: if it cannot be written.
        """
        self._origin = origin
        write_whole(self.config, origin.config)

    def go_on_from(self, found: Checkpoint, origin: Origin, *, every: int | None = 1) -> None:
        """Make the folder as it was when a checkpoint was saved, to train on from there.

        `every` is the number of iterations that a row of metrics sums up; None if it has changed.

        Raises:
            InputError: if it cannot be written.
        """
        try:
            self.checkpoints.set_aside(found)
            self.drop_rows_from(found.state.iteration, every)
            self.rewrite_config(origin)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write_row(self, row: Row) -> None:
        """Append one iteration to metrics.csv and to TensorBoard.

        Where that fails training can go on: a RunWarning says so, and the row is tried again
        with the next.
        """
        self._rows.append(row)
        self._points.append(row)
        if trouble := self._write_rows():
            warnings.warn(
                f"iteration {row['iteration']} cannot be written to {trouble}; training goes on, "
                "and what is missing is tried again with the next",
                RunWarning,
                stacklevel=2,
            )

    def _write_rows(self) -> str:
        """Write what is not written yet; return what cannot be, and why, or ""."""
        troubles = []
        try:
            if self._rows:
                append_rows(self.metrics, self._rows)
            self._rows.clear()
        except OSError as error:
            troubles.append(f"{self.metrics} ({error.strerror})")
        where = self.path / "tensorboard"
        try:
            if self._points and self._events is None:
                self._events = Events(where, int(self._points[0]["iteration"]))
            while self._points and self._events is not None:
                self._events.add(self._points[0])
                self._points.pop(0)
        except OSError as error:
            troubles.append(f"{where} ({error.strerror})")
        return " and ".join(troubles)

    def write_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Put PNG pictures into TensorBoard.

        Args:
            step: iterations done.
            pictures: each file's content, by its name in TensorBoard.

        Raises:
            OSError: if they cannot be written.
        """
        events = Events(self.path / "tensorboard")
        try:
            events.add_pictures(step, pictures)
        finally:
            events.close()

    def drop_rows_from(self, iteration: int, every: int | None = 1) -> None:
        """Remove metrics of iterations that a resumed run will do again, and half-written ones."""
        if not self.metrics.is_file():
            return
        text = self.metrics.read_text(encoding="utf-8", errors="replace")
        # One by one: a quotation mark that should not be there must not swallow the lines below.
        lines = [one_row(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        if lines and lines[0][:1] != ["iteration"]:
            # Without their names the columns mean nothing; kept for whoever wants to mend it.
            os.replace(self.metrics, self.path / "metrics.damaged.csv")
            lines = []
        header, rows = lines[:1], lines[1:]
        numbered = {int(r[0]): r for r in rows if is_whole(r, header[0])}
        kept = [r for number, r in sorted(numbered.items()) if number < iteration]
        wanted = range(every - 1, iteration, every) if every else ()
        missing = sorted(set(wanted) - numbered.keys())
        if missing:
            warnings.warn(
                f"{self.metrics} lacks iterations {shorten(missing)}",
                RunWarning,
                stacklevel=2,
            )
        out = io.StringIO()
        csv.writer(out).writerows(header + kept)
        write_whole(self.metrics, out.getvalue())

    def save(
        self,
        theta: Params,
        state: State,
        *,
        best: tuple[Params, State, Params] | None,
        optimizer: Params | None = None,
    ) -> None:
        """Save a checkpoint as `latest`, keeping the one before.

        Args:
            theta: parameters after `state.iteration` iterations.
            state: all else.
            best: theta, counters and optimizer that the best batch so far was of, to save as
                `best`, if it is new.
            optimizer: what the outer optimiser remembers.

        Raises:
            OSError: if it cannot be written; the old ones are kept.
        """
        assert self._origin is not None, "a folder only opened for reading"
        self.checkpoints.save(theta, state, self._origin, best=best, optimizer=optimizer)
        self._saved = state.iteration

    def load(self, which: str = "latest") -> Checkpoint:
        """Load a checkpoint.

        Raises:
            CheckpointError: if it is missing or not whole, and for `latest` the others too.
        """
        return self.checkpoints.load(which)

    def write_dump(self, name: str, dump: Mapping[str, object]) -> Path:
        """Write what is needed to see a simulation break down again, and return the file.

        Raises:
            OSError: if it cannot be written.
        """
        path = self.path / "dumps" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, as_json(dump))
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what could not be written before, close TensorBoard's file, release the lock.

        A RunWarning names iterations whose metrics are lost.
        """
        trouble = self._write_rows()
        # What no checkpoint has gone beyond a resumed run does again.
        rows = (*self._rows, *self._points)
        lost = sorted({i for row in rows if (i := int(row["iteration"])) < self._saved})
        if lost:
            warnings.warn(
                f"the metrics of iterations {shorten(lost)} are lost: {trouble} cannot be written",
                RunWarning,
                stacklevel=2,
            )
        self._rows.clear()
        self._points.clear()
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


INIT = "init"
"""In versions.json, the run that another was begun with the parameters of."""


def begun_from(run: Path) -> str:
    """Return the name of the run whose parameters a run was begun with, "" if they were new."""
    try:
        found = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get(INIT, "")) if isinstance(found, dict) else ""


class Events:
    """TensorBoard's file of a run, written at once: a full disk is told to the caller."""

    def __init__(self, folder: Path, step: int | None = None) -> None:
        """Begin a file; readers forget what earlier files say of `step` and later.

        Raises:
            OSError: if it cannot be written.
        """
        # Imported on demand: it is slow.
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        # Readers go by the names' order, whatever this host's clock says.
        earlier = [p.name.split(".")[3] for p in folder.glob("events.out.tfevents.*")]
        seconds = max([int(time.time()), *(int(e) + 1 for e in earlier if e.isdecimal())])
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb", buffering=0)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        try:
            self._write(file_version="brain.Event:2")
            if step is not None:
                self._write(step=step, session_log=start)
        except OSError:
            self.close()
            (folder / name).unlink(missing_ok=True)
            raise

    def _write(self, **entries: object) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        event = self._event(wall_time=time.time(), **entries)
        RecordWriter(record).write(event.SerializeToString())
        append(self._file, record.getvalue())

    def add(self, row: Row) -> None:
        """Add the numbers of one row of metrics.

        Raises:
            OSError: if they cannot be written.
        """
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if isinstance(value, int | float) and name != "iteration"
        ]
        self._write(step=int(row["iteration"]), summary=self._summary(value=values))

    def add_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Add PNG pictures by name.

        Raises:
            OSError: if they cannot be written.
        """
        values = []
        for name, content in pictures.items():
            # As PNG has it: a signature, then the header's length, name, width and height.
            width, height = struct.unpack(">II", content[16:24])
            image = self._summary.Image(
                width=width, height=height, colorspace=3, encoded_image_string=content
            )
            values.append(self._summary.Value(tag=name, image=image))
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def one_row(line: str) -> list[str]:
    """Return the cells of one line of CSV; none where it is no CSV."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def is_whole(row: Sequence[str], header: Sequence[str]) -> bool:
    """Whether a row has a cell a column, and begins with the number of an iteration."""
    return len(row) == len(header) and row[0].isascii() and row[0].isdecimal()


def shorten(numbers: Sequence[int]) -> str:
    """Return numbers in words, the first few of many."""
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"


def first_line(path: Path) -> str:
    """Return a text file's first line, "" where there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline()


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a CSV file, with a header where it is new; all or none.

    Where the file has other columns, as after a change of settings, it is written anew with the
    columns of both, empty where a row has none.

    Raises:
        OSError: if they cannot be written.
    """
    first = first_line(path)
    header = one_row(first) or list(rows[0])
    added = [name for name in rows[0] if name not in header]
    text = io.StringIO()
    writer = csv.DictWriter(text, header + added, restval="")
    if not first or added:
        writer.writeheader()
    if added:
        before = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        writer.writerows(dict(zip(header, one_row(line), strict=False)) for line in before)
    writer.writerows(rows)
    if added:
        write_whole(path, text.getvalue())
        return
    # Not blocking, since a pipe that nobody reads would never open.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    with io.FileIO(os.open(path, flags, 0o644), "ab") as file:
        append(file, text.getvalue().encode())


def append(file: io.FileIO, content: bytes) -> None:
    """Append to a file all or nothing, and wait until the disk has it.

    Raises:
        OSError: if it cannot be written.
    """
    size = file.seek(0, os.SEEK_END)
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) or 0 :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside the old one, and swap it in only when the disk has all of it.

    Raises:
        OSError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def check_no_link(entry: Path) -> None:
    """Raise InputError where something in a run folder is a link, which could lead anywhere."""
    if entry.is_symlink():
        raise InputError(f"{entry} is a link, and a run folder holds none: remove it")


def is_unused(path: Path) -> bool:
    """Whether a folder holds nothing but what a start that was killed may have left."""
    names = {entry.name for entry in path.iterdir()} - {LOCK}
    begun = path / "checkpoints"
    return not names or (names == {begun.name} and not any((begun / k).exists() for k in KINDS))


def cannot_write(path: Path, error: OSError, *, elsewhere: bool = False) -> InputError:
    """Return what to tell a user whose run folder cannot be written; a new one can go elsewhere."""
    hint = "; choose another with --out DIR" if elsewhere else ""
    return InputError(f"cannot write the run folder {path}: {error.strerror}{hint}")


def check_space(path: Path, theta: Params, copies: int) -> None:
    """Raise OSError where the disk has no room for four checkpoints and some metrics.

    A checkpoint holds so many `copies` of theta.
    """
    wanted = 4 * copies * sum(p.numel() * p.element_size() for p in theta.values()) + 2**18
    free = shutil.disk_usage(path).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"{free / 2**20:.2f} MiB are free on its disk, and a run takes at least "
            f"{wanted / 2**20:.2f}",
        )


def count_rows(path: Path) -> int:
    """Return how many iterations a metrics.csv holds; 0 if there is none."""
    if not path.is_file():
        return 0
    return max(0, path.read_text(encoding="utf-8", errors="replace").count("\n") - 1)


def read_metrics(path: Path) -> dict[str, Sequence[float]]:
    """Read the numeric columns of a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    words = {"refused_because", "accepted"}
    if not rows:
        return {}
    # A column that a change of settings has brought is empty before.
    return {n: [float(r[n] or "nan") for r in rows] for n in rows[0] if n not in words}
