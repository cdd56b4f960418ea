"""Words on pictures: each in its own corner, nothing else touched."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from envs.cameras import Color, Frame
from maml_rl.captions import Caption, StripRow, captioned, film_strip, font, grey, largest

SIZE = 120
LETTERS = 4
BAR = 2 * LETTERS + 3 * 2
"""Pixels of the two lines above the picture, with margins of half a letter."""
PLAIN = Caption("aaa", "bbb", "ccc", "ddd")


def flat(color: Color, size: int = SIZE) -> Frame:
    return np.full((size, size, 3), color, np.uint8)


def box(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """First and last row, first and last column."""
    rows, columns = np.nonzero(mask)
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.mark.parametrize(
    ("field", "upper", "left"),
    [
        ("task", True, True),
        ("step", True, False),
        ("score", False, True),
        ("measure", False, False),
    ],
)
def test_each_word_has_its_own_corner(field: str, upper: bool, left: bool) -> None:
    """Task and number of steps above, return and measure below; only what changes is redrawn."""
    picture = flat((80, 120, 160))
    before = captioned(picture, PLAIN, LETTERS)
    after = captioned(picture, PLAIN._replace(**{field: "xyz"}), LETTERS)
    top, bottom, first, last = box((before != after).any(-1))
    assert (bottom < BAR // 2 + 2) if upper else (top > BAR // 2 - 2)
    assert bottom < BAR
    assert (last < SIZE // 2) if left else (first > SIZE // 2)


def test_the_picture_below_the_caption_is_left_alone() -> None:
    """The caption lies on a ground a quarter as bright; the given picture is not edited."""
    rng = np.random.default_rng(3)
    picture: Frame = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    given = picture.copy()
    result = captioned(picture, Caption("", "", "", ""), LETTERS)
    assert (picture == given).all()
    assert result.shape == picture.shape
    assert result.dtype == np.uint8
    inner = slice(1, -1)
    assert (result[BAR:-1, inner] == picture[BAR:-1, inner]).all()
    assert (result[1:BAR, inner] == picture[1:BAR, inner] // 4).all()
    # A frame, so that neighbours of one colour can be told apart.
    assert len(np.unique(result[[0, -1]].reshape(-1, 3), axis=0)) == 1


def test_a_high_caption_pushes_the_picture_down() -> None:
    """By what it has over a seventh of the tile, so that what is above the body stays in sight."""
    rows = np.arange(SIZE, dtype=np.uint8)[:, None, None]
    picture: Frame = np.broadcast_to(rows, (SIZE, SIZE, 3)).copy()
    bar = 2 * 9 + 3 * 4
    result = captioned(picture, Caption("", "", "", ""), 9)
    down = bar - SIZE // 7
    assert (result[bar:-1, 1:-1] == picture[bar - down : -1 - down, 1:-1]).all()


def test_how_an_episode_ended_is_written_across_the_foot() -> None:
    """In the middle, larger than the caption."""
    picture = flat((80, 120, 160))
    before = captioned(picture, PLAIN, 9)
    after = captioned(picture, PLAIN._replace(ending="fell at 1.3 s"), 9)
    top, bottom, first, last = box((before != after).any(-1))
    assert top > 0.7 * SIZE
    assert bottom < SIZE - 1
    assert bottom - top > 9
    assert abs(first + last - SIZE) <= 4
    other = captioned(picture, PLAIN._replace(ending="fell at 1.4 s"), 9)
    assert (other != after).any()


def test_a_failed_body_is_grey_and_pale() -> None:
    """Half the mean of red, green and blue, plus 100: 0 to 100, 30 to 115, 255 to 227."""
    picture = np.array([[[0, 0, 0], [10, 30, 50], [255, 255, 255]]], np.uint8)
    assert grey(picture).tolist() == [[[100] * 3, [115] * 3, [227] * 3]]


RED, LIME, NAVY = (200, 0, 0), (0, 200, 0), (0, 0, 200)
COLORS = ((RED, LIME, NAVY), ((200, 200, 0), (200, 0, 200), (0, 200, 200)))


def strip(words: str = "return 3", title: str = "task", instant: str = "1.0 s") -> Frame:
    """Two numbers of gradient steps, three instants, each tile of its own colour."""
    rows = [
        StripRow(label, [(flat(color, 60), words if color == LIME else "") for color in colors])
        for label, colors in zip(("before", "1 gradient step"), COLORS, strict=True)
    ]
    return np.asarray(film_strip(title, ["0.0 s", instant, "2.0 s"], rows))


def tile(picture: Frame, color: Color) -> tuple[int, int, int, int]:
    return box((picture == np.array(color, np.uint8)).all(-1))


def test_a_strip_has_time_to_the_right_and_gradient_steps_downwards() -> None:
    """Every tile whole, in its place; a title above, the labels at the left."""
    picture = strip()
    boxes = np.array([[tile(picture, color) for color in row] for row in COLORS])
    # Of 60 pixels one at each side is the tile's outline.
    assert (boxes[..., 1] - boxes[..., 0] == 57).all()
    assert (boxes[..., 3] - boxes[..., 2] == 57).all()
    assert (np.diff(boxes[..., 0], axis=1) == 0).all()
    assert (np.diff(boxes[..., 0], axis=0) > 60).all()
    assert (np.diff(boxes[..., 2], axis=1) > 60).all()
    assert (np.diff(boxes[..., 2], axis=0) == 0).all()
    top, _, left, _ = boxes[0, 0]
    assert (picture[:top] != 255).any()
    for row in boxes:
        assert (picture[row[0, 0] : row[0, 1], :left] != 255).any()


def test_a_strips_words_are_with_what_they_are_about() -> None:
    """Below its tile; the instant above its column; the title above all."""
    picture = strip()
    top, bottom, left, right = tile(picture, LIME)
    for changed, place in (
        (strip(words="fell at 1.3 s"), (bottom, bottom + 20, left - 15, right + 15)),
        (strip(instant="9.9 s"), (0, top, left, right)),
        (strip(title="tusk"), (0, top // 2, 0, left)),
    ):
        assert changed.shape == picture.shape
        first, last, start, end = box((changed != picture).any(-1))
        assert place[0] <= first <= last <= place[1]
        assert place[2] <= start <= end <= place[3]


@pytest.mark.parametrize("size", [128, 160, 480])
def test_the_words_of_a_caption_do_not_run_into_each_other(size: int) -> None:
    """In each line a gap of its letters' width at least, in tiles that can be read."""
    lines = (("goal (-0.28, -0.28) m", "10 gradient steps"), ("return -1234.5", "distance 0.31 m"))
    letters = largest(lines, size)
    for left, right in lines:
        together = font(letters).getlength(left) + font(letters).getlength(right)
        assert together <= size - letters
    assert letters == 480 // 24 or size < 480
