"""Files of moving pictures, which take frames one by one and keep none of them.

MP4 (H.264) by imageio's ffmpeg, which is an extra; animated WebP or GIF by Pillow without it.
imageio's own writer is not used: it takes a file for whole whatever ffmpeg says, and forks this
process, which has threads.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image

from envs.cameras import Frame


class Movie(Protocol):
    """A file that is being written."""

    path: Path

    def append(self, frame: Frame) -> None:
        """Add a frame (height, width, 3), its sides even.

        Raises:
            OSError: if it cannot be written.
        """

    def close(self) -> None:
        """Finish the file.

        Raises:
            OSError: if it cannot be written.
        """


def has_ffmpeg() -> bool:
    """Return whether MP4 can be written here: the extra `video` is there, with its program."""
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return shutil.which(program) is not None


class Mp4:
    """H.264 as browsers play it."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self._fps = fps
        self._ffmpeg: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None

    def _start(self, width: int, height: int) -> subprocess.Popen[bytes]:
        """Start the program that encodes what it is given."""
        import imageio_ffmpeg

        # A key frame every half second, so that a player finds any instant at once.
        between = max(1, round(self._fps / 2))
        raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}")
        # Not a pipe, which would be full one day; closed with the program.
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        coded = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "veryfast", "-crf", "23")
        places = ("-g", str(between), "-movflags", "+faststart")
        return subprocess.Popen(
            [
                *(imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"),
                *(*raw, "-r", f"{self._fps:.6f}", "-i", "-", "-an", *coded, *places),
                str(self.path.absolute()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._complaints,
            # Ctrl-C is ours to handle; it ends with its input.
            process_group=0,
        )

    def append(self, frame: Frame) -> None:
        """Add a frame."""
        self._ffmpeg = self._ffmpeg or self._start(frame.shape[1], frame.shape[0])
        assert self._ffmpeg.stdin is not None  # a pipe
        try:
            self._ffmpeg.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            self.close()
            raise

    def close(self) -> None:
        """Finish the file."""
        ffmpeg, self._ffmpeg = self._ffmpeg, None
        if ffmpeg is None:
            return
        assert ffmpeg.stdin is not None  # a pipe
        assert self._complaints is not None  # there since it was started
        with self._complaints as complaints:
            with suppress(BrokenPipeError):
                ffmpeg.stdin.close()
            if code := ffmpeg.wait():
                complaints.seek(0)
                lines = complaints.read().decode(errors="replace").split("\n")
                words = next((line for line in lines if line), f"exit code {code}")
                raise OSError(f"ffmpeg: {words}")


class Reel(Image.Image):
    """Frames in files, as one image of many, of which Pillow holds one at a time."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self._files = files
        self.seek(0)

    @property
    def n_frames(self) -> int:
        """How many there are."""
        return len(self._files)

    def seek(self, frame: int) -> None:
        """Show one of them."""
        if not 0 <= frame < len(self._files):
            raise EOFError(f"there is no frame {frame}")
        with Image.open(self._files[frame]) as picture:
            picture.load()
            self.im, self._mode, self._size = picture.im, picture.mode, picture.size
        self._number = frame

    def tell(self) -> int:
        """Return which is shown."""
        return self._number


class Animation:
    """Animated WebP or GIF by Pillow, which wants all frames at the end: they wait in files.

    The last frame is held for a second, since these repeat without a pause. A GIF's frames are in
    memory while it is written, at a byte a pixel.
    """

    LAST_MS = 1000

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self._fps = fps
        self._folder = tempfile.TemporaryDirectory(dir=path.parent)
        self._frames = Pngs(Path(self._folder.name))

    def append(self, frame: Frame) -> None:
        """Add a frame."""
        self._frames.append(frame)

    def close(self) -> None:
        """Write the file."""
        files = self._frames.files
        try:
            if files:
                # In whole milliseconds, or hundredths for GIF, without drifting from the time.
                unit = 10 if self.path.suffix == ".gif" else 1
                ends = [unit * round(1000 / unit * (i + 1) / self._fps) for i in range(len(files))]
                times = [end - start for start, end in zip([0, *ends], ends, strict=False)]
                times[-1] = self.LAST_MS
                Reel(files).save(self.path, save_all=True, duration=times, loop=0, method=2)
        except (RuntimeError, OverflowError) as error:
            # What Pillow raises for pictures larger than the format allows.
            raise OSError(f"{self.path.suffix}: {error}") from error
        finally:
            self._folder.cleanup()


class Pngs:
    """A folder of numbered pictures."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self.files: list[Path] = []

    def append(self, frame: Frame) -> None:
        """Write a frame."""
        file = self.path / f"{len(self.files):05d}.png"
        Image.fromarray(frame).save(file, compress_level=1)
        self.files.append(file)

    def close(self) -> None:
        """Do nothing: each frame is a file of its own."""
