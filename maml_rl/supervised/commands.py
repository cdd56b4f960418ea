"""`maml-rl train`, `resume` and `evaluate` of supervised experiments, and `maml-rl data`."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from maml_rl.cli_shared import Switch, command_line, going_on, refuse_options
from maml_rl.devices import Device, check_place
from maml_rl.errors import InputError, refusal
from maml_rl.results import results_folder
from maml_rl.runs import Row, RunFolder
from maml_rl.settings import normal_flag, parse_command, parse_options
from maml_rl.supervised.config import (
    TestSettings,
    supervised_type,
    supervised_words,
)
from maml_rl.supervised.drawn_characters import draw_characters
from maml_rl.supervised.evaluate import Outcome, load_subjects, outcomes_of, own_step_sizes
from maml_rl.supervised.results import notes_of, shown, tables_of, write_results
from maml_rl.supervised.train import meta_train, resume
from maml_rl.terminal import watching


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Where a run goes and what it starts from."""

    out: Path | None = None
    """The run folder; by default runs/NAME-seedS, or the next free number."""
    init: Path | None = None
    """A run whose latest parameters to start from."""
    quiet: Switch = False
    """Print nothing but errors."""


OF_POLICIES = ("render", "allow_import")
"""Options of `train` that mean nothing here."""


def train_supervised(
    target: str, file: Path, tree: Mapping[str, object], flags: Sequence[str], console: Console
) -> None:
    """`maml-rl train` of an experiment with `data`."""
    given = {normal_flag(word) for word in flags if word.startswith("--")}
    refuse_options({f"--{n.replace('_', '-')}": n in given for n in OF_POLICIES}, "supervised")
    ours = [f.name for f in dataclasses.fields(TrainOptions)]
    problem, arguments = supervised_words(tree, str(file), flags, ignored=ours)
    settings = supervised_type(problem, tyro.conf.arg(name=""))
    experiment, options = parse_command(
        settings, TrainOptions, arguments, f"maml-rl train {target}"
    )
    say = printer(console, options.quiet)
    check_place(experiment.device)
    path = options.out or RunFolder.default_path(experiment.name, experiment.seed)
    RunFolder.check_free(path)
    if options.init is not None:
        RunFolder.open(options.init)
    with going_on(command_line("resume", path), path):
        with watching(console, options.quiet, numbers_that_matter) as watch:
            meta_train(experiment, out=path, init=options.init, watch=watch, say=say)
        report_run(console, path, None, quiet=options.quiet)
    say(f"Run folder: {path}")


def printer(console: Console, quiet: bool) -> Callable[[str], None]:
    """Return what prints a line, or nothing."""

    def say(text: str) -> None:
        if not quiet:
            console.print(text, highlight=False, soft_wrap=True)

    return say


def numbers_that_matter(row: Row) -> str:
    """Return loss and scores of a row of metrics, and how many updates were refused."""
    name = "accuracy" if "accuracy" in row else "error"
    classifies = name == "accuracy"
    parts = [f"loss {float(row['loss']):.4g}"]
    scores = [float(v) for k, v in row.items() if k.startswith(f"validation_{name}_")]
    if classifies:
        parts.append(f"accuracy {shown(float(row[name]), classifies)} %")
    if scores:
        ends = scores[:1] + scores[-1:] * (len(scores) > 1)
        words = " -> ".join(shown(score, classifies) for score in ends)
        parts.append(f"validation {name} {words}{' %' * classifies}")
    if row["refused"]:
        parts.append(f"{row['refused']} updates refused: {row['refused_because']}")
    return ", ".join(parts)


def resume_supervised(
    run: Path,
    *,
    iterations: int | None,
    root: str | None,
    device: Device | None,
    quiet: bool,
    console: Console,
) -> None:
    """`maml-rl resume` of a supervised run."""
    with going_on(command_line("resume", run), run):
        with watching(console, quiet, numbers_that_matter) as watch:
            resume(
                run,
                iterations=iterations,
                root=root,
                device=device,
                watch=watch,
                say=printer(console, quiet),
            )
        report_run(console, run, root, quiet=quiet)


