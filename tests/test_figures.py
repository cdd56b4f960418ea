"""The learning curve: drawn from metrics, or one sentence that says what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from maml_rl.config import load_experiment
from maml_rl.errors import InputError
from maml_rl.figures import learning_curve
from maml_rl.train import meta_train
from tests.tiny import SETTINGS


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    """PNG by its signature."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    meta_train(load_experiment("navigation", **SETTINGS), out=tmp_path / "run")
    learning_curve(tmp_path / "run", tmp_path / "new" / "curve.png")
    assert (tmp_path / "new" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_command_that_cures_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra's absence is one sentence."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'maml-rl\[plot\]'"):
        learning_curve(tmp_path, tmp_path / "x.png")
