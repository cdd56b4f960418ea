"""Pictures by numbers: where arrows point, what the camera follows, what a point leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from envs.ant import AntDir, AntVel
from envs.cameras import ACTUAL, GOAL, Camera, Frame, open_camera
from envs.half_cheetah import HalfCheetahDir, HalfCheetahVel
from envs.locomotion import LocomotionFamily, LocomotionWorlds
from envs.navigation import Navigation2D, NavigationWorlds
from tests.conftest import needs_opengl

SIZE = 96
Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

PERIOD = 4 / 3
"""Metres after which the floor repeats: two checks, each of 80 m / 60 / 2."""


def told(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def green(frame: Frame) -> Mask:
    """Pixels of what is wanted: nothing else in a scene is so much greener than red and blue."""
    r, g, b = np.moveaxis(frame.astype(int), -1, 0)
    return np.asarray((g > r + 40) & (g > b + 40))


def blue(frame: Frame) -> Mask:
    """Pixels of what is."""
    r, g, b = np.moveaxis(frame.astype(int), -1, 0)
    return np.asarray((b > r + 60) & (b > g + 40))


def middle(mask: Mask) -> tuple[float, float]:
    """Right and up of the picture's middle, in pixels."""
    rows, columns = np.nonzero(mask)
    return columns.mean() + 0.5 - mask.shape[1] / 2, mask.shape[0] / 2 - rows.mean() - 0.5


def width(mask: Mask) -> int:
    columns = np.nonzero(mask.any(0))[0]
    return int(columns[-1] - columns[0] + 1)


def brown(frame: Frame) -> Mask:
    """Pixels of a body, which alone is redder than it is green."""
    r, g, _ = np.moveaxis(frame.astype(int), -1, 0)
    return np.asarray(r > g + 15)


class Scene:
    """One body, put anywhere and drawn."""

    def __init__(self, family: LocomotionFamily, size: int = SIZE) -> None:
        self.family = family
        worlds = family.make_worlds(1, threads=1)
        assert isinstance(worlds, LocomotionWorlds)
        self.worlds = worlds
        self.camera: Camera = open_camera(worlds, size, size)

    def draw(
        self, task: Array, measures: Array | None = None, *, x: float = 0.0, y: float = 0.0
    ) -> Frame:
        starts = np.zeros((1, sum(self.family.state_sizes)))
        starts[0, 0] = x
        if y:
            starts[0, 1] = y
        self.worlds.reset(torch.from_numpy(task[None]), starts)
        return self.camera.frame(0, task, measures)


@pytest.fixture(scope="module")
def cheetah() -> Iterator[Scene]:
    scene = Scene(HalfCheetahVel())
    yield scene
    scene.camera.close()
    scene.worlds.close()


@pytest.fixture(scope="module")
def ant() -> Iterator[Scene]:
    scene = Scene(AntVel())
    yield scene
    scene.camera.close()
    scene.worlds.close()


Opened = Callable[[str], Scene]


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Opened:
    def scene(name: str) -> Scene:
        found = request.getfixturevalue(name)
        assert isinstance(found, Scene)
        return found

    return scene


@needs_opengl
@pytest.mark.parametrize("body", ["cheetah", "ant"])
def test_the_wanted_arrow_points_the_wanted_way_and_grows_with_the_speed(
    body: str, opened: Opened
) -> None:
    """From the torso: half a metre for each m/s, to the right forward; a ball for next to none."""
    scene = opened(body)
    # Pixels of a metre at the torso's distance, whose field of view is 45 degrees.
    metre = SIZE / (2 * scene.family.view.distance * np.tan(np.pi / 8))
    for speed in (0.5, 2.0):
        ahead, back = (scene.draw(told(sign * speed)) for sign in (1, -1))
        assert width(green(ahead)) == pytest.approx(0.5 * speed * metre, abs=3)
        # The shaft begins in the middle, and is heavier than the head.
        right, up = middle(green(ahead))
        left, up_again = middle(green(back))
        assert 0.2 * speed * metre < right < 0.33 * speed * metre
        assert left == pytest.approx(-right, abs=1)
        assert up > SIZE / 10
        assert up_again == pytest.approx(up, abs=0.5)
    ball = scene.draw(told(0.01))
    assert abs(middle(green(ball))[0]) < 1
    assert 1 < width(green(ball)) < 0.25 * metre


