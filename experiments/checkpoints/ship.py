"""Keep a trained run here, to be tested, rendered and reported as any run.

python experiments/checkpoints/ship.py RUN NAME   # RUN's best checkpoint becomes NAME's newest

Copies settings, versions, metrics and the checkpoint with the best training return after
adaptation, and tests that on the run's own test tasks; on the paper's own 40 too, where the paper
has such tasks. No step of training is taken. SHA256SUMS says of parameters, settings and tests
whether they are still those (`sha256sum -c SHA256SUMS`): `maml-rl evaluate NAME` writes in the
place of the run's own test.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import envs
from maml_rl.checkpoints import digest
from maml_rl.cli import run as command
from maml_rl.config import load_experiment
from maml_rl.task_sets import PAPER

HERE = Path(__file__).parent


def ship(run: Path, target: Path) -> int:
    """Copy a run and test it.

    Args:
        run: the run folder.
        target: the folder to make; what is there is replaced.

    Returns:
        The exit code of the last command.
    """
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in ("config.yaml", "versions.json", "metrics.csv"):
        shutil.copy2(run / name, target / name)
    shutil.copytree(run / "checkpoints" / "best", target / "checkpoints" / "latest")
    family = load_experiment(target / "config.yaml").family
    code = command(["evaluate", str(target), "--quiet"])
    if code == 0 and family.name in PAPER and family.comparable(envs.make(family.name)):
        where = str(target / "papers_tasks")
        code = command(["evaluate", str(target), "--tasks", "paper", "--out", where, "--quiet"])
    for picture in target.glob("*/*.[ps][nv]g"):
        if picture.relative_to(target) != CURVES:
            picture.unlink()
    sums = (
        f"{digest(file.read_bytes())}  {file.relative_to(target)}\n"
        for file in sorted(guarded(target))
    )
    (target / "SHA256SUMS").write_text("".join(sums))
    return code


CURVES = Path("evaluation/learning_curves.png")
"""The one picture that is kept."""


def guarded(target: Path) -> Iterator[Path]:
    """Yield the files that make a policy what it is, and those that say what it reaches."""
    for pattern in ("config.yaml", "checkpoints/latest/parameters.safetensors", "*/evaluation.csv"):
        yield from target.glob(pattern)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(ship(Path(sys.argv[1]), HERE / sys.argv[2]))
