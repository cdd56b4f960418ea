"""Run folders: the only module that writes them.

RUN/config.yaml                   resolved settings, a valid experiment
RUN/versions.json                 what it was made with
RUN/metrics.csv                   one row an iteration
RUN/tensorboard/                  the same numbers as events
RUN/checkpoints/latest, previous, best
RUN/dumps/                        simulations that broke down, for `maml-rl replay`
RUN/evaluation/                   evaluation.csv, summary.json
RUN/.lock                         while a process trains here

Holds no absolute path and no link: a run folder may be copied, moved or committed.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from envs.family import TaskFamily
from maml_rl.adapt import Params
from maml_rl.checkpoints import Checkpoint, Checkpoints, Origin, State, as_json, origin_of
from maml_rl.config import Experiment, family_name
from maml_rl.errors import InputError, RunStopped, RunWarning
from maml_rl.evaluate import Evaluation
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
            if path.exists() and not path.is_dir():
                raise InputError(f"{path} is a file; choose another folder with --out DIR")
            if path.is_dir() and any(path.iterdir()):
                user = holder(path)
                what = f"is in use by {user}" if user else "exists and is not empty"
                raise InputError(f"{path} {what}; choose another folder with --out DIR")
        except OSError as error:
            raise cannot_write(path, error, elsewhere=True) from error

    @classmethod
    def create(cls, path: Path, experiment: Experiment[TaskFamily], theta: Params) -> RunFolder:
        """Make a new run folder with a first checkpoint, and lock it.

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
            if len(list(path.iterdir())) > 1:
                raise InputError(f"{path} has just been taken; choose another with --out DIR")
            check_space(path, theta)
            folder._origin = origin_of(experiment)
            folder.save(theta, State(0, 0, -np.inf, -1), best=None)
            write_whole(path / "versions.json", as_json(versions()))
            # Last, since it is what makes a folder a run's.
            folder.rewrite_config(experiment)
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
        if not known:
            kept = path / "checkpoints" / "latest" / "config.yaml"
            hint = f"; {kept} is a copy of what it was" if kept.is_file() else ""
            raise InputError(f"{path} is not a run folder: it has no config.yaml{hint}")
        return cls(path)

    def lock(self) -> None:
        """Keep other processes from training here until closed.

        Raises:
            InputError: if one does already, naming it, or if the folder cannot be written.
        """
        try:
            self._lock = FolderLock(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def rewrite_config(self, experiment: Experiment[TaskFamily]) -> None:
        """Replace the resolved experiment, as when a run is extended.

        Raises:
            OSError: if it cannot be written.
        """
        self._origin = origin_of(experiment)
        write_whole(self.config, self._origin.config)

    def go_on_from(self, found: Checkpoint, experiment: Experiment[TaskFamily]) -> None:
        """Make the folder as it was when a checkpoint was saved, to train on from there.

        Raises:
            InputError: if it cannot be written.
        """
        try:
            self.checkpoints.set_aside(found)
            self.drop_rows_from(found.state.iteration)
            self.rewrite_config(experiment)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write_row(self, row: Row) -> None:
        """Append one iteration to metrics.csv and to TensorBoard.

        Where that fails training can go on: a RunWarning says so, and the row is tried again
        with the next.
        """
        self._rows.append(row)
        self._points.append(row)
        try:
            append_rows(self.metrics, self._rows)
            self._rows.clear()
            if self._events is None:
                step = int(self._points[0]["iteration"])
                self._events = Events(self.path / "tensorboard", step)
            while self._points:
                self._events.add(self._points[0])
                self._points.pop(0)
        except OSError as error:
            warnings.warn(
                f"iteration {row['iteration']} cannot be written to {self.metrics} and "
                f"TensorBoard's file: {error.strerror}; training goes on, and what is missing is "
                "tried again with the next",
                RunWarning,
                stacklevel=2,
            )

    def drop_rows_from(self, iteration: int) -> None:
        """Remove metrics of iterations that a resumed run will do again, and half-written ones."""
        try:
            text = self.metrics.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.reader(io.StringIO(whole)))
        header, expected = rows[:1], len(rows[0]) if rows else 0
        kept = [
            r for r in rows[1:] if len(r) == expected and r[0].isdigit() and int(r[0]) < iteration
        ]
        out = io.StringIO()
        csv.writer(out).writerows(header + kept)
        write_whole(self.metrics, out.getvalue())

    def save(self, theta: Params, state: State, *, best: tuple[Params, State] | None) -> None:
        """Save a checkpoint as `latest`, keeping the one before.

        Args:
            theta: parameters after `state.iteration` iterations.
            state: all else.
            best: what sampled the best batch so far, to save as `best`, if it is new.

        Raises:
            OSError: if it cannot be written; the old ones are kept.
        """
        assert self._origin is not None, "a folder only opened for reading"
        self.checkpoints.save(theta, state, self._origin, best=best)

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

    def evaluation_folder(self, out: Path | None = None) -> Path:
        """Make the folder for a test's figures: `out`, or the run's own.

        Raises:
            InputError: if it cannot be made.
        """
        folder = self.path / "evaluation" if out is None else out
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from error
        return folder

    @staticmethod
    def write_evaluation(
        evaluation: Evaluation,
        experiment: Experiment[TaskFamily],
        method: str,
        folder: Path,
    ) -> None:
        """Write evaluation.csv, a row a task and step, and summary.json, into `folder`.

        Raises:
            RunStopped: if the disk does not take them.
        """
        family = experiment.family
        shared = {
            "family": family_name(family),
            "protocol": getattr(family, "protocol", ""),
            "method": method,
            "seed": experiment.seed,
        }
        tasks = [f"task_{c.name}" for c in family.task_columns]
        measures = [f"{c.name}_mean" for c in family.measure_columns]
        numbers = ["gradient_steps", "return_mean", "return_sd", "episodes"]
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow([*shared, "task", *tasks, *numbers, *measures])
        for step, returns in enumerate(evaluation.returns):
            for task, value in enumerate(returns):
                writer.writerow(
                    [
                        *shared.values(),
                        task,
                        *evaluation.tasks[task].tolist(),
                        step,
                        float(value),
                        float(evaluation.return_sds[step, task]),
                        evaluation.episodes,
                        *evaluation.measures[step, task].tolist(),
                    ]
                )
        summary = shared | {
            "versions": versions(),
            "gradient_steps": summarise(evaluation, family),
        }
        try:
            write_whole(folder / "evaluation.csv", table.getvalue())
            write_whole(folder / "summary.json", as_json(summary))
        except OSError as error:
            raise RunStopped(
                f"the test cannot be written to {folder}: {error.strerror}", 3
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close TensorBoard's file and release the lock."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


class Events:
    """TensorBoard's file of a run, written at once: a full disk is told to the caller."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin a file; readers forget what earlier files say of `step` and later.

        Raises:
            OSError: if it cannot be written.
        """
        # Imported on demand: it is slow.
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = (folder / f"events.out.tfevents.{stamp}").open("ab", buffering=0)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(file_version="brain.Event:2")
        self._write(step=step, session_log=start)

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

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a CSV file, with a header where it is new; all or none.

    Raises:
        OSError: if they cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    with path.open("ab", buffering=0) as file:
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
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
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def cannot_write(path: Path, error: OSError, *, elsewhere: bool = False) -> InputError:
    """Return what to tell a user whose run folder cannot be written; a new one can go elsewhere."""
    hint = "; choose another with --out DIR" if elsewhere else ""
    return InputError(f"cannot write the run folder {path}: {error.strerror}{hint}")


def check_space(path: Path, theta: Params) -> None:
    """Raise OSError where the disk has no room for four checkpoints and some metrics."""
    wanted = 4 * sum(p.numel() * p.element_size() for p in theta.values()) + 2**18
    free = shutil.disk_usage(path).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"{free / 2**20:.2f} MiB are free on its disk, and a run takes at least "
            f"{wanted / 2**20:.2f}",
        )


