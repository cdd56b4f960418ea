"""Checkpoints: they come back bit for bit, or not at all."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import maml_rl
from maml_rl.adapt import Params
from maml_rl.checkpoints import (
    CONFIG,
    KINDS,
    MANIFEST,
    PARAMETERS,
    STATE,
    Checkpoints,
    NewerFormatError,
    State,
    as_json,
    digest,
    read_checkpoint,
    seal,
    write_checkpoint,
)
from maml_rl.config import load_experiment, origin_of
from maml_rl.errors import CheckpointError, RunWarning
from tests.tiny import SETTINGS

THETA = {"b": torch.arange(3.0), "a": torch.tensor([[0.5, math.pi]])}
FILES = (PARAMETERS, STATE, CONFIG, MANIFEST)
ORIGIN = origin_of(load_experiment("quickstart", **SETTINGS))


def theta(number: int) -> Params:
    """Parameters that tell which checkpoint they are of."""
    return {name: p + number for name, p in THETA.items()}


def state(number: int) -> State:
    return State(number, 10 * number, -1.5, 0, refused_in_a_row=2, chunk_size=3)


def saved(folder: Path, count: int) -> Checkpoints:
    """Checkpoints after `count` saves, numbered from 0."""
    folder.mkdir(exist_ok=True)
    made = Checkpoints(folder / "checkpoints")
    for number in range(count):
        made.save(theta(number), state(number), ORIGIN, best=(theta(90), state(90), {}))
    return made


def edit_manifest(checkpoint: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change a manifest as an attacker would, who can make its sha256 right."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest.pop("sha256")
    change(manifest)
    (checkpoint / MANIFEST).write_text(as_json(manifest | {"sha256": seal(manifest)}))


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file, and its size and sha256 in the manifest."""
    (checkpoint / name).write_bytes(content)

    def entry(manifest: dict[str, object]) -> None:
        files = manifest["files"]
        assert isinstance(files, dict)
        files[name] = {"bytes": len(content), "sha256": digest(content)}

    edit_manifest(checkpoint, entry)


def test_a_checkpoint_comes_back_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    """Names keep their order, since flattened vectors depend on it; so do all counters."""
    write_checkpoint(tmp_path / "one", THETA, state(5), ORIGIN)
    found = read_checkpoint(tmp_path / "one")
    assert list(found.theta) == ["b", "a"]
    assert all(torch.equal(found.theta[name], THETA[name]) for name in THETA)
    assert (found.state, found.origin) == (state(5), ORIGIN)


def test_the_checkpoint_before_and_the_best_are_kept_each_complete(tmp_path: Path) -> None:
    """latest, previous and best are three checkpoints with four files, and nothing else is left."""
    made = saved(tmp_path, 3)
    assert [made.load(w).state.iteration for w in KINDS] == [2, 1, 90]
    assert torch.equal(made.load("best").theta["b"], theta(90)["b"])
    assert sorted(p.name for p in made.path.iterdir()) == sorted(KINDS)
    for name in KINDS:
        assert sorted(p.name for p in (made.path / name).iterdir()) == sorted(FILES)


def test_a_run_folder_holds_no_link_and_no_absolute_path(tmp_path: Path) -> None:
    """So that it can be copied, moved and committed."""
    maml_rl.meta_train(load_experiment("navigation", **SETTINGS), out=tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_symlink()
        if path.is_file():
            assert os.fsencode(tmp_path) not in path.read_bytes()


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(file=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 8))
def test_a_flip_or_a_cut_anywhere_falls_back_and_never_loads_wrong_values(
    tmp_path: Path, file: str, where: float, bit: int
) -> None:
    """One bit flipped (bits 0 to 7) or the file cut there (8): the one before, and a sentence.

    A flip that leaves the manifest's meaning as it was, such as of a space, may load the same.
    """
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    made = saved(tmp_path, 2)
    path = made.path / "latest" / file
    content = bytearray(path.read_bytes())
    offset = int(where * len(content))
    if bit == 8:
        del content[offset:]
    else:
        content[offset] ^= 1 << bit
    path.write_bytes(content)
    try:
        whole = read_checkpoint(made.path / "latest")
    except CheckpointError:
        with pytest.warns(RunWarning, match=r"latest is damaged.*'previous' of iteration 0 is"):
            found = made.load()
        assert found.state == state(0)
        assert torch.equal(found.theta["a"], theta(0)["a"])
    else:
        assert file == MANIFEST
        assert (whole.state, whole.origin) == (state(1), ORIGIN)
        assert all(torch.equal(whole.theta[n], theta(1)[n]) for n in THETA)


def test_when_none_is_good_it_is_said(tmp_path: Path) -> None:
    """All three damaged: the first one's fault and that the others are no better."""
    made = saved(tmp_path, 2)
    for name in KINDS:
        (made.path / name / STATE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"latest is damaged.*neither of previous, best"):
        made.load()
    with pytest.raises(CheckpointError, match="best is damaged"):
        made.load("best")
    shutil.rmtree(made.path)
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        made.load()
    with pytest.raises(CheckpointError, match=r"one of latest, previous, best, got '\.\./x'"):
        made.load("../x")


