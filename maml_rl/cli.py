"""The command line: what each command takes, prints and exits with.

Exit codes: 0; 1 a bug of ours; 2 bad input; 3 a run stopped itself; 4 a cluster has no worker left;
130, 143 signals.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import tyro
from rich.console import Console

import envs
from envs import TaskFamily
from maml_rl import cluster_speed, gpu_speed, speed
from maml_rl.cli_evaluate import benchmark_command, evaluate_command, report_run
from maml_rl.cli_render import render_command, render_trained, report_command
from maml_rl.cli_shared import (
    CLUSTER_FLAGS,
    ClusterOptions,
    DataOptions,
    Importing,
    PlaceOptions,
    RunOptions,
    Switch,
    command_line,
    going_on,
    refuse_options,
    split_target,
    supervised_run,
)
from maml_rl.config import (
    Experiment,
    experiment_type,
    experiment_words,
    find_experiment,
    find_run,
    is_supervised,
)
from maml_rl.devices import Device, Physics, check_place
from maml_rl.errors import InputError, RunStopped, RunWarning, printable, refusal
from maml_rl.inspection import inspect_run
from maml_rl.listing import show_experiments, show_families, show_policies, show_problems
from maml_rl.plain_yaml import read_yaml
from maml_rl.replay import play, read_dump
from maml_rl.runs import RunFolder
from maml_rl.settings import normal_flag, parse_command, parse_options
from maml_rl.signals import exit_code
from maml_rl.supervised.commands import data_command, resume_supervised, train_supervised
from maml_rl.terminal import (
    Terminal,
    step_words,
    watching,
)
from maml_rl.train import meta_train, resume
from maml_rl.trained import placed
from maml_rl.versions import differences
from maml_rl.workplace import checked, workplace_for

INTRODUCTION = """\
maml-rl: policies that learn a new task from a few episodes and one gradient step.

  maml-rl train EXPERIMENT     meta-train a policy or network; a YAML file or a shipped name
  maml-rl resume RUN           go on with an interrupted run, or extend a finished one
  maml-rl evaluate RUN...      test policies: return against gradient steps, with figures
  maml-rl benchmark FILE       train and test a meta-policy and its baselines side by side
  maml-rl render RUN           videos of a policy before and after each gradient step
  maml-rl report RUN...        one HTML page of a run, a benchmark, or several runs
  maml-rl inspect RUN          what a run or a checkpoint holds, and whether it is whole
  maml-rl replay DUMP          see again a simulation that broke down in training
  maml-rl data NAME DIR        make a data set of small pictures to learn from
  maml-rl list                 task families, problems, and the experiments and policies that ship
  maml-rl speed                how fast this machine samples and updates

`maml-rl COMMAND --help` shows a command's options. Start with: maml-rl train quickstart
"""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions, ClusterOptions):
    """Where a run goes and what it starts from."""

    out: Path | None = None
    """The run folder; by default runs/NAME-seedS, or the next free number."""
    init: Path | None = None
    """A run whose latest parameters to start from."""
    render: Switch = False
    """Render videos when training is done, and put the film strips into TensorBoard."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(PlaceOptions, RunOptions, ClusterOptions):
    """Go on with an interrupted run, or extend a finished one."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    iterations: int | None = None
    """A new total of iterations."""
    data: DataOptions = field(default_factory=DataOptions)
    render: Switch = False
    """Render videos when training is done, and put the film strips into TensorBoard."""


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


@dataclass(frozen=True)
class ListOptions:
    """Show task families, supervised problems, their settings, and what ships."""


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(ClusterOptions):
    """Measure how fast this machine samples and updates."""

    json: Switch = False
    """Print JSON for programs."""
    threads: int = 0
    """Threads of physics and of the update; 0 is one a core."""
    scale: float = 1.0
    """Fraction of the full number of tasks, to try the command quickly; 1 for real figures."""
    device: Device = "cpu"
    """`cuda` measures sampling, update and iterations on a GPU instead, with physics on the CPU and
    on the GPU, from 40 tasks to 64 times as many."""
    physics: Physics | None = None
    """Measure the same with one kind of physics only; without a GPU too."""
    seconds: float = math.inf
    """Of the figures of --device cuda or --physics, begin none after so many seconds; those with
    goals come first."""


def train_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl train`."""
    target, flags = split_target(words, "EXPERIMENT", "maml-rl train quickstart")
    allowed = any(normal_flag(w) == "allow_import" for w in flags)
    ours = [f.name for f in dataclasses.fields(TrainOptions)]
    ours += CLUSTER_FLAGS
    with Importing(allowed), ExitStack() as stack:
        file = find_experiment(target)
        tree = read_yaml(file)
        if isinstance(tree.get("experiment"), str) and "family" not in tree:
            raise refusal(f"{file} is a benchmark: maml-rl benchmark {file}")
        if is_supervised(tree):
            train_supervised(target, file, tree, flags, console)
            return
        family, arguments = experiment_words(tree, str(file), flags, ignored=ours)

        settings = experiment_type(family, tyro.conf.arg(name=""))
        experiment, options = parse_command(
            settings, TrainOptions, arguments, f"maml-rl train {target}"
        )
        path = options.out or RunFolder.default_path(experiment.name, experiment.seed)
        RunFolder.check_free(path)
        init = options.init and find_run(options.init)
        if init is not None:
            RunFolder.open(init)
        place = stack.enter_context(workplace_for(options.cluster))
        place.check(experiment, "sampling", "evaluation")
        if not options.quiet:
            console.print(describe(experiment), highlight=False, soft_wrap=True)
        with going_on(command_line("resume", path, options, options.cluster), path):
            with watching(console, options.quiet) as watch:
                meta_train(experiment, out=path, init=init, watch=watch, engine=place.engine)
            report_run(console, path, place, options.quiet)
            if options.render:
                render_trained(console, path, quiet=options.quiet)
    if not options.quiet:
        console.print(f"Run folder: {path}", highlight=False, soft_wrap=True)


