"""Omniglot's and MiniImagenet's folders, as they are found on a disk. Nothing is ever fetched.

Names are sorted, so that the same images are the same set on every machine. Hidden files are not
looked at. Links are followed, but there is no searching: each tree has a fixed depth.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from maml_rl.errors import refusal
from maml_rl.supervised.decoded_images import Form, Listed, Tree

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""Of images, in small or capital letters."""

OMNIGLOT = Form("omniglot", "L", 28, (28, 105), "and Omniglot's are 105x105, or 28x28")
OMNIGLOT_FOLDERS = ("images_background", "images_evaluation")
GET_OMNIGLOT = (
    "get images_background.zip and images_evaluation.zip from github.com/brendenlake/omniglot, "
    "Brenden Lake's repository, and unpack both into it"
)

MINI_IMAGENET = Form("miniimagenet", "RGB", 84, (84,), "not 84x84: data.resize: True resizes")
RESIZED = Form("miniimagenet-resized", "RGB", 84, (), "")
MINI_IMAGENET_SPLITS: Mapping[str, str] = {"train": "train", "val": "validation", "test": "test"}
"""A split by the name of its folder or table."""
GET_MINI_IMAGENET = (
    "fill it with ImageNet's images, which nobody may pass on, by the split of Ravi and Larochelle "
    "2017, as train/CLASS/*.jpg, val/CLASS/*.jpg and test/CLASS/*.jpg"
)


def find_omniglot(root: Path, advice: str = GET_OMNIGLOT) -> Tree:
    """Find ROOT/images_background/ALPHABET/CHARACTER/*.png, and the same in images_evaluation.

    Either is enough. A character is a class, named images_background/ALPHABET/CHARACTER.

    Args:
        root: the folder.
        advice: how to come by it, where it is missing.

    Raises:
        InputError: if it is no such tree.
    """
    check_root(root, advice)
    parts = [root / name for name in OMNIGLOT_FOLDERS if (root / name).is_dir()]
    if not parts:
        raise refusal(
            f"{root} should hold images_background/ALPHABET/CHARACTER/*.png, or the same in "
            f"images_evaluation, and holds {contents(root)}"
        )

    def found() -> Iterator[Listed]:
        for part in parts:
            for alphabet in folders(part, "alphabets"):
                for character in folders(alphabet, "characters"):
                    name = f"{part.name}/{alphabet.name}/{character.name}"
                    yield Listed(name, "", images(character, name))

    return Tree.of(root, OMNIGLOT, found())


def find_mini_imagenet(root: Path, *, resize: bool) -> Tree:
    """Find ROOT/train/CLASS/*.jpg, val and test, or train.csv, val.csv and test.csv over images.

    A table's columns are filename, in ROOT/images, and label, which is the class.

    Args:
        root: the folder.
        resize: whether images of any size are taken.

    Raises:
        InputError: if it is no such tree.
    """
    check_root(root, GET_MINI_IMAGENET)
    split_folders = [root / name for name in MINI_IMAGENET_SPLITS]
    tables = [root / f"{name}.csv" for name in MINI_IMAGENET_SPLITS]
    if all(p.is_dir() for p in split_folders):
        found = in_folders(split_folders)
    elif all(p.is_file() for p in tables):
        found = in_tables(root, tables)
    else:
        raise refusal(
            f"{root} should hold the folders train, val and test with CLASS/*.jpg in each, or "
            f"train.csv, val.csv and test.csv beside a folder images, and holds {contents(root)}"
        )
    return Tree.of(root, RESIZED if resize else MINI_IMAGENET, found)


def in_folders(splits: Sequence[Path]) -> Iterator[Listed]:
    """Yield the classes of splits that are folders of folders."""
    for split in splits:
        for folder in folders(split, "classes"):
            found = images(folder, f"{split.name}/{folder.name}")
            yield Listed(folder.name, MINI_IMAGENET_SPLITS[split.name], found)


def in_tables(root: Path, tables: Sequence[Path]) -> Iterator[Listed]:
    """Yield the classes of splits that are tables, and check that no image is in two places."""
    seen: dict[Path, str] = {}
    for table in tables:
        labels: dict[str, list[Path]] = {}
        for place, filename, label in table_rows(table):
            path = root / "images" / filename
            if ".." in path.parts or not path.is_relative_to(root / "images"):
                raise refusal(f"{place} leads out of {root / 'images'}: {filename}")
            if path in seen:
                raise refusal(f"{place} names {filename} again, after {seen[path]}")
            if not os.path.isfile(path):
                raise refusal(f"{place} names an image that is not there: {path}")
            seen[path] = place
            labels.setdefault(label, []).append(path)
        if not labels:
            raise refusal(f"{table} lists no images")
        for label in sorted(labels):
            yield Listed(label, MINI_IMAGENET_SPLITS[table.stem], sorted(labels[label]))


def table_rows(table: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the place, filename and label of each row of a table."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"filename", "label"} - set(reader.fieldnames or ())
            if missing:
                raise refusal(
                    f"{table} has no column {' and no column '.join(sorted(missing))}: its first "
                    "line must be filename,label"
                )
            for row in reader:
                place = f"{table} line {reader.line_num}"
                if not row["filename"] or not row["label"]:
                    raise refusal(f"{place} has not both a filename and a label")
                yield place, row["filename"], row["label"]
    except (UnicodeDecodeError, csv.Error) as error:
        raise refusal(f"{table} is not a table in UTF-8: {error}") from error
    except OSError as error:
        raise refusal(f"cannot read {table}: {error.strerror}") from error


def check_root(root: Path, advice: str) -> None:
    """Raise InputError where there is no folder, or nothing in it, saying how to come by it."""
    if os.path.isdir(root):
        if not entries(root):
            raise refusal(f"{root} is empty: {advice}")
    elif os.path.lexists(root):
        raise refusal(f"{root} is no folder, and data.root names a folder of images")
    else:
        raise refusal(
            f"there is no folder {root}; if the images are elsewhere give --data.root DIR, else "
            f"{advice}"
        )


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, sorted, without what is hidden.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise refusal(f"cannot read {folder}: {error.strerror}") from error


def folders(folder: Path, of: str) -> list[Path]:
    """Return the folders in a folder.

    Raises:
        InputError: if there are none.
    """
    found = [folder / entry.name for entry in entries(folder) if entry.is_dir()]
    if not found:
        raise refusal(f"{folder} holds no folders of {of}")
    return found


def images(folder: Path, name: str) -> list[Path]:
    """Return the images in the folder of a class.

    Raises:
        InputError: if there are none, or one is a link that leads nowhere.
    """
    found = []
    for entry in entries(folder):
        if not entry.name.lower().endswith(SUFFIXES):
            continue
        if entry.is_file():
            found.append(folder / entry.name)
        elif entry.is_symlink():
            raise refusal(f"{folder / entry.name} is a link that leads to no file")
    if not found:
        raise refusal(f"class {name} has no images: {folder} holds no {', '.join(SUFFIXES)}")
    return found


def contents(folder: Path) -> str:
    """Return in words what is in a folder, the first few of much."""
    names = [entry.name + "/" * entry.is_dir() for entry in entries(folder)]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