def test_best_is_the_last_resort(tmp_path: Path) -> None:
    """With latest and previous gone, a run can still go on from its best."""
    made = saved(tmp_path, 2)
    shutil.rmtree(made.path / "latest")
    shutil.rmtree(made.path / "previous")
    with pytest.warns(RunWarning, match="latest is missing; 'best' of iteration 90"):
        assert made.load().state.iteration == 90


def test_a_newer_format_is_refused_in_words_and_not_fallen_back_from(tmp_path: Path) -> None:
    """Version 1's loader tells which version wrote the checkpoint."""
    made = saved(tmp_path, 2)

    def newer(manifest: dict[str, object]) -> None:
        manifest["format"] = 2
        manifest["versions"] = {"maml-rl": "7.1"}

    edit_manifest(made.path / "latest", newer)
    with pytest.raises(NewerFormatError, match=r"format 2.*reads format 1.*7\.1"):
        made.load()


def test_a_damaged_checkpoint_set_aside_leaves_room_for_new_ones(tmp_path: Path) -> None:
    """Kept as latest.damaged; the next saves put good ones into latest and previous."""
    made = saved(tmp_path, 2)
    (made.path / "latest" / STATE).write_text("{}")
    with pytest.warns(RunWarning):
        found = made.load()
    made.set_aside(found)
    for number in (1, 2):
        made.save(theta(number), state(number), ORIGIN)
        assert made.load().state.iteration == number
    assert (made.path / "latest.damaged" / STATE).read_text() == "{}"
    assert made.load("previous").state.iteration == 1


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, ("exploded",))


def header_of_terabytes() -> bytes:
    """A safetensors file whose header claims 8 TB of parameters."""
    entry = {"dtype": "F32", "shape": [2_000_000, 1_000_000], "data_offsets": [0, 8 * 10**12]}
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 64


HOSTILE_PARAMETERS = {
    "pickle": pickle.dumps(Bomb()),
    "header of terabytes": header_of_terabytes(),
    "header longer than the file": struct.pack("<Q", 2**60) + b"{}",
    "nothing": b"",
    "other parameters": b"\x08\0\0\0\0\0\0\0{}      ",
}


@pytest.mark.parametrize("name", HOSTILE_PARAMETERS)
def test_hostile_parameters_are_refused_before_memory_is_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With right sizes and hashes: neither code is run nor more than a megabyte taken."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "one", THETA, state(1), ORIGIN)
    replace_file(tmp_path / "one", PARAMETERS, HOSTILE_PARAMETERS[name])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="is damaged"):
            read_checkpoint(tmp_path / "one")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_absurd_size_is_refused_unread(name: str, tmp_path: Path) -> None:
    """A terabyte, sparse on the disk: its size is looked at before anything is read."""
    write_checkpoint(tmp_path / "one", THETA, state(1), ORIGIN)
    os.truncate(tmp_path / "one" / name, 2**40)
    with pytest.raises(CheckpointError, match=r"1099511627776 bytes, at most \d+ expected"):
        read_checkpoint(tmp_path / "one")


def test_paths_that_lead_out_are_refused(tmp_path: Path) -> None:
    """`../` in the manifest, a link to a good file elsewhere, a link for a folder, a pipe."""
    outside = tmp_path / "outside"
    write_checkpoint(outside, THETA, state(1), ORIGIN)
    write_checkpoint(tmp_path / "one", THETA, state(1), ORIGIN)

    def lead_out(manifest: dict[str, object]) -> None:
        files = manifest["files"]
        assert isinstance(files, dict)
        files[f"../outside/{STATE}"] = files.pop(STATE)

    edit_manifest(tmp_path / "one", lead_out)
    with pytest.raises(CheckpointError, match=r"names other files.*\.\./outside"):
        read_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "one", THETA, state(1), ORIGIN)
    (tmp_path / "one" / STATE).unlink()
    (tmp_path / "one" / STATE).symlink_to(outside / STATE)
    with pytest.raises(CheckpointError, match=r"state\.json is a link"):
        read_checkpoint(tmp_path / "one")
    (tmp_path / "linked").symlink_to(outside)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "linked")
    (tmp_path / "one" / STATE).unlink()
    os.mkfifo(tmp_path / "one" / STATE)
    with pytest.raises(CheckpointError, match="no plain file"):
        read_checkpoint(tmp_path / "one")


