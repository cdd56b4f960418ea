"""Trains in a process that is sent a signal at random times, again and again, until it is done.

python -m tests.killed_training OUT SIGNAL SEED ROUNDS

A process of its own without threads, which forks one that trains, so that no start costs an import.
Prints the exit code of each, as JSON: negative for a signal that killed it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer import record_writer

import maml_rl.cli
from maml_rl.__main__ import main
from maml_rl.signals import exit_code, raise_on_terminate
from tests.tiny import flags

IMPORTED = (event_pb2, record_writer, maml_rl.cli)
"""What a child would import, so that none has to."""

TRAIN = [*("train", "navigation", "--threads", "1", "--seed", "5"), *flags(iterations=25)]


def child(out: Path, log: Path) -> None:
    """Train or go on, as a user would, and leave with the command's exit code."""
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    begun = (out / "config.yaml").exists()
    words = ["resume", str(out)] if begun else [*TRAIN, "--out", str(out)]
    sys.argv = ["maml-rl", *words]
    try:
        try:
            main()
        except KeyboardInterrupt as early:  # before the command has begun to look after it
            sys.exit(exit_code(early))
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(stop.code or 0))


def interrupt(out: Path, number: int, seed: int, rounds: int) -> list[int]:
    """Return the exit codes of processes that were sent a signal, and of the one that ended."""
    rng, codes = random.Random(seed), []
    raise_on_terminate()  # for the child's first instants
    # The first use of these imports for a second. One thread, so that no other is lost in a fork.
    torch.set_num_threads(1)
    torch.func.vmap(torch.func.grad(torch.sum))(torch.ones(2, 3))
    log = out.with_name(f"{out.name}.log")
    longest, trained = 0.6, 0
    for _ in range(rounds):
        process = os.fork()
        if process == 0:
            child(out, log)
        # Into training or into what comes before: the handlers are there after an instant.
        time.sleep(rng.uniform(0.05, longest))
        os.kill(process, number)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        # On a busy machine training begins later: where nothing was trained, wait longer.
        metrics = out / "metrics.csv"
        before, trained = trained, metrics.stat().st_size if metrics.exists() else 0
        longest *= 1.5 if trained <= before else 1.0
        if not (out / "config.yaml").exists() and out.exists():
            # Killed before there was a run: what a user would remove, since nothing is in it.
            os.rename(out, out.with_name(f"{out.name}-{len(codes)}"))
    process = os.fork()
    if process == 0:
        child(out, log)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    return codes


if __name__ == "__main__":
    folder, name, seed_, rounds_ = sys.argv[1:]
    print(json.dumps(interrupt(Path(folder), signal.Signals[name], int(seed_), int(rounds_))))