def describe(experiment: Experiment[TaskFamily]) -> str:
    """Return in a sentence what is about to be trained."""
    family, sampling = experiment.family, experiment.sampling
    protocol = family.protocol_name
    inner = experiment.adaptation.inner_steps
    return (
        f"Training {family.name}{f' ({protocol} protocol)' if protocol else ''}: "
        f"{experiment.iterations} iterations of {sampling.tasks} tasks x {sampling.episodes} "
        f"episodes x {family.episode_steps} control steps, "
        + (f"before and {step_words(inner)}." if inner else "without adaptation.")
        + place_words(experiment)
    )


def place_words(experiment: Experiment[TaskFamily]) -> str:
    """Return in a sentence where it is trained; empty if that is the CPU alone."""
    policy = f"the policy is on {experiment.device}"
    if experiment.physics == "warp":
        return (
            f" Physics by mujoco_warp, and {policy}. Kernels are compiled first, once on a "
            "machine, which takes a while."
        )
    return "" if experiment.device == "cpu" else f" Physics on CPU threads, and {policy}."


def resume_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl resume`."""
    options = parse_options(ResumeOptions, words, "maml-rl resume")
    options = dataclasses.replace(options, run=find_run(options.run))
    if supervised_run(options.run):
        refuse_options(
            {
                "--render": options.render,
                "--allow-import": options.allow_import,
                "--physics": options.physics is not None,
                "--cluster.address": bool(options.cluster.address),
            },
            "supervised",
        )
        resume_supervised(
            options.run,
            iterations=options.iterations,
            root=options.data.root,
            device=options.device,
            quiet=options.quiet,
            console=console,
        )
        return
    refuse_options({"--data.root": options.data.root is not None}, "reinforcement")
    line = command_line("resume", options.run, options, options.cluster)
    with (
        Importing(options.allow_import),
        workplace_for(options.cluster) as place,
        going_on(line, options.run),
    ):
        with watching(console, options.quiet) as watch:
            resume(
                options.run,
                iterations=options.iterations,
                device=options.device,
                physics=options.physics,
                watch=watch,
                engine=checked(place),
            )
        report_run(console, options.run, place, options.quiet)
        if options.render:
            render_trained(console, options.run, quiet=options.quiet)


def inspect_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl inspect`."""
    options = parse_options(InspectOptions, words, "maml-rl inspect")
    inspect_run(find_run(options.path), console)


def replay_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl replay`."""
    options = parse_options(ReplayOptions, words, "maml-rl replay")
    with Importing(options.allow_import):
        dump = read_dump(options.dump)
        experiment = placed(dump.experiment)
        broken, family = dump.divergence, experiment.family
        again = play(experiment, broken)
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
    parse_options(ListOptions, words, "maml-rl list")
    show_families(console)
    show_problems(console)
    show_experiments(console)
    show_policies(console)


def speed_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl speed`."""
    options = parse_options(SpeedOptions, words, "maml-rl speed")
    if options.threads < 0:
        raise InputError(f"threads must be at least 0, got {options.threads}")
    if not 0 < options.scale <= 1:
        raise InputError(f"scale must be above 0 and at most 1, got {options.scale}")

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    told = None if options.json else say
    if options.cluster.address:
        others = {
            "--threads": options.threads != 0,
            "--device": options.device != "cpu",
            "--physics": options.physics is not None,
            "--seconds": options.seconds < math.inf,
        }
        if ignored := [flag for flag, is_given in others.items() if is_given]:
            raise refusal(f"{' and '.join(ignored)} means nothing with --cluster.address")
        rows = cluster_speed.measure(options.cluster, options.scale, told)
        made: object = rows
        shown = speed.table(rows)
    elif options.device == "cpu" and options.physics is None:
        if options.seconds < math.inf:
            raise InputError("--seconds goes with --device cuda, or with --physics")
        rows = speed.measure(options.threads, options.scale, told)
        made = rows
        shown = speed.table(rows)
    else:
        kinds: tuple[Physics, ...] = ("cpu", "warp")
        kinds = kinds if options.physics is None else (options.physics,)
        for one in kinds:
            check_place(options.device, one)
        cases = gpu_speed.measure(
            options.device,
            physics=kinds,
            scale=options.scale,
            threads=options.threads,
            seconds=options.seconds,
            say=told,
        )
        made = [{"case": case, **figure} for case, figure in cases]
        shown = gpu_speed.table(cases)
    if options.json:
        print(json.dumps(made, indent=2))
    else:
        console.print(shown)


COMMANDS: Mapping[str, Callable[[Sequence[str], Console], None]] = {
    "train": train_command,
    "resume": resume_command,
    "evaluate": evaluate_command,
    "benchmark": benchmark_command,
    "render": render_command,
    "report": report_command,
    "inspect": inspect_command,
    "replay": replay_command,
    "data": data_command,
    "list": list_command,
    "speed": speed_command,
}


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
    except BrokenPipeError:
        # Whoever read what is printed, such as `head`, has enough; nor shall Python complain.
        with suppress(BrokenPipeError):
            sys.stdout.close()
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
