"""Made-up characters in Omniglot's tree, to try the supervised mode without a download.

A character is three or four strokes; each drawing of it moves their control points, turns, shears,
stretches and shifts the whole, and takes another pen. So the nearest pixels are a poor guide to
which character a drawing is, while its shape is a good one.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from maml_rl.errors import refusal

Points = npt.NDArray[np.float64]
"""(P, 2): x and y, each about -1 to 1, y downwards."""

SIDE = 105
"""Pixels of a drawing, as Omniglot's."""
MARGIN = 16
"""Pixels from where x is -1 to the drawing's edge."""
AN_ALPHABET = 10
"""Characters of an alphabet."""
SMOOTHNESS = 24
"""Pieces that a curve is drawn in."""


@dataclass(frozen=True)
class Hand:
    """How much drawings of a character differ; each a standard deviation or a largest value."""

    wobble: float = 0.04
    """Standard deviation of a control point's place."""
    turn: float = 15.0
    """Largest turn, in degrees."""
    shear: float = 0.15
    """Largest shear."""
    stretch: float = 0.15
    """Largest change of width, and of height, as a fraction."""
    shift: float = 0.12
    """Largest shift across and down."""
    pens: tuple[int, int] = (2, 4)
    """Pixels of the thinnest and of the thickest pen."""


def draw_characters(
    folder: Path, *, characters: int = 40, drawings: int = 20, seed: int = 0
) -> int:
    """Write FOLDER/images_background/alphabetNN/characterNN/NN.png and return how many files.

    Equal seeds give equal files. All of them are there in the end, or none.

    Args:
        folder: new, or empty but for what is hidden.
        characters: how many.
        drawings: of each.
        seed: decides what they look like. A character does not depend on how many there are.

    Raises:
        InputError: if the folder is not empty, or cannot be written.
        ValueError: if there is nothing to draw.
    """
    for name, value in (("characters", characters), ("drawings", drawings)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What is hidden may be what a call that was killed has left, and is never read.
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise refusal(f"{folder} is not empty; name a folder that is, or a new one")
        # One entry that is moved into place, so that half a set is never taken for one.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as partial:
            pictures = Path(partial) / "images_background"
            for number in range(characters):
                alphabet, letter = divmod(number, AN_ALPHABET)
                where = pictures / f"alphabet{alphabet + 1:02d}" / f"character{letter + 1:02d}"
                where.mkdir(parents=True)
                strokes = character(np.random.default_rng([seed, number]))
                for drawing in range(drawings):
                    rng = np.random.default_rng([seed, number, drawing])
                    content = as_png(draw(strokes, Hand(), rng))
                    (where / f"{drawing + 1:02d}.png").write_bytes(content)
            os.replace(pictures, folder / pictures.name)
    except OSError as error:
        raise refusal(f"cannot write {folder}: {error.strerror}; name another folder") from error
    return characters * drawings


def straight(points: Points) -> Points:
    """Return the corners of straight lines from point to point: the points themselves."""
    return points


def curved(points: Points) -> Points:
    """Return points of the Bezier curve with these control points (de Casteljau's way)."""
    along = np.linspace(0.0, 1.0, SMOOTHNESS + 1)[:, None, None]
    curve = np.broadcast_to(points, (SMOOTHNESS + 1, *points.shape))
    while curve.shape[1] > 1:
        curve = (1 - along) * curve[:, :-1] + along * curve[:, 1:]
    return curve[:, 0]


def closed(points: Points) -> Points:
    """Return points of the smooth loop that touches every side of a polygon in its middle."""
    middles = (points + np.roll(points, -1, axis=0)) / 2
    pieces = [curved(np.stack([middles[i - 1], points[i], middles[i]])) for i in range(len(points))]
    return np.concatenate(pieces)


class Kind(NamedTuple):
    """Of strokes."""

    path: Callable[[Points], Points]
    """What makes a line of its control points."""
    points: int
    """Control points."""
    apart: float
    """How far each is from the one before at least."""


KINDS: Sequence[Kind] = (
    Kind(straight, 2, 1.2),
    Kind(straight, 3, 0.9),
    Kind(curved, 3, 0.9),
    Kind(curved, 4, 0.9),
    Kind(closed, 4, 0.0),
)


class Stroke(NamedTuple):
    """What the pen does between touching and leaving the paper."""

    points: Points
    path: Callable[[Points], Points]


def character(rng: np.random.Generator) -> tuple[Stroke, ...]:
    """Return a new character: three or four strokes."""
    kinds = rng.integers(len(KINDS), size=rng.integers(3, 5))
    return tuple(stroke(KINDS[kind], rng) for kind in kinds)


def stroke(kind: Kind, rng: np.random.Generator) -> Stroke:
    """Return a new stroke; a closed one goes round a place once."""
    if kind.path is closed:
        angles = rng.uniform(0, np.pi / 2) + np.arange(kind.points) * 2 * np.pi / kind.points
        round_about = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        radii = rng.uniform(0.35, 0.8, size=2)
        return Stroke(rng.uniform(-0.55, 0.55, size=2) + radii * round_about, kind.path)
    points = [rng.uniform(-1, 1, size=2)]
    while len(points) < kind.points:
        point = rng.uniform(-1, 1, size=2)
        if np.hypot(*(point - points[-1])) >= kind.apart:
            points.append(point)
    return Stroke(np.stack(points), kind.path)


def draw(strokes: Sequence[Stroke], hand: Hand, rng: np.random.Generator) -> Image.Image:
    """Return one drawing of a character: black on white, one bit a pixel."""
    angle = np.deg2rad(rng.uniform(-hand.turn, hand.turn))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, rng.uniform(-hand.shear, hand.shear)], [0.0, 1.0]])
    stretch = np.diag(rng.uniform(1 - hand.stretch, 1 + hand.stretch, size=2))
    shift = rng.uniform(-hand.shift, hand.shift, size=2)
    pen = int(rng.integers(hand.pens[0], hand.pens[1] + 1))
    image = Image.new("1", (SIDE, SIDE), 1)
    paper = ImageDraw.Draw(image)
    for points, path in strokes:
        wobbly = points + rng.normal(0.0, hand.wobble, size=points.shape)
        line = path(wobbly) @ (turn @ shear @ stretch).T + shift
        pixels = (SIDE - 1) / 2 + line * ((SIDE - 1) / 2 - MARGIN)
        corners = [(float(x), float(y)) for x, y in pixels]
        paper.line(corners, fill=0, width=pen, joint="curve")
    return image


def as_png(image: Image.Image) -> bytes:
    """Return the content of an image's PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
