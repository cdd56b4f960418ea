"""The training loop, whatever is trained: iterate, record, save, until done or told to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from maml_rl.adapt import Params
from maml_rl.checkpoints import State
from maml_rl.errors import InputError, RunStopped
from maml_rl.runs import Row, RunFolder
from maml_rl.signals import stop_requests


class Watcher(Protocol):
    """Is told of every row of metrics."""

    def __call__(self, row: Row, total: int) -> None:
        """Show one row of metrics out of `total` iterations."""


Show = Callable[[str], Watcher | None]
"""Begins to show a run, which has a name where there are several; None where nothing is shown."""


class Trainer(Protocol):
    """One run's state and what it needs to go on."""

    @property
    def state(self) -> State:
        """Counters."""

    @property
    def theta(self) -> Params:
        """What is learned, after `state.iteration` iterations."""

    @property
    def optimizer(self) -> Params:
        """What the outer optimiser remembers; nothing where it forgets."""

    @property
    def best(self) -> tuple[Params, State, Params] | None:
        """What to save as `best`, if the last step has found it: theta, counters, optimizer."""

    @property
    def total(self) -> int:
        """Iterations wanted."""

    @property
    def max_refused(self) -> int:
        """Updates refused in a row after which the run ends."""

    def step(self) -> Row:
        """Go on by a row of metrics, and return it."""

    def advice(self, row: Row) -> str:
        """Return what to try where updates are refused."""


def state_to_go_on(
    state: State, *, max_refused: int, iterations: int | None, run: str | Path
) -> State:
    """Return the state that a run is resumed in.

    Args:
        state: of its checkpoint.
        max_refused: updates refused in a row after which it ends.
        iterations: a new total, if one is given.
        run: its folder, for messages.

    Raises:
        InputError: if more iterations are done already.
    """
    if iterations is not None and iterations < state.iteration:
        raise InputError(
            f"{run} has done {state.iteration} iterations; --iterations is the new total and "
            f"must be at least that, got {iterations}"
        )
    if state.refused_in_a_row >= max_refused:
        # The run had ended for it; whoever resumes it wants it to be tried anew.
        return replace(state, refused_in_a_row=0)
    return state


def run_iterations(trainer: Trainer, folder: RunFolder | None, watch: Watcher | None) -> None:
    """Go on until the last iteration, recording and saving after each step.

    Raises:
        RunStopped: on Ctrl-C or SIGTERM after the running step, and where too many updates in a
            row were refused. What was done is saved.
    """
    total = trainer.total
    with stop_requests() as requests:
        try:
            while trainer.state.iteration < total and not requests.number:
                row = trainer.step()
                with requests.shield():
                    if folder is not None:
                        record(folder, trainer, row)
                    if watch is not None:
                        watch(row, total)
                check_refusals(trainer, row)
        except KeyboardInterrupt:
            # The second Ctrl-C: the running step is dropped.
            if not requests.number:
                raise
        if requests.number:
            raise RunStopped(
                f"stopped after {trainer.state.iteration} of {total} iterations",
                128 + requests.number,
            )


def record(folder: RunFolder, trainer: Trainer, row: Row) -> None:
    """Write a row of metrics and a checkpoint.

    Raises:
        RunStopped: if the checkpoint cannot be written; the one before is kept.
    """
    folder.write_row(row)
    try:
        folder.save(trainer.theta, trainer.state, best=trainer.best, optimizer=trainer.optimizer)
    except OSError as error:
        raise RunStopped(
            f"the checkpoint of iteration {trainer.state.iteration} cannot be written to "
            f"{folder.path}: {error.strerror}; the one before is kept",
            3,
        ) from error


def check_refusals(trainer: Trainer, row: Row) -> None:
    """Raise RunStopped, with what to try, where too many updates in a row were refused."""
    count = trainer.state.refused_in_a_row
    if count < trainer.max_refused:
        return
    raise RunStopped(
        f"{count} updates in a row were refused, the last because: {row['refused_because']}. "
        f"The run ends after {trainer.state.iteration} of {trainer.total} iterations; "
        f"try {trainer.advice(row)}: in a new run, or in this one's config.yaml before it is "
        "resumed",
        3,
    )
