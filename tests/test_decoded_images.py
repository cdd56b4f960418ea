"""Images decoded once: the right pixels, whole or not at all, and never of another tree."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

from maml_rl.errors import InputError
from maml_rl.supervised import decoded_images
from maml_rl.supervised.decoded_images import Bytes, Tree, alone, decode_all, open_images
from maml_rl.supervised.image_sets import find_mini_imagenet, find_omniglot
from maml_rl.supervised.tasks import silent
from tests.conftest import files_at_most
from tests.image_trees import (
    pixels_of,
    write_image,
    write_mini_imagenet,
    write_omniglot,
)

FEW = {
    "images_background/Latin/character01": 3,
    "images_background/Latin/character02": 2,
    "images_evaluation/Oriya/character01": 4,
}
DRAWING = Path("images_background", "Latin", "character01", "01.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small Omniglot: 9 drawings."""
    return write_omniglot(tmp_path / "omniglot", FEW)


def opened(root: Path, cache: Path | None = None) -> tuple[Bytes, list[str]]:
    """An Omniglot's images, and what is said while they are opened."""
    said: list[str] = []
    return open_images(find_omniglot(root), cache, said.append), said


def refused(root: Path, cache: Path | None = None) -> str:
    """What an Omniglot is refused with, without the folder that it is in."""
    with pytest.raises(InputError) as caught:
        opened(root, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


def left(folder: Path) -> list[str]:
    """Suffixes of what decoding has left in a folder, hidden files too."""
    return sorted(p.suffix for p in folder.iterdir() if p.name.lstrip(".").startswith("decoded-"))


WHOLE = [".json", ".uint8"]


def test_images_are_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tree's order, channels first; the second time nothing is decoded or said."""
    images, said = opened(root)
    assert images.shape == (9, 1, 28, 28)
    assert not images.flags.writeable
    names = [f"{name}/{i:02d}.png" for name, count in FEW.items() for i in range(count)]
    for image, name in zip(images, names, strict=True):
        np.testing.assert_array_equal(image[0], pixels_of(name, 28, 28))
    (file,) = root.glob("*.uint8")
    assert said == [f"decoding 9 images into {file} ..."]
    assert left(root) == WHOLE
    monkeypatch.delattr(decoded_images, "decode")
    again, said = opened(root)
    assert said == []
    np.testing.assert_array_equal(again, images)


def test_colours_come_first(tmp_path: Path) -> None:
    """(H, W, C) in a file, (C, H, W) in the set; three different channels."""
    tree = find_mini_imagenet(write_mini_imagenet(tmp_path), resize=False)
    images = open_images(tree, None, silent)
    assert images.shape == (40, 3, 84, 84)
    for row, name in ((0, "n01/0"), (6, "n02/0"), (39, "n06/4")):
        expected = pixels_of(name, 84, 84, 3)
        for channel in range(3):
            np.testing.assert_array_equal(images[row, channel], expected[:, :, channel])


def test_the_index_says_what_is_in_the_file(root: Path) -> None:
    opened(root)
    (file,) = root.glob("*.json")
    index = json.loads(file.read_text())
    assert index["fingerprint"] == find_omniglot(root).fingerprint
    assert index["shape"] == [9, 1, 28, 28]
    assert index["classes"][2] == {
        "name": "images_evaluation/Oriya/character01",
        "split": "",
        "images": 4,
    }


def save(path: Path, image: Image.Image) -> None:
    """Write an image in place of another."""
    path.unlink()
    image.save(path)


def test_large_drawings_become_small_ones(root: Path) -> None:
    """One bit a pixel and 105 across, as Omniglot's files: made grey first, or all would be jagged.

    Pillow resizes images of one bit by the nearest pixel, whatever it is asked for.
    """
    drawing = Image.fromarray(pixels_of("large", 105, 105)).convert("1")
    save(root / DRAWING, drawing)
    images, _ = opened(root)
    expected = np.asarray(drawing.convert("L").resize((28, 28), Image.Resampling.LANCZOS))
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(images[1, 0], expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_every_kind_of_file_is_black_on_white(mode: str, root: Path) -> None:
    """A dark square on white; where there is transparency the paper is what is seen through."""
    expected = np.full((28, 28), 255, np.uint8)
    expected[3:9, 5:21] = 0
    image = Image.fromarray(expected)
    if mode in ("RGBA", "LA"):
        seen_through = Image.new(mode, (28, 28))
        seen_through.putalpha(Image.fromarray(255 - expected))
        image = seen_through
    elif mode == "I;16":
        image = Image.fromarray(expected.astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    save(root / DRAWING, image)
    with Image.open(root / DRAWING) as saved:
        assert saved.mode == mode
    images, _ = opened(root)
    np.testing.assert_array_equal(images[1, 0], expected)


def test_a_grey_of_two_bytes_keeps_its_upper_one(root: Path) -> None:
    """Pillow alone would make white of all but the darkest."""
    save(root / DRAWING, Image.fromarray(np.full((28, 28), 0x1234, np.uint16)))
    images, _ = opened(root)
    assert (images[1] == 0x12).all()


def test_photographs_of_any_size_are_resized_where_asked(tmp_path: Path) -> None:
    """And the two sets, with and without, do not take each other's place."""
    write_mini_imagenet(tmp_path)
    plain = open_images(find_mini_imagenet(tmp_path, resize=False), None, silent)
    for resize in (True, False):
        said: list[str] = []
        images = open_images(find_mini_imagenet(tmp_path, resize=resize), None, said.append)
        np.testing.assert_array_equal(images, plain)
        assert len(said) == resize
    photograph = tmp_path / "val" / "n08" / "2.png"
    large = pixels_of("large", 90, 70, 3)
    photograph.unlink()
    write_image(photograph, large)
    with pytest.raises(InputError) as caught:
        open_images(find_mini_imagenet(tmp_path, resize=False), None, silent)
    words = "is 70x90 pixels, not 84x84: data.resize: True resizes"
    assert str(caught.value) == f"{photograph} {words}"
    images = open_images(find_mini_imagenet(tmp_path, resize=True), None, silent)
    expected = Image.fromarray(large).resize((84, 84), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(images[25], np.asarray(expected).transpose(2, 0, 1))


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file that claims to be of a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(header))
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + check
    return start + struct.pack(">I", 99) + b"IDAT"


def truncated() -> bytes:
    """A PNG file without its end."""
    file = io.BytesIO()
    Image.fromarray(pixels_of("cut", 28, 28)).save(file, "PNG")
    return file.getvalue()[:400]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ROOT/FILE is no PNG, JPEG, BMP or WebP image"),
        (b"GIF89a" + bytes(50), "ROOT/FILE is no PNG, JPEG, BMP or WebP image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "ROOT/FILE is no PNG, JPEG, BMP or WebP image"),
        (truncated(), "ROOT/FILE is not a whole image: "),
        (png_header(28, 28), "ROOT/FILE is not a whole image: "),
        (png_header(20_000, 20_000), "ROOT/FILE is not a whole image: Image size (400000000 "),
        (png_header(10_000, 10_000), "ROOT/FILE is not a whole image: Image size (100000000 "),
        (png_header(28, 105), "ROOT/FILE is 28x105 pixels, and Omniglot's are 105x105, or 28x28"),
        (png_header(84, 84), "ROOT/FILE is 84x84 pixels, and Omniglot's are 105x105, or 28x28"),
    ],
    ids=["empty", "gif", "ps", "cut", "header", "bomb", "large", "oblong", "84"],
)
def test_a_file_that_is_no_such_image_is_named(content: bytes, words: str, root: Path) -> None:
    """Whatever is wrong, nothing is left behind."""
    (root / DRAWING).write_bytes(content)
    text = refused(root).replace(str(DRAWING), "FILE")
    assert text.startswith(words)
    assert left(root) == []


def test_a_file_that_may_not_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, formats: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    assert refused(root).endswith("00.png is not a whole image: Permission denied")


@pytest.mark.parametrize("change", ["one more", "one less", "other pixels", "newer", "renamed"])
def test_a_tree_that_has_changed_is_decoded_again(change: str, root: Path) -> None:
    """And what it was before does not stay behind."""
    opened(root)
    drawing = root / DRAWING
    if change == "one more":
        write_image(drawing.with_name("03.png"), pixels_of("new", 28, 28))
    elif change == "one less":
        drawing.unlink()
    elif change == "other pixels":
        drawing.unlink()
        write_image(drawing, pixels_of("new", 28, 28))
    elif change == "newer":
        os.utime(drawing, ns=(0, drawing.stat().st_mtime_ns + 1))
    else:
        drawing.rename(drawing.with_name("09.png"))
    images, said = opened(root)
    assert len(said) == 1
    assert len(images) == {"one more": 10, "one less": 8}.get(change, 9)
    if change == "other pixels":
        np.testing.assert_array_equal(images[1, 0], pixels_of("new", 28, 28))
    if change == "renamed":
        np.testing.assert_array_equal(images[2, 0], pixels_of(str(DRAWING), 28, 28))
    assert left(root) == WHOLE


def test_what_is_damaged_is_decoded_again(root: Path) -> None:
    """The decoded file cut short or too long or gone, its index cut short or gone."""
    expected = np.array(opened(root)[0])
    (file,), (index,) = root.glob("*.uint8"), root.glob("*.json")
    content, text = file.read_bytes(), index.read_bytes()
    for path, damaged in (
        (file, content[:-1]),
        (file, content + b"9"),
        (file, None),
        (index, text[:-9]),
        (index, b"[9]"),
        (index, text.replace(b"character02", b"character09")),
        (index, None),
    ):
        # Not in place, since images that were opened before are mapped from it.
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        images, said = opened(root)
        assert len(said) == 1
        np.testing.assert_array_equal(images, expected)


def test_a_set_may_be_moved_with_its_decoded_file(root: Path) -> None:
    opened(root)
    moved = root.rename(root.with_name("moved"))
    assert opened(moved)[1] == []


def test_a_kill_in_the_middle_leaves_nothing_that_counts(root: Path) -> None:
    """A real process that kills itself at the fifth image; the next one decodes and tidies up."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from maml_rl.supervised import decoded_images as d, image_sets\n"
        "real, calls = d.decode, []\n"
        "def decode(path, form):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(path, form)\n"
        "d.decode = decode\n"
        "d.open_images(image_sets.find_omniglot(Path(sys.argv[1])), None, str)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, root], cwd=Path(__file__).parent.parent, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert left(root) == [".partial"]
    _, said = opened(root)
    assert len(said) == 1
    assert left(root) == WHOLE


def test_an_interrupt_in_the_middle_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def interrupt(path: Path, form: object) -> Bytes:
            raise KeyboardInterrupt

        patched.setattr(decoded_images, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened(root)
    assert left(root) == []
    assert len(opened(root)[1]) == 1


def test_the_second_of_two_at_once_waits_and_decodes_nothing(root: Path) -> None:
    """Two seeds of one experiment start together."""
    tree = find_omniglot(root)
    said: list[str] = []
    heard = threading.Event()
    found: list[Bytes] = []

    def say(words: str) -> None:
        said.append(words)
        heard.set()

    second = threading.Thread(target=lambda: found.append(open_images(tree, None, say)))
    with alone(root, silent) as locked:
        assert locked
        second.start()
        assert heard.wait(10)
        decode_all(
            tree, root / f"decoded-omniglot-{tree.fingerprint[:12]}.uint8", silent, tidy=True
        )
    second.join(10)
    assert said == [f"waiting for another process that decodes images into {root} ..."]
    assert len(found[0]) == 9


def test_without_locks_others_are_let_be(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hidden file may then be one that another process is writing."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (root / ".decoded-omniglot-0123456789ab.uint8.89abcdef.partial").write_bytes(b"99")
    images, said = opened(root)
    assert (len(images), len(said)) == (9, 1)
    assert left(root) == sorted([*WHOLE, ".partial"])


def test_sets_that_share_a_cache_do_not_disturb_one_another(root: Path, tmp_path: Path) -> None:
    """A folder that is made where it is missing; each finds its own again."""
    cache = tmp_path / "a" / "cache"
    other = write_omniglot(tmp_path / "other", {**FEW, "images_evaluation/Oriya/character02": 3})
    for which, count in ((root, 9), (other, 12)):
        images, said = opened(which, cache)
        assert (len(images), len(said)) == (count, 1)
        assert left(which) == []
    assert left(cache) == sorted(WHOLE * 2)
    assert opened(root, cache)[1] == opened(other, cache)[1] == []


def test_images_that_cannot_be_written_to_want_a_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a data set that belongs to others; root, who runs tests, may write anywhere."""
    real = Path.open

    def refuse(path: Path, mode: str = "r") -> IO[bytes]:
        if "x" in mode and path.is_relative_to(root):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode)

    monkeypatch.setattr(Path, "open", refuse)
    assert refused(root) == (
        "cannot keep decoded images in ROOT: Read-only file system; set data.cache to a folder "
        "that can be written"
    )
    assert len(opened(root, tmp_path / "cache")[0]) == 9
    assert left(root) == []


def test_what_cannot_be_a_cache_is_refused(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    words = f"cannot keep decoded images in {file}: "
    assert refused(root, file).startswith(words)


def test_a_full_disk_is_told_and_left_as_it_was(root: Path) -> None:
    with files_at_most(5000):
        assert refused(root).startswith("cannot keep decoded images in ROOT: File too large; set ")
    assert left(root) == []


def test_nothing_is_written_through_a_link(root: Path, tmp_path: Path) -> None:
    """Links in place of what is to be written are replaced; where they lead is left alone."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"99")
    opened(root)
    for file in [*root.glob("*.uint8"), *root.glob("*.json")]:
        file.unlink()
        file.symlink_to(precious)
    images, said = opened(root)
    assert (len(images), len(said)) == (9, 1)
    assert precious.read_bytes() == b"99"
    assert not any(p.is_symlink() for p in root.iterdir())


def test_an_image_that_vanishes_is_named(root: Path) -> None:
    """Between looking for images and decoding them, or between finding and measuring them."""
    tree = find_omniglot(root)
    (root / DRAWING).unlink()
    with pytest.raises(InputError, match=r"01\.png is not a whole image: No such file or directo"):
        open_images(tree, None, silent)
    assert left(root) == []
    with pytest.raises(InputError, match=r"cannot read .*01\.png: No such file or directory"):
        Tree.of(root, tree.form, [decoded_images.Listed("a", "", [root / DRAWING])])
