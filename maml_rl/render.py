"""Videos of adaptation: the same episode before and after each gradient step, side by side.

RUN/video/adaptation.mp4   columns are 0, 1, 2, ... gradient steps, rows are tasks
RUN/video/steps_K.mp4      the column of K gradient steps
RUN/video/strip_R.png      film strip of task R: five instants, a row for each K
RUN/video/frames/          every frame, if asked for
RUN/video/video.json       what was rendered, from what, and the returns

Every episode begins in the same state with the same action noise. The policy is adapted by
`evaluate`, and drawn while the sampler runs it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from envs.cameras import NoOpenGLError
from envs.locomotion import LocomotionFamily
from maml_rl.adapt import Params
from maml_rl.assess import BrokenDown, Subject, evaluate_policy
from maml_rl.episodes import Episodes
from maml_rl.errors import RunStopped
from maml_rl.movies import Animation, Movie, Mp4, Pngs, has_ffmpeg
from maml_rl.opengl import what_is_missing
from maml_rl.rendering import FORMAT, RECORD, Column, Rendering, RenderSettings, read_rendering
from maml_rl.rollout import SamplingError, Watch
from maml_rl.sampler import Sampler, task_seeds
from maml_rl.seeds import TEST, TEST_SEED
from maml_rl.stage import Stage
from maml_rl.task_sets import CHOSEN, TaskSet

FRAMES = "frames"
ROWS = 3
"""Tasks that are shown where nobody chose any."""
WITHOUT_FFMPEG = (
    "without ffmpeg the videos are animated WebP; for MP4, which can be wound, install it: "
    "pip install 'maml-rl[video]'"
)


def render(
    subject: Subject,
    folder: Path,
    *,
    tasks: TaskSet | None = None,
    checkpoint: str = "latest",
    settings: RenderSettings | None = None,
) -> Rendering:
    """Render a policy's episodes before and after each gradient step of its evaluation settings.

    Where bodies cannot be drawn for want of OpenGL the record is written, with the returns.

    Args:
        subject: whose policy.
        folder: where to; what was rendered there before is removed, unless nothing can be drawn.
        tasks: a row each; by default some spread over the family's range.
        checkpoint: which of the run's the policy is, for the record.
        settings: speed, size and formats.

    Raises:
        FamilyError: if nothing draws the family.
        RunStopped: if an adapted policy breaks down, or files cannot be written.
    """
    settings = settings or RenderSettings()
    family = subject.family
    shown = tasks or TaskSet(CHOSEN, family.spread_tasks(ROWS))
    adapted: list[Params] = []
    evaluate_policy(subject.trained, tasks=shown, see=lambda params, _: adapted.append(params))
    trouble = what_is_missing() if isinstance(family, LocomotionFamily) else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the folder itself, which may be a file system of its own.
        with tempfile.TemporaryDirectory(prefix=".video-", dir=folder) as work:
            try:
                made = perform(subject, shown, adapted, Path(work), settings, draw=not trouble)
            except NoOpenGLError as error:
                # The trial found OpenGL, but mujoco had been imported without it.
                trouble = str(error)
                made = perform(subject, shown, adapted, Path(work), settings, draw=False)
            made = dataclasses.replace(made, checkpoint=checkpoint, trouble=trouble or made.trouble)
            before = read_rendering(folder)
            if made.video is None and before is not None and before.video is not None:
                kept = "; the videos from before are kept"
                return dataclasses.replace(made, trouble=made.trouble + kept)
            publish(Path(work), folder, made)
    except OSError as error:
        raise RunStopped(f"the video cannot be written to {folder}: {error}", 3) from error
    return made


def perform(
    subject: Subject,
    tasks: TaskSet,
    adapted: Sequence[Params],
    work: Path,
    settings: RenderSettings,
    *,
    draw: bool,
) -> Rendering:
    """Sample one episode a tile, drawing it if wanted, and return the record.

    Args:
        subject: whose policy.
        tasks: T of them.
        adapted: parameters (T, ...) after 0, 1, ... gradient steps.
        work: an empty folder for the files.
        settings: speed, size and formats.
        draw: whether to make pictures.
    """
    family, columns = subject.family, len(adapted)
    mp4 = has_ffmpeg()
    with ExitStack() as stack:
        movies: list[Movie] = []
        if draw:
            for movie in open_movies(work, columns, settings, mp4=mp4):
                stack.callback(movie.close)
                movies.append(movie)
        stage = Stage(family, tasks.tasks, columns, settings, movies)
        stack.callback(stage.close)
        episodes = play(subject, tasks.tasks, adapted, stage, deterministic=settings.mean)
        stage.finish()
    rows = len(tasks.tasks)
    returns = episodes.returns()[:, 0].tolist()
    parts = [slice(c * rows, (c + 1) * rows) for c in range(columns)]
    names = [movie.path.name for movie in movies]
    return Rendering(
        checkpoint="",
        iterations=subject.iterations,
        mean=settings.mean,
        fps=settings.fps,
        slow=settings.slow,
        frames=stage.frames,
        tasks=tuple(map(tuple, tasks.tasks.tolist())),
        task_words=tuple(map(family.describe_task, tasks.tasks)),
        columns=tuple(
            Column(k, names[k] if draw else None, tuple(returns[p]), tuple(stage.endings[p]))
            for k, p in enumerate(parts)
        ),
        video=names[columns] if draw else None,
        strips=tuple(save_strips(stage, work)) if draw else (),
        trouble="" if mp4 else WITHOUT_FFMPEG,
    )


def save_strips(stage: Stage, work: Path) -> list[str]:
    """Write the film strip of each task and return the files' names."""
    names = []
    for row, picture in enumerate(stage.strips()):
        names.append(f"strip_{row}.png")
        picture.save(work / names[-1])
    return names