@needs_opengl
@pytest.mark.parametrize("body", ["cheetah", "ant"])
def test_the_actual_velocity_is_drawn_below_the_wanted_one(body: str, opened: Opened) -> None:
    """In blue, to its own length and side, whatever is wanted; not where nothing was measured."""
    scene = opened(body)
    without = scene.draw(told(2.0))
    assert not blue(without).any()
    for velocity in (2.0, -2.0, -1.0):
        frame = scene.draw(told(2.0), told(velocity))
        assert np.sign(middle(blue(frame))[0]) == np.sign(velocity)
        assert width(blue(frame)) == pytest.approx(width(green(without)) * abs(velocity) / 2, abs=2)
        above, below = np.nonzero(green(frame).any(1))[0], np.nonzero(blue(frame).any(1))[0]
        assert above.max() < below.min() < SIZE / 2
        assert (green(frame) == green(without)).all()


@needs_opengl
def test_an_arrow_stays_in_the_picture(cheetah: Scene) -> None:
    """Faster than 2.5 m/s all arrows are as long, and end before the edge, but near to it."""
    for sign in (1.0, -1.0):
        fast, faster = (cheetah.draw(told(sign * speed)) for speed in (2.5, 30.0))
        assert (green(fast) == green(faster)).all()
        assert not green(fast)[:, [0, -1]].any()
        assert width(green(fast)) > 0.42 * SIZE


@needs_opengl
@pytest.mark.parametrize("family", [HalfCheetahDir(), AntDir()], ids=lambda f: f.name)
def test_a_wanted_direction_is_an_arrow_that_way(family: LocomotionFamily) -> None:
    """Forward to the right, as x goes; the blue arrow is the velocity, not that the wanted way."""
    scene = Scene(family)
    for direction in (1.0, -1.0):
        frame = scene.draw(told(direction), told(1.0))
        assert np.sign(middle(green(frame))[0]) == direction
        assert middle(blue(frame))[0] > 0
    scene.camera.close()
    scene.worlds.close()


