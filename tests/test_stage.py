"""What a video shows when: by a stage driven by hand, with a camera that draws numbers.

The fake camera's picture of world w after control step t is one colour, (10 w, t, 200), so that a
frame says which world is where and of when.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from envs.ant import AntDir, AntVel
from envs.cameras import Frame
from envs.family import TaskFamily, Transition
from envs.half_cheetah import HalfCheetahDir, HalfCheetahVel
from envs.navigation import Navigation2D
from maml_rl import stage as stage_module
from maml_rl.captions import Caption, StripRow, grey, largest
from maml_rl.movies import Movie
from maml_rl.rendering import RenderSettings
from maml_rl.stage import Stage, step_label

SIZE = 64
Array = npt.NDArray[np.float32]


class FakeMovie:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.path = Path("fake.mp4")
        self.frames: list[Frame] = []

    def append(self, frame: Frame) -> None:
        self.frames.append(frame.copy())

    def close(self) -> None:
        pass


class Seen:
    """What the fakes below have noted."""

    def __init__(self) -> None:
        self.step = 0
        self.drawn: list[tuple[int, int]] = []
        """World and step of every picture that the camera drew."""
        self.tasks: dict[int, list[float]] = {}
        self.measures: list[Array | None] = []
        self.captions: list[Caption] = []
        self.letters: list[int] = []
        self.strips: list[tuple[str, Sequence[str], Sequence[StripRow]]] = []
        self.closed = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Put a camera that draws numbers, and captions that are only noted, into the stage."""
    noted = Seen()

    class FakeCamera:
        def frame(self, world: int, task: Array, measures: Array | None = None) -> Frame:
            noted.drawn.append((world, noted.step))
            noted.tasks[world] = task.tolist()
            noted.measures.append(measures)
            return code(world, noted.step)

        def close(self) -> None:
            noted.closed += 1

    def note(picture: Frame, caption: Caption, letters: int) -> Frame:
        noted.captions.append(caption)
        noted.letters.append(letters)
        return picture

    def keep(title: str, instants: Sequence[str], rows: Sequence[StripRow]) -> str:
        noted.strips.append((title, instants, rows))
        return title

    monkeypatch.setattr(stage_module, "open_camera", lambda *_: FakeCamera())
    monkeypatch.setattr(stage_module, "captioned", note)
    monkeypatch.setattr(stage_module, "film_strip", keep)
    # Small tiles, and captions as in large ones.
    monkeypatch.setattr(stage_module, "SMALL", 0)
    return noted


def code(world: int, step: int) -> Frame:
    return np.full((SIZE, SIZE, 3), (10 * world, step, 200), np.uint8)


class Play:
    """Drives a stage as the sampler does."""

    def __init__(
        self,
        seen: Seen,
        family: TaskFamily,
        tasks: Sequence[Sequence[float]],
        columns: int = 1,
        settings: RenderSettings | None = None,
        movies: Sequence[Movie] | None = None,
    ) -> None:
        self.seen, self.family = seen, family
        self.movies = [FakeMovie() for _ in range(columns + 1)]
        self.count = columns * len(tasks)
        self.worlds = family.make_worlds(self.count, threads=1)
        self.stage = Stage(
            family,
            np.array(tasks, np.float32),
            columns,
            settings or RenderSettings(size=SIZE),
            self.movies if movies is None else movies,
        )
        self.now = torch.ones(self.count, dtype=torch.bool)
        self.stage(self.worlds, None, self.now.clone())

    def step(
        self,
        rewards: float | Sequence[float] = 0.0,
        measures: float | Sequence[float] = 0.0,
        terminated: Sequence[int] = (),
        diverged: Sequence[int] = (),
    ) -> None:
        """One control step, in which some worlds end; rows of those that had are rubbish."""
        self.seen.step += 1

        def full(values: float | Sequence[float]) -> torch.Tensor:
            given = torch.tensor(values, dtype=torch.float32).expand(self.count).clone()
            given[~self.now] = 99.0
            return given

        def mask(which: Sequence[int]) -> torch.Tensor:
            flags = torch.zeros(self.count, dtype=torch.bool)
            flags[list(which)] = True
            # A world that has ended may say anything.
            return flags | ~self.now

        over, broken = mask(terminated), mask(diverged)
        transition = Transition(
            torch.zeros(self.count, 1), full(rewards), over, broken, full(measures)[:, None]
        )
        self.stage(self.worlds, transition, self.now.clone())
        self.now &= ~over & ~broken

    def run(self, steps: int) -> Play:
        for _ in range(steps):
            self.step()
        self.stage.finish()
        return self

    def steps_shown(self, world: int = 0) -> list[int]:
        """Which step of a world of the only row each frame of its column shows."""
        return [int(frame[0, 0, 1]) for frame in self.movies[world].frames]

    def captions(self) -> Iterator[list[Caption]]:
        """Yield the captions of every frame, column by column."""
        for start in range(0, len(self.seen.captions), self.count):
            yield self.seen.captions[start : start + self.count]


