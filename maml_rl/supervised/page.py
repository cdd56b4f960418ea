"""`maml-rl report` of supervised runs: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import importlib.util
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maml_rl.errors import InputError
from maml_rl.report.charts import NARROW, SMALL, WIDE, Frame
from maml_rl.report.plots import metrics_of
from maml_rl.report.sheet import filled, page_file, page_name, plot_of, write_page
from maml_rl.report.tables import NOTHING, Cell, Group, Row, Table, number
from maml_rl.report.tested import check_run
from maml_rl.report.training import (
    Command,
    Sentence,
    Training,
    checkpoint_digest,
    config_text,
    duration,
    run_name,
    settings_table,
    versions_tables,
    yes_or_no,
)
from maml_rl.results import results_folder
from maml_rl.runs import RunFolder
from maml_rl.supervised.close_ups import fits_of, pictured
from maml_rl.supervised.config import SupervisedExperiment
from maml_rl.supervised.evaluate import (
    MAML,
    ORACLE,
    PRETRAINED,
    RANDOM,
    Outcome,
    Subject,
    kind_of,
    load_subjects,
    outcomes_of,
    own_step_sizes,
)
from maml_rl.supervised.few_shot import FewShotImages
from maml_rl.supervised.looks import (
    SHORT_STATISTICS,
    axis_name,
    names_of,
    papers_by_method,
    shots_words,
    subjects_of,
    unit_of,
)
from maml_rl.supervised.own import Arrays
from maml_rl.supervised.plots import curves_charts, fits_charts, steps_charts
from maml_rl.supervised.results import STATISTICS, notes_of, shown, write_results
from maml_rl.supervised.sinusoid import Sinusoid
from maml_rl.supervised.stored import stored_test
from maml_rl.supervised.tasks import Problem
from maml_rl.supervised.trained import experiment_of, placed, restore
from maml_rl.terminal import step_words
from maml_rl.versions import versions

Settings = SupervisedExperiment[Problem]
Say = Callable[[str], None]


def make_report(
    targets: Sequence[Path],
    out: Path | None,
    *,
    checkpoint: str = "latest",
    root: str | None = None,
    say: Say,
) -> Path:
    """Write the page of supervised runs, and return its file.

    Args:
        targets: run folders.
        out: the file to write; by default report.html in the folder, and beside the first of
            several.
        checkpoint: which of each run: "latest", "previous" or "best".
        root: where their images are now, if not where they were.
        say: is told what takes time.

    Raises:
        InputError: for what is no run, cannot be compared, or a file that cannot be there.
        RunStopped: if the disk does not take the page or a test.
    """
    for target in targets:
        check_run(target)
    file = page_file(targets, out)
    tested = gather(targets, checkpoint, root, say)
    return write_page(file, page(tested, page_name(targets), checkpoint, root, say))


@dataclass(frozen=True)
class Tested:
    """Networks with their tests."""

    subjects: list[Subject]
    outcomes: list[Outcome]
    versions: list[Mapping[str, str]]
    """What the tests were made with."""
    lost: str = ""
    """Why there are no images, "" where there are or none are needed."""


def gather(targets: Sequence[Path], checkpoint: str, root: str | None, say: Say) -> Tested:
    """Return the tests of runs: their own, if they are there and alike, or new ones.

    A run's own is written to RUN/evaluation where it has none.

    Raises:
        InputError: if runs cannot be compared, or images are missing for a test.
        RunStopped: if a test cannot be written.
    """
    lost: InputError | None = None
    try:
        subjects = load_subjects(targets, checkpoint, root)
    except InputError as error:
        subjects, lost = without_images(targets, checkpoint, root, error), error
    found = [stored_test(subject) for subject in subjects]
    own = [test for test in found if test is not None]
    first = subjects[0].experiment.evaluation
    if len(own) == len(subjects) and all(
        own_step_sizes(first, subject) == subject.experiment.evaluation for subject in subjects
    ):
        outcomes = [one for test in own for one in test.outcomes]
        why = "" if lost is None else str(lost)
        return Tested(subjects, outcomes, [test.versions for test in own], why)
    if lost is not None:
        raise lost
    if len(subjects) > 1:
        say(
            "the runs have no tests by the same settings, and are tested now by those of "
            f"{subjects[0].path} ..."
        )
        outcomes = [
            one
            for subject in subjects
            for one in outcomes_of(subject, own_step_sizes(first, subject))
        ]
    elif checkpoint == "latest":
        say(f"{targets[0]} has no test of its newest checkpoint and is tested now ...")
        outcomes = write_own_test(subjects[0])
    else:
        say(f"{targets[0]} has no test of its checkpoint {checkpoint!r} and is tested now ...")
        outcomes = list(outcomes_of(subjects[0], first))
    return Tested(subjects, outcomes, [versions()])


def without_images(
    targets: Sequence[Path], checkpoint: str, root: str | None, why: InputError
) -> list[Subject]:
    """Return networks though their images are not there, to show a test that is stored.

    Raises:
        InputError: `why` they could not be loaded, if it is not for their images.
    """

    def gone(tasks: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        raise why

    subjects = []
    for run in targets:
        folder = RunFolder.open(run)
        experiment = placed(experiment_of(folder, root))
        if not isinstance(experiment.data, FewShotImages):
            raise why
        learned, found = restore(folder, experiment, checkpoint, tasks=gone)
        subjects.append(Subject(run, learned, found.state.iteration))
    if len({kind_of(subject.experiment.data) for subject in subjects}) > 1:
        raise why
    return subjects


def write_own_test(subject: Subject) -> list[Outcome]:
    """Test a run's newest network by its experiment's own settings, and write RUN/evaluation."""
    settings = subject.experiment.evaluation
    outcomes = list(outcomes_of(subject, settings))
    folder = results_folder([subject.path], None, usual=True)
    write_results(folder, outcomes, settings, {"checkpoint": "latest"})
    return outcomes


def page(tested: Tested, name: str, checkpoint: str, root: str | None, say: Say) -> str:
    """Return the page.

    Args:
        tested: networks with their tests.
        name: of the page.
        checkpoint: which of each run.
        root: where their images are now, if not where they were.
        say: is told what is left out.
    """
    subjects, outcomes = tested.subjects, tested.outcomes
    problem = subjects[0].experiment.data
    names = names_of(subjects)
    rows = fits_of(outcomes)
    steps, fits, curves = steps_charts(outcomes), fits_charts(rows), curves_charts(outcomes)
    each = len(fits) // len(rows) if rows else 0
    versions = versions_tables([subject.path for subject in subjects], tested.versions)
    notes = []
    if tested.lost:
        notes.append(
            "The figures are those of the stored test; no examples are shown, for the images are "
            f"not there: {tested.lost}"
        )
        say(notes[-1])
    return filled(
        "supervised.html",
        charts=[*steps, *fits, *curves],
        name=name,
        kind=kind_of(problem),
        sentences=sentences(subjects),
        notes=notes,
        runs=[run_name(subject.path) for subject in subjects],
        folder="",
        measure=axis_name(problem)[0],
        steps=[plot_of(chart, *sizes(steps)) for chart in steps],
        papers=bool(papers_by_method(outcomes)),
        normalises=any(one.statistics for one in outcomes),
        tables=tables_of(outcomes),
        reading=reading(outcomes),
        fits=[
            (row.name, [plot_of(c, SMALL) for c in fits[each * place : each * (place + 1)]])
            for place, row in enumerate(rows)
        ],
        examples=None if tested.lost else examples(outcomes[0], say),
        images=isinstance(problem, FewShotImages),
        curves=[plot_of(chart, *sizes(curves)) for chart in curves],
        settings=settings_table(
            dict(zip(names, (subject.experiment for subject in subjects), strict=True)), SETTINGS
        ),
        counted="tasks",
        timed="sampling, updating and validating",
        trainings=[
            training(subject, method, checkpoint)
            for subject, method in zip(subjects, names, strict=True)
        ],
        versions=versions,
        packages=list(dict.fromkeys(name for one in versions for name in one.versions)),
        commands=commands(subjects, checkpoint, root),
        checkpoint=checkpoint,
    )


def sizes(charts: Sequence[object]) -> Sequence[Frame]:
    """Return the sizes that charts are drawn in: small where they are many."""
    return (SMALL,) if len(charts) > 2 else (WIDE, NARROW)


class Example(NamedTuple):
    """The picture of some tasks' images."""

    source: str
    words: str


