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
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import envs
from envs import TaskFamily
from envs.references import allow_imports
from maml_rl import speed
from maml_rl.config import (
    Experiment,
    experiment_type,
    experiment_words,
    find_experiment,
    shipped_experiments,
)
from maml_rl.errors import InputError, RunStopped, RunWarning, printable, refusal
from maml_rl.inspection import inspect_run
from maml_rl.memory import check_memory
from maml_rl.plain_yaml import read_yaml
from maml_rl.replay import play, read_dump
from maml_rl.runs import RunFolder
from maml_rl.settings import normal_flag, parse_with_tyro
from maml_rl.signals import exit_code
from maml_rl.terminal import Terminal, evaluation_notes, evaluation_table, step_words, watching
from maml_rl.train import evaluate_policy, meta_train, resume
from maml_rl.trained import TrainedPolicy, check_device, load
from maml_rl.versions import differences

Switch = tyro.conf.FlagCreatePairsOff[bool]

INTRODUCTION = """\
maml-rl: policies that learn a new task from a few episodes and one gradient step.

  maml-rl train EXPERIMENT     meta-train a policy; EXPERIMENT is a YAML file or a shipped name
  maml-rl resume RUN           go on with an interrupted run, or extend a finished one
  maml-rl evaluate RUN         test a run's policy: return against gradient steps
  maml-rl inspect RUN          what a run or a checkpoint holds, and whether it is whole
  maml-rl replay DUMP          see again a simulation that broke down in training
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
    checkpoint: Literal["latest", "previous", "best"] = "latest"
    """The newest, the one before it, or the best by training return after adaptation."""
    steps: int | None = None
    """Gradient steps; by default the experiment's."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Print what a run folder or a checkpoint holds, and whether it is whole."""

    path: tyro.conf.Positional[Path]
    """A run folder, or a checkpoint such as RUN/checkpoints/best."""


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """See again a simulation that broke down in training."""

    dump: tyro.conf.Positional[Path]
    """A file that a stopped run wrote, RUN/dumps/iteration-N.json."""
    allow_import: Switch = False
    """Let the dump's experiment import code of yours."""


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
    allowed = any(normal_flag(w) == "allow_import" for w in flags)
    ours = [f.name for f in dataclasses.fields(TrainOptions)]
    with Importing(allowed):
        file = find_experiment(target)
        tree = read_yaml(file)
        family, arguments = experiment_words(tree, str(file), flags, ignored=ours)

        # The family decides the flags, so the command's arguments are put together here; what
        # they are no static type can say, hence Any.
        settings = experiment_type(family, tyro.conf.arg(name=""))
        arguments_class: type[Any] = dataclasses.make_dataclass(
            "TrainCommand",
            [
                ("experiment", settings),
                ("options", Annotated[TrainOptions, tyro.conf.arg(name="")]),
            ],
            frozen=True,
        )
        parsed = parse_with_tyro(arguments_class, arguments, f"maml-rl train {target}")
        experiment: Experiment[TaskFamily] = parsed.experiment
        options: TrainOptions = parsed.options
        check_device(experiment.device)
        check_memory(experiment, "sampling", "evaluation")
        path = options.out or RunFolder.default_path(experiment.name, experiment.seed)
        RunFolder.check_free(path)
        if options.init is not None:
            RunFolder.open(options.init)
        if not options.quiet:
            console.print(describe(experiment), highlight=False, soft_wrap=True)
        with going_on(path, options):
            with watching(console, options.quiet) as watch:
                trained = meta_train(experiment, out=path, init=options.init, watch=watch)
            report_evaluation(console, trained, RunFolder.open(path), None, options.quiet)
    if not options.quiet:
        console.print(f"Run folder: {path}", highlight=False, soft_wrap=True)