def cheetah(**fields: object) -> HalfCheetahVel:
    return HalfCheetahVel(**{"protocol": "paper", **fields})  # type: ignore[arg-type]  # of many types


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        # .01 s a step, .04 s a frame.
        (cheetah(horizon=20), {}, [0, 4, 8, 12, 16, 20]),
        # .05 s a step: frames at 0, .04, .08 ... are of the steps at or before them.
        (cheetah(protocol="gymnasium", horizon=4), {}, [0, 0, 1, 2, 3, 4, 4]),
        (
            cheetah(protocol="gymnasium", horizon=4),
            {"slow": 0.5},
            [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4],
        ),
        # .02 s a step; 5 is between two frames, and shown as the end.
        (AntVel(protocol="paper", horizon=5), {}, [0, 2, 4, 5]),
        (cheetah(horizon=10), {"fps": 30.0}, [0, 3, 6, 10]),
        (cheetah(horizon=8), {"fps": 50.0, "slow": 2.0}, [0, 4, 8]),
        # 25 control steps a second.
        (Navigation2D(horizon=3), {}, [0, 1, 2, 3]),
        (Navigation2D(horizon=5), {"fps": 10.0}, [0, 2, 5]),
        (Navigation2D(horizon=3), {"slow": 0.5}, [0, 0, 1, 1, 2, 2, 3, 3]),
        # Slower than a frame an episode.
        (cheetah(horizon=3), {"fps": 1.0}, [0, 3]),
    ],
)
def test_a_frame_shows_the_step_at_its_time(
    family: TaskFamily, settings: Mapping[str, Any], expected: list[int], seen: Seen
) -> None:
    """Frame i is of the last control step at or before i slow / fps; then the end, if not shown."""
    task = family.sample_tasks(1, np.random.default_rng(0)).tolist()
    play = Play(seen, family, task, settings=RenderSettings(size=SIZE, **settings))
    play.run(family.episode_steps)
    assert play.steps_shown() == expected
    assert play.stage.frames == len(expected)


@pytest.mark.parametrize("protocol", ["paper", "gymnasium"])
@pytest.mark.parametrize("body", [HalfCheetahVel, AntVel])
@pytest.mark.parametrize(("fps", "slow"), [(25.0, 1.0), (30.0, 1.0), (25.0, 0.5)])
def test_a_second_of_video_is_a_second_of_physics(
    protocol: str, body: type[HalfCheetahVel | AntVel], fps: float, slow: float, seen: Seen
) -> None:
    """Under either protocol --fps frames show a second, and with --slow .5 twice as many."""
    family = body(protocol=protocol, horizon=120)  # type: ignore[arg-type]  # a parameter
    steps = round(1.2 / family.control_seconds)
    play = Play(seen, family, [[1.0]], settings=RenderSettings(size=SIZE, fps=fps, slow=slow))
    for _ in range(steps):
        play.step()
    times = np.array(play.steps_shown()) * family.control_seconds
    assert (times < 1.0 - 1e-9).sum() == pytest.approx(fps / slow)


