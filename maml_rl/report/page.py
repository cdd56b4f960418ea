"""`maml-rl report`: one HTML file of a run, of several, or of a benchmark, that needs nothing else.

Style, script, charts and videos stand in the file itself, and it forbids itself the network.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from maml_rl.assess import Subject
from maml_rl.comparison import MAML
from maml_rl.errors import InputError, RunStopped, refusal
from maml_rl.looks import SHADES, title
from maml_rl.paper import Point, points_for
from maml_rl.report.charts import NARROW, SMALL, WIDE, Chart, Frame, draw, readings, swatch
from maml_rl.report.players import Player, has_videos, player_of
from maml_rl.report.plots import curves_chart, returns_chart, task_charts
from maml_rl.report.tables import (
    by_seed_table,
    by_task_table,
    differences_table,
    scores_table,
)
from maml_rl.report.tested import Tested, gather
from maml_rl.report.training import (
    commands,
    run_name,
    sentences,
    settings_table,
    training_of,
    versions_tables,
)
from maml_rl.runs import check_no_link, write_whole
from maml_rl.terminal import evaluation_notes, title_of

FILES = Path(__file__).parent / "files"
NAME = "report.html"


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
    html = page(tested, players, page_name(targets), checkpoint)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, html)
    except OSError as error:
        raise RunStopped(f"the report cannot be written to {file}: {error.strerror}", 3) from error
    return file


def to_film(tested: Tested) -> list[Subject]:
    """Return the runs given that have no videos; of a benchmark the first meta-policy, if so."""
    subjects = tested.subjects
    if tested.folder:
        subjects = [next((s for s in subjects if s.method == MAML), subjects[0])]
    return [subject for subject in subjects if not has_videos(subject)]


def page_file(targets: Sequence[Path], out: Path | None) -> Path:
    """Return where to write a page.

    Raises:
        InputError: if something else is there.
    """
    above = targets[0] if len(targets) == 1 else targets[0].parent
    file = above / NAME if out is None else out
    if out is None:
        check_no_link(file)
    if file.is_dir():
        raise refusal(f"{file} is a folder; give a file, such as --out {file / NAME}")
    return file


def page_name(targets: Sequence[Path]) -> str:
    """Return what a page is called: after its folders, the first of many."""
    names = [target.resolve().name for target in targets]
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


class Plot(NamedTuple):
    """A chart as it stands in the page."""

    chart: Chart
    pictures: list[Markup]
    swatches: list[tuple[Markup, str]]
    """The legend."""


def plot_of(chart: Chart, *frames: Frame) -> Plot:
    """Return a chart drawn for each size of page, with its legend."""
    return Plot(
        chart,
        [Markup(draw(chart, frame)) for frame in frames],
        [(Markup(swatch(one)), one.name) for one in chart.series],
    )


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
    versions = versions_tables(tested)
    tables = (
        by_task_table(scores, family),
        by_seed_table(scores),
        differences_table(tested.compared),
    )
    style, script = (
        (FILES / "report.css").read_text("utf-8"),
        (FILES / "report.js").read_text("utf-8"),
    )
    template = environment().get_template("report.html")
    return template.render(
        name=name,
        family=title(family),
        tasks_words=title_of(scores[0], family),
        folder=tested.folder,
        benchmark=tested.benchmark,
        sentences=sentences(tested.subjects),
        notes=tested.notes,
        players=players,
        runs=[run_name(subject) for subject in tested.subjects],
        returns=plot_of(returns, WIDE, NARROW),
        scores=scores_table(tested.compared, papers, family),
        reading=evaluation_notes(tested.compared, family),
        papers=papers,
        tables=[table for table in tables if table is not None],
        tasks=[plot_of(chart, *sizes) for chart in tasks],
        curves=plot_of(curves, WIDE, NARROW) if curves else None,
        curves_note=curves_note,
        settings=settings_table(tested.subjects),
        trainings=[training_of(subject, checkpoint) for subject in tested.subjects],
        versions=versions,
        packages=list(dict.fromkeys(name for one in versions for name in one.versions)),
        commands=commands(tested, checkpoint),
        checkpoint=checkpoint,
        readings={chart.name: readings(chart) for chart in charts},
        shades=SHADES,
        style=Markup(style),
        script=Markup(script),
        script_hash=csp_hash(script),
    )


def papers_of(tested: Tested) -> dict[str, list[Point]]:
    """Return the paper's points that stand beside a test, by method: none of more steps."""
    last = max(step.steps for one in tested.compared.scores for step in one.steps)
    outcome, family = tested.outcomes[0], tested.subjects[0].family
    points = points_for(family, outcome.evaluation.tasks)
    kept = {method: [p for p in found if p.steps <= last] for method, found in points.items()}
    return {method: found for method, found in kept.items() if found}


def environment() -> jinja2.Environment:
    """Return the template's surroundings: all text is escaped, and nothing may be missing."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return made


def csp_hash(text: str) -> str:
    """Return what a Content-Security-Policy knows an inline script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
