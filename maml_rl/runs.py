"""Run folders: the only module that writes them.

RUN/config.yaml                   resolved settings, a valid experiment
RUN/versions.json                 what it was made with
RUN/metrics.csv                   one row an iteration
RUN/tensorboard/                  the same numbers as events
RUN/checkpoints/latest, previous, best
    parameters.safetensors  state.json  manifest.json
RUN/evaluation/                   evaluation.csv, summary.json
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from envs.family import TaskFamily
from maml_rl._version import __version__
from maml_rl.adapt import Params
from maml_rl.config import Experiment, InputError, family_name, to_yaml
from maml_rl.evaluate import Evaluation

FORMAT = 1
PARAMETERS, STATE, MANIFEST = "parameters.safetensors", "state.json", "manifest.json"

Row = Mapping[str, float | int | str | bool]


@functools.cache
def versions() -> Mapping[str, str]:
    """Return versions of everything a result depends on, and the git commit if there is one."""
    found = {"python": platform.python_version(), "maml-rl": __version__}
    for package in ("torch", "mujoco", "gymnasium", "numpy"):
        found[package] = importlib.metadata.version(package)
    commit = git_commit()
    return found | ({"git": commit} if commit else {})


def git_commit() -> str:
    """Return the commit of the checkout this package runs from, or ''; "+" if edited since."""
    here = Path(__file__).parent
    try:
        ours = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True
        )
        if ours.returncode:
            return ""
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return described.stdout.strip()


@dataclass(frozen=True)
class State:
    """What a run continues from, beside its parameters. All randomness follows from these."""

    iteration: int
    """Iterations done."""
    env_steps: int
    """Control steps sampled for training."""
    best_return: float
    """Best return after adaptation of any batch; -inf before the first."""
    best_iteration: int
    """The iteration that sampled it."""


class CheckpointError(InputError):
    """A checkpoint is missing or not whole."""


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: object | None = None

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
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; choose another folder with --out DIR")
        if path.is_dir() and any(path.iterdir()):
            raise InputError(
                f"{path} exists and is not empty; choose another folder with --out DIR"
            )

    @classmethod
    def create(cls, path: Path, experiment: Experiment[TaskFamily]) -> RunFolder:
        """Make a new run folder.

        Raises:
            InputError: if it exists and is not empty, or cannot be written.
        """
        cls.check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.yaml").write_text(to_yaml(experiment), encoding="utf-8")
            (path / "versions.json").write_text(as_json(versions()))
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {path}: {error.strerror}; "
                "choose another with --out DIR"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run folder.

        Raises:
            InputError: if it is none.
        """
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path} is not a run folder: it has no config.yaml")
        return cls(path)

    def rewrite_config(self, experiment: Experiment[TaskFamily]) -> None:
        """Replace the resolved experiment, as when a run is extended."""
        with replacing(self.config) as partial:
            partial.write_text(to_yaml(experiment), encoding="utf-8")

    def write_row(self, row: Row) -> None:
        """Append one iteration to metrics.csv and to TensorBoard."""
        new = not self.metrics.exists()
        with self.metrics.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        step = int(row["iteration"])
        events = self._writer(step)
        for name, value in row.items():
            if isinstance(value, int | float) and name != "iteration":
                events.add_scalar(name, float(value), step)
        events.flush()

    def _writer(self, step: int):  # type: ignore[no-untyped-def]  # imported on demand: it is slow
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        return self._events

    def drop_rows_from(self, iteration: int) -> None:
        """Remove metrics of iterations that a resumed run will do again."""
        if not self.metrics.exists():
            return
        with self.metrics.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if not rows:
            return
        kept = [rows[0], *(r for r in rows[1:] if r and int(r[0]) < iteration)]
        with replacing(self.metrics) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows(kept)

    def save(self, theta: Params, state: State, *, best: Params | None) -> None:
        """Save a checkpoint as `latest`, keeping the one before.

        Args:
            theta: parameters after `state.iteration` iterations.
            state: all else.
            best: parameters that sampled the best batch so far, to save as `best`, if they are new.
        """
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        if best is not None:
            self._save_as(folder / "best", best, state)
        latest, previous = folder / "latest", folder / "previous"
        new = self._write_checkpoint(folder / ".new", theta, state)
        if latest.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(latest, previous)
        os.replace(new, latest)
        sync_folder(folder)

    def _save_as(self, target: Path, theta: Params, state: State) -> None:
        new = self._write_checkpoint(target.with_name(f".{target.name}"), theta, state)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(new, target)

    @staticmethod
    def _write_checkpoint(target: Path, theta: Params, state: State) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        tensors = {name: p.detach().cpu().contiguous() for name, p in theta.items()}
        contents = {
            PARAMETERS: safetensors.torch.save(tensors),
            STATE: as_json(asdict(state)).encode(),
        }
        manifest = {
            "format": FORMAT,
            "order": list(theta),
            "versions": versions(),
            "sha256": {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()},
        }
        contents[MANIFEST] = as_json(manifest).encode()
        for name, content in contents.items():
            with (target / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(target)
        return target

    def load(self, which: str = "latest") -> tuple[Params, State]:
        """Load a checkpoint.

        Raises:
            CheckpointError: if it is missing or not whole.
        """
        folder = self.path / "checkpoints" / which
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            contents = {name: (folder / name).read_bytes() for name in (PARAMETERS, STATE)}
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} has no whole checkpoint {which!r}") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} has format {manifest.get('format')}; "
                f"this version of maml-rl reads format {FORMAT}"
            )
        try:
            for name, content in contents.items():
                if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
                    raise CheckpointError(
                        f"checkpoint {folder}: {name} is damaged (sha256 differs)"
                    )
            tensors = safetensors.torch.load(contents[PARAMETERS])
            theta = {name: tensors[name] for name in manifest["order"]}
            saved = json.loads(contents[STATE])
            best = -math.inf if saved["best_return"] is None else saved["best_return"]
            return theta, State(**saved | {"best_return": best})
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {folder} lacks an entry: {error}") from error

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
        """Write evaluation.csv, a row a task and step, and summary.json, into `folder`."""
        family = experiment.family
        shared = {
            "family": family_name(family),
            "protocol": getattr(family, "protocol", ""),
            "method": method,
            "seed": experiment.seed,
        }
        with (folder / "evaluation.csv").open("w", newline="", encoding="utf-8") as file:
            tasks = [f"task_{c.name}" for c in family.task_columns]
            measures = [f"{c.name}_mean" for c in family.measure_columns]
            numbers = ["gradient_steps", "return_mean", "return_sd", "episodes"]
            writer = csv.writer(file)
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
        (folder / "summary.json").write_text(as_json(summary))

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._events is not None:
            self._events.close()  # type: ignore[attr-defined]  # a SummaryWriter
            self._events = None


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


class replacing:  # noqa: N801  # reads as a statement
    """Write a whole file beside the old one, and swap it in only when it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")

    def __enter__(self) -> Path:
        return self._partial

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            os.replace(self._partial, self._path)


def read_metrics(path: Path) -> dict[str, Sequence[float]]:
    """Read the numeric columns of a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    words = {"refused_because", "accepted"}
    return {n: [float(r[n]) for r in rows] for n in rows[0] if n not in words} if rows else {}


def check_device(device: str) -> None:
    """Raise InputError if the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        reason = (
            "this torch is a CPU build"
            if torch.version.cuda is None
            else "torch finds no CUDA device"
        )
        raise InputError(f"device cuda is not there: {reason}; use --device cpu")
