"""`maml-rl evaluate` and `maml-rl benchmark`: options, order of work, what is printed."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from envs import Navigation2D, TaskFamily
from maml_rl.assess import (
    Subject,
    load_subject,
    load_subjects,
    outcomes_of,
    under_settings,
    ways_of,
    with_step_size,
)
from maml_rl.benchmark import (
    check_plan,
    check_reused,
    choose_step_sizes,
    in_place_of,
    plan,
    progress,
    tasks_to_test,
    train_planned,
    train_side_by_side,
)
from maml_rl.benchmark_file import Benchmark, base_experiment, benchmark_words
from maml_rl.cli_render import render_after
from maml_rl.cli_shared import (
    CLUSTER_FLAGS,
    ClusterOptions,
    DataOptions,
    Importing,
    PlaceOptions,
    RunOptions,
    Switch,
    going_on,
    refuse_options,
    split_target,
    supervised_run,
    supervised_runs,
)
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.comparison import METHODS, Comparison, Outcome
from maml_rl.config import find_file, find_run, shipped_benchmarks, shipped_supervised
from maml_rl.errors import InputError, refusal
from maml_rl.report.tested import is_run
from maml_rl.results import NEWEST, results_folder, write_own_test, write_results
from maml_rl.settings import parse_options, parse_with_tyro
from maml_rl.supervised.commands import evaluate_supervised
from maml_rl.task_sets import TaskSet, between, chosen, held_out, papers_own
from maml_rl.terminal import (
    evaluation_notes,
    evaluation_tables,
    later_steps_note,
    watching,
    watching_runs,
)
from maml_rl.workplace import Workplace, workplace_for


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(PlaceOptions, RunOptions, ClusterOptions):
    """Test policies, of one run or several side by side: return against gradient steps."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders. Runs of the same settings and several seeds count as one method; what is not
    given below is as the first run's experiment says, for all of them."""
    out: Path | None = None
    """Where to write evaluation.csv, summary.json and figures; by default RUN/evaluation, and for
    several runs `evaluation` beside the first."""
    checkpoint: Literal["latest", "previous", "best"] = "latest"
    """The newest, the one before it, or the best by training return after adaptation (of a
    supervised run, by its score on validation tasks)."""
    steps: int | None = None
    """Gradient steps, and for an oracle too, which otherwise takes none."""
    episodes: int | None = None
    """Episodes for every figure and every update."""
    step_size: tuple[float, ...] = ()
    """Step sizes of the first update to try, one after the other; by default each run's own."""
    tasks: Literal["test", "paper"] = "test"
    """Tasks that training never drew, or the 40 that the paper's numbers were measured on."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A task of your own, the numbers of one joined by commas (0.3,-0.2); may be repeated."""
    tasks_from: tuple[float, float] | None = None
    """Tasks drawn between two numbers, such as speeds that were never trained."""
    shots: tuple[int, ...] = ()
    """Of a supervised run: examples to adapt to (of each class), a test each."""
    data: DataOptions = field(default_factory=DataOptions)
    render: Switch = False
    """Render videos of every run too, into RUN/video, as tested (by the first of several step
    sizes), of the tasks of your own where you gave any; see `maml-rl render`."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(RunOptions, ClusterOptions):
    """Where the runs go, and which there are already."""

    out: Path | None = None
    """The folder of the runs and results; by default runs/NAME. What is there is gone on with."""
    reuse: tuple[Path, ...] = ()
    """Run folders elsewhere to take in place of training."""
    settings_may_differ: Switch = False
    """Take the runs of --reuse as they are, though they were trained with other settings than the
    benchmark's or for other iterations, on a budget of their own; it is said in what."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkCommand:
    """Train and test maml, pretrained, oracle and random side by side, each on the same budget.

    Every setting of the experiment is a flag too, such as --sampling.tasks 4.
    """

    benchmark: Annotated[Benchmark, tyro.conf.arg(name="")]
    options: Annotated[BenchmarkOptions, tyro.conf.arg(name="")]


def report_results(
    console: Console,
    subjects: Sequence[Subject],
    outcomes: Sequence[Outcome],
    folder: Path,
    *,
    quiet: bool,
    notes: Mapping[str, object],
) -> None:
    """Score tests, write them to `folder`, print them, and draw them."""
    family = subjects[0].family
    compared = Comparison.of(outcomes, family)
    write_results(folder, outcomes, compared, subjects, notes)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if not quiet:
        show_results(console, compared, subjects, folder)
    if importlib.util.find_spec("matplotlib") is None:
        if not quiet:
            say("Figures need matplotlib: pip install 'maml-rl[plot]'")
        return
    # Imported on demand: it is slow, and an extra.
    from maml_rl import figures

    plane = isinstance(family, Navigation2D)
    ways = ways_of(subjects, outcomes, DRAWN_TASKS) if plane else None
    drawn = figures.draw(folder, subjects, outcomes, compared.scores, ways)
    if not quiet:
        say(f"Drawn, as PNG and SVG: {', '.join(drawn)}")


