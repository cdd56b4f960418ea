"""Files of moving pictures: what a player finds in them, and that they hold no frames in memory."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from envs.cameras import Frame
from maml_rl.movies import Animation, Movie, Mp4, Pngs, Reel, has_ffmpeg
from tests.conftest import files_at_most

needs_ffmpeg = pytest.mark.skipif(not has_ffmpeg(), reason="no imageio-ffmpeg: maml-rl[video]")

HEIGHT, WIDTH = 32, 48


def frame(number: int, count: int = 20) -> Frame:
    """Brighter from left to right in time: what it shows says when."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:] = round(255 * number / max(1, count - 1))
    picture[: HEIGHT // 2, :, 2] = 0
    return picture


def level(picture: Frame, count: int = 20) -> float:
    """Return which frame a picture looks like."""
    return float(picture[HEIGHT // 2 + 4 :].mean()) * (count - 1) / 255


def write(movie: Movie, count: int = 20) -> Path:
    for number in range(count):
        movie.append(frame(number, count))
    movie.close()
    return movie.path


def decoded(path: Path) -> tuple[str, npt.NDArray[np.uint8]]:
    """Return what ffmpeg says of a video, and its frames as a player would show them."""
    import imageio_ffmpeg

    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    )
    return done.stderr.decode(), np.frombuffer(done.stdout, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)


def boxes(content: bytes) -> list[bytes]:
    """Return the kinds of an MP4's outermost boxes, in order."""
    kinds, place = [], 0
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        kinds.append(content[place + 4 : place + 8])
        place += size
    assert place == len(content)
    return kinds


@needs_ffmpeg
@pytest.mark.parametrize("fps", [25.0, 12.5])
def test_an_mp4_is_what_browsers_play(fps: float, tmp_path: Path) -> None:
    """H.264 in yuv420p, all frames in order at the right rate, its index before its pictures."""
    path = write(Mp4(tmp_path / "a.mp4", fps))
    words, shown = decoded(path)
    found = re.search(rf"Video: h264 .*yuv420p.* {WIDTH}x{HEIGHT}.* ([\d.]+) fps", words)
    assert found
    assert float(found[1]) == fps
    assert f"Duration: 00:00:{20 / fps:05.2f}" in words
    assert [level(picture) for picture in shown] == pytest.approx(range(20), abs=0.4)
    # Blue is dark above and bright below: neither channels nor rows are turned round.
    assert shown[-1][4, :, 2].max() < 60
    assert shown[-1][4, :, 0].min() > 150
    kinds = boxes(path.read_bytes())
    assert kinds.index(b"moov") < kinds.index(b"mdat")


@needs_ffmpeg
def test_an_mp4_can_be_wound_to_every_half_second(tmp_path: Path) -> None:
    """At 10 frames a second no key frame is over five from the next; not every frame is one."""
    content = write(Mp4(tmp_path / "a.mp4", 10.0)).read_bytes()
    place = content.index(b"stss") + 8
    (count,) = struct.unpack(">I", content[place : place + 4])
    numbers = struct.unpack(f">{count}I", content[place + 4 : place + 4 + 4 * count])
    assert max(np.diff([*numbers, 21])) <= 5
    assert 4 <= count < 10


def times_and_levels(path: Path) -> tuple[list[int], list[float]]:
    with Image.open(path) as animation:
        times, levels = [], []
        for number in range(getattr(animation, "n_frames", 1)):
            animation.seek(number)
            animation.load()
            times.append(animation.info["duration"])
            levels.append(level(np.asarray(animation.convert("RGB"))))
        assert animation.info["loop"] == 0
    return times, levels


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
@pytest.mark.parametrize("fps", [25.0, 30.0, 13.0])
def test_an_animation_keeps_the_time(suffix: str, fps: float, tmp_path: Path) -> None:
    """No frame is off by more than half a unit, in the last as in the first; the last holds."""
    times, levels = times_and_levels(write(Animation(tmp_path / f"a{suffix}", fps)))
    assert levels == pytest.approx(range(20), abs=0.6)
    starts = np.cumsum([0, *times[:-1]])
    unit = 10 if suffix == ".gif" else 1
    assert np.abs(starts - 1000 * np.arange(20) / fps).max() <= unit / 2 + 1e-9
    assert times[-1] == 1000


def test_an_animation_leaves_no_folder_of_frames(tmp_path: Path) -> None:
    """Nor does one that is closed without a frame, or that cannot be written."""
    write(Animation(tmp_path / "a.webp", 25.0))
    Animation(tmp_path / "b.webp", 25.0).close()
    wrong = Animation(tmp_path / "nowhere.unknown", 25.0)
    wrong.append(frame(1))
    with pytest.raises(ValueError, match="unknown file extension"):
        wrong.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.webp"]


def test_single_frames_are_numbered_and_exact(tmp_path: Path) -> None:
    pngs = Pngs(tmp_path / "frames")
    write(pngs, 12)
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == [f"{number:05d}.png" for number in range(12)]
    for number, path in enumerate(sorted(pngs.files)):
        with Image.open(path) as picture:
            assert (np.asarray(picture) == frame(number, 12)).all()


def mp4(path: Path) -> Movie:
    return Mp4(path / "a.mp4", 25.0)


def webp(path: Path) -> Movie:
    return Animation(path / "a.webp", 25.0)


def gif(path: Path) -> Movie:
    return Animation(path / "a.gif", 25.0)


def pngs(path: Path) -> Movie:
    return Pngs(path / "frames")


Make = Callable[[Path], Movie]
VIDEO = pytest.param(mp4, marks=needs_ffmpeg)


@pytest.mark.parametrize("make", [VIDEO, webp, gif, pngs])
def test_no_frame_is_kept_once_it_is_appended(make: Make, tmp_path: Path) -> None:
    """Each is garbage as soon as its caller has no more use for it."""
    movie = make(tmp_path)
    for number in range(5):
        picture = frame(number)
        gone = weakref.ref(picture)
        movie.append(picture)
        del picture
        assert gone() is None
    movie.close()


def test_a_reel_holds_one_frame_at_a_time(tmp_path: Path) -> None:
    """And shows them in whatever order it is asked."""
    frames = Pngs(tmp_path / "frames")
    write(frames, 7)
    reel = Reel(frames.files)
    assert (reel.n_frames, reel.tell()) == (7, 0)
    for number in (3, 6, 0):
        reel.seek(number)
        assert reel.tell() == number
        assert (np.asarray(reel) == frame(number, 7)).all()
    for wrong in (-1, 7):
        with pytest.raises(EOFError):
            reel.seek(wrong)


def test_a_webp_is_written_without_holding_its_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Pillow writes it no more than a few of its pictures are open at any time."""
    opened: list[weakref.ref[Image.Image]] = []
    most = 0
    real = Image.open

    def count(path: Path) -> Image.Image:
        nonlocal most
        picture = real(path)
        opened.append(weakref.ref(picture))
        most = max(most, sum(ref() is not None for ref in opened))
        return picture

    monkeypatch.setattr(Image, "open", count)
    write(Animation(tmp_path / "a.webp", 25.0), 30)
    assert len(opened) >= 30
    assert most <= 3


@pytest.mark.parametrize("make", [VIDEO, webp, gif, pngs])
@pytest.mark.parametrize("limit", [0, 500, 4000])
def test_a_full_disk_is_told_and_not_taken_for_a_whole_file(
    make: Make, limit: int, tmp_path: Path
) -> None:
    """Whether it fills at the first byte or while the file is finished, after the last frame."""
    rng = np.random.default_rng(1)
    movie = make(tmp_path)
    with files_at_most(limit), pytest.raises(OSError, match=r"too large|ffmpeg|[Bb]roken"):  # noqa: PT012
        try:
            for _ in range(30):
                movie.append(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        finally:
            movie.close()


@pytest.mark.parametrize(
    ("suffix", "width"),
    [(".webp", 16_400), (".gif", 65_600), pytest.param(".mp4", 20_000, marks=needs_ffmpeg)],
)
def test_a_picture_too_large_for_its_format_is_told(
    suffix: str, width: int, tmp_path: Path
) -> None:
    """As of dozens of gradient steps side by side."""
    kind = Mp4 if suffix == ".mp4" else Animation
    movie = kind(tmp_path / f"a{suffix}", 25.0)
    for number in range(2):
        movie.append(np.full((2, width, 3), number, np.uint8))
    with pytest.raises(OSError, match=r"WebPEncodingError|too big|invalid width"):
        movie.close()


@needs_ffmpeg
def test_what_ffmpeg_says_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a line, for instance that the folder is gone; the screen is left to us."""
    movie = Mp4(tmp_path / "gone" / "a.mp4", 25.0)
    movie.append(frame(0))
    capfd.readouterr()
    with pytest.raises(OSError, match=r"ffmpeg: .*No such file or directory") as raised:
        movie.close()
    assert "\n" not in str(raised.value)
    movie.close()
    assert capfd.readouterr() == ("", "")


@needs_ffmpeg
def test_ctrl_c_does_not_reach_ffmpeg(tmp_path: Path) -> None:
    """It has a process group of its own, and ends when its input does."""
    movie = Mp4(tmp_path / "a.mp4", 25.0)
    movie.append(frame(0))
    assert movie._ffmpeg is not None
    assert os.getpgid(movie._ffmpeg.pid) != os.getpgid(0)
    process = movie._ffmpeg
    movie.close()
    assert process.returncode == 0


def test_without_ffmpeg_there_is_no_mp4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may be missing, or there without its program."""
    there = importlib.util.find_spec("imageio_ffmpeg") is not None
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, "imageio_ffmpeg", None)
        assert not has_ffmpeg()
    if not there:
        return

    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    for no_program in (missing, lambda: "/nowhere/ffmpeg"):
        monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", no_program)
        assert not has_ffmpeg()