def summarise(evaluation: Evaluation, family: TaskFamily) -> list[dict[str, object]]:
    """Return for each number of gradient steps the mean return, its half-width and spread."""
    names = [c.name for c in family.measure_columns]
    result = []
    for step, returns in enumerate(evaluation.returns):

        def figures(rows: np.ndarray, step: int = step) -> dict[str, float]:
            values = evaluation.measures[step][rows].mean(0)
            return {
                "return": float(evaluation.returns[step][rows].mean()),
                **dict(zip(names, values.tolist(), strict=True)),
            }

        result.append(
            {
                "steps": step,
                **figures(np.ones(len(returns), bool)),
                "half_width_95": evaluation.half_width(family, step),
                "sd_over_tasks": float(returns.std()),
                "by_task": {name: figures(mask) for name, mask in evaluation.groups(family)},
            }
        )
    return result


def count_rows(path: Path) -> int:
    """Return how many iterations a metrics.csv holds; 0 if there is none."""
    try:
        return max(0, path.read_text(encoding="utf-8", errors="replace").count("\n") - 1)
    except FileNotFoundError:
        return 0


def read_metrics(path: Path) -> dict[str, Sequence[float]]:
    """Read the numeric columns of a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    words = {"refused_because", "accepted"}
    return {n: [float(r[n]) for r in rows] for n in rows[0] if n not in words} if rows else {}