@contextmanager
def going_on(path: Path, options: RunOptions) -> Iterator[None]:
    """Add the line to type to go on, where a signal ends a run or its test and not a fault.

    Raises:
        RunStopped: in place of KeyboardInterrupt, where there is a run to go on with.
    """
    allow = " --allow-import" if options.allow_import else ""
    line = f"Go on with: maml-rl resume {shlex.quote(str(path))}{allow}"
    try:
        yield
    except RunStopped as stopped:
        if stopped.exit_code < 128:
            raise
        raise RunStopped(f"{stopped}. {line}", stopped.exit_code) from stopped
    except KeyboardInterrupt as interrupt:
        if not (path / "config.yaml").exists():
            raise
        raise RunStopped(f"interrupted. {line}", exit_code(interrupt)) from interrupt


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
    options = parse_with_tyro(ResumeOptions, words, "maml-rl resume")
    with Importing(options.allow_import), going_on(options.run, options):
        with watching(console, options.quiet) as watch:
            trained = resume(options.run, iterations=options.iterations, watch=watch)
        report_evaluation(console, trained, RunFolder.open(options.run), None, options.quiet)


def evaluate_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl evaluate`."""
    options = parse_with_tyro(EvaluateOptions, words, "maml-rl evaluate")
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


def inspect_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl inspect`."""
    options = parse_with_tyro(InspectOptions, words, "maml-rl inspect")
    inspect_run(options.path, console)


def replay_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl replay`."""
    options = parse_with_tyro(ReplayOptions, words, "maml-rl replay")
    with Importing(options.allow_import):
        dump = read_dump(options.dump)
        broken, family = dump.divergence, dump.experiment.family
        again = play(family, broken.task, broken.start, broken.actions)
    last = len(broken.actions) - 1
    console.print(
        f"{family.name}, task {family.describe_task(broken.task)}: iteration {dump.iteration}, "
        f"task {broken.task_index} (seed {broken.task_seed}), episode {broken.episode}, "
        f"control step {last}",
        highlight=False,
        soft_wrap=True,
    )
    for name, values in {**dump.state, "action": broken.actions[-1]}.items():
        numbers = " ".join(f"{v:.6g}" for v in values)
        console.print(f"  {printable(name)}: {numbers}", highlight=False, soft_wrap=True)
    if again.diverged_at != last:
        what = (
            "did not break down"
            if again.diverged_at is None
            else f"broke down at control step {again.diverged_at}"
        )
        made_with = ", ".join(differences(dump.versions)) or "the versions that are here"
        raise RunStopped(f"here the simulation {what}; the dump was made with {made_with}", 3)
    same = all(np.array_equal(again.state.get(n, ()), v) for n, v in dump.state.items())
    how = "from the very same state" if same else "from a state that differs in its last digits"
    console.print(f"The simulation broke down again in this step, {how}.", soft_wrap=True)


def list_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl list`."""

    @dataclass(frozen=True)
    class ListOptions:
        """Show task families, their settings, and the experiments that ship."""

    parse_with_tyro(ListOptions, words, "maml-rl list")
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
    for name, path in shipped_experiments().items():
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
    options = parse_with_tyro(SpeedOptions, words, "maml-rl speed")
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
    "inspect": inspect_command,
    "replay": replay_command,
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
    console = Terminal(markup=False)
    if not words or words[0] in ("-h", "--help", "help"):
        print(INTRODUCTION, end="")
        return 0 if words else 2
    try:
        if words[0] not in COMMANDS:
            near = difflib.get_close_matches(words[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            raise refusal(f"there is no command {words[0]!r}: {hint}")
        with printed_warnings():
            COMMANDS[words[0]](words[1:], console)
    except RunStopped as stopped:
        complain(stopped)
        return stopped.exit_code
    except (InputError, envs.FamilyError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt as interrupt:
        complain("interrupted")
        return exit_code(interrupt)
    return 0


def complain(what: object) -> None:
    """Print a message on stderr, whatever a file or a word put into it, if it can be written."""
    lines = map(printable, str(what).splitlines())
    with suppress(OSError):
        print("maml-rl: " + "\n".join(lines), file=sys.stderr, flush=True)


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Print every RunWarning on stderr as a sentence, each time it comes."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, RunWarning):
            complain(message)
        else:
            before(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", RunWarning)
        before, warnings.showwarning = warnings.showwarning, show
        yield
