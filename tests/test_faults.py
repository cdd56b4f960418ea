"""What a run survives: each fault is made to happen, in the way it happens to a user.

Damaged and hostile checkpoints are in test_checkpoints.py, malformed configs in test_fuzz.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
import torch

import maml_rl
from envs import Navigation2D
from envs.family import Transition, Worlds
from envs.navigation import NavigationWorlds
from maml_rl.checkpoints import KINDS, MANIFEST, PARAMETERS, as_json, digest, seal
from maml_rl.chunks import Chunks
from maml_rl.cli import run
from maml_rl.config import load_experiment, origin_of
from maml_rl.errors import InputError, RunStopped, RunWarning
from maml_rl.runs import Row, RunFolder, read_metrics, write_whole
from maml_rl.sampler import Sampler
from maml_rl.train import meta_train, resume
from maml_rl.trained import load, new_policy
from tests.conftest import files_at_most, rows
from tests.killed_training import TRAIN
from tests.tiny import SETTINGS, flags

CHECKOUT = Path(maml_rl.__file__).parent.parent
NAVIGATION = load_experiment("navigation", **SETTINGS)


def points(folder: Path) -> list[tuple[int, float]]:
    """Step and value of return_1 as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("return_1")]


def edit_config(folder: Path, before: str, after: str) -> Path:
    """Change a run's config.yaml as a user would, and return its path."""
    config = folder / "config.yaml"
    text = config.read_text()
    assert before in text
    config.write_text(text.replace(before, after))
    return config


def weights(folder: Path) -> str:
    """The sha256 of a run's parameters."""
    return digest((folder / "checkpoints" / "latest" / PARAMETERS).read_bytes())


@pytest.fixture(scope="module")
def never_interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of tests/killed_training.py, in one piece."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run([*TRAIN, "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130), ("SIGTERM", 143)]
)
def test_a_run_stopped_again_and_again_equals_one_never_interrupted(
    name: str, code: int, never_interrupted: Path, tmp_path: Path
) -> None:
    """Stopped at eight random times and resumed: same weights, rows, TensorBoard steps and best.

    After a kill the next process just goes on; after a signal the line to type is printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_training", tmp_path / "run", name, "3", "8"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    log = (tmp_path / "run.log").read_text()
    assert set(codes) == {code, 0}, log
    assert codes.count(code) >= 2, "the signals must hit training"
    assert "Traceback" not in log
    if name != "SIGKILL":
        assert log.count(f"Go on with: maml-rl resume {tmp_path / 'run'}") >= 1
    assert weights(tmp_path / "run") == weights(never_interrupted)
    assert rows(tmp_path / "run") == rows(never_interrupted)
    assert points(tmp_path / "run") == points(never_interrupted)
    assert [step for step, _ in points(tmp_path / "run")] == list(range(25))
    for kind in KINDS:
        ours, theirs = (RunFolder(f).load(kind) for f in (tmp_path / "run", never_interrupted))
        assert ours.state == theirs.state
        assert all(torch.equal(ours.theta[n], theirs.theta[n]) for n in theirs.theta)


@pytest.mark.parametrize("kind", ["latest", "latest and previous"])
def test_a_run_goes_on_from_an_earlier_checkpoint_to_the_same_end(
    kind: str, tmp_path: Path
) -> None:
    """With the newest damaged: one sentence, and the same rows and weights once more."""
    whole = replace(NAVIGATION, iterations=5)
    meta_train(whole, out=tmp_path / "whole")
    meta_train(replace(NAVIGATION, iterations=4), out=tmp_path / "run")
    for name in kind.split(" and "):
        (tmp_path / "run" / "checkpoints" / name / PARAMETERS).write_bytes(b"")
    with pytest.warns(RunWarning, match="latest is damaged.*is taken in its place"):
        resume(tmp_path / "run", iterations=5)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert points(tmp_path / "run") == points(tmp_path / "whole")
    load(tmp_path / "run")
    # Kept to be looked at, and out of the way of new ones.
    assert (tmp_path / "run" / "checkpoints" / "latest.damaged" / PARAMETERS).read_bytes() == b""


def test_a_half_written_row_is_dropped(tmp_path: Path) -> None:
    """What a power cut leaves of the last line, even if it reads like an early row."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.csv"
    whole = metrics.read_bytes()
    for torn in (b"3", b"1,0.5", whole.splitlines()[-1]):
        metrics.write_bytes(whole + torn)
        resume(tmp_path / "run")
        assert metrics.read_bytes() == whole


