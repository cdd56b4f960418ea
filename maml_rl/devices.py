"""Where things run: what must be there, and how bits are made the same every time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from maml_rl.errors import InputError, RunWarning

Device = Literal["cpu", "cuda"]
"""Where a policy or network is evaluated and updated."""
Physics = Literal["cpu", "warp"]
"""What simulates: MuJoCo on CPU threads, or mujoco_warp on the policy's device."""


def missing_device(device: str) -> str:
    """Return why a device is not there; empty if it is."""
    if device != "cuda" or torch.cuda.is_available():
        return ""
    why = "torch finds no CUDA device"
    if torch.version.cuda is None:
        why = "this torch is a CPU build, and one for CUDA is at pytorch.org"
    return f"device cuda is not there: {why}"


def missing_physics(physics: str) -> str:
    """Return why physics of a kind is not there; empty if it is."""
    if physics != "warp":
        return ""
    try:
        import envs.warp  # noqa: F401  # an extra, and slow to import
    except ImportError as error:
        return str(error)
    return ""


def check_place(device: str, physics: str = "cpu") -> None:
    """Raise InputError if the device, or what simulates, is not there."""
    if reason := missing_device(device):
        raise InputError(f"{reason}; use --device cpu")
    if reason := missing_physics(physics):
        raise InputError(f"{reason}; or use --physics cpu")


def device_for(own: Device, given: Device | None) -> Device:
    """Return the device that a run's parameters are used on: the one given, its own, or the CPU.

    Raises:
        InputError: if the one given is not there.

    Warns:
        RunWarning: if its own is not there.
    """
    if given is not None:
        check_place(given)
        return given
    if reason := missing_device(own):
        warnings.warn(f"{reason}; the CPU is used instead", RunWarning, stacklevel=3)
        return "cpu"
    return own


def physics_for(own: Physics, given: Physics | None) -> Physics:
    """Return what a run's policy is simulated with: the one given, its own, or MuJoCo on the CPU.

    Raises:
        InputError: if the one given is not there.

    Warns:
        RunWarning: if its own is not there.
    """
    if given is not None:
        check_place("cpu", given)
        return given
    if reason := missing_physics(own):
        warnings.warn(f"{reason}; physics cpu is used instead", RunWarning, stacklevel=3)
        return "cpu"
    return own


@contextmanager
def reproducible(device: str) -> Iterator[None]:
    """Run a block so that on a GPU the same sums come out bit for bit every time, in full float32.

    What has no such way there warns. On a CPU nothing changes: all is so already.
    """
    if device == "cpu":
        yield
        return
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    wanted = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=only_warns)
        torch.set_float32_matmul_precision(precision)


@contextmanager
def as_it_comes() -> Iterator[None]:
    """Run a block within `reproducible` whose bits are the same every time anyway.

    What is asked for there costs memory and launches where a control step writes down one row.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=only_warns)
