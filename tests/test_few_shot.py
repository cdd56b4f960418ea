"""Few-shot tasks: the right pixels under the right numbers, and nothing seen twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maml_rl.errors import InputError
from maml_rl.supervised.decoded_images import Bytes, ImageClass
from maml_rl.supervised.few_shot import (
    Classes,
    DrawnCharacters,
    FewShotImages,
    FewShotTasks,
    MiniImagenet,
    Omniglot,
    check_apart,
    draw_distinct,
    turn_in_place,
)
from maml_rl.supervised.tasks import Batch, Split
from tests.image_trees import (
    CHARACTERS,
    THINGS,
    pixels_of,
    write_mini_imagenet,
    write_omniglot,
)

SMALL = {"ways": 2, "shots": 1, "query": 2, "train_classes": 4, "validation_classes": 2}
"""Of the 9 characters; 3 remain for tests."""


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Omniglot."""
    return write_omniglot(tmp_path_factory.mktemp("omniglot"))


@pytest.fixture(scope="module")
def mini_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MiniImagenet."""
    return write_mini_imagenet(tmp_path_factory.mktemp("miniimagenet"))


def characters(root: Path, **changed: int | str | bool) -> Omniglot:
    """The problem over the small Omniglot."""
    return Omniglot(root=str(root), **{**SMALL, **changed})  # type: ignore[arg-type]  # by name


def photographs(root: Path, **changed: int | str | bool) -> MiniImagenet:
    """The problem over the small MiniImagenet."""
    settings = {"ways": 2, "shots": 1, "query": 3, **changed}
    return MiniImagenet(root=str(root), **settings)  # type: ignore[arg-type]  # by name


def draw(
    problem: FewShotImages, split: Split = "train", count: int = 30, query: int | None = None
) -> Batch:
    """Draw tasks with the seed 7."""
    return problem.open().sample(split, count, np.random.default_rng(7), query=query)


def refused(problem: FewShotImages) -> str:
    """What opening is refused with, without the folder."""
    with pytest.raises(InputError) as caught:
        problem.open()
    return str(caught.value).replace(problem.root, "ROOT")


Known = Mapping[bytes, tuple[str, int, int]]


def drawings() -> Known:
    """Name, number and quarters anticlockwise of each drawing, by the bytes it is handed out as."""
    known = {}
    for name, count in CHARACTERS.items():
        for number in range(count):
            file = pixels_of(f"{name}/{number:02d}.png", 28, 28)
            for quarters in range(4):
                ink = 1 - np.rot90(file, quarters).astype(np.float32) / np.float32(255)
                known[np.ascontiguousarray(ink).tobytes()] = (name, number, quarters)
    return known


def things() -> Known:
    """The same of photographs, which are never turned."""
    known = {}
    for classes in THINGS.values():
        for name, count in classes.items():
            for number in range(count):
                file = pixels_of(f"{name}/{number}", 84, 84, 3)
                image = file.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
                known[np.ascontiguousarray(image).tobytes()] = (name, number, 0)
    return known


def recognise(inputs: Tensor, known: Known) -> list[list[tuple[str, int, int]]]:
    """What each image of each task is: an image that is no file's, bit for bit, is a KeyError."""
    return [[known[image.numpy().tobytes()] for image in task] for task in inputs]


def test_shapes_and_types_are_those_of_the_contract(omniglot: Path, mini_imagenet: Path) -> None:
    """(M, N K, C, H, W) float32 and (M, N K) int64; M, N, K and Q all different."""
    problem = characters(omniglot, ways=3, shots=2, query=1, train_classes=6, validation_classes=0)
    assert (problem.input_shape, problem.outputs, problem.shots) == ((1, 28, 28), 3, 2)
    batch = draw(problem, count=5)
    assert batch.support.inputs.shape == (5, 6, 1, 28, 28)
    assert batch.query.inputs.shape == (5, 3, 1, 28, 28)
    pictures = photographs(mini_imagenet)
    assert (pictures.input_shape, pictures.outputs, pictures.shots) == ((3, 84, 84), 2, 1)
    photos = draw(pictures, count=4)
    assert photos.support.inputs.shape == (4, 2, 3, 84, 84)
    assert photos.query.inputs.shape == (4, 6, 3, 84, 84)
    for inputs, targets in (*batch, *photos):
        assert inputs.dtype == torch.float32
        assert targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.shape == inputs.shape[:2]
        assert 0 <= inputs.min() < 0.02
        assert 0.98 < inputs.max() <= 1