@pytest.mark.parametrize(
    "change",
    [
        {"made_for": {}},
        {"made_for": {"family": [], "protocol": "", "observations": 2, "actions": 2}},
        {"made_for": "ant"},
        {"versions": {"mujoco": {}}},
        {"versions": 3},
        {"order": ["b"]},
        {"order": ["b", "a", "a"]},
        {"order": 5},
        {"files": []},
        {"format": "1"},
    ],
)
def test_a_manifest_of_other_types_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    """Even with the right hash."""
    write_checkpoint(tmp_path / "one", THETA, state(1), ORIGIN)
    edit_manifest(tmp_path / "one", lambda manifest: manifest.update(change))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "one")


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"best_return": 1' + b"0" * 400 + b"}",
        as_json(vars(state(1)) | {"iteration": -1}).encode(),
        as_json(vars(state(1)) | {"iteration": 1.5}).encode(),
        as_json(vars(state(1)) | {"iteration": True}).encode(),
        as_json(vars(state(1)) | {"iteration": 10**400}).encode(),
        as_json(vars(state(1)) | {"best_return": "high"}).encode(),
        as_json(vars(state(1)) | {"more": 1}).encode(),
    ],
)
def test_a_state_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    """Even with the right hash: wrong types, ranges, entries, and nesting without end."""
    write_checkpoint(tmp_path / "one", THETA, state(1), ORIGIN)
    replace_file(tmp_path / "one", STATE, content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(tmp_path / "one")


SAVE_UNTIL_KILLED = """
    # A process without threads of torch, forked again and again, so that each start is cheap.
    import os, random, signal, sys, time, warnings
    from pathlib import Path
    from maml_rl.errors import CheckpointError
    from tests.test_checkpoints import ORIGIN, Checkpoints, THETA, state, theta
    import torch

    warnings.simplefilter("ignore")
    made = Checkpoints(Path(sys.argv[1]) / "checkpoints")
    made.save(theta(0), state(0), ORIGIN, best=(theta(0), state(0), {}))
    began = time.perf_counter()
    made.save(theta(0), state(0), ORIGIN, best=(theta(0), state(0), {}))
    save = time.perf_counter() - began
    rng, unloadable, went_back, newest = random.Random(int(sys.argv[2])), 0, 0, 0
    for _ in range(int(sys.argv[3])):
        begin, said = made.load().state.iteration, os.pipe()
        child = os.fork()
        if child == 0:
            for n in range(begin + 1, begin + 10_000):
                best = (theta(n), state(n), {}) if n % 2 else None
                made.save(theta(n), state(n), ORIGIN, best=best)
                os.write(said[1], n.to_bytes(8, "little"))
        time.sleep(rng.uniform(0.2, 4.0) * save)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(said[1])
        words = b""
        while part := os.read(said[0], 2**16):
            words += part
        os.close(said[0])
        done = int.from_bytes(words[-8:], "little") if words else begin
        try:
            found, best = made.load(), made.load("best")
        except CheckpointError as error:
            unloadable += 1
            print(error, file=sys.stderr)
            continue
        for one in (found, best):
            n = one.state.iteration
            assert one.state == state(n)
            assert all(torch.equal(one.theta[name], theta(n)[name]) for name in THETA)
        went_back += found.state.iteration < done
        newest = max(newest, found.state.iteration)
    print(unloadable, went_back, newest)
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """100 kills at random instants: none unloadable, and no save that was finished is lost."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAVE_UNTIL_KILLED), tmp_path, "7", "100"],
        capture_output=True,
        text=True,
        cwd=Path(maml_rl.__file__).parent.parent,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    unloadable, went_back, newest = map(int, done.stdout.split())
    assert (unloadable, went_back) == (0, 0), done.stderr
    assert newest >= 10  # the kills did hit processes that were saving


def test_every_step_of_a_save_may_be_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each call that changes the folder, and again in the next save: latest loads,
    and best too."""

    class KilledError(BaseException):
        """Stands for SIGKILL, which nothing catches."""

    calls = 0
    last = 0
    real = {name: getattr(os, name) for name in ("replace", "fsync")}
    real_rmtree = shutil.rmtree

    def counted(name: str) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KilledError
            real[name](*arguments, **named)

        return call

    def rmtree(path: Path, *, ignore_errors: bool) -> None:
        nonlocal calls
        calls += 1
        if calls == last and path.exists():
            # Half of it gone.
            (path / MANIFEST).unlink(missing_ok=True)
            raise KilledError
        real_rmtree(path, ignore_errors=ignore_errors)

    stopped = True
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    trial = 0
    while stopped:
        trial += 1
        last = 0
        made = saved(tmp_path / str(trial), 3)
        calls, last = 0, trial
        try:
            made.save(theta(3), state(3), ORIGIN, best=(theta(3), state(3), {}))
            stopped = calls >= trial
        except KilledError:
            pass
        assert made.load("best").state.iteration in (90, 3)
        latest = read_checkpoint(made.find("latest"))
        assert latest.state.iteration in (2, 3)
        # Stopped once more, just after the next save has begun to reuse the hidden names.
        calls, last = 0, 3
        with pytest.raises(KilledError):
            made.save(theta(3), state(3), ORIGIN, best=(theta(3), state(3), {}))
        assert made.load("best").state.iteration in (90, 3)
        assert read_checkpoint(made.find("latest")).state.iteration in (2, 3)
        # And the next save, after a crash, leaves all in order.
        last = 0
        made.save(theta(4), state(4), ORIGIN)
        assert made.load().state.iteration == 4
        assert read_checkpoint(made.find("previous")).state.iteration in (1, 2, 3)
    assert trial > 15