def test_none_good_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """resume and evaluate of a run without a whole checkpoint, and inspect tells which are bad."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    for kind in KINDS:
        (tmp_path / "run" / "checkpoints" / kind / MANIFEST).write_text("{}")
    for command in ("resume", "evaluate"):
        assert run([command, str(tmp_path / "run")]) == 2
        assert "neither of previous, best is good" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().out.count("damaged") == 3


def test_inspect_tells_what_is_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run and of one checkpoint: iterations, versions, shapes, whole or not; exit 0 or 2."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    assert run(["inspect", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for words in ("navigation, 3 iterations wanted, 3 rows in metrics.csv", "latest is whole"):
        assert words in out
    assert run(["inspect", str(tmp_path / "run" / "checkpoints" / "previous")]) == 0
    out = capsys.readouterr().out
    assert "2 iterations" in out
    assert f"mujoco {mujoco.__version__}" in out
    assert "mean.0.weight (2, 8)" in out
    (tmp_path / "run" / "checkpoints" / "best" / PARAMETERS).write_bytes(b"cut")
    assert run(["inspect", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert "best is damaged: parameters.safetensors has 3 bytes" in printed.err
    assert "latest is whole" in printed.out
    assert run(["inspect", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


# Disks and locks.


def test_metrics_that_cannot_be_written_do_not_stop_training(tmp_path: Path) -> None:
    """While metrics.csv may not grow training goes on; then all rows are there, none twice."""
    long = replace(NAVIGATION, iterations=6)
    meta_train(long, out=tmp_path / "whole")
    # Above a checkpoint's largest file, and reached by metrics and events after some rows.
    filler = 20_000
    run_folder = tmp_path / "run"
    with ExitStack() as quota:

        def watch(row: Row, total: int) -> None:
            if row["iteration"] == 1:
                with (run_folder / "metrics.csv").open("ab") as file:
                    file.write(b"\n" * filler)
                quota.enter_context(files_at_most(filler))
            if row["iteration"] == 4:
                quota.close()

        with pytest.warns(RunWarning, match=r"written to .*File too large.*; training") as warned:
            meta_train(long, out=run_folder, watch=watch)
    assert len(warned) == 3
    assert rows(run_folder) == rows(tmp_path / "whole")
    assert points(run_folder) == points(tmp_path / "whole")
    assert weights(run_folder) == weights(tmp_path / "whole")


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_keeps_the_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quota below a checkpoint's size from the second iteration on: exit 3, loud; then resume."""
    meta_train(NAVIGATION, out=tmp_path / "whole")
    folder = tmp_path / "run"
    with ExitStack() as quota:

        def watch(row: Row, total: int) -> None:
            if row["iteration"] == 0:
                quota.enter_context(files_at_most(200))

        said = r"of iteration 2 cannot be written to .*the one before"
        with pytest.warns(RunWarning, match="goes on"), pytest.raises(RunStopped, match=said):
            meta_train(NAVIGATION, out=folder, watch=watch)
    assert RunFolder(folder).load().state.iteration == 1
    assert run(["resume", str(folder), "--quiet"]) == 0
    assert weights(folder) == weights(tmp_path / "whole")
    assert rows(folder) == rows(tmp_path / "whole")


