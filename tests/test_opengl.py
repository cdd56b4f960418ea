"""Which OpenGL is chosen: not over the user's head, and without dying of a broken library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import maml_rl
from maml_rl import __main__, opengl
from maml_rl.opengl import DISPLAYS, VARIABLE, choose_platform, what_is_missing, works


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Sequence[str]], list[str]]:
    """Set the user's choice and what works; returns what is then tried, in order."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(opengl, "_failed", "")
    for name in (VARIABLE, *DISPLAYS):
        # Set and then deleted, so that it is put back even where it was not set before.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def set_up(chosen: str, working: Sequence[str]) -> list[str]:
        if chosen:
            monkeypatch.setenv(VARIABLE, chosen)
        tried: list[str] = []

        def fake(name: str) -> bool:
            tried.append(name)
            return name in working

        monkeypatch.setattr(opengl, "works", fake)
        return tried

    return set_up


@pytest.mark.parametrize(
    ("display", "working", "chosen", "tried"),
    [
        (None, ["egl", "osmesa", ""], "egl", ["egl"]),
        (None, ["osmesa", ""], "osmesa", ["egl", "osmesa"]),
        # Without a display the system's own way is a window's, and is not even tried.
        (None, [""], None, ["egl", "osmesa"]),
        (None, [], None, ["egl", "osmesa"]),
        ("DISPLAY", ["egl", ""], None, [""]),
        ("WAYLAND_DISPLAY", ["egl", ""], None, [""]),
        # A display that nothing can be drawn on, as after `ssh -X` into a bare machine.
        ("DISPLAY", ["egl"], "egl", ["", "egl"]),
    ],
)
def test_the_first_that_works_is_chosen(
    display: str | None,
    working: list[str],
    chosen: str | None,
    tried: list[str],
    platform: Callable[[str, Sequence[str]], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """egl and then osmesa without a display; with one the system's own way before both."""
    if display:
        monkeypatch.setenv(display, ":0")
    asked = platform("", working)
    choose_platform()
    assert os.environ.get(VARIABLE) == chosen
    assert asked == tried


def test_the_users_choice_is_kept(
    platform: Callable[[str, Sequence[str]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it works, whatever else would too."""
    monkeypatch.setenv("DISPLAY", ":0")
    tried = platform("osmesa", ["egl", "osmesa", ""])
    choose_platform()
    assert os.environ[VARIABLE] == "osmesa"
    assert tried == ["osmesa"]
    assert what_is_missing() == ""


def test_elsewhere_than_on_linux_nothing_is_chosen(
    platform: Callable[[str, Sequence[str]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has its own way only."""
    tried = platform("", ["egl"])
    monkeypatch.setattr(sys, "platform", "darwin")
    choose_platform()
    assert VARIABLE not in os.environ
    assert tried == []


def test_a_choice_that_does_not_work_is_turned_off_and_named(
    platform: Callable[[str, Sequence[str]], list[str]],
) -> None:
    """mujoco could not be imported with it; another is not taken in its place."""
    platform("osmesa", ["egl"])
    choose_platform()
    assert os.environ[VARIABLE] == "disabled"
    assert "(MUJOCO_GL is 'osmesa')" in what_is_missing()


@pytest.mark.parametrize(("chosen", "named"), [("", False), ("disabled", True)])
def test_what_is_missing_says_what_to_install(
    chosen: str, named: bool, platform: Callable[[str, Sequence[str]], list[str]]
) -> None:
    """A command for Debian and one for Fedora, and the user's own choice where there is one."""
    platform(chosen, [])
    choose_platform()
    words = what_is_missing()
    assert "apt install libegl1 libgl1-mesa-dri" in words
    assert "dnf install mesa-libEGL mesa-dri-drivers" in words
    assert ("MUJOCO_GL is 'disabled'" in words) == named
    assert "\n" not in words


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import os; os.abort()", False),
        ("raise ImportError('libEGL.so.1')", False),
        ("import time; time.sleep(60)", False),
        ("import os; assert os.environ['MUJOCO_GL'] == 'egl'", True),
    ],
    ids=["aborts", "raises", "hangs", "draws"],
)
def test_a_trial_is_a_process_of_its_own(
    program: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may abort the process or wait for ever: then it does not work, and we live."""
    monkeypatch.setenv(VARIABLE, "disabled")
    monkeypatch.setattr(opengl, "PROBE", program)
    monkeypatch.setattr(opengl, "SECONDS", 0.2 if "sleep" in program else 30.0)
    assert works.__wrapped__("egl") is expected
    assert os.environ[VARIABLE] == "disabled"


def test_the_systems_own_way_is_tried_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "disabled")
    monkeypatch.setattr(opengl, "PROBE", "import os; assert 'MUJOCO_GL' not in os.environ")
    assert works.__wrapped__("")


@pytest.mark.parametrize(
    ("words", "drawing"),
    [
        (["render", "a"], True),
        (["report", "a"], True),
        (["train", "navigation", "--render"], True),
        (["resume", "a", "--render", "--quiet"], True),
        (["evaluate", "a", "--render"], True),
        (["train", "navigation"], False),
        (["evaluate", "render"], False),
        ([], False),
    ],
)
def test_commands_that_draw_choose_before_anything_is_loaded(
    words: list[str], drawing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others lose no time with it."""
    done: list[str] = []
    monkeypatch.setattr(__main__, "raise_on_terminate", lambda: None)
    monkeypatch.setattr(__main__, "choose_platform", lambda: done.append("choose"))
    monkeypatch.setattr(maml_rl, "check_envs", lambda: done.append("load"))
    monkeypatch.setattr("maml_rl.cli.run", lambda _: done.append("run"))
    monkeypatch.setattr(sys, "argv", ["maml-rl", *words])
    with pytest.raises(SystemExit):
        __main__.main()
    assert done == [*(["choose"] if drawing else []), "load", "run"]


def test_mujoco_is_not_imported_before_the_choice() -> None:
    """In a new process: `maml_rl` and its command line's entry load no mujoco."""
    program = "import sys, maml_rl.__main__; print('mujoco' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(maml_rl.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
