"""Follows episodes while they are sampled, and draws them as tiles of a grid."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from envs.cameras import Camera, Frame, open_camera
from envs.family import Column, TaskFamily, Transition, Worlds
from maml_rl.captions import Caption, StripRow, captioned, film_strip, grey, largest
from maml_rl.movies import Movie
from maml_rl.rendering import RenderSettings
from maml_rl.terminal import step_words

INSTANTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of an episode, in a film strip."""


def step_label(steps: int, last: int) -> str:
    """Return "before adapting", "1 gradient step" and so on, of columns up to `last` steps."""
    return step_words(steps).removeprefix("after ") if last else "no gradient step"


SMALL = 200
"""Side of a tile, pixels, below which captions are short: their letters would be too small."""
WIDEST = ("return -999.9", -9.99)
"""Return in words, and measure, that letters are made to fit from the first frame on."""


def short_label(steps: int, last: int) -> str:
    """Return what `step_label` does in fewer letters."""
    return step_label(steps, last).replace("gradient ", "").removesuffix(" adapting")


def measure_words(column: Column, value: float, digits: str, *, named: bool) -> str:
    """Return a measure with its unit, and its name if wanted."""
    # Not "-0.0".
    words = f"{value:z{digits}} {column.unit}"
    return f"{column.name} {words}" if named else words