def test_columns_are_gradient_steps_and_rows_are_tasks(seen: Seen) -> None:
    """World c T + r is in column c and row r, drawn with the goal of task r; all of one step."""
    play = Play(seen, Navigation2D(horizon=2), [[0.1, 0.0], [0.0, 0.2]], columns=3)
    play.run(2)
    *columns, whole = play.movies
    for step, frame in enumerate(whole.frames):
        assert frame.shape == (2 * SIZE, 3 * SIZE, 3)
        for column in range(3):
            for row in range(2):
                part = np.s_[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
                assert (frame[part] == code(2 * column + row, step)).all()
            assert (columns[column].frames[step] == frame[:, column * SIZE :][:, :SIZE]).all()
    assert [len(movie.frames) for movie in play.movies] == [3] * 4
    for world, task in seen.tasks.items():
        assert task == pytest.approx([[0.1, 0.0], [0.0, 0.2]][world % 2])
    for frame_captions in play.captions():
        assert [caption.task for caption in frame_captions] == [
            "goal (0.10, 0.00) m",
            "goal (0.00, 0.20) m",
        ] * 3
        assert [caption.step for caption in frame_captions] == [
            *("before adapting", "before adapting"),
            *("1 gradient step", "1 gradient step"),
            *("2 gradient steps", "2 gradient steps"),
        ]


def test_number_of_steps_in_words() -> None:
    assert step_label(0, 0) == "no gradient step"
    assert [step_label(n, 2) for n in (0, 1, 2)] == [
        *("before adapting", "1 gradient step", "2 gradient steps")
    ]


def test_a_caption_has_the_return_and_the_measure_so_far(seen: Seen) -> None:
    """After the step that is shown, not before; the start has a return of 0 and no measure yet."""
    family = Navigation2D(horizon=3)
    play = Play(seen, family, [[0.5, 0.0]], columns=2)
    for rewards, measures in (([1, -0.04], [3, 5]), ([2, 0], [4, 6.128]), ([4, -8], [7, 8])):
        play.step(rewards, measures)
    play.stage.finish()
    scores = [[caption.score for caption in both] for both in play.captions()]
    assert scores == [
        ["return 0.0", "return 0.0"],
        ["return 1.0", "return 0.0"],  # -0.04, not "-0.0"
        ["return 3.0", "return 0.0"],
        ["return 7.0", "return -8.0"],
    ]
    measures_shown = [[caption.measure for caption in both] for both in play.captions()]
    assert measures_shown == [
        ["", ""],
        ["distance 3.00 m", "distance 5.00 m"],
        ["distance 4.00 m", "distance 6.13 m"],
        ["distance 7.00 m", "distance 8.00 m"],
    ]
    assert play.stage.returns.tolist() == pytest.approx([7.0, -8.04])


def test_letters_are_as_high_in_every_tile_and_never_grow(seen: Seen) -> None:
    """From the first frame on, when there is no measure yet; longer words alone make them lower."""
    play = Play(seen, cheetah(horizon=5), [[1.0], [2.0]], 3, RenderSettings(size=480, fps=100.0))
    play.step([1.0, 2.0, 3.0, 4.0, 5.0, -900.0], -5.0)
    assert set(seen.letters) == {480 // 24}
    play.step([1e30, *[0.0] * 5])
    play.step([-1e30, *[0.0] * 5])
    play.stage.finish()
    assert seen.letters == sorted(seen.letters, reverse=True)
    (first, last) = dict.fromkeys(seen.letters)
    assert first == 480 // 24 > last


def test_letters_have_room_for_what_is_still_to_come(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a small tile, whose first words are short, as in the frames after it."""
    monkeypatch.setattr(stage_module, "SMALL", SIZE + 1)
    play = Play(seen, HalfCheetahDir(horizon=3), [[1.0]], columns=2)
    for _ in range(3):
        play.step(-300.0, -5.0)
    play.stage.finish()
    lines = seen.captions[-1].lines
    assert lines == (("forward", "1 step"), ("return -900.0", "-5.00 m/s"))
    assert set(seen.letters) == {largest(lines, SIZE)}
    assert largest(seen.captions[0].lines, SIZE) > largest(lines, SIZE)


def test_small_tiles_say_it_in_fewer_words(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the measure's name; strips have room."""
    monkeypatch.setattr(stage_module, "SMALL", SIZE + 1)
    play = Play(seen, cheetah(horizon=2), [[1.0]], columns=3)
    play.step(measures=2.0)
    play.step(measures=2.0)
    play.stage.finish()
    assert [caption.step for caption in seen.captions[-3:]] == ["before", "1 step", "2 steps"]
    assert {caption.measure for caption in seen.captions[-3:]} == {"2.00 m/s"}
    play.stage.strips()
    labels = [row.words for row in seen.strips[0][2]]
    assert labels == ["before adapting", "1 gradient step", "2 gradient steps"]


@pytest.mark.parametrize(("protocol", "steps"), [("paper", 50), ("gymnasium", 10)])
def test_a_bodys_speed_is_that_of_the_last_half_second(
    protocol: str, steps: int, seen: Seen
) -> None:
    """Its unit with it: after step 60 of speeds 1, 2, ... 60 the mean of so many last ones."""
    family = cheetah(protocol=protocol, horizon=60)
    play = Play(seen, family, [[1.0]], settings=RenderSettings(size=SIZE, fps=100.0))
    for step in range(1, 61):
        play.step(measures=float(step))
    play.stage.finish()
    last = seen.captions[-1]
    assert last.measure == f"velocity {60 - (steps - 1) / 2:.2f} m/s"
    assert last.task == "wanted 1.00 m/s"
    # The arrow shows the same number.
    assert seen.measures[-1] is not None
    assert seen.measures[-1].tolist() == [60 - (steps - 1) / 2]
    assert seen.measures[0] is None
    # The first ones are means of fewer.
    assert seen.captions[round(2 * family.control_seconds * 100)].measure == "velocity 1.50 m/s"


def test_a_body_that_fell_is_grey_and_stays_as_it_was(seen: Seen) -> None:
    """World 1 of 3 falls in step 2, at .1 s: the last picture, return and speed are those of it."""
    family = AntDir(protocol="gymnasium", horizon=4)
    play = Play(seen, family, [[-1.0]], columns=3, settings=RenderSettings(size=SIZE, fps=20.0))
    play.step(1.0, 2.0)
    play.step([1.0, 0.5, 1.0], [2.0, 4.0, 2.0], terminated=[1])
    play.step(1.0, 2.0)
    play.step(1.0, 2.0)
    play.stage.finish()
    fallen = play.movies[1].frames
    assert (fallen[1] == code(1, 1)).all()
    for frame in fallen[2:]:
        assert (frame == grey(code(1, 2))).all()
    assert play.steps_shown(0) == play.steps_shown(2) == [0, 1, 2, 3, 4]
    assert [(caption.ending, caption.score, caption.measure) for _, caption, _ in play.captions()][
        2:
    ] == [("fell at 0.1 s", "return 1.5", "velocity 3.00 m/s")] * 3
    assert [first.ending or third.ending for first, _, third in play.captions()] == [""] * 5
    assert play.stage.endings == ["", "fell at 0.1 s", ""]
    assert (1, 3) not in seen.drawn


def test_reaching_the_goal_is_no_failure(seen: Seen) -> None:
    """A point that is there keeps its colours."""
    play = Play(seen, Navigation2D(horizon=4), [[0.1, 0.1]], columns=2)
    play.step(terminated=[])
    play.step(terminated=[1])
    play.run(2)
    assert play.stage.endings == ["", "there at step 2"]
    assert play.steps_shown(1) == [0, 1, 2, 2, 2]
    for frame in play.movies[1].frames[2:]:
        assert (frame == code(1, 2)).all()


def test_a_simulation_that_broke_down_is_grey_and_not_drawn_as_what_it_was_reset_to(
    seen: Seen,
) -> None:
    """What is shown is its last good picture; the broken step's reward and speed are nothing."""
    family = cheetah(protocol="gymnasium", horizon=4)
    play = Play(seen, family, [[1.0]], columns=2, settings=RenderSettings(size=SIZE, fps=20.0))
    play.step(1.0, 2.0)
    play.step([float("nan"), 1.0], [float("nan"), 2.0], diverged=[0])
    play.run(2)
    assert seen.drawn.count((0, 1)) == 1
    assert max(step for world, step in seen.drawn if world == 0) == 1
    for frame in play.movies[0].frames[2:]:
        assert (frame == grey(code(0, 1))).all()
    first = [caption for caption, _ in play.captions()]
    assert [caption.ending for caption in first] == [
        *("", ""),
        *["the simulation broke down at 0.1 s"] * 3,
    ]
    assert {caption.score for caption in first[2:]} == {"return 1.0"}
    assert {caption.measure for caption in first[2:]} == {"velocity 2.00 m/s"}
    assert play.stage.returns.tolist() == [1.0, 2.0]
    assert play.steps_shown(1) == [0, 1, 2, 3, 4]


def test_a_world_that_falls_and_breaks_down_at_once_broke_down(seen: Seen) -> None:
    """MuJoCo has reset it: that the reset pose counts as fallen means nothing."""
    play = Play(seen, AntVel(protocol="gymnasium", horizon=3), [[1.0]])
    play.step(1.0)
    play.step(5.0, terminated=[0], diverged=[0])
    play.stage.finish()
    assert play.stage.endings == ["the simulation broke down at 0.1 s"]
    assert play.stage.returns.tolist() == [1.0]


def test_an_episode_that_ends_between_two_frames_is_shown_at_its_end(seen: Seen) -> None:
    """At .02 s a step and .04 s a frame, step 3 is shown from the frame of step 4 on."""
    play = Play(seen, AntVel(protocol="paper", horizon=6), [[1.0]], columns=2)
    play.run(2)
    play.step(terminated=[0])
    play.run(3)
    shown = play.movies[0].frames
    assert [(frame == grey(code(0, 3))).all() for frame in shown] == [False, False, True, True]
    assert play.steps_shown(1) == [0, 2, 4, 6]


def test_a_video_goes_on_to_the_end_where_all_have_ended_before(seen: Seen) -> None:
    """Nothing comes after step 3, which is between two frames: it is shown, with its return."""
    play = Play(seen, AntVel(protocol="paper", horizon=50), [[1.0]])
    play.step(1.0)
    play.step(1.0)
    play.step(1.0, terminated=[0])
    play.stage.finish()
    assert play.steps_shown()[:2] == [0, 2]
    assert (play.movies[0].frames[-1] == grey(code(0, 3))).all()
    assert (seen.captions[-1].score, seen.captions[-1].ending) == ("return 3.0", "fell at 0.1 s")
    # Its film strip is whole all the same.
    assert play.stage.strips()
    (row,) = seen.strips[0][2]
    assert [words for _, words in row.tiles] == ["return 0", *["return 3, fell at 0.1 s"] * 4]


@pytest.mark.parametrize(
    ("horizon", "instants"),
    [(8, [0, 2, 4, 6, 8]), (5, [0, 1, 2, 4, 5]), (2, [0, 0, 1, 2, 2]), (1, [0, 0, 0, 1, 1])],
)
def test_a_film_strip_has_five_instants_of_every_column(
    horizon: int, instants: list[int], seen: Seen
) -> None:
    """0, 1/4, 1/2, 3/4 and all of the episode, each with its own picture, return and measure.

    A strip for each task; a row for each number of gradient steps. Even where no frame is due then.
    """
    settings = RenderSettings(size=SIZE, fps=1.0)
    tasks = [[0.1, 0.0], [0.0, 0.2]]
    play = Play(seen, Navigation2D(horizon=horizon), tasks, columns=2, settings=settings)
    for step in range(1, horizon + 1):
        play.step([1, 2, 3, 4], [step, step, step, step])
    play.stage.finish()
    titles = ["navigation: goal (0.10, 0.00) m", "navigation: goal (0.00, 0.20) m"]
    assert list(map(str, play.stage.strips())) == titles
    for task, (title, moments, rows) in enumerate(seen.strips):
        assert title == titles[task]
        assert list(moments) == [f"step {instant}" for instant in instants]
        assert [row.words for row in rows] == ["before adapting", "1 gradient step"]
        for column, row in enumerate(rows):
            world = 2 * column + task
            for instant, (picture, words) in zip(instants, row.tiles, strict=True):
                assert (picture == code(world, instant)).all()
                told = f"return {instant * (world + 1)}"
                assert words == (f"{told}, {instant}.0 m" if instant else told)


def test_a_bodys_instants_are_in_seconds(seen: Seen) -> None:
    play = Play(seen, HalfCheetahDir(protocol="gymnasium", horizon=40), [[1.0]]).run(40)
    play.stage.strips()
    assert list(seen.strips[0][1]) == ["0.0 s", "0.5 s", "1.0 s", "1.5 s", "2.0 s"]
    assert seen.strips[0][0] == "half_cheetah_dir: forward"


def test_without_movies_nothing_is_drawn_and_returns_are_kept(seen: Seen) -> None:
    """As where there is no OpenGL."""
    play = Play(seen, AntVel(protocol="paper", horizon=3), [[1.0]], movies=[])
    play.step(2.0)
    play.step(3.0, terminated=[0])
    play.stage.finish()
    play.stage.close()
    assert play.stage.returns.tolist() == [5.0]
    assert play.stage.endings == ["fell at 0.0 s"]
    assert (len(seen.drawn), len(seen.captions)) == (0, 0)
    assert (seen.closed, play.stage.frames) == (0, 0)


def test_the_camera_is_closed(seen: Seen) -> None:
    play = Play(seen, Navigation2D(horizon=1), [[0.1, 0.0]])
    play.stage.close()
    assert seen.closed == 1


def test_frames_are_not_kept(seen: Seen) -> None:
    """Each is handed to the movies and forgotten, however many there are."""

    class Counting(FakeMovie):
        def append(self, frame: Frame) -> None:
            given.append(weakref.ref(frame))
            alive.append(sum(ref() is not None for ref in given))

    given: list[weakref.ref[Frame]] = []
    alive: list[int] = []
    movies = [Counting() for _ in range(3)]
    play = Play(seen, Navigation2D(horizon=40), [[0.1, 0.0]], columns=2, movies=movies)
    play.run(40)
    assert play.stage.frames == 41
    assert len(given) == 41 * len(movies)
    assert max(alive) <= 2 * len(movies)
