"""What a run folder or a checkpoint holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from maml_rl.checkpoints import (
    KINDS,
    MANIFEST,
    Checkpoint,
    NewerFormatError,
    read_checkpoint,
)
from maml_rl.errors import CheckpointError, InputError, printable
from maml_rl.locks import holder
from maml_rl.plain_yaml import leaves, read_yaml
from maml_rl.runs import RunFolder, count_rows


def inspect_run(path: Path, console: Console) -> None:
    """Print what is in a run folder or a checkpoint.

    Raises:
        InputError: if it is neither.
        CheckpointError: after printing, if a checkpoint in it is damaged or the latest missing.
    """
    if is_checkpoint(path):
        print_checkpoint(read_checkpoint(path), console)
        return
    folder = RunFolder.open(path)
    settings = dict(leaves(read_yaml(folder.config)))
    rows = count_rows(folder.metrics)
    user = holder(path)
    say(
        console,
        f"{path}: {settings.get('name')}, {settings.get('iterations')} iterations wanted, "
        f"{rows} row{'s' * (rows != 1)} in metrics.csv" + (f"; in use by {user}" if user else ""),
    )
    found: dict[str, Checkpoint] = {}
    words: dict[str, str] = {}
    complaints = []
    for name in KINDS:
        where = folder.checkpoints.find(name)
        try:
            found[name] = read_checkpoint(where)
            words[name] = "whole"
        except CheckpointError as error:
            newer = isinstance(error, NewerFormatError)
            words[name] = "newer" if newer else "damaged" if where.exists() else "none"
            # A run can do without the others: they may not have been made yet.
            if where.exists() or name == "latest":
                complaints.append(str(error))
    table = Table(box=None, pad_edge=False)
    newest = next((found[name] for name in KINDS if name in found), None)
    for heading in (
        "checkpoint",
        "",
        "iteration",
        "control steps" if newest is None else unit(newest),
    ):
        table.add_column(heading, justify="left" if heading in ("checkpoint", "") else "right")
    for name in KINDS:
        state = found[name].state if name in found else None
        table.add_row(
            name,
            words[name],
            f"{state.iteration}" if state else "",
            f"{state.env_steps:,}" if state else "",
        )
    console.print(table)
    if newest is not None:
        print_checkpoint(newest, console)
    if complaints:
        raise CheckpointError("; ".join(complaints))


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or not, and no run.

    Raises:
        InputError: if it cannot be looked at.
    """
    try:
        # A run may lie in a folder called checkpoints too.
        if (path / "checkpoints").is_dir():
            return False
        return (path / MANIFEST).exists() or path.resolve().parent.name == "checkpoints"
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def print_checkpoint(checkpoint: Checkpoint, console: Console) -> None:
    """Print a checkpoint that is whole."""
    state, origin = checkpoint.state, checkpoint.origin
    made_for = ", ".join(f"{name} {value}" for name, value in origin.made_for.items() if value)
    made_with = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    size = sum(p.numel() for p in checkpoint.theta.values())
    shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in checkpoint.theta.items())
    best = (
        f"best {best_words(checkpoint)}, in iteration {state.best_iteration}"
        if state.best_iteration >= 0
        else "nothing to choose the best by yet"
    )
    say(console, f"{checkpoint.path} is whole: every file matches its sha256")
    say(console, f"  {state.iteration} iterations, {state.env_steps:,} {unit(checkpoint)}; {best}")
    if state.refused_in_a_row:
        say(console, f"  the last {state.refused_in_a_row} updates were refused")
    say(console, f"  made for: {made_for}")
    say(console, f"  made with: {made_with}")
    say(console, f"  {size:,} parameters: {shapes}")


def is_policy(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a policy, and not of a network of supervised learning."""
    return "family" in checkpoint.origin.made_for


def best_words(checkpoint: Checkpoint) -> str:
    """Return what the best checkpoint was chosen by, and its value."""
    value = checkpoint.state.best_return
    if is_policy(checkpoint):
        return f"return after adaptation {value:.1f}"
    # An error is kept with a minus, so that the greatest is the best.
    return f"error {-value:.4g}" if value < 0 else f"accuracy {value:.4f}"


def unit(checkpoint: Checkpoint) -> str:
    """Return what a run counts beside iterations."""
    return "control steps" if is_policy(checkpoint) else "tasks drawn"


def say(console: Console, text: str) -> None:
    """Print a line as it is, for people and for grep."""
    console.print(printable(text), highlight=False, soft_wrap=True)
