"""What a result depends on beside its settings."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from maml_rl._version import __version__

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("torch", "mujoco", "gymnasium", "numpy"),
    "warp": ("torch", "mujoco", "mujoco-warp", "warp-lang", "gymnasium", "numpy"),
}
"""What a result depends on, by what simulates."""


@functools.cache
def versions(physics: str = "cpu") -> Mapping[str, str]:
    """Return versions of everything a result depends on, and the git commit if there is one."""
    found = {"python": platform.python_version(), "maml-rl": __version__}
    for package in PACKAGES[physics]:
        found[package] = importlib.metadata.version(package)
    commit = git_commit()
    return found | ({"git": commit} if commit else {})


def git_commit() -> str:
    """Return the commit of the checkout this package runs from, or ''; "+" if edited since."""
    here = Path(__file__).parent
    try:
        ours = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True
        )
        if ours.returncode:
            return ""
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return described.stdout.strip()


def differences(saved: Mapping[str, str]) -> list[str]:
    """Return what differs from the versions here, as "mujoco 3.3.1 (here 4.0.0)".

    The commit is left out, which changes with every edit of a text, and Python's version, on
    which no number depends.
    """
    here = dict(versions())
    for package in saved.keys() - here.keys() - {"git"}:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            here[package] = importlib.metadata.version(package)
    return [
        f"{name} {version} (here {here.get(name, 'absent')})"
        for name, version in saved.items()
        if name not in ("git", "python") and here.get(name) != version
    ]
