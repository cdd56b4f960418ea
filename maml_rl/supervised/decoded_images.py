"""Sets of images in folders, decoded once into a file that is mapped into memory.

The file holds (N, C, H, W) bytes, image by image in the tree's sorted order. It lies beside the
images, or in a folder of the user's choice:

decoded-KIND-XXXXXXXXXXXX.uint8   the bytes; XXXXXXXXXXXX is the beginning of the fingerprint
decoded-KIND-XXXXXXXXXXXX.json    fingerprint, shape and classes; there once the bytes are whole

The fingerprint is of the images' paths, sizes and times, so a tree that changes is decoded again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from maml_rl.errors import InputError, refusal

Bytes = npt.NDArray[np.uint8]

VERSION = 1
"""Of how images are decoded; another one makes other fingerprints."""

DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow raises at files that are no images, or not whole."""


class Form(NamedTuple):
    """How images are stored, and which are taken."""

    kind: str
    """Of set, as the decoded file's name says it."""
    mode: Literal["L", "RGB"]
    """One or three bytes a pixel."""
    side: int
    """Pixels across and down."""
    sides: tuple[int, ...]
    """Of the files that are taken; others are refused. Where there are none, any file is."""
    advice: str
    """For a file of another size."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return len(self.mode), self.side, self.side


class ImageClass(NamedTuple):
    """What images show, and where they are."""

    name: str
    split: str
    """As the tree says it, "" where it says none."""
    start: int
    """Its first image."""
    images: int
    """How many."""


class Listed(NamedTuple):
    """A class as it is found in a tree."""

    name: str
    split: str
    files: Sequence[Path]


@dataclass(frozen=True)
class Tree:
    """Images that have been found, none of them opened yet."""

    root: Path
    form: Form
    classes: tuple[ImageClass, ...]
    files: tuple[Path, ...]
    """In the order of the decoded images."""
    fingerprint: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return len(self.files), *self.form.shape

    @classmethod
    def of(cls, root: Path, form: Form, found: Iterable[Listed]) -> Tree:
        """Return the tree that has these classes.

        Raises:
            InputError: if an image cannot be read.
        """
        digest = hashlib.sha256(repr((VERSION, form[:4])).encode())
        classes: list[ImageClass] = []
        files: list[Path] = []
        for name, split, images in found:
            classes.append(ImageClass(name, split, len(files), len(images)))
            files.extend(images)
            digest.update(os.fsencode(f"class\0{name}\0{split}\n"))
            for path in images:
                try:
                    about = os.stat(path)
                except OSError as error:
                    raise refusal(f"cannot read {path}: {error.strerror}") from error
                where = str(path)[len(str(root)) :]
                digest.update(os.fsencode(f"{where}\0{about.st_size}\0{about.st_mtime_ns}\n"))
        return cls(root, form, tuple(classes), tuple(files), digest.hexdigest())


def open_images(tree: Tree, cache: Path | None, say: Callable[[str], None]) -> Bytes:
    """Return a tree's images (N, C, H, W), read-only, from a file that is made where it is missing.

    Processes that want it at once wait for the first. A kill leaves a hidden file, which the next
    that decodes removes.

    Args:
        tree: what is to be there.
        cache: folder of the decoded file; beside the images if None.
        say: is told that images are being decoded.

    Raises:
        InputError: if an image is damaged or of a wrong size, or the file cannot be written.
    """
    folder = cache or tree.root
    file = folder / f"decoded-{tree.form.kind}-{tree.fingerprint[:12]}.uint8"
    try:
        images = open_decoded(tree, file)
        if images is None:
            folder.mkdir(parents=True, exist_ok=True)
            with alone(folder, say) as locked:
                images = open_decoded(tree, file)
                if images is None:
                    decode_all(tree, file, say, tidy=locked)
                    images = open_decoded(tree, file)
    except OSError as error:
        raise refusal(
            f"cannot keep decoded images in {folder}: {error.strerror}; set data.cache to a "
            "folder that can be written"
        ) from error
    if images is None:
        raise refusal(f"{file} was changed while it was written; start again")
    return images


def index_of(tree: Tree) -> dict[str, object]:
    """Return what the index of a decoded tree says, but for where the tree is."""
    classes = [{"name": c.name, "split": c.split, "images": c.images} for c in tree.classes]
    return {"fingerprint": tree.fingerprint, "shape": list(tree.shape), "classes": classes}


def read_index(path: Path) -> Mapping[str, object]:
    """Return what an index says, nothing where it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def open_decoded(tree: Tree, file: Path) -> Bytes | None:
    """Return decoded images, None where they are missing, not whole, or of another tree."""
    found = read_index(file.with_suffix(".json"))
    if {**index_of(tree), "tree": found.get("tree")} != found:
        return None
    try:
        if file.stat().st_size != int(np.prod(tree.shape)):
            return None
        # As a plain array: memmap's own way of indexing is slow.
        return np.asarray(np.memmap(file, np.uint8, "r", shape=tree.shape))
    except FileNotFoundError:
        return None


