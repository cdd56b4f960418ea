"""Run folders: what is written can be read back, and damage is noticed."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from maml_rl.config import InputError, load_experiment
from maml_rl.runs import CheckpointError, RunFolder, State, as_json, read_metrics, versions
from tests.tiny import SETTINGS

THETA = {"b": torch.arange(3.0), "a": torch.tensor([[0.5, math.pi]])}
EARLIER = {"b": -torch.arange(3.0), "a": torch.tensor([[7.0, 8.0]])}
STATE = State(iteration=2, env_steps=77, best_return=-1.5, best_iteration=1)


def folder(path: Path) -> RunFolder:
    return RunFolder.create(path / "run", load_experiment("quickstart", **SETTINGS))


def test_a_checkpoint_comes_back_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    """Names keep their order, since flattened vectors depend on it; so do all counters."""
    run = folder(tmp_path)
    run.save(THETA, STATE, best=None)
    theta, state = run.load()
    assert list(theta) == ["b", "a"]
    assert all(torch.equal(theta[name], THETA[name]) for name in THETA)
    assert state == STATE


def test_the_checkpoint_before_and_the_best_are_kept(tmp_path: Path) -> None:
    """latest, previous and best are three checkpoints of their own."""
    run = folder(tmp_path)
    for i, best in enumerate([EARLIER, None, None]):
        run.save(THETA, State(i, i, 0.0, 0), best=best)
    assert torch.equal(run.load("best")[0]["b"], EARLIER["b"])
    assert [run.load(w)[1].iteration for w in ("best", "previous", "latest")] == [0, 1, 2]
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == [
        "best",
        "latest",
        "previous",
    ]


@pytest.mark.parametrize("name", ["parameters.safetensors", "state.json"])
def test_a_flipped_bit_is_never_loaded(name: str, tmp_path: Path) -> None:
    """sha256 of every file is checked before it is read."""
    run = folder(tmp_path)
    run.save(THETA, STATE, best=None)
    path = run.path / "checkpoints" / "latest" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        run.load()


def test_missing_and_newer_checkpoints_are_refused_in_words(tmp_path: Path) -> None:
    """No checkpoint, and a format that a later version wrote."""
    run = folder(tmp_path)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        run.load()
    run.save(THETA, STATE, best=None)
    path = run.path / "checkpoints" / "latest" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match=r"format 2.*reads format 1"):
        run.load()


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


def test_a_manifest_that_lacks_an_entry_is_refused_in_words(tmp_path: Path) -> None:
    """An edited manifest or state is a CheckpointError, never a KeyError."""
    run = folder(tmp_path)
    run.save(THETA, STATE, best=None)
    path = run.path / "checkpoints" / "latest" / "manifest.json"
    path.write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="lacks an entry"):
        run.load()


def test_json_holds_no_number_that_json_has_not(tmp_path: Path) -> None:
    """Half-widths of a single task and the best return before the first iteration are null."""
    assert (
        as_json({"a": [math.nan, 1.0], "b": -math.inf})
        == json.dumps({"a": [None, 1.0], "b": None}, indent=2) + "\n"
    )
    run = folder(tmp_path)
    fresh = State(0, 0, -math.inf, -1)
    run.save(THETA, fresh, best=None)
    assert run.load()[1] == fresh
