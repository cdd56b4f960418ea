"""The command line: what each command takes, prints and exits with.

Exit codes: 0; 1 a bug of ours; 2 bad input; 3 a run stopped itself; 130, 143 signals.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import envs
from envs import TaskFamily
from envs.references import allow_imports
from maml_rl import config, speed
from maml_rl.config import Experiment, InputError, experiment_words
from maml_rl.evaluate import Evaluation
from maml_rl.runs import Row, RunFolder, check_device
from maml_rl.train import RunStopped, Watcher, evaluate_policy, meta_train, resume
from maml_rl.trained import TrainedPolicy, load

Switch = tyro.conf.FlagCreatePairsOff[bool]

INTRODUCTION = """\
maml-rl: policies that learn a new task from a few episodes and one gradient step.

  maml-rl train EXPERIMENT     meta-train a policy; EXPERIMENT is a YAML file or a shipped name
  maml-rl resume RUN           go on with an interrupted run, or extend a finished one
  maml-rl evaluate RUN         test a run's policy: return against gradient steps
  maml-rl list                 task families, their settings, and the experiments that ship
  maml-rl speed                how fast this machine samples and updates

`maml-rl COMMAND --help` shows a command's options. Start with: maml-rl train quickstart
"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every command that runs an experiment takes."""

    quiet: Switch = False
    """Print nothing but errors."""
    allow_import: Switch = False
    """Let the experiment import code of yours, named package.module:Class or :function."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Where a run goes and what it starts from."""

    out: Path | None = None
    """The run folder; by default runs/NAME-seedS, or the next free number."""
    init: Path | None = None
    """A run whose latest parameters to start from."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(RunOptions):
    """Go on with an interrupted run, or extend a finished one."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    iterations: int | None = None
    """A new total of iterations."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Test a run's policy: return against gradient steps."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    out: Path | None = None
    """Where to write evaluation.csv and summary.json; by default RUN/evaluation."""
    checkpoint: str = "latest"
    """latest, previous, or best by training return after adaptation."""
    steps: int | None = None
    """Gradient steps; by default the experiment's."""


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Measure how fast this machine samples and updates."""

    json: Switch = False
    """Print JSON for programs."""
    threads: int = 0
    """Threads of physics and of the update; 0 is one a core."""
    scale: float = 1.0
    """Fraction of the full number of tasks, to try the command quickly; 1 for real figures."""


class Importing(ExitStack):
    """Allows an experiment's own code to be imported while open, if the user said so."""

    def __init__(self, allowed: bool) -> None:
        super().__init__()
        if allowed:
            # A module beside the user is found even from a console script.
            if "" not in sys.path and os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            self.enter_context(allow_imports())


class Lines:
    """Prints one line an iteration, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Watcher:
        return self.show

    def __exit__(self, *exception: object) -> None:
        return

    def show(self, row: Row, total: int) -> None:
        """Print one iteration."""
        seconds = float(row["seconds_sampling"]) + float(row["seconds_updating"])
        self._console.print(
            f"iteration {int(row['iteration']) + 1}/{total}  {numbers_that_matter(row)}  "
            f"{seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


class Bar:
    """Shows a progress bar with the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, numbers="first iteration ...")

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self.show

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, row: Row, total: int) -> None:
        """Move the bar by one iteration."""
        self._progress.update(
            self._task,
            total=total,
            completed=int(row["iteration"]) + 1,
            numbers=numbers_that_matter(row),
        )


class Silence:
    """Shows nothing."""

    def __enter__(self) -> None:
        return

    def __exit__(self, *exception: object) -> None:
        return


def numbers_that_matter(row: Row) -> str:
    """Return an iteration's returns before and after adaptation, KL, and whether it was refused."""
    steps = sum(1 for name in row if name.startswith("return_") and not name.endswith("_sd")) - 1
    parts = [f"return {float(row['return_0']):.1f}"]
    if steps:
        parts = [
            f"return before {float(row['return_0']):.1f}",
            f"after {steps} step{'s' * (steps > 1)} {float(row[f'return_{steps}']):.1f}",
        ]
    parts.append(f"KL {float(row['kl']):.4f}")
    if row["refused_because"]:
        parts.append(f"update refused: {row['refused_because']}")
    if row["diverged_worlds"]:
        parts.append(f"{row['diverged_worlds']} simulations diverged")
    return ", ".join(parts)


def watching(console: Console, quiet: bool) -> Bar | Lines | Silence:
    """Return how to show progress here: a bar on a terminal, lines elsewhere, or nothing."""
    if quiet:
        return Silence()
    return Bar(console) if console.is_terminal else Lines(console)


def step_words(steps: int) -> str:
    """Return "before adapting", "after 1 gradient step" and so on."""
    return "before adapting" if steps == 0 else f"after {steps} gradient step{'s' * (steps > 1)}"