DRAWN_TASKS = 3
"""Of navigation, whose episodes are drawn."""


def show_results(
    console: Console, compared: Comparison, subjects: Sequence[Subject], folder: Path
) -> None:
    """Print what tests come to, and where they are."""
    family = subjects[0].family
    console.print()
    for table in evaluation_tables(compared, family):
        console.print(table)
    notes = evaluation_notes(compared, family)
    experiments = {s.method: s.trained.experiment for s in subjects}
    scales: dict[str, float] = {
        method: e.evaluation.later_step_scale
        for method, e in experiments.items()
        if e.evaluation.steps > max(1, e.adaptation.inner_steps)
    }
    if scales:
        notes.append(later_steps_note(scales))
    for note in [*notes, f"Written: {folder}"]:
        console.print(note, highlight=False, soft_wrap=True)


def report_run(console: Console, run: Path, place: Workplace, quiet: bool) -> None:
    """Test a run that has just been trained, by its experiment's own settings."""
    subject = load_subject(run)
    outcomes = write_own_test(subject, place.test)
    if not quiet:
        compared = Comparison.of(outcomes, subject.family)
        show_results(console, compared, [subject], results_folder([run], None, usual=True))


def evaluate_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl evaluate`."""
    options = parse_options(EvaluateOptions, words, "maml-rl evaluate")
    options = replace(options, run=tuple(map(find_run, options.run)))
    if not options.run:
        raise InputError("expected RUN first, as in `maml-rl evaluate runs/quickstart-seed0`")
    usual = replace(
        options,
        out=None,
        quiet=False,
        allow_import=False,
        render=False,
        data=DataOptions(),
        device=None,
        cluster=ClusterSettings(),
    ) == EvaluateOptions(run=options.run)
    if supervised_runs(options.run):
        evaluate_supervised_runs(options, usual, console)
        return
    refuse_options(
        {"--shots": bool(options.shots), "--data.root": options.data.root is not None},
        "reinforcement",
    )
    with Importing(options.allow_import), workplace_for(options.cluster) as place:
        subjects = load_subjects(options.run, options.checkpoint, options.device, options.physics)
        first = subjects[0].trained.experiment
        own = first.evaluation
        try:
            settings = replace(
                own,
                steps=own.steps if options.steps is None else options.steps,
                episodes=own.episodes if options.episodes is None else options.episodes,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        subjects = under_settings(subjects, settings, oracle_steps=options.steps or 0)
        tasks = wanted_tasks(options, first.family, settings.tasks)
        placed = replace(first, evaluation=replace(settings, tasks=len(tasks.tasks)))
        place.check(placed, "evaluation", runs=len(subjects) * max(1, len(options.step_size)))
        sizes = dict.fromkeys(METHODS, options.step_size)
        outcomes = outcomes_of(subjects, tasks, sizes, place.test)
        folder = results_folder(options.run, options.out, usual=usual)
        notes = {"checkpoint": options.checkpoint}
        report_results(console, subjects, outcomes, folder, quiet=options.quiet, notes=notes)
        if options.render:
            render_after(
                console,
                with_first_step_size(subjects, options.step_size),
                quiet=options.quiet,
                tasks=tasks if options.task else None,
                checkpoint=options.checkpoint,
            )


def evaluate_supervised_runs(options: EvaluateOptions, usual: bool, console: Console) -> None:
    """Test supervised runs, having refused what means nothing for them."""
    refuse_options(
        {
            "--episodes": options.episodes is not None,
            "--tasks": options.tasks != "test",
            "--task": bool(options.task),
            "--tasks-from": options.tasks_from is not None,
            "--render": options.render,
            "--allow-import": options.allow_import,
            "--physics": options.physics is not None,
            "--cluster.address": bool(options.cluster.address),
        },
        "supervised",
    )
    evaluate_supervised(
        options.run,
        checkpoint=options.checkpoint,
        root=options.data.root,
        device=options.device,
        out=options.out,
        steps=options.steps,
        shots=options.shots,
        step_sizes=options.step_size,
        usual=usual,
        quiet=options.quiet,
        console=console,
    )


def with_first_step_size(subjects: Sequence[Subject], sizes: Sequence[float]) -> list[Subject]:
    """Return policies that adapt by the first of some step sizes, or by their own."""
    if not sizes:
        return list(subjects)
    result = []
    for subject in subjects:
        experiment = subject.trained.experiment
        adaptation = with_step_size(experiment.adaptation, sizes[0])
        trained = replace(subject.trained, experiment=replace(experiment, adaptation=adaptation))
        result.append(replace(subject, trained=trained))
    return result


def wanted_tasks(options: EvaluateOptions, family: TaskFamily, count: int) -> TaskSet:
    """Return the tasks that the command line asks for.

    Raises:
        InputError: if it asks for several kinds.
        FamilyError: for what is no task of the family.
    """
    kinds: list[tuple[str, bool, Callable[[], TaskSet]]] = [
        ("--tasks paper", options.tasks == "paper", lambda: papers_own(family)),
        ("--task", bool(options.task), lambda: chosen(family, options.task)),
        (
            "--tasks-from",
            options.tasks_from is not None,
            lambda: between(family, *(options.tasks_from or (0.0, 0.0)), count),
        ),
    ]
    given = [(flag, make) for flag, is_given, make in kinds if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(flag for flag, _ in given)} exclude each other")
    return given[0][1]() if given else held_out(family, count)


def benchmark_command(words: Sequence[str], console: Console) -> None:
    """`maml-rl benchmark`."""
    target, flags = split_target(words, "FILE", "maml-rl benchmark benchmark_navigation")
    if os.path.isdir(target) and is_run(Path(target)) and supervised_run(Path(target)):
        raise refusal(
            f"{target} is a run of supervised learning, and a benchmark is of reinforcement "
            f"learning: test runs side by side (maml-rl evaluate {target} RUN ...)"
        )
    # Supervised experiments are found too, to say what to type instead.
    known = shipped_supervised() if target in shipped_supervised() else shipped_benchmarks()
    file = find_file(target, known, "benchmark")
    of_command = [f.name for f in dataclasses.fields(BenchmarkOptions)]
    of_command += CLUSTER_FLAGS
    sorted_words = benchmark_words(file, flags, ignored=of_command)
    parsed = parse_with_tyro(
        BenchmarkCommand, sorted_words.benchmark, f"maml-rl benchmark {target}"
    )
    benchmark, options = parsed.benchmark, parsed.options
    out = options.out or Path("runs") / benchmark.name

    def say(text: str) -> None:
        if not options.quiet:
            console.print(text, highlight=False, soft_wrap=True)

    with Importing(options.allow_import), workplace_for(options.cluster) as place:
        base = base_experiment(benchmark, sorted_words, file)
        tasks = tasks_to_test(benchmark, base)
        planned = plan(benchmark, base, out)
        for one in planned:
            place.check(one.experiment, "sampling", "evaluation", runs=len(planned))
        if options.settings_may_differ and not options.reuse:
            raise InputError("--settings-may-differ is of the runs of --reuse, and there are none")
        reused = [find_run(path) for path in options.reuse]
        given = check_plan(planned, reused, settings_may_differ=options.settings_may_differ)
        check_reused(planned, given, out)
        instead = {
            one.name: in_place_of(one, given[one.name]) for one in planned if one.name in given
        }
        with going_on(shlex.join(["maml-rl", "benchmark", *words])):
            to_train = [one for one in planned if one.name not in given]
            side_by_side = place.at_once(len(to_train)) > 1
            for one in planned:
                say(f"{one.name}: {instead.get(one.name) or progress(one)}")
                if one in to_train and not side_by_side:
                    with watching(console, options.quiet) as watch:
                        train_planned(one, watch, place.engine)
            if side_by_side:
                with watching_runs(console, options.quiet) as show:
                    train_side_by_side(to_train, place, show)
            loaded = [given.get(one.name) or load_subject(one.path) for one in planned]
            subjects = [
                under_settings([subject], one.experiment.evaluation)[0]
                for one, subject in zip(planned, loaded, strict=True)
            ]
            sizes = choose_step_sizes(benchmark, subjects, say, place.test)
            tried = {method: size.tried for method, size in sizes.items()}
            outcomes = outcomes_of(subjects, tasks, tried, place.test)
            notes = {
                **NEWEST,
                "benchmark": dataclasses.asdict(benchmark),
                "step_sizes": {name: dataclasses.asdict(size) for name, size in sizes.items()},
                "reused": instead,
            }
            folder = results_folder([], out, usual=True)
            report_results(console, subjects, outcomes, folder, quiet=options.quiet, notes=notes)