def examples(one: Outcome, say: Say) -> Example | None:
    """Return the picture of test tasks' images; None of no images, or without matplotlib."""
    tasks = pictured(one)
    if not tasks:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        say("no examples in it: they need matplotlib: pip install 'maml-rl[plot]'")
        return None
    # Imported on demand: it is slow, and an extra.
    from maml_rl.supervised.figures import examples_png

    content = base64.b64encode(examples_png(one, tasks)).decode()
    parts = [
        f"task {number + 1}: "
        + ", ".join(f"{task.right(step):.0%} right {step_words(step)}" for step in task.guesses)
        for number, task in enumerate(tasks)
    ]
    return Example(f"data:image/png;base64,{content}", f"Test tasks' images. {'; '.join(parts)}.")


def tables_of(outcomes: Sequence[Outcome]) -> list[Table]:
    """Return score against gradient steps: a table a number of shots and batch normalisation."""
    problem = outcomes[0].subject.experiment.data
    classifies, unit = problem.classifies, unit_of(problem)
    name, percent = axis_name(problem)
    score = f"{name} ({percent})" if percent else name
    subjects = subjects_of(outcomes)
    names = {id(s): name for s, name in zip(subjects, names_of(subjects), strict=True)}
    tables = []
    for shots, statistics in dict.fromkeys((one.shots, one.statistics) for one in outcomes):
        some = [one for one in outcomes if (one.shots, one.statistics) == (shots, statistics)]

        def cell(value: float) -> Cell:
            return number(shown(value, classifies), unit * value)

        groups = []
        for one in some:
            with np.errstate(invalid="ignore", over="ignore"):
                means, half, sds = one.means, one.half_widths, one.sds
            rows = []
            for step in range(len(means)):
                cells = [cell(float(values[step])) for values in (means, half, sds)]
                share = worse(one, step)
                rows.append(Row(str(step), [*cells, number(f"{share:.0%}", share)]))
            size = f"{one.step_size:g}" if len(means) > 1 else ""
            groups.append(Group(names[id(one.subject)], size, rows))
        for method, scores in papers_by_method(some):
            rows = [
                Row(
                    str(one.steps),
                    [cell(one.mean / unit), cell(one.half_width / unit), NOTHING, NOTHING],
                )
                for one in scores
            ]
            groups.append(Group(f"{method}, the paper's", "", rows))
        words = STATISTICS[statistics]
        caption = shots_words(problem, shots) + (f", {words}" if words else "")
        tables.append(Table(caption, [score, "± 95 %", "spread", "worse"], groups))
    return tables