def open_movies(
    work: Path, columns: int, settings: RenderSettings, *, mp4: bool
) -> Iterator[Movie]:
    """Yield the movies of the columns, then of the grid, then of single frames if wanted."""
    kind, suffix = (Mp4, ".mp4") if mp4 else (Animation, ".webp")
    whole, ending = (Animation, ".gif") if settings.gif else (kind, suffix)
    for column in range(columns):
        yield kind(work / f"steps_{column}{suffix}", settings.fps)
    yield whole(work / f"adaptation{ending}", settings.fps)
    if settings.frames:
        yield Pngs(work / FRAMES)


def play(
    subject: Subject,
    tasks: npt.NDArray[np.float32],
    adapted: Sequence[Params],
    watch: Watch,
    *,
    deterministic: bool,
) -> Episodes:
    """Sample one episode of each task after each number of steps, N = (n + 1) T, all watched.

    Raises:
        BrokenDown: if an action is not finite.
    """
    experiment = subject.trained.experiment
    count = len(adapted) * len(tasks)
    params = {name: torch.cat([one[name] for one in adapted]) for name in adapted[0]}
    # Not among the evaluation's own: iteration 1. The same for all: same start, same noise.
    seeds = np.repeat(task_seeds(TEST, TEST_SEED, 1, 0, 1), count)
    try:
        with Sampler(
            subject.family,
            subject.trained.policy,
            tasks=count,
            episodes=1,
            action_scale=experiment.policy.action_scale,
            threads=experiment.threads,
            deterministic=deterministic,
            watch=watch,
        ) as sampler:
            return sampler.sample(params, torch.from_numpy(tasks).repeat(len(adapted), 1), seeds)
    except SamplingError as error:
        raise BrokenDown(f"the rendering was stopped: {error}", 3) from error


def publish(work: Path, folder: Path, made: Rendering) -> None:
    """Move new files to where the user looks, in the place of those before; keep all others."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(made)}, indent=2)
    (work / RECORD).write_text(text + "\n", encoding="utf-8")
    before = read_rendering(folder)
    (folder / RECORD).unlink(missing_ok=True)
    frames = folder / FRAMES
    if before is not None:
        for name in before.files:
            (folder / name).unlink(missing_ok=True)
        for file in frames.glob("[0-9]" * 5 + ".png"):
            file.unlink()
        with suppress(OSError):
            frames.rmdir()
    # The record last: where it is, all is.
    new = (file for file in work.rglob("*") if file.is_file())
    for file in sorted(new, key=lambda file: file.name == RECORD):
        where = folder / file.relative_to(work)
        where.parent.mkdir(exist_ok=True)
        os.replace(file, where)
