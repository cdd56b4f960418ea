"""`maml-rl report`: one HTML file of a run, of several, or of a benchmark, that needs nothing else.

Its videos stand in the file itself too; see sheet.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from maml_rl.assess import Subject
from maml_rl.comparison import MAML
from maml_rl.errors import InputError
from maml_rl.looks import title
from maml_rl.paper import Point, points_for
from maml_rl.report.charts import NARROW, SMALL, WIDE
from maml_rl.report.players import Player, has_videos, player_of
from maml_rl.report.plots import curves_chart, returns_chart, task_charts
from maml_rl.report.sheet import filled, page_file, page_name, plot_of, write_page
from maml_rl.report.tables import (
    by_seed_table,
    by_task_table,
    differences_table,
    scores_table,
)
from maml_rl.report.tested import Tested, gather
from maml_rl.report.training import (
    SETTINGS,
    commands,
    experiments_of,
    run_name,
    sentences,
    settings_table,
    training_of,
    versions_tables,
)
from maml_rl.terminal import evaluation_notes, title_of


def make_report(
    targets: Sequence[Path],
    out: Path | None,
    *,
    checkpoint: str = "latest",
    say: Callable[[str], None],
    film: Callable[[Subject], object] | None = None,
) -> Path:
    """Write the page of runs or of a benchmark, and return its file.

    Args:
        targets: run folders, or one benchmark's folder.
        out: the file to write; by default report.html in the folder, and beside the first of
            several.
        checkpoint: which of each run: "latest", "previous" or "best".
        say: is told what takes time.
        film: renders a run that has no videos of that checkpoint; of a benchmark's one.

    Raises:
        InputError: for what is no run, cannot be compared, or a file that cannot be there.
        RunStopped: if a test breaks down, or the disk does not take the page.
    """
    if not targets:
        raise InputError("expected RUN first, as in `maml-rl report runs/quickstart-seed0`")
    file = page_file(targets, out)
    tested = gather(targets, checkpoint, say)
    if film is not None:
        for subject in to_film(tested):
            film(subject)
    found = [player_of(subject) for subject in tested.subjects]
    players = [player for player in found if player is not None]
    if not players:
        say(f"no videos in it: `maml-rl render {tested.subjects[0].path}` makes them")
    return write_page(file, page(tested, players, page_name(targets), checkpoint))


def to_film(tested: Tested) -> list[Subject]:
    """Return the runs given that have no videos; of a benchmark the first meta-policy, if so."""
    subjects = tested.subjects
    if tested.folder:
        subjects = [next((s for s in subjects if s.method == MAML), subjects[0])]
    return [subject for subject in subjects if not has_videos(subject)]


def page(tested: Tested, players: Sequence[Player], name: str, checkpoint: str) -> str:
    """Return the page.

    Args:
        tested: policies with their tests.
        players: the videos of those that have them.
        name: of the page.
        checkpoint: which of each run.
    """
    scores, family = tested.compared.scores, tested.subjects[0].family
    papers = papers_of(tested)
    returns = returns_chart(scores, papers, family)
    tasks = task_charts(tested.outcomes, scores, family)
    curves, curves_note = curves_chart(tested.subjects)
    charts = [returns, *tasks, *([curves] if curves else [])]
    sizes = (SMALL,) if len(tasks) > 1 else (WIDE, NARROW)
    versions = versions_tables([s.path for s in tested.subjects], tested.versions)
    tables = (
        by_task_table(scores, family),
        by_seed_table(scores),
        differences_table(tested.compared),
    )
    return filled(
        "report.html",
        charts,
        name=name,
        kind=title(family),
        tasks_words=title_of(scores[0], family),
        folder=tested.folder,
        benchmark=tested.benchmark,
        sentences=sentences(tested.subjects),
        notes=tested.notes,
        players=players,
        runs=[run_name(subject.path) for subject in tested.subjects],
        returns=plot_of(returns, WIDE, NARROW),
        scores=scores_table(tested.compared, papers, family),
        reading=evaluation_notes(tested.compared, family),
        papers=papers,
        tables=[table for table in tables if table is not None],
        tasks=[plot_of(chart, *sizes) for chart in tasks],
        curves=plot_of(curves, WIDE, NARROW) if curves else None,
        curves_note=curves_note,
        settings=settings_table(experiments_of(tested.subjects), SETTINGS),
        counted="control steps",
        timed="sampling and updating",
        trainings=[training_of(subject, checkpoint) for subject in tested.subjects],
        versions=versions,
        packages=list(dict.fromkeys(name for one in versions for name in one.versions)),
        commands=commands(tested, checkpoint),
        checkpoint=checkpoint,
    )


def papers_of(tested: Tested) -> dict[str, list[Point]]:
    """Return the paper's points that stand beside a test, by method: none of more steps."""
    last = max(step.steps for one in tested.compared.scores for step in one.steps)
    outcome, family = tested.outcomes[0], tested.subjects[0].family
    points = points_for(family, outcome.evaluation.tasks)
    kept = {method: [p for p in found if p.steps <= last] for method, found in points.items()}
    return {method: found for method, found in kept.items() if found}