def test_numbers_go_class_by_class(omniglot: Path) -> None:
    problem = characters(omniglot, ways=3, shots=2, query=1, train_classes=6, validation_classes=0)
    batch = draw(problem, count=2)
    assert batch.support.targets.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert batch.query.targets.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("rotations", [True, False])
def test_a_task_is_of_files_pixels(rotations: bool, omniglot: Path) -> None:
    """Ink is 1; a number is one character, turned one way; no drawing comes twice in a task."""
    problem = characters(omniglot, shots=2, query=2, rotations=rotations)
    batch, known = draw(problem), drawings()
    support, query = (recognise(part.inputs, known) for part in batch)
    seen = set()
    for first, second in zip(support, query, strict=True):
        # Class by class: two to adapt to, two to be judged by.
        for n in range(2):
            same = [*first[2 * n : 2 * n + 2], *second[2 * n : 2 * n + 2]]
            ((name, quarters),) = {(name, quarters) for name, _, quarters in same}
            assert len({number for _, number, _ in same}) == 4
            seen.add((name, quarters))
        assert first[0][0] != first[2][0]
    expected = {c.name for c in problem.open().classes["train"]}
    assert seen == {(n, q) for n in expected for q in (range(4) if rotations else (0,))}


def test_classes_of_a_task_turn_each_their_own_way(omniglot: Path) -> None:
    support = recognise(draw(characters(omniglot)).support.inputs, drawings())
    assert len({(a[2], b[2]) for a, b in support}) > 8


def test_photographs_are_files_pixels_and_upright(mini_imagenet: Path) -> None:
    """x / 255, channels first, each split its own classes."""
    problem, known = photographs(mini_imagenet), things()
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        batch = draw(problem, split, count=20)  # type: ignore[arg-type]  # a split
        support, query = (recognise(part.inputs, known) for part in batch)
        names = {name for task in (*support, *query) for name, _, _ in task}
        assert names == set(THINGS[folder])
        for first, second in zip(support, query, strict=True):
            for n in range(2):
                same = [first[n], *second[3 * n : 3 * n + 3]]
                assert len({name for name, _, _ in same}) == 1
                assert len({number for _, number, _ in same}) == 4


def test_a_number_means_nothing_beyond_its_task(omniglot: Path) -> None:
    """Every class has every number about equally often, whatever the folders' order.

    Of 300 tasks a number is each of 5 classes in 300 / 5 = 60, sd sqrt(300 * .2 * .8) = 7.
    """
    problem = characters(omniglot, ways=3, train_classes=4, validation_classes=0, rotations=False)
    source = problem.open()
    tasks = source.sample("test", 300, np.random.default_rng(3))
    counts = np.zeros((5, 3))
    names = [c.name for c in source.classes["test"]]
    for task in recognise(tasks.support.inputs, drawings()):
        for number, (name, _, _) in enumerate(task):
            counts[names.index(name), number] += 1
    assert counts.sum(axis=0).tolist() == [300] * 3
    assert (abs(counts - 60) < 4 * 7).all()


def test_tasks_follow_from_the_generator_alone(omniglot: Path, mini_imagenet: Path) -> None:
    """Opened anew or not; another generator draws others, and so does the next call."""
    for problem in (characters(omniglot), photographs(mini_imagenet)):
        source = problem.open()
        rng = np.random.default_rng(7)
        first, second = source.sample("train", 30, rng), source.sample("train", 30, rng)
        again = draw(problem)
        for part, same in zip(first, again, strict=True):
            assert torch.equal(part.inputs, same.inputs)
        assert not torch.equal(first.support.inputs, second.support.inputs)


def test_tests_may_judge_by_another_number(omniglot: Path, mini_imagenet: Path) -> None:
    """By default as in training: as many as shots for 0, else the number given."""
    assert draw(characters(omniglot, shots=2, query=0)).query.inputs.shape[1] == 2 * 2
    assert draw(characters(omniglot)).query.inputs.shape[1] == 2 * 2
    assert draw(characters(omniglot), query=3).query.inputs.shape[1] == 2 * 3
    assert draw(photographs(mini_imagenet), query=1).query.inputs.shape[1] == 2
    with pytest.raises(InputError, match=r"5 images a class are wanted .* and one has 4"):
        draw(characters(omniglot), "train", query=4)