def decode_all(tree: Tree, file: Path, say: Callable[[str], None], *, tidy: bool) -> None:
    """Write a tree's decoded images and their index, one image in memory at a time.

    Args:
        tree: what to decode.
        file: where to.
        say: is told so.
        tidy: whether to remove what kills have left, and what the tree was before it changed.

    Raises:
        InputError: if an image is damaged, or of a wrong size.
        OSError: if the files cannot be written.
    """
    pattern = f"decoded-{tree.form.kind}-*"
    for left in file.parent.glob(f".{pattern}.partial") if tidy else ():
        left.unlink(missing_ok=True)
    say(f"decoding {len(tree.files):,} images into {file} ...")
    with replacing(file) as out, warnings.catch_warnings():
        # Of damaged side information, which is not read here.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for path in tree.files:
            out.write(decode(path, tree.form).tobytes())
    index, where = file.with_suffix(".json"), os.path.relpath(tree.root, file.parent)
    with replacing(index) as out:
        out.write(json.dumps({"tree": where, **index_of(tree)}, indent=1).encode())
    for other in file.parent.glob(f"{pattern}.json") if tidy else ():
        if other != index and read_index(other).get("tree") == where:
            other.unlink(missing_ok=True)
            other.with_suffix(".uint8").unlink(missing_ok=True)


def decode(path: Path, form: Form) -> Bytes:
    """Return an image (C, H, W).

    Raises:
        InputError: if it is damaged, or of a size that is not taken.
    """
    try:
        # Named, since Pillow hands some other formats to programs.
        with Image.open(path, formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            width, height = image.size
            if form.sides and (width != height or width not in form.sides):
                raise refusal(f"{path} is {width}x{height} pixels, {form.advice}")
            image.load()
            pixels = in_bytes(image).convert(form.mode)
            if pixels.size != (form.side, form.side):
                pixels = pixels.resize((form.side, form.side), Image.Resampling.LANCZOS)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise refusal(f"{path} is no PNG, JPEG, BMP or WebP image") from error
    except DAMAGED as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise refusal(f"{path} is not a whole image: {why or error}") from error
    return np.asarray(pixels).reshape(form.side, form.side, -1).transpose(2, 0, 1)


def in_bytes(image: Image.Image) -> Image.Image:
    """Return an image with a byte a channel, on white paper where it can be seen through."""
    if image.mode == "I;16":
        # Which Pillow would clip at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a hidden file that takes a path's place once all is written, or is removed.

    It never writes through a link: the hidden file is new, and a link in its place is replaced.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Wait until no other process decodes into a folder; yields whether it is so from now on.

    Where the file system has no locks, two that decode at once write the same bytes twice.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that decodes images into {folder} ...")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)