def evaluation_table(evaluation: Evaluation, family: TaskFamily) -> Table:
    """Return return against gradient steps as a table in plain words."""
    measure = family.measure_columns[0] if family.measure_columns else None
    groups = list(evaluation.groups(family))
    title = (
        f"How {family.name} does on {len(evaluation.tasks)} test tasks that training never saw"
        if family.finite_tasks is None
        else f"How {family.name} does on fresh episodes of the training tasks"
    )
    # Narrow enough for a terminal of 80 columns with two kinds of task.
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("return", justify="right", no_wrap=True)
    if measure is not None and not groups:
        table.add_column(f"{measure.name} ({measure.unit})", justify="right")
    for name, _ in groups:
        table.add_column(f"{name}\nreturn", justify="right")
        if measure is not None:
            table.add_column(f"{name}\n{measure.unit}", justify="right")
    for step, returns in enumerate(evaluation.returns):
        width = evaluation.half_width(family, step)
        interval = "" if math.isnan(width) else f" ± {width:.1f}"
        cells = [step_words(step), f"{returns.mean():.1f}{interval}"]
        if measure is not None and not groups:
            cells.append(f"{evaluation.measures[step, :, 0].mean():.2f}")
        for _, mask in groups:
            cells.append(f"{returns[mask].mean():.1f}")
            if measure is not None:
                cells.append(f"{evaluation.measures[step, mask, 0].mean():.2f}")
        table.add_row(*cells)
    return table


def evaluation_notes(evaluation: Evaluation, family: TaskFamily) -> str:
    """Return what a newcomer needs to read the table."""
    notes = [
        "Return: sum of an episode's rewards, mean over tasks, ± half its 95 % interval.",
        f"Before each gradient step a task's policy acts for {evaluation.episodes} episodes, "
        "which are all that the step learns from.",
    ]
    if family.finite_tasks is not None and family.measure_columns:
        measure = family.measure_columns[0]
        notes.append(f"{measure.unit}: mean {measure.name} the wanted way.")
    return " ".join(notes)


def method_name(experiment: Experiment[TaskFamily]) -> str:
    """Return what a run's policy is called in evaluation.csv."""
    return "maml" if experiment.adaptation.inner_steps else "pretrained"


def report_evaluation(
    console: Console, trained: TrainedPolicy, folder: RunFolder, out: Path | None, quiet: bool
) -> None:
    """Test a policy, write the figures, and print them."""
    written = folder.evaluation_folder(out)
    evaluation = evaluate_policy(trained)
    experiment = trained.experiment
    folder.write_evaluation(evaluation, experiment, method_name(experiment), written)
    if not quiet:
        console.print()
        console.print(evaluation_table(evaluation, experiment.family))
        notes = evaluation_notes(evaluation, experiment.family)
        console.print(f"{notes} All figures: {written}", highlight=False, soft_wrap=True)


def train_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl train`."""
    target, flags = split_target(words, "EXPERIMENT", "maml-rl train quickstart")
    allowed = any(config.normal_flag(w) == "allow_import" for w in flags)
    ours = [f.name for f in dataclasses.fields(TrainOptions)]
    with Importing(allowed):
        family, arguments = experiment_words(config.find_experiment(target), flags, ignored=ours)

        # The family decides the flags, so the command's arguments are put together here; what
        # they are no static type can say, hence Any.
        settings = config.experiment_type(family, tyro.conf.arg(name=""))
        arguments_class: type[Any] = dataclasses.make_dataclass(
            "TrainCommand",
            [
                ("experiment", settings),
                ("options", Annotated[TrainOptions, tyro.conf.arg(name="")]),
            ],
            frozen=True,
        )
        parsed = config.parse_with_tyro(arguments_class, arguments, f"maml-rl train {target}")
        experiment: Experiment[TaskFamily] = parsed.experiment
        options: TrainOptions = parsed.options
        check_device(experiment.device)
        path = options.out or RunFolder.default_path(experiment.name, experiment.seed)
        RunFolder.check_free(path)
        if options.init is not None:
            RunFolder.open(options.init)
        if not options.quiet:
            console.print(describe(experiment), highlight=False, soft_wrap=True)
        with watching(console, options.quiet) as watch:
            try:
                trained = meta_train(experiment, out=path, init=options.init, watch=watch)
            except RunStopped as stopped:
                raise with_resume_line(stopped, path) from stopped
        report_evaluation(console, trained, RunFolder.open(path), None, options.quiet)
    if not options.quiet:
        console.print(f"Run folder: {path}", highlight=False, soft_wrap=True)


def with_resume_line(stopped: RunStopped, path: Path) -> RunStopped:
    """Add the line to type to go on, where a signal stopped the run and not a fault."""
    if stopped.exit_code < 128:
        return stopped
    return RunStopped(f"{stopped}. Go on with: maml-rl resume {path}", stopped.exit_code)


def describe(experiment: Experiment[TaskFamily]) -> str:
    """Return in a sentence what is about to be trained."""
    family, sampling = experiment.family, experiment.sampling
    protocol = getattr(family, "protocol", "")
    inner = experiment.adaptation.inner_steps
    return (
        f"Training {family.name}{f' ({protocol} protocol)' if protocol else ''}: "
        f"{experiment.iterations} iterations of {sampling.tasks} tasks x {sampling.episodes} "
        f"episodes x {family.episode_steps} control steps, "
        + (f"before and {step_words(inner)}." if inner else "without adaptation.")
    )


def resume_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl resume`."""
    options = config.parse_with_tyro(ResumeOptions, words, "maml-rl resume")
    with Importing(options.allow_import), watching(console, options.quiet) as watch:
        try:
            trained = resume(options.run, iterations=options.iterations, watch=watch)
        except RunStopped as stopped:
            raise with_resume_line(stopped, options.run) from stopped
    report_evaluation(console, trained, RunFolder.open(options.run), None, options.quiet)


def evaluate_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl evaluate`."""
    options = config.parse_with_tyro(EvaluateOptions, words, "maml-rl evaluate")
    with Importing(options.allow_import):
        trained = load(options.run, checkpoint=options.checkpoint)
        if options.steps is not None:
            try:
                settings = dataclasses.replace(trained.experiment.evaluation, steps=options.steps)
            except ValueError as error:
                raise InputError(str(error)) from error
            experiment = dataclasses.replace(trained.experiment, evaluation=settings)
            trained = dataclasses.replace(trained, experiment=experiment)
        folder = RunFolder.open(options.run)
        report_evaluation(console, trained, folder, options.out, options.quiet)