def test_classes_of_unequal_size_are_drawn_from_whole(omniglot: Path) -> None:
    """All of a class's drawings come up, and none of its neighbour's."""
    problem = characters(omniglot, ways=9, train_classes=9, validation_classes=0, rotations=False)
    source = FewShotTasks(problem, *opened_as_one(problem))
    tasks = source.sample("train", 60, np.random.default_rng(1))
    inputs = [recognise(part.inputs, drawings()) for part in tasks]
    found = {image[:2] for part in inputs for task in part for image in task}
    assert found == {(name, i) for name, count in CHARACTERS.items() for i in range(count)}


def opened_as_one(problem: Omniglot) -> tuple[Bytes, Classes]:
    """All images as one split."""
    tree = problem.find()
    smaller = characters(Path(problem.root)).open()
    return smaller.images, {"train": tree.classes}


def test_a_quarter_is_anticlockwise() -> None:
    """12 over 34, by 1, 3, 0 and 2 quarters; the second channel is left-right reversed."""
    pixels = np.array([[[[1, 2], [3, 4]], [[2, 1], [4, 3]]]], np.uint8).repeat(4, axis=0)
    turn_in_place(pixels, np.array([1, 3, 0, 2]))
    assert pixels[:, 0].tolist() == [
        [[2, 4], [1, 3]],
        [[3, 1], [4, 2]],
        [[1, 2], [3, 4]],
        [[4, 3], [2, 1]],
    ]
    assert pixels[0, 1].tolist() == [[1, 3], [2, 4]]


def test_different_numbers_are_drawn_below_each_size() -> None:
    """Every ordered pair of 3, and all of 2: 6 and 2 ways, each equally often."""
    sizes = np.array([[3, 2]]).repeat(1200, axis=0)
    drawn = draw_distinct(np.random.default_rng(5), sizes, 2)
    assert drawn.shape == (1200, 2, 2)
    for column, ways in ((0, 6), (1, 2)):
        pairs, counts = np.unique(drawn[:, column], axis=0, return_counts=True)
        assert len(pairs) == ways
        assert all(a != b for a, b in pairs)
        assert abs(counts - 1200 / ways).max() < 4 * np.sqrt(1200 / ways)


def test_splits_share_no_character(omniglot: Path) -> None:
    """And together they are all; alphabets are mixed, and the seed decides how."""
    divided = {}
    for seed in (1, 2):
        source = characters(omniglot, split_seed=seed).open()
        assert source.splits == ("train", "validation", "test")
        names = [[c.name for c in source.classes[s]] for s in source.splits]
        assert [len(n) for n in names] == [4, 2, 3]
        assert sorted(n for part in names for n in part) == sorted(CHARACTERS)
        divided[seed] = names
    assert divided[1] != divided[2]
    # Written down, since a test split that changes would make results of old unfair.
    assert divided[1][2] == [
        "images_evaluation/Tengwar/character09",
        "images_background/Latin/character01",
        "images_evaluation/Tengwar/character10",
    ]
    alone = characters(omniglot, validation_classes=0).open()
    assert alone.splits == ("train", "test")


def test_a_split_without_enough_classes_is_named(omniglot: Path, mini_imagenet: Path) -> None:
    assert refused(characters(omniglot, validation_classes=1)) == (
        "the validation split of ROOT has 1 classes, and data.ways is 2 (classes are divided by "
        "data.train_classes and data.validation_classes, test is the rest: train 4, validation 1, "
        "test 4)"
    )
    assert refused(characters(omniglot, train_classes=6)).startswith("the test split of ROOT has 1")
    assert refused(Omniglot(root=str(omniglot))).startswith("the validation split of ROOT has 0")
    assert refused(photographs(mini_imagenet, ways=3)) == (
        "the validation split of ROOT has 2 classes, and data.ways is 3 (classes are divided as "
        "its folders or tables say: train 3, validation 2, test 2)"
    )


