"""Store the PNGs that are kept here with 256 colours, which takes half of the space.

python experiments/results/fewer_colours.py

Those that have a palette already are left alone, so it may be run again at any time.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

COLOURS = 256


def main() -> None:
    """Do it, and say what it spared."""
    before = after = 0
    for path in sorted(Path(__file__).parent.rglob("*.png")):
        with Image.open(path) as picture:
            picture.load()
        if picture.mode == "P":
            continue
        before += path.stat().st_size
        plain = Image.new("RGB", picture.size, "white")
        plain.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
        plain.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
        after += path.stat().st_size
    print(f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