def list_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl list`."""

    @dataclass(frozen=True)
    class ListOptions:
        """Show task families, their settings, and the experiments that ship."""

    config.parse_with_tyro(ListOptions, words, "maml-rl list")
    for name, cls in envs.FAMILIES.items():
        family = envs.make(name)
        first = (cls.__doc__ or "").splitlines()[0]
        console.print(f"\n{name}", style="bold", highlight=False)
        console.print(f"  {first}", highlight=False, soft_wrap=True)
        for title, columns in (("task", family.task_columns), ("measured", family.measure_columns)):
            text = "; ".join(f"{c.name} ({c.unit}): {c.meaning}" for c in columns)
            console.print(f"  {title}: {text}", highlight=False, soft_wrap=True, markup=False)
        table = Table(box=None, pad_edge=False, show_header=True)
        for heading in ("  field", "default", "meaning and unit"):
            table.add_column(heading)
        meanings = field_meanings(cls)
        for item in dataclasses.fields(family):
            value = getattr(family, item.name)
            alternatives = other_protocols(family, item.name, value)
            table.add_row(f"  {item.name}", f"{value}{alternatives}", meanings.get(item.name, ""))
        console.print(table)
    console.print("\nExperiments that ship (maml-rl train NAME)", style="bold")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, path in config.shipped_experiments().items():
        header = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        table.add_row(f"  {name}", header)
    console.print(table)


def other_protocols(family: TaskFamily, field: str, value: object) -> str:
    """Return what the other protocols decide for a field, in brackets, where it differs."""
    tables: Mapping[str, Mapping[str, object]] = getattr(family, "protocols", {})
    own = getattr(family, "protocol", "")
    others = [
        f"{name}: {decided[field]}"
        for name, decided in tables.items()
        if name != own and field in decided and decided[field] != value
    ]
    return f" ({', '.join(others)})" if others else ""


def field_meanings(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, after in itertools.pairwise(body.body):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[line.target.id] = " ".join(str(after.value.value).split())
    return found


def speed_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl speed`."""
    options = config.parse_with_tyro(SpeedOptions, words, "maml-rl speed")
    if options.threads < 0:
        raise InputError(f"threads must be at least 0, got {options.threads}")
    if not 0 < options.scale <= 1:
        raise InputError(f"scale must be above 0 and at most 1, got {options.scale}")

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    rows = speed.measure(options.threads, options.scale, None if options.json else say)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    console.print(speed.table(rows))


COMMANDS: Mapping[str, Callable[[Sequence[str], Console], None]] = {
    "train": train_command,
    "resume": resume_command,
    "evaluate": evaluate_command,
    "list": list_command,
    "speed": speed_command,
}


def split_target(words: Sequence[str], what: str, example: str) -> tuple[str, list[str]]:
    """Take the first word, which must be no flag, off a command's words."""
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            return "quickstart", list(words)
        raise InputError(f"expected {what} first, as in `{example}`")
    return words[0], list(words[1:])


def run(words: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    # Folders may be called anything, so text is never read as markup.
    console = Console(markup=False)
    if not words or words[0] in ("-h", "--help", "help"):
        print(INTRODUCTION, end="")
        return 0 if words else 2
    try:
        if words[0] not in COMMANDS:
            near = difflib.get_close_matches(words[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            raise InputError(f"there is no command {words[0]!r}: {hint}")
        COMMANDS[words[0]](words[1:], console)
    except RunStopped as stopped:
        print(f"maml-rl: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except (InputError, envs.FamilyError) as error:
        print(f"maml-rl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maml-rl: interrupted", file=sys.stderr)
        return 130
    return 0
