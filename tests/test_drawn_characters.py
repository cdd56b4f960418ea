"""Made-up characters: Omniglot's tree and files, equal for equal seeds, and no easy prey."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_rl.errors import InputError
from maml_rl.supervised.drawn_characters import closed, curved, draw_characters
from maml_rl.supervised.few_shot import DrawnCharacters
from tests.conftest import files_at_most


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by its path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_are_as_omniglots(tmp_path: Path) -> None:
    """Ten characters an alphabet; 105x105 pixels of one bit, mostly white, with no frame of ink."""
    assert draw_characters(tmp_path / "a" / "new", characters=12, drawings=3, seed=4) == 36
    root = tmp_path / "a" / "new"
    names = {f"alphabet01/character{i:02d}" for i in range(1, 11)}
    names |= {f"alphabet02/character{i:02d}" for i in (1, 2)}
    files = {f"images_background/{name}/{i:02d}.png" for name in names for i in (1, 2, 3)}
    assert contents(root).keys() == files
    # Nothing else either, hidden or empty.
    assert [p.name for p in root.iterdir()] == ["images_background"]
    for file in files:
        with Image.open(root / file) as image:
            assert (image.size, image.mode) == ((105, 105), "1")
            ink = ~np.asarray(image)
        assert 0.01 < ink.mean() < 0.25
        edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert edge.sum() < 30


def test_equal_seeds_draw_equal_files(tmp_path: Path) -> None:
    """A character does not depend on how many there are; no two drawings are the same."""
    for name, characters, seed in (("a", 3, 5), ("b", 3, 5), ("c", 2, 5), ("d", 3, 6)):
        draw_characters(tmp_path / name, characters=characters, drawings=2, seed=seed)
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    assert a == b
    assert c.items() < a.items()
    assert len({*a.values(), *d.values()}) == 12


def test_a_curve_begins_and_ends_at_its_control_points() -> None:
    """A Bezier curve's middle is (p + 3 q + 3 r + s) / 8; a loop passes the polygon's middles."""
    points = np.array([[0.0, 0.0], [1.0, 3.0], [5.0, 2.0], [7.0, -4.0]])
    curve = curved(points)
    np.testing.assert_allclose(curve[[0, -1]], points[[0, -1]])
    np.testing.assert_allclose(curve[len(curve) // 2], [25 / 8, 11 / 8])
    loop = closed(points)
    np.testing.assert_allclose(loop[0], loop[-1])
    for middle in ([0.5, 1.5], [3.0, 2.5], [6.0, -1.0], [3.5, -2.0]):
        assert np.hypot(*(loop - middle).T).min() < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_the_nearest_pixels_are_a_poor_guide(seed: int, tmp_path: Path) -> None:
    """One shot of five, .2 by chance: under .7, or there is little to learn, and well over .2."""
    draw_characters(tmp_path, seed=seed)
    # Nearly all characters in one split.
    problem = DrawnCharacters(root=str(tmp_path), train_classes=35, validation_classes=0)
    support, query = problem.open().sample("train", 600, np.random.default_rng(8))
    far = torch.cdist(query.inputs.flatten(2), support.inputs.flatten(2))
    found = support.targets.gather(1, far.argmin(dim=2))
    assert 0.45 < (found == query.targets).double().mean() < 0.7


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"99")
    with pytest.raises(InputError, match=r" is not empty; name a folder that is, or a new one$"):
        draw_characters(tmp_path, characters=1, drawings=1)
    with pytest.raises(InputError, match=r"^cannot write .*mine: File exists; name another folder"):
        draw_characters(tmp_path / "mine", characters=1, drawings=1)
    assert contents(tmp_path) == {"mine": b"99"}


def test_half_a_set_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, after Ctrl-C, or where another fills the folder meanwhile."""
    with (
        files_at_most(50),
        pytest.raises(InputError, match=r"^cannot write .*: File too large; name another folder$"),
    ):
        draw_characters(tmp_path, characters=1, drawings=2)
    assert list(tmp_path.iterdir()) == []

    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    def taken(source: Path, target: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    for replace, expected in ((interrupt, KeyboardInterrupt), (taken, InputError)):
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(expected):
            draw_characters(tmp_path, characters=1, drawings=2)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["characters", "drawings"])
def test_nothing_to_draw_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0$"):
        draw_characters(tmp_path / "new", **{name: 0})
    assert not (tmp_path / "new").exists()


def test_what_a_killed_call_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "set" / ".partial" / "images_background").mkdir(parents=True)
    assert draw_characters(tmp_path / "set", characters=2, drawings=1) == 2
    assert (tmp_path / "set" / "images_background").is_dir()
