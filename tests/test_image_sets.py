"""Omniglot's and MiniImagenet's folders: what is found in them, and what is refused in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from maml_rl.errors import InputError
from maml_rl.supervised.decoded_images import ImageClass, Tree
from maml_rl.supervised.image_sets import find_mini_imagenet, find_omniglot
from tests.image_trees import (
    CHARACTERS,
    THINGS,
    pixels_of,
    write_image,
    write_mini_imagenet,
    write_omniglot,
)


def photographs(root: Path) -> Tree:
    """MiniImagenet without resizing."""
    return find_mini_imagenet(root, resize=False)


def message(find: Callable[[Path], Tree], root: Path) -> str:
    """What a tree is refused with: one sentence, without the folder it is in."""
    with pytest.raises(InputError) as caught:
        find(root)
    text = str(caught.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text.replace(str(root), "ROOT")


def test_a_character_is_a_class_and_none_has_a_split(tmp_path: Path) -> None:
    """Sorted by name, one after the other; rows and files agree."""
    tree = find_omniglot(write_omniglot(tmp_path))
    start = 0
    for found, (name, drawings) in zip(tree.classes, CHARACTERS.items(), strict=True):
        assert found == ImageClass(name, "", start, drawings)
        files = tree.files[start : start + drawings]
        assert files == tuple(tmp_path / name / f"{i:02d}.png" for i in range(drawings))
        start += drawings
    assert tree.shape == (43, 1, 28, 28)


def test_what_is_hidden_or_no_image_is_left_alone(tmp_path: Path) -> None:
    """As macOS leaves ._01.png, and an unpacked zip a text; capital suffixes are images."""
    before = find_omniglot(write_omniglot(tmp_path))
    folder = tmp_path / "images_evaluation" / "Oriya" / "character02"
    (folder / "._00.png").write_bytes(b"99")
    (folder / "notes.txt").write_bytes(b"99")
    (folder / "more.png").mkdir()
    (tmp_path / "images_evaluation" / ".trash" / "character01").mkdir(parents=True)
    assert find_omniglot(tmp_path) == before
    write_image(folder / "04.PNG", pixels_of("one more", 28, 28))
    assert len(find_omniglot(tmp_path).files) == len(before.files) + 1


@pytest.mark.parametrize("gone", ["images_background", "images_evaluation"])
def test_one_half_of_omniglot_is_a_set_too(gone: str, tmp_path: Path) -> None:
    shutil.rmtree(write_omniglot(tmp_path) / gone)
    names = [c.name for c in find_omniglot(tmp_path).classes]
    assert names == [name for name in CHARACTERS if not name.startswith(gone)]


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    """Users link data sets; the names are those of the links."""
    real = write_omniglot(tmp_path / "real")
    linked = tmp_path / "linked"
    (linked / "images_background" / "Korean").mkdir(parents=True)
    (linked / "images_evaluation").symlink_to(real / "images_evaluation")
    for name in ("character01", "character02"):
        folder = linked / "images_background" / "Korean" / name
        folder.mkdir()
        for file in (real / "images_background" / "Korean" / name).iterdir():
            (folder / file.name).symlink_to(file)
    shutil.rmtree(real / "images_background" / "Latin")
    names = [(c.name, c.images) for c in find_omniglot(linked).classes]
    assert names == [(n, drawings) for n, drawings in CHARACTERS.items() if "Latin" not in n]
    (folder / "zz.png").symlink_to(tmp_path / "nothing")
    assert "zz.png is a link that leads to no file" in message(find_omniglot, linked)


@pytest.mark.parametrize("tables", [False, True])
def test_both_layouts_of_mini_imagenet_are_one_set(tables: bool, tmp_path: Path) -> None:
    """Splits in order, classes by name within them."""
    tree = photographs(write_mini_imagenet(tmp_path, tables=tables))
    names = {"train": "train", "val": "validation", "test": "test"}
    expected = [
        (name, names[split], count)
        for split, classes in THINGS.items()
        for name, count in classes.items()
    ]
    assert [(c.name, c.split, c.images) for c in tree.classes] == expected
    assert tree.shape == (40, 3, 84, 84)
    last = tmp_path / ("images/n06-4.png" if tables else "test/n06/4.png")
    assert tree.files[-1] == last


def test_folders_are_taken_where_there_are_tables_too(tmp_path: Path) -> None:
    """The tables that are handed around often lie beside the sorted images."""
    write_mini_imagenet(tmp_path)
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_text("filename,label\nmissing.jpg,n01\n")
    assert len(photographs(tmp_path).files) == 40


@pytest.mark.parametrize(
    ("find", "words"),
    [
        (find_omniglot, "images_evaluation.zip from github.com/brendenlake/omniglot"),
        (photographs, "by the split of Ravi and Larochelle 2017, as train/CLASS/*.jpg"),
    ],
)
def test_a_missing_set_says_where_it_comes_from(
    find: Callable[[Path], Tree], words: str, tmp_path: Path
) -> None:
    """Missing, empty, or a file where a folder should be."""
    missing = message(find, tmp_path / "none")
    assert missing.startswith("there is no folder ROOT; if the images are elsewhere ")
    assert words in missing
    (tmp_path / ".hidden").touch()
    empty = message(find, tmp_path)
    assert empty.startswith("ROOT is empty: ")
    assert words in empty
    file = tmp_path / "file"
    file.touch()
    assert message(find, file) == "ROOT is no folder, and data.root names a folder of images"


def test_another_tree_is_told_from_omniglot(tmp_path: Path) -> None:
    """One folder too deep, or something else; what was expected, and what is there."""
    write_omniglot(tmp_path)
    assert message(find_omniglot, tmp_path / "images_background") == (
        "ROOT should hold images_background/ALPHABET/CHARACTER/*.png, or the same in "
        "images_evaluation, and holds Korean/, Latin/"
    )
    write_mini_imagenet(tmp_path / "mini", tables=True)
    (tmp_path / "mini" / "zz").touch()
    assert message(find_omniglot, tmp_path / "mini").endswith(
        "and holds images/, test.csv, train.csv, val.csv and 1 more"
    )


def test_a_level_of_omniglot_that_is_empty_is_named(tmp_path: Path) -> None:
    write_omniglot(tmp_path)
    character = tmp_path / "images_evaluation" / "Oriya" / "character01"
    shutil.rmtree(character)
    character.mkdir()
    assert message(find_omniglot, tmp_path) == (
        "class images_evaluation/Oriya/character01 has no images: "
        "ROOT/images_evaluation/Oriya/character01 holds no .png, .jpg, .jpeg, .bmp, .webp"
    )
    shutil.rmtree(character.parent)
    character.parent.mkdir()
    text = message(find_omniglot, tmp_path)
    assert text == "ROOT/images_evaluation/Oriya holds no folders of characters"
    shutil.rmtree(tmp_path / "images_background")
    (tmp_path / "images_background").mkdir()
    text = message(find_omniglot, tmp_path)
    assert text == "ROOT/images_background holds no folders of alphabets"


def test_a_split_of_mini_imagenet_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    write_mini_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "val")
    assert message(photographs, tmp_path) == (
        "ROOT should hold the folders train, val and test with CLASS/*.jpg in each, or train.csv, "
        "val.csv and test.csv beside a folder images, and holds test/, train/"
    )
    (tmp_path / "val").mkdir()
    assert message(photographs, tmp_path) == "ROOT/val holds no folders of classes"
    (tmp_path / "val" / "n04").mkdir()
    assert message(photographs, tmp_path).startswith("class val/n04 has no images: ROOT/val/n04 ")
    write_mini_imagenet(tmp_path / "tables", {**THINGS, "test": {}}, tables=True)
    assert message(photographs, tmp_path / "tables") == "ROOT/test.csv lists no images"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("filename,label\nn04-9.png,n04\n", "line 2 names an image that is not there: ROOT/images"),
        ("filename,label\n\nn04-9.png,n04\n", "line 3 names an image that is not there"),
        ("filename,label\n../train.csv,n04\n", "line 2 leads out of ROOT/images: ../train.csv"),
        ("filename,label\n/etc/passwd,n04\n", "line 2 leads out of ROOT/images: /etc/passwd"),
        (
            "filename,label\nn04-0.png,n04\nn04-0.png,n08\n",
            "line 3 names n04-0.png again, after ROOT/val.csv line 2",
        ),
        (
            "filename,label\nn01-3.png,n04\n",
            "line 2 names n01-3.png again, after ROOT/train.csv line 5",
        ),
        ("filename,label\nn04-0.png\n", "line 2 has not both a filename and a label"),
        ("filename,label\n,n04\n", "line 2 has not both a filename and a label"),
        ("filename,class\n", "has no column label: its first line must be filename,label"),
        ("n04-0.png,n04\n", "has no column filename and no column label: "),
        ("", "has no column filename and no column label: "),
        ("filename,label\n\xe9.png,n04\n", "is not a table in UTF-8: "),
        ("filename,label\n" + "9" * 140_000, "is not a table in UTF-8: field larger than"),
    ],
)
def test_a_table_that_is_wrong_is_named_with_its_line(
    table: str, words: str, tmp_path: Path
) -> None:
    """An image in two places would be trained and tested with."""
    write_mini_imagenet(tmp_path, tables=True)
    (tmp_path / "val.csv").write_bytes(table.encode("latin-1"))
    text = message(photographs, tmp_path)
    assert text.startswith("ROOT/val.csv")
    assert words in text


def test_a_table_of_another_program_is_read(tmp_path: Path) -> None:
    """With a byte-order mark, Windows' ends of lines and another column."""
    write_mini_imagenet(tmp_path, tables=True)
    table = "\ufefflabel,size,filename\r\nn04,9,n04-1.png\r\nn04,9,n04-0.png\r\n"
    (tmp_path / "val.csv").write_bytes(table.encode())
    tree = photographs(tmp_path)
    assert [c.images for c in tree.classes if c.split == "validation"] == [2]
    assert [p.name for p in tree.files if "n04" in p.name] == ["n04-0.png", "n04-1.png"]


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_omniglot(tmp_path)

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    assert message(find_omniglot, tmp_path) == "cannot read ROOT: Permission denied"
