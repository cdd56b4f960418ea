"""Pictures of worlds: bodies through OpenGL, navigation from above without it."""

from __future__ import annotations

import itertools
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
Color = tuple[int, int, int]

WIDTH, HEIGHT = 640, 480
"""Pixels of a frame, unless another size is asked for; navigation's is square, as high as this."""
GOAL: Color = (60, 170, 90)
"""Green of what is wanted."""
ACTUAL: Color = (40, 80, 200)
"""Blue of what is."""


class NoOpenGLError(RuntimeError):
    """No picture of a body can be drawn here; the message says why."""


class Camera(Protocol):
    """Draws worlds."""

    def frame(self, world: int, task: Array, measures: Array | None = None) -> Frame:
        """Return a picture of one world, (height, width, 3).

        Args:
            world: which.
            task: (P,), whose goal is drawn.
            measures: (Q,), the family's, drawn beside the goal where they are given.
        """

    def close(self) -> None:
        """Release what the camera holds."""


@singledispatch
def open_camera(worlds: Worlds, width: int = WIDTH, height: int = HEIGHT) -> Camera:
    """Return what draws these worlds.

    Args:
        worlds: which.
        width: of a frame, pixels; navigation's is as wide as it is high.
        height: of a frame, pixels.

    Raises:
        FamilyError: if nothing draws them.
        NoOpenGLError: if they are bodies, and OpenGL is not to be had.
    """
    raise FamilyError(f"{type(worlds).__name__} cannot be drawn")


class BodyCamera:
    """Follows a MuJoCo body along the ground, through OpenGL; sets how its model looks.

    Above the body are two arrows: what is wanted of it, green, and below it in blue its velocity.
    """

    METRES = 0.5
    """Length of an arrow for each m/s, m."""
    LONGEST = 0.39
    """Of an arrow, as a share of the camera's distance: that of a faster body ends at the picture's
    edge."""

    def __init__(self, worlds: LocomotionWorlds, width: int, height: int) -> None:
        self._family, self._physics = worlds.family, worlds.physics
        model = worlds.physics.model
        view = self._family.view
        self._camera = mujoco.MjvCamera()
        self._camera.distance, self._camera.elevation = view.distance, view.elevation
        self._camera.azimuth = 90.0
        # A fifth of the time without a GPU: no mirrors, one sample a pixel, fewer faces, shadows of
        # 1024 pixels for 4096, enough where the light follows the body and shines on little else.
        model.vis.quality.shadowsize = 1024
        model.vis.map.shadowclip = 2.0 / model.stat.extent
        model.vis.quality.offsamples = 0
        model.vis.quality.numslices, model.vis.quality.numstacks = 16, 8
        # A floor's gloss is reckoned at few of its points, and flickers as the body goes over them.
        of_floors = model.geom_matid[model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE]
        model.mat_specular[of_floors[of_floors >= 0]] = 0.0
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except Exception as error:  # each OpenGL platform raises its own
            raise NoOpenGLError(
                "no picture without OpenGL: without a display, set the environment variable "
                "MUJOCO_GL=egl (or osmesa) before python starts; Debian has it in libegl1"
            ) from error
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

    def frame(self, world: int, task: Array, measures: Array | None = None) -> Frame:
        """Return a picture of one world, (height, width, 3)."""
        view = self._family.view
        data = self._physics.data(world)
        x, y, _ = data.body("torso").xpos
        self._camera.lookat[:] = x, y, view.height
        self._renderer.update_scene(data, camera=self._camera)
        for light in self._renderer.scene.lights[: self._renderer.scene.nlight]:
            light.pos[:2] += x, y
        wanted = self._family.wanted_velocity(task)
        if wanted is not None:
            self._add_arrow(np.array([x, y, view.arrows]), wanted, GOAL)
        if measures is not None:
            below = view.arrows - 0.055 * view.distance
            self._add_arrow(np.array([x, y, below]), float(measures[0]), ACTUAL)
        picture: Frame = self._renderer.render()
        return picture

    def _add_arrow(self, start: npt.NDArray[np.float64], velocity: float, color: Color) -> None:
        """Draw an arrow along x into the scene; a ball where there is nearly no velocity."""
        scene = self._renderer.scene
        width = 0.01 * self._family.view.distance
        longest = self.LONGEST * self._family.view.distance
        length = float(np.clip(self.METRES * velocity, -longest, longest))
        short = abs(length) < 4 * width
        kind = mujoco.mjtGeom.mjGEOM_SPHERE if short else mujoco.mjtGeom.mjGEOM_ARROW
        geom = scene.geoms[scene.ngeom]
        rgba = np.array([*(c / 255 for c in color), 1.0], np.float32)
        size = np.full(3, 2 * width)
        mujoco.mjv_initGeom(geom, kind, size, start, np.eye(3).ravel(), rgba)
        if not short:
            # MuJoCo draws an arrow half as long as it is told to.
            end = start + np.array([2 * length, 0.0, 0.0])
            mujoco.mjv_connector(geom, kind, width, start, end)
        # As bright from every side, and without a shadow on the body.
        geom.emission = 0.6
        geom.transparent = True
        scene.ngeom += 1

    def close(self) -> None:
        """Free the OpenGL context."""
        self._renderer.close()