def test_a_small_disk_is_found_at_the_start_or_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a real file system of 128 KiB nothing is begun; on one that fills up the run ends, 3."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small disk wants root")
    try:
        words = ["train", "navigation", *flags(), "--out"]
        assert run([*words, str(disk / "run")]) == 2
        assert "MiB are free on its disk" in capsys.readouterr().err
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=640k", disk], check=True)
        # A disk that another program fills while the run goes on.
        fresh = new_policy(NAVIGATION)
        with RunFolder.create(disk / "run", origin_of(NAVIGATION), fresh.params):
            pass
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(b"0" * 2**20)
        assert run(["resume", str(disk / "run")]) in (2, 3)
        assert "No space left on device" in capsys.readouterr().err
        (disk / "filler").unlink()
        assert run(["resume", str(disk / "run"), "--quiet"]) == 0
        assert len(rows(disk / "run")) == 3
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/run", "/dev/null"])
def test_a_place_that_cannot_be_a_folder_is_found_at_the_start(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where the folder should be, a folder below a file, a place that nobody can write."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert run(["train", "navigation", *flags(), "--out", where]) == 2
    error = capsys.readouterr().err
    assert where in error
    assert "--out" in error
    assert Path("file").read_text() == "mine"


HOLD = """
import sys, time
from pathlib import Path
from maml_rl.runs import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_two_processes_on_one_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is told host and pid of the first; when that is killed, nothing is left behind."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        named = f"is in use by process {other.pid} on {os.uname().nodename}"
        for command in (
            ["resume", str(tmp_path / "run")],
            ["train", "navigation", *flags(), "--out", str(tmp_path / "run")],
        ):
            assert run(command) == 2
            assert named in capsys.readouterr().err
        assert run(["inspect", str(tmp_path / "run")]) == 0
        assert named.removeprefix("is ") in capsys.readouterr().out
        load(tmp_path / "run")  # reading is free to all
        other.kill()
        other.wait()
    assert run(["resume", str(tmp_path / "run"), "--iterations", "4", "--quiet"]) == 0
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_a_lock_does_not_outlive_its_process_in_a_child(tmp_path: Path) -> None:
    """A process that forked and died leaves no lock, though its child lives on."""
    code = HOLD.replace(
        'print("held", flush=True)\n',
        "import os\nif os.fork():\n    os._exit(0)\nprint(os.getpid(), flush=True)\n",
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as other:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        try:
            other.wait()
            with RunFolder(tmp_path) as folder:
                folder.lock()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_run_folder_may_be_moved_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in it says where it was."""
    monkeypatch.chdir(tmp_path)
    meta_train(replace(NAVIGATION, iterations=4), out="whole")
    meta_train(NAVIGATION, out="run")
    shutil.copytree("run", "deep/down/copy")
    Path("run").rename("moved")
    for name in ("deep/down/copy", "moved"):
        resume(name, iterations=4)
        assert weights(Path(name)) == weights(Path("whole"))


@pytest.mark.parametrize("name", ["metrics.csv", ".lock", "checkpoints", "tensorboard", "dumps"])
def test_no_link_in_a_run_folder_is_followed(name: str, tmp_path: Path) -> None:
    """Somebody's run folder could point to a file of yours: it is left as it was."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    link = tmp_path / "run" / name
    if link.exists():
        link.rename(tmp_path / "aside")
    link.symlink_to(precious)
    with pytest.raises(InputError, match=rf"{name} is a link, and a run folder holds none"):
        resume(tmp_path / "run", iterations=4)
    assert precious.read_text() == "mine"
    # A link where a new text is written first is replaced, not followed.
    link.unlink()
    if (tmp_path / "aside").exists():
        (tmp_path / "aside").rename(link)
    partial = tmp_path / "run" / ".config.yaml.partial"
    partial.symlink_to(precious)
    with pytest.raises(InputError, match="is a link"):
        resume(tmp_path / "run", iterations=4)
    write_whole(tmp_path / "run" / "config.yaml", "name: x")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "checkpoints/.latest/state.json"]])
def test_what_a_start_that_was_killed_leaves_does_not_stand_in_the_way(
    left: list[str], tmp_path: Path
) -> None:
    """Training into the same folder begins anew; a folder with a checkpoint is resumed."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("elsewhere 1")
    meta_train(NAVIGATION, out=folder)
    (folder / "config.yaml").unlink()
    with pytest.warns(RunWarning, match="was missing"):
        resume(folder, iterations=4)
    assert len(rows(folder)) == 4


@pytest.mark.slow
def test_rows_that_stay_unwritten_are_named_at_the_end_and_at_resume(tmp_path: Path) -> None:
    """A folder where metrics.csv should be, to the last iteration; then TensorBoard's as a file."""
    folder = tmp_path / "run"

    def watch(row: Row, total: int) -> None:
        if row["iteration"] == 0:
            (folder / "metrics.csv").unlink()
            (folder / "metrics.csv").mkdir()

    with pytest.warns(RunWarning) as warned:
        meta_train(NAVIGATION, out=folder, watch=watch)
    said = [str(w.message) for w in warned]
    assert sum("training goes on" in s and "metrics.csv (Is a dir" in s for s in said) == 2
    assert "the metrics of iterations 1, 2 are lost" in said[-1]
    (folder / "metrics.csv").rmdir()
    resume(folder, iterations=4)
    with pytest.warns(RunWarning, match=r"metrics\.csv lacks iterations 0, 1, 2"):
        resume(folder, iterations=5)
    assert [r["iteration"] for r in rows(folder)] == ["3", "4"]


def test_other_columns_are_added_and_none_is_lost(tmp_path: Path) -> None:
    """A second inner step from the config: earlier rows are empty there."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    edit_config(tmp_path / "run", "inner_steps: 1", "inner_steps: 2")
    with pytest.warns(RunWarning, match=r"inner_steps 1 -> 2"):
        resume(tmp_path / "run", iterations=5)
    resume(tmp_path / "run", iterations=6)
    table = rows(tmp_path / "run")
    assert [r["iteration"] for r in table] == ["0", "1", "2", "3", "4", "5"]
    assert [r["return_2"] != "" for r in table] == [False] * 3 + [True] * 3
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    assert np.isnan(metrics["return_2"]).tolist() == [True] * 3 + [False] * 3


def test_a_quotation_mark_in_the_metrics_costs_its_own_row(tmp_path: Path) -> None:
    """One flipped character: the rows below it stay, and the one lost is named."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.csv"
    lines = metrics.read_text().splitlines(keepends=True)
    lines[1] = '"' + lines[1]
    metrics.write_text("".join(lines))
    with pytest.warns(RunWarning, match="lacks iterations 0$"):
        resume(tmp_path / "run", iterations=4)
    assert [r["iteration"] for r in rows(tmp_path / "run")] == ["1", "2", "3"]
    # In the line of the names it costs all, which are kept beside; the file is sound again.
    damaged = '"' + metrics.read_text()
    metrics.write_text(damaged)
    with pytest.warns(RunWarning, match="lacks iterations 0, 1, 2, 3$"):
        resume(tmp_path / "run", iterations=5)
    assert [r["iteration"] for r in rows(tmp_path / "run")] == ["4"]
    assert (tmp_path / "run" / "metrics.damaged.csv").read_text() == damaged


def test_tensorboards_files_are_in_order_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on on a host whose clock is a day behind."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    now = time.time()
    monkeypatch.setattr("maml_rl.runs.time.time", lambda: now - 86400)
    resume(tmp_path / "run", iterations=6)
    assert [step for step, _ in points(tmp_path / "run")] == list(range(6))


@pytest.mark.slow
def test_a_terminal_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    """Its log on a full disk, or a pipe that nobody reads any more."""
    command = [sys.executable, "-m", "maml_rl", "train", "navigation", *flags(), "--out"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, tmp_path / "a"], stdout=full, stderr=full, cwd=CHECKOUT)
    assert len(rows(tmp_path / "a")) == 3, done
    assert (tmp_path / "a" / "evaluation" / "summary.json").exists()
    with subprocess.Popen(
        [*command, tmp_path / "b"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=CHECKOUT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        process.wait()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert len(rows(tmp_path / "b")) == 3


def test_a_disk_without_room_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no small disk can be mounted, one that says it is full."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    assert run(["train", "navigation", *flags(), "--out", str(tmp_path / "run")]) == 2
    assert "0.10 MiB are free on its disk" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Checkpoints of something else.


def test_a_checkpoint_of_another_family_or_protocol_is_refused_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HalfCheetah's for Ant, put there by hand; forward's for speed, where all shapes agree."""
    cheetah = load_experiment("half_cheetah_dir", **SETTINGS)
    meta_train(replace(cheetah, iterations=0), out=tmp_path / "cheetah")
    for other, differs in (
        ("ant_dir", "expected:   ant_dir (paper protocol), 41 observations, 8 actions"),
        ("half_cheetah_vel", "expected:   half_cheetah_vel (paper protocol), 20 observations"),
        ("half_cheetah_dir_gymnasium", "expected:   half_cheetah_dir (gymnasium protocol), 17 obs"),
    ):
        run_folder = tmp_path / other
        none = {**SETTINGS, "iterations": 0, "family__horizon": 6}
        meta_train(load_experiment(other, **none), out=run_folder)
        shutil.rmtree(run_folder / "checkpoints")
        shutil.copytree(tmp_path / "cheetah" / "checkpoints", run_folder / "checkpoints")
        for command in ("resume", "evaluate"):
            assert run([command, str(run_folder)]) == 2
            error = capsys.readouterr().err
            assert "checkpoint: half_cheetah_dir (paper protocol), 20 observations, 6 act" in error
            assert differs in error
        words = ["train", other, *flags(), "--init", str(tmp_path / "cheetah")]
        assert run([*words, "--out", str(tmp_path / "new")]) == 2
        assert differs in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_other_versions_are_named_and_the_run_goes_on(tmp_path: Path) -> None:
    """MuJoCo 2.1.0 in the manifest: a warning with both versions, and the same result."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    for kind in KINDS:
        path = tmp_path / "run" / "checkpoints" / kind / MANIFEST
        manifest = json.loads(path.read_text())
        manifest["versions"]["mujoco"] = "2.1.0"
        manifest.pop("sha256")
        path.write_text(as_json(manifest | {"sha256": seal(manifest)}))
    with pytest.warns(RunWarning, match=r"made with mujoco 2\.1\.0 \(here \d.*physics changes"):
        resume(tmp_path / "run", iterations=4)
    assert len(rows(tmp_path / "run")) == 4


def test_an_edited_config_is_named(tmp_path: Path) -> None:
    """A run goes on with what its config says now, and says what has changed."""
    meta_train(NAVIGATION, out=tmp_path / "run")
    config = edit_config(tmp_path / "run", "max_kl: 0.01", "max_kl: 0.02")
    with pytest.warns(RunWarning, match=r"has changed .*: trust_region\.max_kl 0\.01 -> 0\.02"):
        resume(tmp_path / "run", iterations=4)
    text = config.read_text()
    config.unlink()
    # Looking at a run, which may just be being made by another process, writes nothing.
    with pytest.raises(InputError, match=r"latest/config\.yaml is what it was"):
        load(tmp_path / "run")
    assert run(["inspect", str(tmp_path / "run")]) == 2
    assert not config.exists()
    with pytest.warns(RunWarning, match=r"config\.yaml was missing and is that of .*'latest'"):
        resume(tmp_path / "run")
    assert config.read_text() == text
    config.write_text("")
    with pytest.raises(InputError, match=r"holds no settings.*latest/config\.yaml is what it was"):
        resume(tmp_path / "run")


# Signals, forks and threads.


@pytest.mark.slow
def test_a_second_ctrl_c_drops_the_iteration_but_never_a_save(tmp_path: Path) -> None:
    """Two signals in one iteration: it ends at once; what was saved before loads."""
    code = (
        "import os, signal, sys, threading, time\n"
        "from maml_rl.config import Experiment, load_experiment\n"
        "from maml_rl.errors import RunStopped\n"
        "from maml_rl.train import meta_train\n"
        "def twice():\n"
        "    for _ in range(2):\n"
        "        time.sleep(0.2); os.kill(os.getpid(), signal.SIGINT)\n"
        "def watch(row, total):\n"
        "    if row['iteration'] == 0: threading.Thread(target=twice).start()\n"
        "sizes = {'threads': 1, 'sampling__tasks': 8, 'iterations': 475}\n"
        "experiment = load_experiment('half_cheetah_vel', **sizes)\n"
        "try: meta_train(experiment, out=sys.argv[1], watch=watch)\n"
        "except RunStopped as stopped: print(stopped, stopped.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=100,
    )
    assert done.stdout == "stopped after 1 of 475 iterations 130\n", done.stderr
    assert RunFolder(tmp_path / "run").load().state.iteration == 1


FORK = """
import hashlib, os, signal, sys
import numpy as np, torch
from maml_rl.config import Experiment, load_experiment
from maml_rl.sampler import Sampler, task_seeds
from maml_rl.train import meta_train
from maml_rl.trained import new_policy
from maml_rl.adapt import broadcast
from tests.tiny import SETTINGS

experiment = load_experiment(sys.argv[1], **SETTINGS, threads=2)
policy = new_policy(experiment)
sampler = Sampler(experiment.family, policy.policy, tasks=2, episodes=3, threads=2)
tasks = torch.from_numpy(experiment.family.sample_tasks(2, np.random.default_rng(0)))
def sample():
    return sampler.sample(broadcast(policy.params, 2), tasks, task_seeds(1, 0, 0, 0, 2))
meta_train(experiment)                    # the parent has used every pool there is
before = sample()
worlds = experiment.family.make_worlds(3, threads=2)
starts = np.stack([experiment.family.draw_start(np.random.default_rng(i)) for i in range(3)])
worlds.reset(tasks[[0, 1, 0]], starts)
actions = torch.full((3, len(experiment.family.action_columns)), 0.05)
for _ in range(60):                       # until it lies on the ground
    worlds.step(actions)
child = os.fork()
signal.alarm(30)                          # kills whoever hangs
step = worlds.step(actions)               # goes on from the parent's state in the child too
after = sample()
trained = meta_train(experiment)
assert all(torch.equal(vars(before)[n], vars(after)[n]) for n in vars(before))
states = map(torch.from_numpy, worlds.state(0).values())
seen = [step.observations, *trained.params.values(), *states]
# One write: print() makes two where PYTHONUNBUFFERED is set, and two processes' lines could mix.
digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in seen)).hexdigest()
os.write(1, digest.encode() + b"\\n")
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending", ["sys.exit(0)", "del worlds; sys.exit(0)", "worlds.close(); sys.exit(0)"]
)
def test_a_forked_process_that_uses_nothing_ends(ending: str) -> None:
    """A batch's destructor would wait for threads that are not there."""
    code = (
        "import os, signal, sys, torch, envs\n"
        "family = envs.make('half_cheetah_dir')\n"
        "worlds = family.make_worlds(3, threads=2)\n"
        "import numpy as np\n"
        "worlds.reset(torch.ones(3, 1), np.zeros((3, 18)))\n"
        "worlds.step(torch.zeros(3, 6))\n"
        f"child = os.fork()\nsignal.alarm(20)\nif not child:\n    {ending}\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half_cheetah_dir", "navigation", "ant_vel"])
def test_a_forked_process_goes_on_with_threads_of_its_own(name: str) -> None:
    """Worlds, sampler and training, used before and after os.fork: both give the same numbers."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, name],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_two_trainings_in_two_threads_and_one_after_another(tmp_path: Path) -> None:
    """Results as if alone, and the signal handlers are left alone by threads."""
    experiments = [
        load_experiment("navigation", **SETTINGS, threads=1),
        load_experiment("half_cheetah_dir", **SETTINGS, threads=1),
    ]
    alone = [meta_train(e).params for e in experiments]
    handler, stdout = signal.getsignal(signal.SIGINT), sys.stdout
    together: dict[int, maml_rl.TrainedPolicy] = {}

    def train(number: int) -> None:
        again = load_experiment(("navigation", "half_cheetah_dir")[number], **SETTINGS, threads=1)
        together[number] = meta_train(again, out=tmp_path / str(number))
        together[number] = resume(tmp_path / str(number))

    threads = [threading.Thread(target=train, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, theta in enumerate(alone):
        assert all(torch.equal(theta[n], together[number].params[n]) for n in theta)
    assert signal.getsignal(signal.SIGINT) is handler
    assert sys.stdout is stdout


# Numbers.


def test_refused_updates_end_the_run_with_what_to_try(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No candidate can have so small a KL: parameters stay bit for bit, exit 3 after three."""
    words = ["train", "navigation", *flags(iterations=9, max_refused=3)]
    words += ["--trust-region.max-kl", "1e-30", "--out", str(tmp_path / "run")]
    assert run(words) == 3
    printed = capsys.readouterr()
    assert "3 updates in a row were refused" in printed.err
    assert "try " in printed.err
    assert "Traceback" not in printed.err
    assert printed.out.count("update refused: ") == 3
    table = rows(tmp_path / "run")
    assert [r["accepted"] for r in table] == ["0", "0", "0"]
    assert all(r["refused_because"] for r in table)
    run_folder = RunFolder(tmp_path / "run")
    fresh = new_policy(load_experiment(run_folder.config)).params
    found = run_folder.load()
    assert found.state.refused_in_a_row == 3
    assert all(torch.equal(found.theta[n], fresh[n]) for n in fresh)
    # Gone on with, it is tried anew.
    assert run(["resume", str(tmp_path / "run")]) == 3
    assert "3 updates in a row" in capsys.readouterr().err
    assert run_folder.load().state.iteration == 6


class NoNumbers(NavigationWorlds):
    """Worlds whose reward is no number."""

    def step(self, actions: torch.Tensor, where: torch.Tensor | None = None) -> Transition:
        """Step as always."""
        step = super().step(actions, where)
        return step._replace(rewards=step.rewards * torch.nan)


@dataclass(frozen=True, kw_only=True)
class Unrewarding(Navigation2D):
    """Navigation that has such worlds."""

    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        """Make them."""
        return NoNumbers(self, count)


def test_an_inner_step_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Rewards that are no numbers: nothing is sampled with such parameters, theta stays bit for
    bit, and the reason is in the metrics and the message."""
    wild = replace(NAVIGATION, family=Unrewarding(horizon=6), max_refused=2)
    with pytest.raises(RunStopped, match=r"inner step not finite.*smaller adaptation\.step_size"):
        meta_train(wild, out=tmp_path / "run")
    table = rows(tmp_path / "run")
    assert [r["refused_because"] for r in table] == ["inner step not finite"] * 2
    assert [r["return_1"] for r in table] == ["nan", "nan"]
    theta, fresh = RunFolder(tmp_path / "run").load().theta, new_policy(wild).params
    assert all(torch.equal(theta[n], fresh[n]) for n in fresh)


def test_an_inner_step_that_cannot_be_acted_with_is_refused(tmp_path: Path) -> None:
    """A step size of a million: parameters that are finite, with actions that are not."""
    wild = replace(
        NAVIGATION, max_refused=2, adaptation=replace(NAVIGATION.adaptation, step_size=1e6)
    )
    with pytest.raises(RunStopped, match=r"2 updates in a row .*inner step not finite.*try "):
        meta_train(wild, out=tmp_path / "run")
    theta, fresh = RunFolder(tmp_path / "run").load().theta, new_policy(wild).params
    assert all(torch.equal(theta[n], fresh[n]) for n in fresh)


def out_of_memory(times: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the update's first passes over the tasks run out of memory; collects their chunks."""
    real, sizes = Chunks.map, []

    def scarce(self: Chunks, function: object, tasks: int) -> object:
        sizes.append(self.size)
        if len(sizes) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, function, tasks)  # type: ignore[arg-type]  # handed on as it came

    monkeypatch.setattr(Chunks, "map", scarce)
    return sizes


