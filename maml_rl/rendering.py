"""What is asked of a rendering, and the record of what was made."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from maml_rl.checkpoints import UNREADABLE
from maml_rl.errors import InputError

VIDEO = "video"
"""The folder of a run's videos."""
RECORD = "video.json"
FORMAT = 1
OURS = re.compile(r"\w+\.(mp4|webp|gif|png)", re.ASCII)
"""Names of files that are made."""


@dataclass(frozen=True, kw_only=True)
class RenderSettings:
    """How videos are made."""

    fps: float = 25.0
    """Frames a second."""
    slow: float = 1.0
    """Speed: .5 is half as fast as life. Navigation's 25 control steps a second count as life."""
    mean: bool = False
    """Whether the policy takes its mean action, without noise."""
    gif: bool = False
    """Whether the grid is a GIF, for places that play nothing else."""
    frames: bool = False
    """Whether to write every frame as PNG too."""
    size: int = 480
    """Pixels of a tile's side."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least, most in (("fps", 1, 240), ("slow", 0.01, 100), ("size", 64, 1920)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise InputError(f"{name} must be between {least} and {most}, got {value}")
        if self.size % 2:
            raise InputError(f"size must be even, got {self.size}")


@dataclass(frozen=True)
class Column:
    """What became of the rendered episodes after one number of gradient steps."""

    gradient_steps: int
    video: str | None
    """File of this column's video, beside the record: MP4, or animated WebP; None where nothing
    could be drawn."""
    returns: tuple[float, ...]
    """Of the rendered episode of each task."""
    endings: tuple[str, ...]
    """How each ended early, in words such as "fell at 1.3 s"; "" where it did not."""


@dataclass(frozen=True)
class Rendering:
    """A record of what was rendered, and from what."""

    checkpoint: str
    """latest, previous or best."""
    iterations: int
    """Done when that checkpoint was saved."""
    mean: bool
    """Whether the policy acted without noise."""
    fps: float
    slow: float
    frames: int
    tasks: tuple[tuple[float, ...], ...]
    task_words: tuple[str, ...]
    """Each task in words, with its unit."""
    columns: tuple[Column, ...]
    video: str | None
    """File of the whole grid, beside the record."""
    strips: tuple[str, ...]
    """Files of the film strips, PNG, one a task, beside the record; none where nothing could be
    drawn."""
    trouble: str
    """Why there is no picture, and what to install; or why the videos are no MP4; else ""."""

    @property
    def files(self) -> list[str]:
        """Every file beside the record."""
        videos = [self.video, *(column.video for column in self.columns)]
        return [*(name for name in videos if name is not None), *self.strips]


def read_rendering(folder: Path) -> Rendering | None:
    """Return the record of what was rendered into a folder; None where there is none to be read."""
    try:
        saved = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if saved.pop("format") != FORMAT:
            return None
        columns = [
            Column(**{**c, "returns": tuple(c["returns"]), "endings": tuple(c["endings"])})
            for c in saved.pop("columns")
        ]
        words, strips = (tuple(map(str, saved.pop(name))) for name in ("task_words", "strips"))
        tasks = tuple(map(tuple, saved.pop("tasks")))
        made = Rendering(
            columns=tuple(columns), tasks=tasks, task_words=words, strips=strips, **saved
        )
    except (OSError, *UNREADABLE):
        return None
    # A record from elsewhere must not lead out of its folder, nor to files of another kind.
    return made if all(OURS.fullmatch(str(name)) for name in made.files) else None
