"""The videos of a report: files that `maml-rl render` wrote, as data: URIs."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from maml_rl.assess import Subject
from maml_rl.errors import refusal
from maml_rl.rendering import VIDEO, Column, Rendering, read_rendering
from maml_rl.terminal import step_words

KINDS: Mapping[str, str] = {
    ".mp4": "video/mp4",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
"""Media types of what a page can show."""


@dataclass(frozen=True)
class Shown:
    """A film or picture on the page."""

    source: str
    """A data: URI."""
    is_video: bool
    words: str
    """What it shows, for those who do not see it."""


@dataclass(frozen=True)
class Episode:
    """What became of one task's rendered episode."""

    task: str
    value: str
    """The return."""
    ending: str
    """How it ended early, "" where it did not."""


@dataclass(frozen=True)
class Film:
    """One number of gradient steps."""

    heading: str
    shown: Shown | None
    episodes: list[Episode]


@dataclass(frozen=True)
class Player:
    """The films of one run, which go together."""

    run: str
    films: list[Film]
    seconds: float
    """Length of the films as they play."""
    frame: float
    """Seconds that one picture is shown for."""
    slow: float
    """Speed: .5 is half as fast as life."""
    notes: list[str]

    @property
    def plays(self) -> bool:
        """Whether every film is a video, so that one scrubber can drive them."""
        return all(film.shown is not None and film.shown.is_video for film in self.films)


def has_videos(subject: Subject) -> bool:
    """Whether a run has videos of the checkpoint that its policy is of."""
    made = read_rendering(subject.path / VIDEO)
    if made is None or made.video is None or made.iterations != subject.iterations:
        return False
    return all((subject.path / VIDEO / name).is_file() for name in made.files)


def player_of(subject: Subject) -> Player | None:
    """Return the player of a run's videos; None where it has none.

    Raises:
        InputError: if their record is damaged.
    """
    folder = subject.path / VIDEO
    made = read_rendering(folder)
    if made is None or not made.columns:
        return None
    try:
        return Player(
            run=subject.path.resolve().name,
            films=[film_of(column, made, folder) for column in made.columns],
            seconds=made.frames / made.fps,
            frame=1.0 / made.fps,
            slow=made.slow,
            notes=notes_on(made, subject),
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        hint = f"make the videos again: maml-rl render {subject.path}"
        raise refusal(
            f"the record of the videos in {folder} is damaged: {error}; {hint}"
        ) from error


def film_of(column: Column, made: Rendering, folder: Path) -> Film:
    """Return one column of the videos."""
    alone = len(made.columns) == 1
    heading = "without a gradient step" if alone else step_words(column.gradient_steps)
    episodes = [
        Episode(str(task), f"{value:.1f}", str(ending))
        for task, value, ending in zip(made.task_words, column.returns, column.endings, strict=True)
    ]
    told = "; ".join(f"{e.task}: return {e.value}" for e in episodes)
    shown = None if column.video is None else embedded(folder / column.video, f"{heading}. {told}")
    return Film(heading, shown, episodes)


def embedded(file: Path, words: str) -> Shown | None:
    """Return a file as it stands in a page; None where it is missing or of no known kind."""
    kind = KINDS.get(file.suffix)
    if kind is None or not file.is_file():
        return None
    content = base64.b64encode(file.read_bytes()).decode()
    return Shown(f"data:{kind};base64,{content}", kind.startswith("video/"), words)


def notes_on(made: Rendering, subject: Subject) -> list[str]:
    """Return what the videos must be looked at with."""
    how = "their mean, without noise" if made.mean else "drawn from the policy, by the same noise"
    notes = [
        f"Every column starts the same; actions are {how}. A return is that of the one episode "
        "shown, so it differs from the means below."
    ]
    if made.trouble:
        notes.append(str(made.trouble))
    if made.iterations != subject.iterations:
        notes.append(
            f"The videos are of the checkpoint {made.checkpoint!r} after {made.iterations} "
            f"iterations; the figures on this page are of {subject.iterations} iterations. "
            "`maml-rl render`, with this page's --checkpoint, makes them anew."
        )
    return notes
