"""Take from what is kept here what nobody sees, for the sake of its size.

python experiments/results/make_smaller.py

PNGs get 256 colours and charts 32, a GIF's frames one palette in common, and numbers in metrics.csv
seven digits.
What is so already is left alone, so it may be run again at any time.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image, ImageSequence

COLOURS = 256
CHARTS = {"learning_curves.png": 32, "returns.png": 32, "tasks.png": 32}
"""Pictures of few colours, by the names of their files."""
DIGITS = 7
FRACTION = re.compile(r"-?\d+\.\d+(e[-+]\d+)?")
"""A number that is no integer: those are counts, and stay."""
KEPT = Path(__file__).resolve().parents[1]
"""Results and checkpoints."""


def main() -> None:
    """Do it, and say what it spared."""
    for pattern, shrink in (("*.png", png), ("*.gif", gif), ("metrics.csv", metrics)):
        files = sorted(KEPT.rglob(pattern))
        before = sum(file.stat().st_size for file in files)
        for file in files:
            shrink(file)
        after = sum(file.stat().st_size for file in files)
        print(f"{pattern}: {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB")


def png(file: Path) -> None:
    """Store a picture with a palette."""
    colours = CHARTS.get(file.name, COLOURS)
    with Image.open(file) as stored:
        if stored.mode == "P" and stored.getcolors(colours) is not None:
            return
        picture = stored.convert("RGBA")
    plain = Image.new("RGB", picture.size, "white")
    plain.paste(picture, mask=picture.getchannel("A"))
    plain.quantize(colours, dither=Image.Dither.NONE).save(file, optimize=True)


def gif(file: Path) -> None:
    """Store a film whose frames share the palette that suits some of them."""
    with Image.open(file) as film:
        if film.info.get("comment") == SHRUNK:
            return
        frames, times = [], []
        for frame in ImageSequence.Iterator(film):
            frames.append(frame.convert("RGB"))
            times.append(frame.info["duration"])
    some = frames[:: max(1, len(frames) // 8)]
    width, height = film.size
    sheet = Image.new("RGB", (width, height * len(some)))
    for i, frame in enumerate(some):
        sheet.paste(frame, (0, i * height))
    palette = sheet.quantize(COLOURS, dither=Image.Dither.NONE)
    first, *others = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    first.save(file, save_all=True, append_images=others, duration=times, loop=0, comment=SHRUNK)


SHRUNK = b"one palette"
"""A GIF's comment, which says that it has been here."""


def metrics(file: Path) -> None:
    """Round to what a float32, of which most are means, can tell apart."""
    text = file.read_text(encoding="utf-8")
    shorter = FRACTION.sub(lambda number: f"{float(number[0]):.{DIGITS}g}", text)
    if shorter != text:
        file.write_text(shorter, encoding="utf-8", newline="")


if __name__ == "__main__":
    main()