class Stage:
    """Follows the worlds of a grid while they are sampled, and draws them when a frame is due.

    World c T + r is task r (of T) after as many gradient steps as column c says.
    """

    def __init__(
        self,
        family: TaskFamily,
        tasks: npt.NDArray[np.float32],
        columns: int,
        settings: RenderSettings,
        movies: Sequence[Movie],
    ) -> None:
        """Begin.

        Args:
            family: whose worlds.
            tasks: (T, P).
            columns: numbers of gradient steps, from 0 on.
            settings: speed and size.
            movies: of the columns one by one, then those of the whole grid; none: nothing is drawn.
        """
        self._family, self._tasks, self._settings = family, tasks, settings
        self._movies, self._columns = movies, columns
        count = columns * len(tasks)
        self.returns = np.zeros(count)
        """(N,): running."""
        self.endings = [""] * count
        self.frames = 0
        self._failed = np.zeros(count, bool)
        self._broken = np.zeros(count, bool)
        self._recent: deque[npt.NDArray[np.float32]] = deque(maxlen=family.shown_mean_steps)
        self._measures: npt.NDArray[np.float32] | None = None
        self._step = self._drawn_step = 0
        self._pictures: list[Frame | None] = [None] * count
        self._letters = settings.size
        """Height, pixels: the same in all tiles, and never larger than before."""
        self._camera: Camera | None = None
        self._instants = [round(share * family.episode_steps) for share in INSTANTS]
        # For each row, for each column, what its strip shows so far.
        self._strips: list[list[list[tuple[Frame, str]]]] = [
            [[] for _ in range(columns)] for _ in tasks
        ]

    def __call__(self, worlds: Worlds, transition: Transition | None, now: Tensor) -> None:
        """See the worlds after a step, those of the mask `now`; a `Watch`."""
        ended = np.zeros(len(self.returns), bool)
        if transition is not None:
            self._step += 1
            ended = self._take(worlds, transition, now.numpy())
        if not self._movies:
            return
        self._camera = self._camera or open_camera(worlds, self._settings.size, self._settings.size)
        due = self._frames_due()
        shown = bool(self._instants) and self._instants[0] <= self._step
        for world in range(len(self.returns)):
            going = not self.endings[world]
            if ended[world] or (going and (due or shown)):
                self._draw(world)
        for _ in range(due):
            self._show()
        # Several where the episode is short.
        while self._instants and self._instants[0] <= self._step:
            self._keep_instant()

    def _take(
        self, worlds: Worlds, transition: Transition, now: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Add up a step's rewards and return which worlds ended with it."""
        diverged = transition.diverged.numpy() & now
        good = now & ~diverged
        self.returns[good] += transition.rewards.double().numpy()[good]
        if transition.measures.shape[1]:
            self._recent.append(transition.measures.numpy().copy())
            means = np.mean(self._recent, axis=0)
            before = means if self._measures is None else self._measures
            self._measures = np.where(good[:, None], means, before)
        terminated = transition.terminated.numpy() & good
        moment = self._family.moment(self._step)
        for world in terminated.nonzero()[0].tolist():
            self.endings[world] = f"{self._family.ending(worlds.state(world))} at {moment}"
        for world in diverged.nonzero()[0].tolist():
            self.endings[world] = f"the simulation broke down at {moment}"
        self._broken |= diverged
        self._failed |= diverged | (terminated & self._family.ending_is_failure)
        return terminated | diverged

    def _frames_due(self) -> int:
        """Return how many frames show this step: those before the next one's time."""
        until = (self._step + 1) * self._family.shown_seconds / self._settings.slow
        return max(0, math.ceil(until * self._settings.fps - 1e-6) - self.frames)

    def _draw(self, world: int) -> None:
        """Draw one world as it is now."""
        assert self._camera is not None  # opened with the first frame
        before = self._pictures[world]
        if before is None or not self._broken[world]:
            measures = None if self._measures is None else self._measures[world]
            task = self._tasks[world % len(self._tasks)]
            picture = self._camera.frame(world, task, measures)
        else:
            # MuJoCo has reset it: what there is now is not what was simulated.
            picture = before
        self._pictures[world] = grey(picture) if self._failed[world] else picture

    def _caption(self, world: int) -> Caption:
        """Return what a world's tile says now."""
        task = self._family.describe_task(self._tasks[world % len(self._tasks)])
        score = f"return {self.returns[world]:z.1f}"
        small = self._settings.size < SMALL
        measure = self._measure_words(world, ".2f", named=not small)
        label = short_label if small else step_label
        steps = label(world // len(self._tasks), self._columns - 1)
        return Caption(task, steps, score, measure, self.endings[world])

    def _fit_letters(self, captions: Sequence[Caption]) -> None:
        """Choose letters for which there is room in every caption, now and probably later."""
        size = self._settings.size
        score, value = WIDEST
        named = size >= SMALL
        columns = self._family.measure_columns[:1]
        widest = [(score, measure_words(c, value, ".2f", named=named)) for c in columns]
        lines = [line for caption in captions for line in caption.lines]
        self._letters = min(self._letters, largest([*lines, *widest], size))

    def _measure_words(self, world: int, digits: str, *, named: bool) -> str:
        """Return what the family measures of a world now, "" before the first step."""
        if self._measures is None:
            return ""
        column = self._family.measure_columns[0]
        return measure_words(column, float(self._measures[world, 0]), digits, named=named)

    def _show(self) -> None:
        """Send a frame to every movie."""
        rows = len(self._tasks)
        captions = [self._caption(world) for world in range(len(self.returns))]
        self._fit_letters(captions)
        tiles = []
        for picture, caption in zip(self._pictures, captions, strict=True):
            assert picture is not None  # drawn with the first frame
            tiles.append(captioned(picture, caption, self._letters))
        columns = [
            np.concatenate(tiles[column * rows : (column + 1) * rows])
            for column in range(self._columns)
        ]
        whole = np.concatenate(columns, axis=1)
        for number, movie in enumerate(self._movies):
            movie.append(columns[number] if number < self._columns else whole)
        self.frames += 1
        self._drawn_step = self._step

    def _keep_instant(self) -> None:
        """Keep the present pictures for the film strips."""
        self._instants.pop(0)
        for world, picture in enumerate(self._pictures):
            assert picture is not None  # drawn for this
            score = f"return {self.returns[world]:z.0f}"
            more = self.endings[world] or self._measure_words(world, ".1f", named=False)
            column, row = divmod(world, len(self._tasks))
            self._strips[row][column].append((picture, ", ".join(filter(None, (score, more)))))

    def finish(self) -> None:
        """Show the end, where every episode was over before its time."""
        if not self._movies:
            return
        if self._drawn_step < self._step:
            self._show()
        while self._instants:
            self._keep_instant()

    def strips(self) -> list[Image.Image]:
        """Return the film strip of each task."""
        family = self._family
        moments = [family.moment(round(share * family.episode_steps)) for share in INSTANTS]
        pictures = []
        for row, columns in enumerate(self._strips):
            rows = [
                StripRow(step_label(steps, len(columns) - 1), tiles)
                for steps, tiles in enumerate(columns)
            ]
            title = f"{family.name}: {family.describe_task(self._tasks[row])}"
            pictures.append(film_strip(title, moments, rows))
        return pictures

    def close(self) -> None:
        """Release the camera."""
        if self._camera is not None:
            self._camera.close()
