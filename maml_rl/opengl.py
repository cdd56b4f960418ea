"""Which OpenGL draws bodies here.

mujoco reads MUJOCO_GL when it is imported, so the choice comes before that; and where a library is
missing or broken it may abort the process, so each is tried in a process of its own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

VARIABLE = "MUJOCO_GL"
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
WITHOUT_DISPLAY = ("egl", "osmesa")
PROBE = """
import mujoco
with mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8) as renderer:
    renderer.update_scene(mujoco.MjData(renderer.model))
    renderer.render()
"""
SECONDS = 60.0
"""After which a trial counts as failed."""
DISABLED = "disabled"
"""With this mujoco can be imported anywhere, and draws nothing."""

_failed = ""
"""The user's own choice, where that does not work."""


def choose_platform() -> None:
    """Set MUJOCO_GL to what works here, unless the user has; to be called before mujoco's import.

    Where there is a display the system's own way is tried first. Where nothing works it is left
    unset. A choice of the user's that does not work is turned off, since mujoco could not even be
    imported with some.
    """
    global _failed
    if not sys.platform.startswith("linux"):
        return
    if chosen := os.environ.get(VARIABLE):
        if not works(chosen):
            _failed, os.environ[VARIABLE] = chosen, DISABLED
        return
    if any(os.environ.get(name) for name in DISPLAYS) and works(""):
        return
    for platform in WITHOUT_DISPLAY:
        if works(platform):
            os.environ[VARIABLE] = platform
            return


@functools.cache
def works(platform: str) -> bool:
    """Return whether a picture can be drawn with this MUJOCO_GL; "" leaves it unset."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if platform:
        environment[VARIABLE] = platform
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def what_is_missing() -> str:
    """Return why no body can be drawn here and what to install; "" where one can."""
    platform = os.environ.get(VARIABLE, "")
    if works(platform):
        return ""
    platform = _failed or platform
    cause = f" ({VARIABLE} is {platform!r})" if platform else ""
    other = next((name for name in WITHOUT_DISPLAY if works(name)), "")
    cause += f"; {VARIABLE}={other} would do here" if other else ""
    return (
        f"no picture of a body without OpenGL{cause}. Without a display install, on Debian and "
        "Ubuntu: apt install libegl1 libgl1-mesa-dri libopengl0; on Fedora: dnf install "
        "mesa-libEGL mesa-dri-drivers libglvnd-opengl"
    )