def test_a_class_without_enough_images_is_named(omniglot: Path, mini_imagenet: Path) -> None:
    """Tests judge by as many as are adapted to, even where training does by fewer."""
    text = refused(characters(omniglot, shots=3, query=1))
    name, words = text.removeprefix("class ").split(" ", 1)
    assert CHARACTERS[name] < 6
    assert words == (
        f"of ROOT has {CHARACTERS[name]} images, and 6 are wanted: 3 to adapt to (data.shots) and "
        "3 others to be judged by (data.query)"
    )
    assert refused(photographs(mini_imagenet, query=5)) == (
        "class n02 of ROOT has 5 images, and 6 are wanted: 1 to adapt to (data.shots) and 5 others "
        "to be judged by (data.query)"
    )


def test_a_class_in_two_splits_is_refused(tmp_path: Path) -> None:
    """Before anything is decoded."""
    for tables in (False, True):
        root = write_mini_imagenet(tmp_path / str(tables), tables=tables)
        if tables:
            table = root / "test.csv"
            table.write_text(table.read_text().replace(",n03", ",n05"))
        else:
            (root / "test" / "n03").rename(root / "test" / "n05")
        assert refused(photographs(root)) == (
            "class n05 is in two splits, train and test: what is tested with would have been "
            "trained with"
        )
        assert not list(root.glob("decoded-*"))


def test_classes_that_share_images_are_refused() -> None:
    """Whatever divides them: names that differ are not enough."""
    one, two = ImageClass("one", "", 3, 4), ImageClass("two", "", 7, 5)
    check_apart({"train": [two], "test": [one]})
    with pytest.raises(InputError, match="classes one and three have images in common"):
        check_apart({"train": [ImageClass("three", "", 6, 5)], "test": [one]})


def test_decoding_is_said_once_and_goes_where_it_is_told(omniglot: Path, tmp_path: Path) -> None:
    said: list[str] = []
    problem = characters(omniglot, cache=str(tmp_path))
    problem.open(said.append)
    problem.open(said.append)
    (file,) = tmp_path.glob("*.uint8")
    assert said == [f"decoding 43 images into {file} ..."]


def test_a_home_folder_may_be_abbreviated(
    omniglot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").symlink_to(omniglot)
    assert characters(Path("~/set"), cache="~/cache").open().splits
    assert list((tmp_path / "cache").glob("decoded-*"))


def test_drawn_characters_lie_in_omniglots_tree(omniglot: Path, tmp_path: Path) -> None:
    """With a smaller division, and their own way to come by them."""
    problem = DrawnCharacters(root=str(omniglot), ways=2, train_classes=4, validation_classes=2)
    assert torch.equal(draw(problem, query=2).query.inputs, draw(characters(omniglot)).query.inputs)
    text = refused(DrawnCharacters(root=str(tmp_path / "none")))
    assert text.startswith("there is no folder ROOT; ")
    assert text.endswith("else make one by `maml-rl data drawn-characters DIR`")
    with pytest.raises(InputError, match=r"--data\.root DIR is missing"):
        DrawnCharacters().open()


def test_defaults_are_the_papers() -> None:
    """Section 5.2: 1,200 characters to train with; 15 photographs a class to be judged by."""
    first, second, third = Omniglot(root="a"), MiniImagenet(root="a"), DrawnCharacters(root="a")
    assert (first.train_classes, first.validation_classes, first.rotations) == (1200, 100, True)
    assert (first.ways, first.shots, first.training_query) == (5, 1, 1)
    assert (second.ways, second.shots, second.training_query) == (5, 1, 15)
    assert (third.train_classes, third.validation_classes, third.rotations) == (24, 6, True)
    names = [problem.name for problem in (first, second, third)]
    assert names == ["omniglot", "miniimagenet", "drawn_characters"]
    assert first.classifies


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ways", 1, "data.ways must be at least 2, got 1"),
        ("ways", 1001, "data.ways must be at most 1000, got 1001"),
        ("shots", 0, "data.shots must be at least 1, got 0"),
        ("query", -1, "data.query must be at least 0, got -1"),
        ("train_classes", 1, "data.train_classes must be at least 2, got 1"),
        ("validation_classes", -1, "data.validation_classes must be at least 0, got -1"),
        ("split_seed", -1, "data.split_seed must be at least 0, got -1"),
        ("cache", "a\0", r"data.cache must name a folder, got 'a\\x00'"),
    ],
)
def test_a_setting_out_of_range_is_refused(field: str, value: int | str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Omniglot(**{"root": "a", field: value})  # type: ignore[arg-type]  # by name
