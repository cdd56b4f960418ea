"""Small Omniglots and MiniImagenets, of pixels that follow from the files' names."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from maml_rl.supervised.decoded_images import Bytes

CHARACTERS: Mapping[str, int] = {
    "images_background/Korean/character01": 4,
    "images_background/Korean/character02": 6,
    "images_background/Latin/character01": 5,
    "images_background/Latin/character03": 4,
    "images_evaluation/Oriya/character01": 7,
    "images_evaluation/Oriya/character02": 4,
    "images_evaluation/Tengwar/character02": 5,
    "images_evaluation/Tengwar/character09": 4,
    "images_evaluation/Tengwar/character10": 4,
}
"""Drawings of each: 9 characters, 43 drawings."""

THINGS: Mapping[str, Mapping[str, int]] = {
    "train": {"n01": 6, "n02": 5, "n05": 7},
    "val": {"n04": 5, "n08": 6},
    "test": {"n03": 6, "n06": 5},
}
"""Photographs of each: 7 classes, 40 photographs."""


def pixels_of(name: str, *shape: int) -> Bytes:
    """The pixels of an image by its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(256, size=shape, dtype=np.uint8)


def write_image(path: Path, pixels: Bytes) -> None:
    """Write an image file, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_omniglot(root: Path, characters: Mapping[str, int] = CHARACTERS) -> Path:
    """Write drawings NN.png of 28x28 pixels; return the root."""
    for character, drawings in characters.items():
        for number in range(drawings):
            name = f"{character}/{number:02d}.png"
            write_image(root / name, pixels_of(name, 28, 28))
    return root


def write_mini_imagenet(
    root: Path, things: Mapping[str, Mapping[str, int]] = THINGS, *, tables: bool = False
) -> Path:
    """Write photographs NN.png (lossless) of 84x84 pixels in either layout; return the root."""
    for split, classes in things.items():
        rows = ["filename,label"]
        for name, photographs in classes.items():
            for number in range(photographs):
                place = f"images/{name}-{number}.png" if tables else f"{split}/{name}/{number}.png"
                write_image(root / place, pixels_of(f"{name}/{number}", 84, 84, 3))
                rows.append(f"{name}-{number}.png,{name}")
        if tables:
            (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root
