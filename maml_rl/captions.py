"""Words on pictures, by Pillow: captions of a video's tiles, and film strips."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from envs.cameras import Color, Frame

WHITE: Color = (255, 255, 255)
LIGHT_GREEN: Color = (130, 225, 155)
LIGHT_BLUE: Color = (150, 190, 255)
"""Of what is wanted and what is, on a dark ground."""
BLACK: Color = (0, 0, 0)
DARK: Color = (60, 60, 60)


class Caption(NamedTuple):
    """What a tile of a video says."""

    task: str
    step: str
    """Number of gradient steps, in words."""
    score: str
    """Running return."""
    measure: str
    """What the family measures, now."""
    ending: str = ""
    """How the episode ended early."""

    @property
    def lines(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """What stands left and right, line by line."""
        return (self.task, self.step), (self.score, self.measure)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, so many pixels high."""
    return ImageFont.load_default(size)


def captioned(picture: Frame, caption: Caption, letters: int) -> Frame:
    """Return a tile (S, S, 3) with its caption above, and how its episode ended across it.

    Args:
        picture: (S, S, 3).
        caption: the words.
        letters: their height, pixels; see `largest`.
    """
    size = len(picture)
    margin = letters // 2
    bar = 2 * letters + 3 * margin
    # In a small tile the bar is high, and would hide the arrows above the body.
    down = max(0, bar - size // 7)
    result = np.concatenate([picture[:down], picture[: size - down]])
    result[:bar] //= 4
    image = Image.fromarray(result)
    draw = ImageDraw.Draw(image)
    right = size - margin
    for y, left_words, right_words, left_color, right_color in (
        (margin, caption.task, caption.step, LIGHT_GREEN, WHITE),
        (2 * margin + letters, caption.score, caption.measure, WHITE, LIGHT_BLUE),
    ):
        draw.text((margin, y), left_words, left_color, font(letters))
        draw.text((right, y), right_words, right_color, font(letters), anchor="ra")
    if caption.ending:
        draw.text(
            (size // 2, size - 2 * letters),
            caption.ending,
            WHITE,
            font(3 * letters // 2),
            anchor="mm",
            stroke_width=2,
            stroke_fill=BLACK,
        )
    # So that tiles of one colour can be told apart.
    draw.rectangle((0, 0, size - 1, size - 1), outline=DARK)
    return np.asarray(image)


def largest(lines: Sequence[tuple[str, str]], size: int) -> int:
    """Return the height of letters, pixels, at which two words a line fit side by side."""
    for letters in range(max(9, size // 24), 5, -1):
        widest = max(font(letters).getlength("  ".join(words)) for words in lines)
        if widest <= size - letters:
            return letters
    return 5


def grey(picture: Frame) -> Frame:
    """Return a picture without colours, and paler."""
    light = picture.mean(-1, keepdims=True) * 0.5 + 100
    return np.broadcast_to(light, picture.shape).astype(np.uint8)


class StripRow(NamedTuple):
    """What a film strip shows of one number of gradient steps."""

    words: str
    tiles: Sequence[tuple[Frame, str]]
    """Picture (S, S, 3) and the words below it, at each instant."""


def film_strip(title: str, instants: Sequence[str], rows: Sequence[StripRow]) -> Image.Image:
    """Return pictures in a grid: time to the right, gradient steps downwards.

    Args:
        title: above all.
        instants: when the pictures of each column are from.
        rows: one for each number of gradient steps, with a tile for each instant.
    """
    size = len(rows[0].tiles[0][0])
    letters = max(9, size // 12)
    gap = max(2, size // 60)
    below = letters + 2 * gap
    left = int(max(font(letters).getlength(row.words) for row in rows)) + 4 * gap
    top = 3 * letters
    width = left + len(instants) * (size + gap)
    height = top + len(rows) * (size + below + gap)
    image = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(image)
    draw.text((2 * gap, gap), title, BLACK, font(letters))
    for column, words in enumerate(instants):
        x = left + column * (size + gap)
        draw.text((x + size // 2, top - gap), words, BLACK, font(letters), anchor="md")
    for number, row in enumerate(rows):
        y = top + number * (size + below + gap)
        draw.text((2 * gap, y + size // 2), row.words, BLACK, font(letters), anchor="lm")
        for column, (picture, words) in enumerate(row.tiles):
            x = left + column * (size + gap)
            image.paste(Image.fromarray(picture), (x, y))
            draw.rectangle((x, y, x + size - 1, y + size - 1), outline=DARK)
            middle = (x + size // 2, y + size + gap)
            draw.text(middle, words, BLACK, font(letters), anchor="ma")
    return image
