"""Run folders: what is written can be read back, and damage is noticed."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from maml_rl.checkpoints import State, as_json
from maml_rl.config import load_experiment, origin_of
from maml_rl.errors import InputError
from maml_rl.runs import RunFolder, append_rows, read_metrics, write_whole
from maml_rl.versions import versions
from tests.conftest import files_at_most
from tests.tiny import SETTINGS

THETA = {"b": torch.arange(3.0), "a": torch.tensor([[0.5, math.pi]])}


def folder(path: Path) -> RunFolder:
    return RunFolder.create(
        path / "run", origin_of(load_experiment("quickstart", **SETTINGS)), THETA
    )


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A run never writes into what is there: not empty, or a file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="--out"):
        folder(tmp_path)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        RunFolder.check_free(tmp_path / "run" / "thesis.txt")


def test_default_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/NAME-seedS, then -2, -3."""
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        path = RunFolder.default_path("x", 5)
        path.mkdir(parents=True)
        names.append(str(path))
    assert names == ["runs/x-seed5", "runs/x-seed5-2", "runs/x-seed5-3"]


def test_metrics_are_read_back_and_rows_to_be_done_again_dropped(tmp_path: Path) -> None:
    """drop_rows_from(2) keeps iterations 0 and 1, header and text columns."""
    run = folder(tmp_path)
    for i in range(4):
        run.write_row({"iteration": i, "kl": i / 8, "accepted": 1, "refused_because": "a, b"})
    run.drop_rows_from(2)
    run.close()
    assert read_metrics(run.metrics) == {"iteration": [0.0, 1.0], "kl": [0.0, 0.125]}
    with run.metrics.open(newline="") as file:
        assert next(csv.DictReader(file))["refused_because"] == "a, b"


def test_versions_name_what_results_depend_on(tmp_path: Path) -> None:
    """versions.json has Python, torch, mujoco, gymnasium, numpy and this package."""
    saved = json.loads((folder(tmp_path).path / "versions.json").read_text())
    assert saved == versions()
    assert {"python", "torch", "mujoco", "gymnasium", "numpy", "maml-rl"} <= set(saved)


def test_json_holds_no_number_that_json_has_not(tmp_path: Path) -> None:
    """Half-widths of a single task and the best return before the first iteration are null."""
    assert (
        as_json({"a": [math.nan, 1.0], "b": -math.inf})
        == json.dumps({"a": [None, 1.0], "b": None}, indent=2) + "\n"
    )
    run = folder(tmp_path)
    assert run.load().state == State(0, 0, -math.inf, -1)


def test_a_row_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where the disk takes half of it, the half is taken back."""
    path = tmp_path / "metrics.csv"
    append_rows(path, [{"iteration": 0, "kl": 0.5}])
    whole = path.read_bytes()
    with files_at_most(len(whole) + 3), pytest.raises(OSError, match="File too large"):
        append_rows(path, [{"iteration": 1, "kl": 0.25}])
    assert path.read_bytes() == whole
    append_rows(path, [{"iteration": 1, "kl": 0.25}, {"iteration": 2, "kl": 0.125}])
    assert read_metrics(path)["kl"] == [0.5, 0.25, 0.125]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """The old text stays where the new one does not fit, and nothing is left beside it."""
    path = tmp_path / "config.yaml"
    write_whole(path, "old")
    with files_at_most(5), pytest.raises(OSError, match="File too large"):
        write_whole(path, "much longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