def worse(one: Outcome, step: int) -> float:
    """Return the share of tasks that gradient steps have made worse; NaN before any."""
    if step == 0:
        return math.nan
    before, after = one.scores[0], one.scores[step]
    classifies = one.subject.experiment.data.classifies
    # What is no number is no better.
    fine = after >= before if classifies else after <= before
    return float(1 - fine.mean())


def reading(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what a newcomer needs to read the tables, a sentence a line."""
    count = outcomes[0].scores.shape[1]
    return [
        f"Means over {count} test task{'s' * (count > 1)} that training never saw, "
        "± 1.96 standard deviations / sqrt(tasks).",
        *notes_of(outcomes)[1:],
        "spread: standard deviation over tasks; worse: share of tasks with a worse score than "
        "before adapting.",
        *(
            ["Batch normalisation by the query's statistics sees all images to be judged at once."]
            if any(one.statistics for one in outcomes)
            else []
        ),
    ]


WHAT: Mapping[str, Callable[[Settings], str]] = {
    PRETRAINED: lambda e: "trained on all tasks alike, and adapted in the test alone",
    ORACLE: lambda e: "trained with its task among its inputs, so it takes no step",
    RANDOM: lambda e: "not trained, and adapted in the test alone",
}
"""What became of a network, where it is not meta-trained."""


def meta_trained(experiment: Settings) -> str:
    """Return what became of a network that is."""
    problem, steps = experiment.data, experiment.adaptation.inner_steps
    each = " of each class" if problem.classifies else ""
    return (
        f"meta-trained so that {step_words(steps).removeprefix('after ')} on "
        f"{shots_words(problem, problem.shots)}{each} adapt{'s' * (steps == 1)} it to a task"
    )


def sentences(subjects: Sequence[Subject]) -> list[Sentence]:
    """Return in a sentence for each network what was trained."""
    result = []
    for subject, name in zip(subjects, names_of(subjects), strict=True):
        experiment = subject.experiment
        text = WHAT.get(subject.method, meta_trained)(experiment)
        if subject.method not in (MAML, *WHAT):
            text += f" ({subject.method})"
        if subject.iterations:
            text += f"; {subject.iterations} iteration{'s' * (subject.iterations != 1)}"
            text += f" of {experiment.outer.tasks} task{'s' * (experiment.outer.tasks > 1)}"
        text += f"; seed {experiment.seed}."
        if len(subjects) == 1:
            text, name = f"This is a network for {kind_of(experiment.data)}, {text}", ""
        result.append(Sentence(name, text))
    return result


def told(experiment: Settings) -> str:
    """Return whether a sinusoid's network observes its task, "" for other problems."""
    problem = experiment.data
    return yes_or_no(problem.observe_task) if isinstance(problem, Sinusoid) else ""


def network_words(experiment: Settings) -> str:
    """Return what a network is made of."""
    network = experiment.network
    if network.kind == "mlp":
        widths = ", ".join(map(str, network.layers))
        return f"fully connected, hidden layers {widths}" + (
            ", batch-normalised" if network.batch_norm else ""
        )
    return f"{network.kind}, {network.blocks} blocks of {network.filters} filters"


SETTINGS: Mapping[str, Callable[[Settings], str]] = {
    "problem": lambda e: kind_of(e.data),
    "examples to adapt to": lambda e: (
        shots_words(e.data, e.data.shots) + (" of each class" if e.data.classifies else "")
    ),
    "observes its task": told,
    "network": network_words,
    "iterations wanted": lambda e: str(e.iterations),
    "tasks of a batch": lambda e: str(e.outer.tasks),
    "Adam's learning rate": lambda e: f"{e.outer.learning_rate:g}",
    "gradient steps to a task in training": lambda e: str(e.adaptation.inner_steps),
    "step size alpha": lambda e: f"{e.adaptation.step_size:g}",
    "learned step sizes": lambda e: yes_or_no(e.adaptation.learned_step_sizes),
    "loss of classification": lambda e: e.adaptation.loss if e.data.classifies else "",
    "first order": lambda e: yes_or_no(e.adaptation.first_order),
    "adapted": lambda e: {"all": "all layers", "last-layer": "the last layer"}[
        e.adaptation.adapted
    ],
    "multi-step loss": lambda e: yes_or_no(e.adaptation.multi_step_loss),
    "trained with batch norm by": lambda e: (
        SHORT_STATISTICS["batch" if e.adaptation.transductive else "support"]
        if e.network.kind != "mlp" or e.network.batch_norm
        else ""
    ),
    "test of its own": lambda e: (
        f"{e.evaluation.tasks} tasks, {e.evaluation.steps} gradient steps, with "
        + " and ".join(shots_words(e.data, n) for n in e.evaluation.shots or (e.data.shots,))
    ),
}
"""The settings that matter, in words."""


def training(subject: Subject, method: str, checkpoint: str) -> Training:
    """Return what a run took."""
    metrics = metrics_of(subject.path, subject.iterations)
    names = [f"seconds_{name}" for name in ("sampling", "updating", "validating")]
    seconds = sum(sum(metrics.get(name, ())) for name in names)
    return Training(
        run=run_name(subject.path),
        method=method,
        seed=subject.experiment.seed,
        iterations=subject.iterations,
        amount=f"{subject.iterations * subject.experiment.outer.tasks:,}",
        time=f"{seconds:.0f} s" if seconds < 90 else duration(seconds),
        digest=checkpoint_digest(subject.path, checkpoint),
        config=config_text(subject.path),
    )


def commands(subjects: Sequence[Subject], checkpoint: str, root: str | None) -> list[Command]:
    """Return what to type to make a page and all that is in it again."""
    runs = [run_name(subject.path) for subject in subjects]
    which = [] if checkpoint == "latest" else ["--checkpoint", checkpoint]
    images = [] if root is None else ["--data.root", root]

    def line(command: str, *words: str) -> str:
        return shlex.join(["maml-rl", command, *words, *images])

    return [
        *(
            Command(
                f"training of {run}", line("train", f"{run}/config.yaml", "--out", f"{run}-again")
            )
            for run in runs
        ),
        Command("test, with figures", line("evaluate", *runs, *which)),
        Command("this page", line("report", *runs, *which)),
    ]