@needs_opengl
@pytest.mark.parametrize("body", ["cheetah", "ant"])
def test_the_camera_follows_the_torso_and_the_floor_shows_the_motion(
    body: str, opened: Opened
) -> None:
    """A period of the floor further all is as before; half a period further only the floor is not.

    The body stays in the middle, and is as bright 30 m from where it began.
    """
    scene = opened(body)
    task, velocity = told(1.0), told(-1.0)
    start = scene.draw(task, velocity)
    here = brown(start)
    assert here.sum() > 100
    assert abs(middle(here)[0]) < 4
    for x in (PERIOD, -PERIOD, 22 * PERIOD):
        again = scene.draw(task, velocity, x=x)
        assert (np.abs(again.astype(int) - start).max(-1) > 12).mean() < 0.01
    moved = scene.draw(task, velocity, x=PERIOD / 2)
    changed = np.abs(moved.astype(int) - start).max(-1) > 100
    assert changed[SIZE // 2 :].mean() > 0.5
    assert (brown(moved) & here).sum() > 0.95 * here.sum()
    assert (green(moved) == green(start)).all()
    # A little further the checks have gone a little to the left.
    lines = [scene.draw(task, x=x)[-2].astype(int).sum(-1) for x in (0.0, 0.1)]
    edges = [np.nonzero(np.abs(np.diff(line)) > 150)[0] for line in lines]
    assert 0 < np.median(edges[0]) - np.median(edges[1]) < SIZE / 8


@needs_opengl
def test_the_camera_follows_sideways_too(ant: Scene) -> None:
    """An ant that strays along y stays as large and in the middle, and the floor as bright."""
    start = ant.draw(told(1.0))
    for periods in (1, -3, 6):
        aside = ant.draw(told(1.0), y=periods * PERIOD)
        assert (np.abs(aside.astype(int) - start).max(-1) > 12).mean() < 0.03


@needs_opengl
def test_drawing_leaves_the_simulation_alone(ant: Scene) -> None:
    """Twice the same picture, of another size than square too, and not a bit of the state moves."""
    ant.draw(told(1.0))
    before = ant.worlds.physics.qpos.clone(), ant.worlds.physics.qvel.clone()
    first, second = (ant.camera.frame(0, told(1.0), told(0.5)) for _ in range(2))
    assert (first == second).all()
    # The renderer's own buffer is not handed out twice.
    assert not np.shares_memory(first, second)
    assert torch.equal(before[0], ant.worlds.physics.qpos)
    assert torch.equal(before[1], ant.worlds.physics.qvel)
    camera = open_camera(ant.worlds, 48, 32)
    assert camera.frame(0, told(1.0)).shape == (32, 48, 3)
    camera.close()


class Plane:
    """Some points in a picture of 100 pixels, each of 12.5 mm: +-.625 m."""

    PIXELS = 100

    def __init__(self, count: int = 1) -> None:
        family = Navigation2D()
        worlds = family.make_worlds(count)
        assert isinstance(worlds, NavigationWorlds)
        self.worlds = worlds
        self.camera = open_camera(worlds, self.PIXELS, self.PIXELS)
        self.goals = np.tile(told(0.4, -0.2), (count, 1))
        self.reset()

    def reset(self) -> None:
        self.worlds.reset(torch.from_numpy(self.goals), np.zeros((len(self.goals), 0)))

    def move(self, *moves: float) -> None:
        self.worlds.step(torch.tensor(moves).reshape(len(self.goals), 2))

    def draw(self, world: int = 0) -> Frame:
        return self.camera.frame(world, self.goals[world])


def is_color(frame: Frame, color: tuple[int, int, int]) -> Mask:
    found: Mask = (frame == np.array(color, np.uint8)).all(-1)
    return found


WAY = (150, 185, 240)


def test_a_point_leaves_its_way() -> None:
    """Light blue from the start through every point drawn, right along +x and up along +y."""
    plane = Plane()
    assert not is_color(plane.draw(), WAY).any()
    for move in ((0.1, 0.0), (0.1, 0.0), (0.0, 0.1)):
        plane.move(*move)
        frame = plane.draw()
    way = is_color(frame, WAY)
    rows, columns = np.nonzero(way)
    # From (0, 0) to (.2, 0) m is from pixel 50 to 66; up to .1 m is 8 pixels.
    assert (columns.min(), rows.max()) == (50, 51)
    assert columns.max() in (66, 67)
    assert (way[50:52, 50:66].sum(), way[50:52, :50].sum()) == (32, 0)
    assert way[45:50, 66:68].all()
    assert not way[:41].any()
    right, up = middle(is_color(frame, ACTUAL))
    assert (right, up) == pytest.approx((16, 8), abs=1)
    assert middle(is_color(frame, GOAL)) == pytest.approx((32, -16), abs=1)


def test_a_new_episode_begins_without_a_way() -> None:
    plane = Plane()
    first = plane.draw()
    plane.move(0.1, 0.1)
    assert (plane.draw() != first).any()
    plane.reset()
    assert (plane.draw() == first).all()
    plane.move(-0.1, 0.0)
    columns = np.nonzero(is_color(plane.draw(), WAY))[1]
    assert columns.max() <= 51


def test_each_world_has_its_own_way() -> None:
    plane = Plane(2)
    for world in (0, 1):
        plane.draw(world)
    plane.move(0.1, 0.0, 0.0, -0.1)
    way, other = (is_color(plane.draw(world), WAY) for world in (0, 1))
    assert width(way) > width(other)
    assert not (way & other)[:, 54:].any()
    assert not (way & other)[54:].any()


def test_what_is_beyond_the_picture_is_drawn_on_its_edge() -> None:
    """A goal outside the range, and a point that has run away."""
    plane = Plane()
    plane.goals[0] = 7.0, 0.0
    for _ in range(20):
        plane.move(-0.1, 0.05)
    frame = plane.draw()
    assert is_color(frame, GOAL)[45:55, 97:].any()
    assert is_color(frame, ACTUAL)[:4, :4].any()
