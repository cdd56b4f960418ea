"""N classes, K images of each to learn them from: Omniglot, MiniImagenet and drawn characters.

A task's classes come in random order, and a class's number in it is its place in that order: no
number means anything beyond its task. A class's images to adapt to and to be judged by differ.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
import numpy.typing as npt
import torch

from maml_rl.errors import refusal
from maml_rl.supervised.decoded_images import Bytes, Form, ImageClass, Tree, open_images
from maml_rl.supervised.image_sets import (
    GET_MINI_IMAGENET,
    GET_OMNIGLOT,
    MINI_IMAGENET,
    OMNIGLOT,
    find_mini_imagenet,
    find_omniglot,
)
from maml_rl.supervised.tasks import Batch, Examples, Problem, Split, check_ranges, silent

Numbers = npt.NDArray[np.int64]
Classes = Mapping[Split, Sequence[ImageClass]]


@dataclass(frozen=True, kw_only=True)
class FewShotImages(Problem):
    """Tell a few classes apart after seeing a few images of each."""

    classifies: ClassVar[bool] = True
    form: ClassVar[Form]
    """Of the images."""
    inverted: ClassVar[bool] = False
    """Whether images are handed out as their negatives."""
    division: ClassVar[str] = "as its folders or tables say"
    """What decides which classes go to which split."""

    advice: ClassVar[str]
    """How to come by the images."""

    root: str = ""
    """Folder of the images; has to be given."""
    ways: int = 5
    """Classes N of a task."""
    shots: int = 1
    """Images K of each class to adapt to."""
    query: int = 0
    """Images of each class to be judged by in training; 0 is as many as shots."""
    cache: str = ""
    """Folder of the file of decoded images; "" is beside the images."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, ways=(2, 1000), shots=(1, 1000), query=(0, 1000))
        for name in ("root", "cache"):
            if "\0" in getattr(self, name):
                raise ValueError(f"data.{name} must name a folder, got {getattr(self, name)!r}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.form.shape

    @property
    def outputs(self) -> int:
        """N."""
        return self.ways

    @property
    def training_query(self) -> int:
        """Images Q of each class to be judged by in training."""
        return self.query or self.shots

    @property
    def turned(self) -> bool:
        """Whether each class of a task is turned by a random number of quarters."""
        return False

    @property
    def folder(self) -> Path:
        """Of the images.

        Raises:
            InputError: if none is given.
        """
        if not self.root:
            raise refusal(f"--data.root DIR is missing, the folder of the images: {self.advice}")
        return Path(os.path.expanduser(self.root))

    def find(self) -> Tree:
        """Return the images that the folder holds.

        Raises:
            InputError: if it is missing, or not as it should be.
        """
        raise NotImplementedError

    def divide(self, classes: Sequence[ImageClass]) -> Classes:
        """Return which classes go to which split."""
        return {s: [c for c in classes if c.split == s] for s in get_args(Split)}

    def open(self, say: Callable[[str], None] = silent) -> FewShotTasks:
        """Return what draws tasks; decodes the images where that has not been done before.

        Args:
            say: is told that images are being decoded.

        Raises:
            InputError: if images are missing, damaged, too few, or not as they should be.
        """
        tree = self.find()
        classes = self.divide(tree.classes)
        check_apart(classes)
        self.check_enough(classes)
        cache = Path(os.path.expanduser(self.cache)) if self.cache else None
        return FewShotTasks(self, open_images(tree, cache, say), classes)

    def check_enough(self, classes: Classes) -> None:
        """Raise InputError where a split has too few classes, or a class too few images."""
        sizes = ", ".join(f"{split} {len(group)}" for split, group in classes.items())
        for split, group in classes.items():
            if len(group) < self.ways:
                raise refusal(
                    f"the {split} split of {self.root} has {len(group)} classes, and data.ways is "
                    f"{self.ways} (classes are divided {self.division}: {sizes})"
                )
        # Tests judge by as many images as are adapted to.
        query = max(self.training_query, self.shots)
        for one in (c for group in classes.values() for c in group):
            if one.images < self.shots + query:
                raise refusal(
                    f"class {one.name} of {self.root} has {one.images} images, and "
                    f"{self.shots + query} are wanted: {self.shots} to adapt to (data.shots) and "
                    f"{query} others to be judged by (data.query)"
                )


@dataclass(frozen=True, kw_only=True)
class Omniglot(FewShotImages):
    """Handwritten characters of 50 alphabets, 20 drawings of each (Lake et al. 2011).

    As in Finn et al. 2017, section 5.2: 28x28 pixels, characters divided at random whatever their
    alphabet, and turned by quarters into new ones.
    """

    name: ClassVar[str] = "omniglot"
    form: ClassVar[Form] = OMNIGLOT
    inverted: ClassVar[bool] = True
    division: ClassVar[str] = "by data.train_classes and data.validation_classes, test is the rest"
    advice: ClassVar[str] = GET_OMNIGLOT
    """How to come by the folder."""

    train_classes: int = 1200
    """Characters to train with."""
    validation_classes: int = 100
    """Characters to choose by; 0 is no such split. All others are to test with."""
    rotations: bool = True
    """Whether each character of a task is turned by 0, 90, 180 or 270 degrees, in every split:
    turned characters are classes of their own, but no task holds the same one twice."""
    split_seed: int = 1
    """Decides which characters go to which split."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_ranges(self, train_classes=(2, 10**6), validation_classes=(0, 10**6))
        check_ranges(self, split_seed=(0, 2**32 - 1))

    @property
    def turned(self) -> bool:
        """Whether each class of a task is turned by a random number of quarters."""
        return self.rotations

    def find(self) -> Tree:
        """Return the images that the folder holds."""
        return find_omniglot(self.folder, self.advice)

    def divide(self, classes: Sequence[ImageClass]) -> Classes:
        """Return which classes go to which split: by a hash of seed and name, so for ever."""

        def key(one: ImageClass) -> bytes:
            return hashlib.sha256(os.fsencode(f"{self.split_seed} {one.name}")).digest()

        shuffled = sorted(classes, key=key)
        first, second = self.train_classes, self.train_classes + self.validation_classes
        parts: dict[Split, Sequence[ImageClass]] = {"train": shuffled[:first]}
        if self.validation_classes:
            parts["validation"] = shuffled[first:second]
        return {**parts, "test": shuffled[second:]}


@dataclass(frozen=True, kw_only=True)
class DrawnCharacters(Omniglot):
    """Made-up characters in Omniglot's tree: see `draw_characters`."""

    name: ClassVar[str] = "drawn_characters"
    advice: ClassVar[str] = "make one by `maml-rl data drawn-characters DIR`"

    train_classes: int = 24
    """Characters to train with."""
    validation_classes: int = 6
    """Characters to choose by; 0 is no such split. All others are to test with."""


@dataclass(frozen=True, kw_only=True)
class MiniImagenet(FewShotImages):
    """Photographs of 100 kinds of things, 600 of each (Vinyals et al. 2016).

    Divided as in Ravi and Larochelle 2017: 64 to train with, 16 to choose by, 20 to test with.
    """

    name: ClassVar[str] = "miniimagenet"
    advice: ClassVar[str] = GET_MINI_IMAGENET
    form: ClassVar[Form] = MINI_IMAGENET

    query: int = 15
    """Images of each class to be judged by in training; 0 is as many as shots."""
    resize: bool = False
    """Whether images of other sizes than 84x84 are taken, and resized."""

    def find(self) -> Tree:
        """Return the images that the folder holds."""
        return find_mini_imagenet(self.folder, resize=self.resize)


def check_apart(classes: Classes) -> None:
    """Raise InputError where two splits have a class, or two classes an image, in common."""
    seen: dict[str, Split] = {}
    for split, group in classes.items():
        for one in group:
            if one.name in seen:
                raise refusal(
                    f"class {one.name} is in two splits, {seen[one.name]} and {split}: what is "
                    "tested with would have been trained with"
                )
            seen[one.name] = split
    ordered = sorted((c for group in classes.values() for c in group), key=lambda c: c.start)
    for one, after in pairwise(ordered):
        if one.start + one.images > after.start:
            raise refusal(f"classes {one.name} and {after.name} have images in common")


class FewShotTasks:
    """Draws tasks from decoded images."""

    def __init__(self, problem: FewShotImages, images: Bytes, classes: Classes) -> None:
        self.classes = classes
        self.splits = tuple(classes)
        self._problem = problem
        self.images = images
        self._starts = {s: np.array([c.start for c in group]) for s, group in classes.items()}
        self._counts = {s: np.array([c.images for c in group]) for s, group in classes.items()}

    def sample(
        self, split: Split, count: int, rng: np.random.Generator, *, query: int | None = None
    ) -> Batch:
        """Draw tasks; inputs (M, N K, C, H, W) from 0 to 1, class by class.

        Args:
            split: whose.
            count: tasks M.
            rng: decides them; equal generators draw equal tasks.
            query: images of each class to be judged by; by default as in training.

        Raises:
            InputError: if a class has too few images.
        """
        problem, counts = self._problem, self._counts[split]
        shots = problem.shots
        wanted = shots + (problem.training_query if query is None else query)
        if wanted > counts.min():
            raise refusal(
                f"{wanted} images a class are wanted for {shots} shots and the query, and one has "
                f"{counts.min()}: lower shots or query"
            )
        # (M, N), (M, N, K + Q), (M, N).
        chosen = draw_distinct(rng, np.full(count, len(counts)), problem.ways)
        images = self._starts[split][chosen][..., None]
        images = images + draw_distinct(rng, counts[chosen], wanted)
        quarters = rng.integers(4, size=chosen.shape) * problem.turned
        return Batch(
            self._examples(images[..., :shots], quarters),
            self._examples(images[..., shots:], quarters),
        )

    def _examples(self, images: Numbers, quarters: Numbers) -> Examples:
        """Return images of M tasks.

        Args:
            images: (M, N, K): their numbers.
            quarters: (M, N): of a turn, anticlockwise, by class.
        """
        tasks, ways, each = images.shape
        pixels = np.take(self.images, images.reshape(-1), axis=0)
        turn_in_place(pixels, np.repeat(quarters.reshape(-1), each))
        inputs = torch.from_numpy(pixels).float().div_(255)
        if self._problem.inverted:
            inputs = 1 - inputs
        targets = torch.arange(ways).repeat_interleave(each).repeat(tasks, 1)
        return Examples(inputs.reshape(tasks, ways * each, *pixels.shape[1:]), targets)


def turn_in_place(pixels: Bytes, quarters: Numbers) -> None:
    """Turn square images (B, C, H, H) by quarters (B,) of a turn, anticlockwise."""
    for k in (1, 2, 3):
        where = quarters == k
        if where.any():
            pixels[where] = np.rot90(pixels[where], k, axes=(2, 3))


def draw_distinct(rng: np.random.Generator, sizes: Numbers, count: int) -> Numbers:
    """Draw `count` different numbers below each size, in random order.

    Those with the least of as many random keys as the size.

    Args:
        rng: decides them.
        sizes: (...), each at least `count`.
        count: how many.

    Returns:
        (..., count).
    """
    most = int(sizes.max())
    keys = rng.random((*sizes.shape, most))
    keys[np.arange(most) >= sizes[..., None]] = 1.0  # above any that is drawn
    least = np.argpartition(keys, count - 1, axis=-1)[..., :count]
    order = np.argsort(np.take_along_axis(keys, least, axis=-1), axis=-1)
    return np.take_along_axis(least, order, axis=-1)
