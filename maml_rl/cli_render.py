"""`maml-rl render` and `maml-rl report`, and what `--render` does after training and tests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from envs.family import FamilyError
from maml_rl.assess import Subject, load_subject, under_settings
from maml_rl.cli_shared import (
    DataOptions,
    Importing,
    RunOptions,
    Switch,
    refuse_options,
    supervised_run,
    supervised_runs,
)
from maml_rl.config import find_run
from maml_rl.errors import InputError, RunStopped, refusal
from maml_rl.render import render
from maml_rl.rendering import VIDEO, Rendering, RenderSettings, read_rendering
from maml_rl.report.page import make_report
from maml_rl.report.tested import is_benchmark, is_run
from maml_rl.runs import RunFolder
from maml_rl.settings import parse_options
from maml_rl.stage import step_label
from maml_rl.supervised.page import make_report as supervised_report
from maml_rl.supervised.stored import holds_supervised
from maml_rl.task_sets import TaskSet, chosen


@dataclass(frozen=True, kw_only=True)
class RenderOptions(RunOptions):
    """Render a policy before and after each gradient step, side by side, as videos and strips."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """A run folder."""
    out: Path | None = None
    """The folder to write to; by default RUN/video. What was rendered there before is removed."""
    checkpoint: Literal["latest", "previous", "best"] = "latest"
    """The newest, the one before it, or the best by training return after adaptation."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A task, the numbers of one joined by commas (0.3,-0.2); may be repeated. By default three
    spread over the family's range, or all of finitely many."""
    steps: int | None = None
    """Gradient steps; by default as the run's experiment says."""
    mean: Switch = False
    """Let the policy take its mean action, without noise."""
    fps: float = 25.0
    """Frames a second of video."""
    slow: float = 1.0
    """Speed of the video: 1 is true to time, .5 half as fast. Where there is no time, as in
    navigation, 25 control steps count as a second."""
    gif: Switch = False
    """Write the grid as animated GIF."""
    frames: Switch = False
    """Write every frame as PNG too."""
    size: int = 480
    """Side of a tile, pixels, even."""


