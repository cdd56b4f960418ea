"""The command line, as a user types it: output, files, exit codes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import maml_rl
from maml_rl.cli import COMMANDS, run
from maml_rl.config import shipped_experiments
from tests.tiny import TINY


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, away from the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(shipped_experiments()))
def test_every_experiment_trains_one_tiny_iteration(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every YAML that ships, by name: a row of metrics, an evaluation, a table in plain words."""
    assert run(["train", name, *TINY]) == 0
    out = capsys.readouterr().out
    folder = Path("runs") / f"{name}-seed0"
    assert f"Run folder: {folder}" in out
    assert "iteration 1/1" in out
    for words in ("before", "gradient", "return"):
        assert words in out
    with (folder / "evaluation" / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["gradient_steps"] for r in rows} == {"0", "1", "2"}
    assert {r["method"] for r in rows} == {"maml"}
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert [s["steps"] for s in summary["methods"][0]["gradient_steps"]] == [0, 1, 2]


@pytest.mark.slow
def test_a_run_is_resumed_evaluated_and_trained_again_from_its_config(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """resume extends, evaluate writes where it is told, and config.yaml is an experiment."""
    assert run(["train", "navigation", *TINY, "--out", "a", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["resume", "a", "--iterations", "2"]) == 0
    assert "iteration 2/2" in capsys.readouterr().out
    assert run(["evaluate", "a", "--steps", "1", "--out", "there"]) == 0
    assert (Path("there") / "evaluation.csv").exists()
    assert run(["train", "a/config.yaml", "--out", "b", "--quiet"]) == 0
    weights = [(Path(p) / "checkpoints/latest/parameters.safetensors").read_bytes() for p in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["trian"], "did you mean 'train'"),
        (["train"], "expected EXPERIMENT first"),
        (["train", "--seed", "3"], "expected EXPERIMENT first"),
        (["train", "quickstrat"], "did you mean 'quickstart'"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "quickstart", "--sed", "3"], "did you mean 'seed'"),
        (["train", "quickstart", "--sampling.epsodes", "3"], "did you mean 'sampling.episodes'"),
        (["train", "quickstart", "--family.name", "ant_di"], "did you mean 'ant_dir'"),
        (["train", "quickstart", "--family.speed-low", "1"], "family.speed_low"),
        (["train", "quickstart", "--seed", "x"], "x"),
        (["train", "quickstart", "--seed"], "--seed"),
        (["train", "quickstart", "more"], "more"),
        (["train", "quickstart", "--sampling.tasks", "0"], "at least 1, got 0"),
        (
            ["train", "quickstart", "--trust-region.max-kl", "-1"],
            "max_kl must be finite and above 0, got -1",
        ),
        (["train", "quickstart", "--policy.nonlinearity", "gelu"], "gelu"),
        (["train", "quickstart", "--device", "cuda"], "device cuda is not there"),
        (["train", "quickstart", "--init", "nowhere"], "nowhere is not a run folder"),
        (["train", "quickstart", "--family.name", "mine:Family"], "--allow-import"),
        (["train", "quickstart", "--out", "taken"], "taken exists and is not empty"),
        (["train", "quickstart", "--out", "taken/file"], "is a file"),
        (["resume", "nowhere"], "nowhere is not a run folder"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["evaluate"], "run"),
        (["train", "quickstart", "--family.name"], "--family.name needs a value"),
        (["speed", "--threads", "-1"], "threads must be at least 0"),
        (["speed", "--scale", "3"], "scale must be above 0 and at most 1"),
        (["list", "more"], "more"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(
    words: list[str], complaint: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, naming what is wrong; no traceback, no run folder."""
    (elsewhere / "taken").mkdir()
    (elsewhere / "taken" / "file").write_text("mine")
    assert run(words) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert sorted(p.name for p in elsewhere.rglob("*")) == ["file", "taken"]


@pytest.mark.slow
def test_bad_input_for_an_existing_run(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative steps and totals, a folder that cannot be made, brackets in a name: no traceback."""
    assert run(["train", "navigation", *TINY, "--out", "a[/b]", "--quiet"]) == 0
    for words, complaint in (
        (["evaluate", "a[/b]", "--steps", "-1"], "steps must be at least 0, got -1"),
        (["evaluate", "a[/b]", "--out", "/dev/null/x"], "cannot write to /dev/null/x"),
        (["evaluate", "a[/b]", "--checkpoint", "beste"], "did you mean 'best'"),
        (["resume", "a[/b]", "--iterations", "0"], "has done 1 iterations"),
    ):
        assert run(words) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
    assert run(["train", "half_cheetah_dir", *TINY, "--init", "a[/b]", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "checkpoint: navigation, 2 observations" in error
    assert "expected:   half_cheetah_dir (paper protocol), 20 observations" in error
    assert run(["evaluate", "a[/b]"]) == 0
    assert "a[/b]/evaluation" in capsys.readouterr().out


def test_help_and_version() -> None:
    """--help exits 0 for the program and for each command; --version prints one line."""
    assert run(["--help"]) == 0
    assert run([]) == 2
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            run([command, "--help"])
        assert stopped.value.code == 0
    done = subprocess.run(
        [sys.executable, "-m", "maml_rl", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(maml_rl.__file__).parent.parent,
    )
    assert done.stdout == f"maml-rl {maml_rl.__version__}\n"


def test_list_shows_families_fields_units_and_experiments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every family with every field's meaning, and every experiment."""
    assert run(["list"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in ("navigation", "half_cheetah_vel", "half_cheetah_dir", "ant_vel", "ant_dir"):
        assert f" {name} " in f" {out} "
    for words in ("goal_range", "(m/s)", "frame_skip", "gymnasium: 5", "Highest height"):
        assert words in out
    for name in shipped_experiments():
        assert name in out


@pytest.mark.slow
def test_code_of_the_users_own_is_imported_only_when_allowed(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A family and from_gymnasium's functions, by name: train, resume, evaluate."""
    (elsewhere / "swing.py").write_text(
        "import gymnasium\n"
        "from dataclasses import dataclass\n"
        "from envs import Navigation2D\n"
        "def make_env(): return gymnasium.make('Pendulum-v1')\n"
        "def sample_tasks(count, rng): return rng.uniform(5, 15, (count, 1))\n"
        "def set_task(env, task): env.unwrapped.g = float(task[0])\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Far(Navigation2D):\n"
        "    '''Farther goals.'''\n"
        "    goal_range: float = 2.0\n"
    )
    (elsewhere / "far.yaml").write_text("name: far\nfamily: {name: 'swing:Far'}\niterations: 1\n")
    (elsewhere / "pendulum.yaml").write_text(
        "name: pendulum\niterations: 1\nfamily: {name: gymnasium, make_env: 'swing:make_env', "
        "draw_tasks: 'swing:sample_tasks', set_task: 'swing:set_task'}\n"
    )
    for name in ("far", "pendulum"):
        assert run(["train", f"{name}.yaml", *TINY, "--out", name]) == 2
        assert "--allow-import" in capsys.readouterr().err
        assert not (elsewhere / name).exists()
        assert run(["train", f"{name}.yaml", *TINY, "--out", name, "--allow-import"]) == 0
        assert run(["resume", name, "--iterations", "2", "--allow-import"]) == 0
        assert run(["evaluate", name, "--allow-import"]) == 0


def test_a_foreign_envs_package_is_named(elsewhere: Path) -> None:
    """Another package called envs first on the path: one sentence with its file, exit 2."""
    (elsewhere / "envs").mkdir()
    (elsewhere / "envs" / "__init__.py").write_text("")
    checkout = Path(maml_rl.__file__).parent.parent
    code = f"import sys; sys.path[:0] = [{str(elsewhere)!r}, {str(checkout)!r}]; "
    done = subprocess.run(
        [sys.executable, "-c", code + "from maml_rl.__main__ import main; main()", "list"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert str(elsewhere / "envs" / "__init__.py") in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_mujoco_without_batches_is_told_which_version_is_needed() -> None:
    """One sentence with the pip command that cures it, exit 2."""
    code = (
        "import sys; sys.modules['mujoco.batch'] = None; sys.argv = ['maml-rl', 'list']; "
        "from maml_rl.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(maml_rl.__file__).parent.parent,
    )
    assert done.returncode == 2
    assert "pip install 'mujoco>=3.17'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_names_are_printed_whole_and_without_control_characters(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line to type must not be cut, nor may a folder's name clear the screen."""
    long = "a" * 90
    assert run(["train", "navigation", *TINY, "--out", long, "--quiet"]) == 0
    assert run(["resume", long, "--iterations", "0"]) == 2
    assert f"{long} has done 1 iterations" in capsys.readouterr().err
    assert run(["resume", "\x1b[2Jx"]) == 2
    assert "\\x1b[2Jx is not a run folder" in capsys.readouterr().err