@pytest.mark.slow
def test_out_of_memory_halves_the_chunk_and_repeats_the_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 4, then 2, then 1: the same run as with 1 from the start, and resumed with 1.

    That chunked and whole gradients agree is in test_maml.py.
    """
    with monkeypatch.context() as patch:
        patch.setattr("maml_rl.shard.chunk_size", lambda *_: 1)
        one_by_one = meta_train(NAVIGATION).params
    sizes = out_of_memory(2, monkeypatch)
    with pytest.warns(RunWarning, match="iteration 0 is repeated with") as warned:
        chunked = meta_train(NAVIGATION, out=tmp_path / "run").params
    assert len(warned) == 2
    assert sizes[:3] == [4, 2, 1]
    assert set(sizes[2:]) == {1}
    assert all(torch.equal(chunked[n], one_by_one[n]) for n in chunked)
    assert len(rows(tmp_path / "run")) == 3
    assert RunFolder(tmp_path / "run").load().state.chunk_size == 1
    monkeypatch.undo()
    sizes = out_of_memory(0, monkeypatch)
    resume(tmp_path / "run", iterations=4)
    assert set(sizes) == {1}


def test_memory_that_never_suffices_ends_the_run_with_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the update, in sampling and in the test: exit 3, and the settings with their values."""
    assert run(["train", "navigation", *flags(), "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    out_of_memory(10**9, monkeypatch)
    assert run(["train", "navigation", *flags(), "--out", str(tmp_path / "a")]) == 3
    assert "lower sampling.episodes (now 3)" in capsys.readouterr().err
    monkeypatch.undo()

    def sample(self: Sampler, *arguments: object) -> None:
        np.zeros(2**62, np.int8)

    monkeypatch.setattr(Sampler, "sample", sample)
    assert run(["train", "navigation", *flags(), "--out", str(tmp_path / "b")]) == 3
    assert "lower sampling.tasks_at_once (now 4)" in capsys.readouterr().err
    assert run(["evaluate", str(tmp_path / "whole")]) == 3
    said = "lower sampling.tasks_at_once (now 2), evaluation.episodes"
    assert said in capsys.readouterr().err