class PlaneCamera:
    """Draws navigation from above with NumPy: axes grey, goal green, point blue, x right, y up.

    Where the point has been drawn since it was last at the start, its way is light blue.
    """

    def __init__(self, worlds: NavigationWorlds, size: int) -> None:
        self._worlds = worlds
        self._size = size
        self._ways: dict[int, list[Array]] = {}
        family = worlds.family
        self.reach = 1.25 * max(family.goal_range, 4.0 * family.max_move)
        """The picture shows plus or minus this, m; a point beyond it is drawn on the edge."""

    def frame(self, world: int, task: Array, measures: Array | None = None) -> Frame:
        """Return a picture of one world, (size, size, 3); the distance is there to be seen."""
        point: Array = self._worlds.positions[world].numpy().copy()
        way = self._ways.setdefault(world, [])
        if not point.any():
            way.clear()
        way.append(point)
        pixel = 2.0 * self.reach / self._size
        x = (np.arange(self._size) + 0.5) * pixel - self.reach
        y = -x[:, None]
        picture = np.full((self._size, self._size, 3), 255, np.uint8)
        picture[(np.abs(x) < pixel) | (np.abs(y) < pixel)] = 200
        for start, end in itertools.pairwise(way):
            self._draw_line(picture, start, end, pixel)
        radius = max(self._worlds.family.goal_radius, 0.04 * self.reach)
        for center, size, color in ((task, radius, GOAL), (point, 0.025 * self.reach, ACTUAL)):
            at = np.clip(center, -self.reach, self.reach)
            picture[np.hypot(x - at[0], y - at[1]) <= size] = color
        return picture

    def _draw_line(self, picture: Frame, start: Array, end: Array, pixel: float) -> None:
        """Draw a line two pixels wide, of points a pixel apart."""
        count = int(np.abs(end - start).max() / pixel) + 2
        ways = start + np.linspace(0.0, 1.0, count)[:, None] * (end - start)
        columns, rows = ((ways * [1, -1] + self.reach) / pixel).astype(int).T
        last = self._size - 2
        columns, rows = columns.clip(0, last), rows.clip(0, last)
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            picture[rows + down, columns + right] = (150, 185, 240)

    def close(self) -> None:
        """Do nothing: it holds nothing."""


@open_camera.register
def _(worlds: LocomotionWorlds, width: int = WIDTH, height: int = HEIGHT) -> Camera:
    return BodyCamera(worlds, width, height)


@open_camera.register
def _(worlds: NavigationWorlds, width: int = WIDTH, height: int = HEIGHT) -> Camera:
    return PlaneCamera(worlds, height)