def report_run(console: Console, run: Path, root: str | None, *, quiet: bool) -> None:
    """Test a run that has just been trained, by its experiment's own settings."""
    (subject,) = load_subjects([run], root=root)
    folder = results_folder([run], None, usual=True)
    settings = subject.experiment.evaluation
    outcomes = list(outcomes_of(subject, settings))
    finish(console, outcomes, settings, folder, {"checkpoint": "latest"}, quiet=quiet)


def evaluate_supervised(
    runs: Sequence[Path],
    *,
    checkpoint: str,
    root: str | None,
    device: Device | None,
    out: Path | None,
    steps: int | None,
    shots: Sequence[int],
    step_sizes: Sequence[float],
    usual: bool,
    quiet: bool,
    console: Console,
) -> None:
    """`maml-rl evaluate` of supervised runs.

    Args:
        runs: run folders.
        checkpoint: which of each.
        root: where their images are now, if not where they were.
        device: where to test them, if not where they were trained.
        out: where to write.
        steps: gradient steps; None is as the first run's experiment says.
        shots: examples to adapt to, a test each; none is likewise.
        step_sizes: to try one after the other; none is likewise.
        usual: whether none of these is given.
        quiet: whether to print nothing but errors.
        console: where to print.
    """
    subjects = load_subjects(runs, checkpoint, root, device)
    folder = results_folder(runs, out, usual=usual)
    settings = subjects[0].experiment.evaluation
    try:
        settings = replace(
            settings,
            steps=settings.steps if steps is None else steps,
            shots=tuple(shots) or settings.shots,
        )
        tried = [replace(settings, step_sizes=(size,)) for size in step_sizes]
    except ValueError as error:
        raise InputError(str(error)) from error
    outcomes = [
        outcome
        for subject in subjects
        for one in tried or [own_step_sizes(settings, subject)]
        for outcome in outcomes_of(subject, one)
    ]
    finish(console, outcomes, settings, folder, {"checkpoint": checkpoint}, quiet=quiet)


def finish(
    console: Console,
    outcomes: Sequence[Outcome],
    settings: TestSettings,
    folder: Path,
    notes: Mapping[str, object],
    *,
    quiet: bool,
) -> None:
    """Write tests to `folder`, print them, and draw them."""
    write_results(folder, outcomes, settings, notes)
    say = printer(console, quiet)
    if not quiet:
        console.print()
        for table in tables_of(outcomes):
            console.print(table)
    for note in [*notes_of(outcomes), f"Written: {folder}"]:
        say(note)
    if importlib.util.find_spec("matplotlib") is None:
        say("Figures need matplotlib: pip install 'maml-rl[plot]'")
        return
    # Imported on demand: it is slow, and an extra.
    from maml_rl.supervised import figures

    say(f"Drawn, as PNG and SVG: {', '.join(figures.draw(folder, outcomes))}")


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """Make a data set."""

    name: tyro.conf.Positional[str]
    """What to make: drawn-characters."""
    folder: tyro.conf.Positional[Path]
    """A new folder for it."""
    characters: int = 40
    """Made-up characters."""
    drawings: int = 20
    """Drawings of each."""
    seed: int = 0
    """Of what is drawn."""
    quiet: Switch = False
    """Print nothing but errors."""


MAKERS = {"drawn-characters": draw_characters}
"""What makes each data set that can be made here."""


def data_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl data`."""
    options = parse_options(MakeOptions, words, "maml-rl data")
    if options.name not in MAKERS:
        raise refusal(
            f"there is no data set {options.name!r} that can be made: there is "
            f"{', '.join(MAKERS)}; others are to be fetched, and a missing one is answered by how"
        )
    for name, least in (("characters", 1), ("drawings", 1), ("seed", 0)):
        if not least <= getattr(options, name) <= 100_000:
            raise InputError(f"{name} must be from {least} to 100000, got {getattr(options, name)}")
    count = MAKERS[options.name](
        options.folder,
        characters=options.characters,
        drawings=options.drawings,
        seed=options.seed,
    )
    printer(console, options.quiet)(
        f"{count} drawings of {options.characters} characters in {options.folder}. "
        f"Train on them: maml-rl train drawn_characters --data.root {options.folder}"
    )