def render_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl render`."""
    options = parse_options(RenderOptions, words, "maml-rl render")
    if len(options.run) != 1:
        raise InputError("expected one RUN, as in `maml-rl render runs/quickstart-seed0`")
    run = find_run(options.run[0])
    names = [field.name for field in dataclasses.fields(RenderSettings)]
    settings = RenderSettings(**{name: getattr(options, name) for name in names})
    if supervised_run(run):
        raise refusal(
            f"{run} is a run of supervised learning, which has no episodes to film: "
            f"`maml-rl evaluate {run}` draws figures of it, `maml-rl report {run}` makes a page"
        )
    with Importing(options.allow_import):
        subject = with_steps(load_subject(run, options.checkpoint), options.steps)
        tasks = chosen(subject.family, options.task) if options.task else None
        if tasks is not None and not options.quiet:
            outside = subject.family.outside_training(tasks.tasks).tolist()
            for text in itertools.compress(options.task, outside):
                console.print(f"Training never drew task {text}.", highlight=False, soft_wrap=True)
        folder = options.out or run / VIDEO
        made = render(
            subject, folder, tasks=tasks, checkpoint=options.checkpoint, settings=settings
        )
    if not options.quiet:
        tell(console, made, folder)


def with_steps(subject: Subject, steps: int | None) -> Subject:
    """Return a policy to be tested by so many gradient steps, or as its experiment says.

    An oracle takes none unless told to.

    Raises:
        InputError: if the number is out of its range.
    """
    settings = subject.trained.experiment.evaluation
    try:
        settings = settings if steps is None else dataclasses.replace(settings, steps=steps)
    except ValueError as error:
        raise InputError(str(error)) from error
    return under_settings([subject], settings, oracle_steps=steps or 0)[0]


def tell(console: Console, made: Rendering, folder: Path) -> None:
    """Print the returns of what was rendered, and where it is."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say("Return of the rendered episode:")
    for row, words in enumerate(made.task_words):
        parts = []
        for column in made.columns:
            ending = f" ({column.endings[row]})" if column.endings[row] else ""
            label = step_label(column.gradient_steps, len(made.columns) - 1)
            parts.append(f"{label} {column.returns[row]:z.1f}{ending}")
        say(f"  {words}: {', '.join(parts)}")
    if made.trouble:
        say(f"Note: {made.trouble}")
    if made.video is not None:
        say(f"Video: {folder / made.video}")
        say(f"Film strips: {', '.join(str(folder / name) for name in made.strips)}")
    # Not where videos from before are kept in its place.
    if read_rendering(folder) == made:
        say(f"Written: {folder}")


def render_trained(console: Console, run: Path, *, quiet: bool) -> None:
    """Render a run that has just been trained, by its experiment's own settings."""
    render_after(console, [with_steps(load_subject(run), None)], quiet=quiet)


def render_after(
    console: Console,
    subjects: Sequence[Subject],
    *,
    quiet: bool,
    tasks: TaskSet | None = None,
    checkpoint: str = "latest",
) -> None:
    """Render policies after their training or test, and put the film strips into TensorBoard.

    What was written before is there whatever happens now: trouble is told, and no more.

    Args:
        console: where to tell it.
        subjects: the policies, with the settings of their test.
        quiet: whether to tell trouble alone.
        tasks: a row each; by default some spread over the family's range.
        checkpoint: which of the run's the policies are.
    """
    for subject in subjects:
        folder = subject.path / VIDEO
        try:
            made = render(subject, folder, tasks=tasks, checkpoint=checkpoint)
            pictures = {
                f"film_strip/{words}": (folder / name).read_bytes()
                for words, name in zip(made.task_words, made.strips, strict=False)
            }
            if pictures:
                RunFolder.open(subject.path).write_pictures(subject.iterations, pictures)
        except (FamilyError, InputError, RunStopped, OSError) as error:
            console.print(f"Nothing was rendered: {error}", highlight=False, soft_wrap=True)
            continue
        if not quiet:
            tell(console, made, folder)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(RunOptions):
    """Write one HTML page of a run, of several side by side, or of a benchmark.

    A supervised run's has no videos: it shows curves with their fits, or images.
    """

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or the folder of a benchmark. A run without a test of its checkpoint is tested,
    and RUN/evaluation written."""
    out: Path | None = None
    """The file to write; by default report.html in the folder, or beside the first of several."""
    checkpoint: Literal["latest", "previous", "best"] = "latest"
    """The newest, the one before it, or the best by training return after adaptation."""
    no_render: Switch = False
    """Leave out the videos that are not there yet, which else are rendered into RUN/video: of each
    run, and of a benchmark's first meta-policy."""
    data: DataOptions = field(default_factory=DataOptions)


def report_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl report`."""
    options = parse_options(ReportOptions, words, "maml-rl report")
    options = dataclasses.replace(options, run=tuple(map(find_run, options.run)))

    def say(text: str) -> None:
        if not options.quiet:
            console.print(text, highlight=False, soft_wrap=True)

    for target in options.run:
        if is_benchmark(target) and holds_supervised(target):
            raise refusal(
                f"{target} holds tests of supervised runs; for a page of them give the run "
                "folders, as in `maml-rl report RUN RUN`"
            )
    if options.run and all(map(is_run, options.run)) and supervised_runs(options.run):
        refuse_options(
            {"--no-render": options.no_render, "--allow-import": options.allow_import},
            "supervised",
        )
        file = supervised_report(
            options.run,
            options.out,
            checkpoint=options.checkpoint,
            root=options.data.root,
            say=say,
        )
        say(f"Written: {file}")
        return
    refuse_options({"--data.root": options.data.root is not None}, "reinforcement")

    def film(subject: Subject) -> None:
        folder = subject.path / VIDEO
        say(f"Rendering {subject.path} into {folder} ...")
        try:
            made = render(with_steps(subject, None), folder, checkpoint=options.checkpoint)
        except FamilyError as error:
            say(f"No videos: {error}")
            return
        if made.trouble:
            say(f"Note: {made.trouble}")

    with Importing(options.allow_import):
        file = make_report(
            options.run,
            options.out,
            checkpoint=options.checkpoint,
            say=say,
            film=None if options.no_render else film,
        )
    say(f"Written: {file}")
