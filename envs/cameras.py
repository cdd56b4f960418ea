"""Pictures of worlds: bodies through OpenGL, navigation from above without it."""

from __future__ import annotations

from functools import singledispatch
from typing import Protocol

import mujoco
import numpy as np
import numpy.typing as npt

from envs.family import FamilyError, Worlds
from envs.locomotion import LocomotionWorlds
from envs.navigation import NavigationWorlds

Array = npt.NDArray[np.float32]
Frame = npt.NDArray[np.uint8]

WIDTH, HEIGHT = 640, 480
"""Pixels of a frame of a body, MuJoCo's default buffer; navigation's is square."""


class Camera(Protocol):
    """Draws worlds."""

    def frame(self, world: int, task: Array) -> Frame:
        """Return a picture of one world, (height, width, 3), given its task (P,)."""

    def close(self) -> None:
        """Release what the camera holds."""


@singledispatch
def open_camera(worlds: Worlds) -> Camera:
    """Return what draws these worlds.

    Raises:
        FamilyError: if nothing does.
    """
    raise FamilyError(f"{type(worlds).__name__} cannot be drawn")


class BodyCamera:
    """Follows a MuJoCo body with the model's own camera, through OpenGL."""

    def __init__(self, worlds: LocomotionWorlds) -> None:
        self._physics = worlds.physics
        try:
            self._renderer = mujoco.Renderer(worlds.physics.model, HEIGHT, WIDTH)
        except Exception as error:  # each OpenGL platform raises its own
            raise RuntimeError(
                "no picture without OpenGL: without a display, set the environment variable "
                "MUJOCO_GL=egl (or osmesa) before python starts; Debian has it in libegl1"
            ) from error

    def frame(self, world: int, task: Array) -> Frame:
        """Return a picture of one world, (HEIGHT, WIDTH, 3)."""
        self._renderer.update_scene(self._physics.data(world), camera="track")
        picture: Frame = self._renderer.render()
        return picture

    def close(self) -> None:
        """Free the OpenGL context."""
        self._renderer.close()


class PlaneCamera:
    """Draws navigation from above with NumPy: axes grey, goal green, point blue, x right, y up."""

    def __init__(self, worlds: NavigationWorlds) -> None:
        self._worlds = worlds
        family = worlds.family
        self.reach = 1.25 * max(family.goal_range, 4.0 * family.max_move)
        """The picture shows plus or minus this, m; a point beyond it is drawn on the edge."""

    def frame(self, world: int, task: Array) -> Frame:
        """Return a picture of one world, (HEIGHT, HEIGHT, 3)."""
        pixel = 2.0 * self.reach / HEIGHT
        x = (np.arange(HEIGHT) + 0.5) * pixel - self.reach
        y = -x[:, None]
        picture = np.full((HEIGHT, HEIGHT, 3), 255, np.uint8)
        picture[(np.abs(x) < pixel) | (np.abs(y) < pixel)] = 200
        radius = max(self._worlds.family.goal_radius, 0.04 * self.reach)
        discs = (
            (task, radius, (60, 170, 90)),
            (self._worlds.positions[world].numpy(), 0.025 * self.reach, (40, 80, 200)),
        )
        for center, size, color in discs:
            at = np.clip(center, -self.reach, self.reach)
            picture[np.hypot(x - at[0], y - at[1]) <= size] = color
        return picture

    def close(self) -> None:
        """Do nothing: it holds nothing."""


@open_camera.register
def _(worlds: LocomotionWorlds) -> Camera:
    return BodyCamera(worlds)


@open_camera.register
def _(worlds: NavigationWorlds) -> Camera:
    return PlaneCamera(worlds)
