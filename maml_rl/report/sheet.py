"""What the pages of both modes are made of: one HTML file that needs nothing else.

Style, script and charts stand in the file itself, and it forbids itself the network.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from maml_rl.errors import RunStopped, refusal
from maml_rl.looks import SHADES
from maml_rl.report.charts import Chart, Frame, draw, readings, swatch
from maml_rl.runs import check_no_link, write_whole

FILES = Path(__file__).parent / "files"
NAME = "report.html"


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


def write_page(file: Path, html: str) -> Path:
    """Write a page, and return its file.

    Raises:
        RunStopped: if the disk does not take it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, html)
    except OSError as error:
        raise RunStopped(f"the report cannot be written to {file}: {error.strerror}", 3) from error
    return file


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


def filled(template: str, charts: Sequence[Chart], **values: object) -> str:
    """Return a template's page.

    Args:
        template: its file's name.
        charts: those that can be read by pointer or arrow keys.
        values: what the template names.
    """
    style, script = (
        (FILES / "report.css").read_text("utf-8"),
        (FILES / "report.js").read_text("utf-8"),
    )
    return (
        environment()
        .get_template(template)
        .render(
            values,
            readings={chart.name: readings(chart) for chart in charts},
            shades=SHADES,
            style=Markup(style),
            script=Markup(script),
            script_hash=csp_hash(script),
        )
    )


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
