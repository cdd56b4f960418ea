"""The page of runs and benchmarks: whose numbers it holds, what it refuses, what it never holds."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from maml_rl.assess import Subject, load_subject, load_subjects
from maml_rl.checkpoints import digest
from maml_rl.comparison import Comparison, Method, Outcome
from maml_rl.config import load_experiment
from maml_rl.errors import InputError, RunStopped
from maml_rl.paper import paper_returns
from maml_rl.rendering import FORMAT, RECORD, Column, Rendering
from maml_rl.report import page as report
from maml_rl.report.page import make_report
from maml_rl.report.sheet import csp_hash, page_name
from maml_rl.report.training import SETTINGS as SHOWN
from maml_rl.report.training import settings_table
from maml_rl.results import write_own_test, write_results
from maml_rl.task_sets import papers_own
from maml_rl.train import meta_train, resume
from tests.conftest import files_at_most
from tests.outcomes import outcome
from tests.tiny import SETTINGS

RESULTS = Path(__file__).parent.parent / "experiments" / "results"
TESTED = {
    p.parent.parent if p.parent.name == "evaluation" else p.parent
    for p in RESULTS.rglob("evaluation.csv")
    if p.read_text().startswith("family,")
}
KEPT = sorted(
    str(folder.relative_to(RESULTS))
    for folder in TESTED
    # Of some variants only the figures are kept.
    if (folder / "checkpoints").is_dir() or not (folder / "config.yaml").is_file()
)
"""Folders of runs and benchmarks of policies."""
TOLD = {"adaptation__inner_steps": 0, "policy__observe_task": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: two seeds of a meta-policy, an oracle, an untrained one; each tested."""
    folder = tmp_path_factory.mktemp("trained")
    for name, changed in (
        ("maml-seed0", {}),
        ("maml-seed1", {"seed": 1}),
        ("oracle-seed0", TOLD),
        ("random-seed0", {"iterations": 0}),
    ):
        meta_train(load_experiment("navigation", **{**SETTINGS, **changed}), out=folder / name)
        write_own_test(load_subject(folder / name))
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """Copies of them."""
    return shutil.copytree(trained, tmp_path / "runs")


def silent(text: str) -> None:
    """Say nothing."""


class Tables(HTMLParser):
    """The rows of a page's tables: of each cell its text, and its exact value where it has one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[tuple[str, str]]]] = {}
        self._table, self._cell, self._text, self._value = "", False, "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table":
            self._table = given.get("aria-labelledby") or ""
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self._cell, self._text, self._value = True, "", ""
        elif tag == "data":
            self._value = given["value"] or ""

    def handle_data(self, data: str) -> None:
        self._text += data if self._cell else ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.rows[self._table][-1].append((self._text.strip(), self._value))
            self._cell = False


def scores_of(page: str) -> Iterator[tuple[str, str, int, Mapping[str, tuple[str, str]]]]:
    """Method, step size, gradient steps and named cells of each row of the table of returns."""
    heads, *rows = Tables(page).rows["scores-name"]
    names = [text for text, _ in heads]
    method = size = ""
    for row in rows:
        if len(row) == len(names):
            (method, _), (size, _), *row = row
        (steps, _), *cells = row
        yield method, size, int(steps), dict(zip(names[3:], cells, strict=True))


def written(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def check_against(page: str, table: Path) -> int:
    """Check a page's returns against an evaluation.csv; return how many there are."""
    rows, count = written(table), 0
    for method, size, steps, cells in scores_of(page):
        if method.endswith("the paper's"):
            continue
        mine = [
            float(row["return_mean"])
            for row in rows
            if (row["method"], int(row["gradient_steps"])) == (method, steps)
            and (not size or f"{float(row['step_size']):g}" == size)
        ]
        text, value = cells["return"]
        assert float(value) == pytest.approx(np.mean(mine), rel=1e-12), (method, steps)
        assert text == f"{np.mean(mine):.1f}"
        count += 1
    return count


def test_the_tables_numbers_are_those_of_evaluation_csv(runs: Path) -> None:
    """Before and after one gradient step, of the run's own test, which is not made again."""
    run = runs / "maml-seed0"
    before = (run / "evaluation" / "evaluation.csv").read_bytes()
    file = make_report([run], None, say=silent)
    assert file == run / "report.html"
    page = file.read_text()
    assert check_against(page, run / "evaluation" / "evaluation.csv") == 2
    assert (run / "evaluation" / "evaluation.csv").read_bytes() == before
    # As the file says, not as the policy would do today.
    table = run / "evaluation" / "evaluation.csv"
    (first, *_) = (row["return_mean"] for row in written(table))
    table.write_text(table.read_text().replace(first, "-77777.0"))
    page = make_report([run], None, say=silent).read_text()
    assert check_against(page, table) == 2
    assert "-77777" in page


def test_the_page_says_what_was_trained(runs: Path) -> None:
    """Family, settings, seed, iterations, steps, versions, digest, config, and the commands."""
    run = runs / "maml-seed1"
    page = make_report([run], None, say=silent).read_text()
    tables = Tables(page).rows
    subject = load_subject(run)
    parameters = (run / "checkpoints" / "latest" / "parameters.safetensors").read_bytes()
    ((name, *_, sha),) = ([text for text, _ in row] for row in tables["runs"][1:])
    assert (name, sha) == ("maml-seed1", digest(parameters)[:16])
    assert [text for text, _ in tables["runs"][1]][2:5] == ["1", "3", f"{subject.env_steps:,}"]
    settings = {row[0][0]: row[1][0] for row in tables["settings"]}
    assert settings["task family"] == "navigation"
    assert settings["step size alpha"] == "0.5"
    assert settings["hidden layers"] == "8, 5; relu"
    assert "protocol" not in settings
    versions = json.loads((run / "versions.json").read_text())
    assert {row[0][0]: row[1][0] for row in tables["versions"][1:]} == versions
    assert html.escape((run / "config.yaml").read_text()) in page
    assert "meta-trained so that 1 gradient step on 3 episodes adapts it to a task" in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    assert "maml-rl train maml-seed1/config.yaml --out maml-seed1-again" in text
    assert "maml-rl report maml-seed1" in text


def test_a_run_without_a_test_is_tested_and_keeps_it(runs: Path) -> None:
    """With the numbers that training's own test has."""
    run = runs / "maml-seed0"
    expected = (run / "evaluation" / "evaluation.csv").read_bytes()
    shutil.rmtree(run / "evaluation")
    said: list[str] = []
    make_report([run], None, say=said.append)
    assert "is tested now" in said[0]
    assert (run / "evaluation" / "evaluation.csv").read_bytes() == expected


def test_a_run_that_went_on_is_tested_again(runs: Path) -> None:
    run = runs / "maml-seed0"
    before = (run / "evaluation" / "evaluation.csv").read_bytes()
    resume(run, iterations=4)
    page = make_report([run], None, say=silent).read_text()
    assert (run / "evaluation" / "evaluation.csv").read_bytes() != before
    (tested,) = json.loads((run / "evaluation" / "summary.json").read_text())["runs"]
    assert tested["iterations"] == 4
    assert check_against(page, run / "evaluation" / "evaluation.csv") == 2


def test_another_checkpoint_is_tested_and_the_newest_ones_test_stays(runs: Path) -> None:
    run = runs / "maml-seed0"
    before = (run / "evaluation" / "evaluation.csv").read_bytes()
    page = make_report([run], None, checkpoint="previous", say=silent).read_text()
    assert (run / "evaluation" / "evaluation.csv").read_bytes() == before
    assert "checkpoints/previous/parameters.safetensors" in page
    assert "--checkpoint" in page
    row = [text for text, _ in Tables(page).rows["runs"][1]]
    parameters = (run / "checkpoints" / "previous" / "parameters.safetensors").read_bytes()
    assert (row[3], row[-1]) == ("2", digest(parameters)[:16])


def test_runs_that_met_the_same_tasks_are_not_tested_again(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds are one method; the oracle takes no step; the page lies beside them."""

    def refuse(*given: object) -> None:
        raise AssertionError("tested again")

    monkeypatch.setattr("maml_rl.report.tested.outcomes_of", refuse)
    names = ("maml-seed0", "maml-seed1", "oracle-seed0", "random-seed0")
    file = make_report([runs / name for name in names], None, say=silent)
    assert file == runs / "report.html"
    found = {(m, steps): cells["return"] for m, _, steps, cells in scores_of(file.read_text())}
    assert found.keys() == {
        *(("maml", 0), ("maml", 1), ("oracle", 0), ("random", 0), ("random", 1)),
    }
    values = [
        float(row["return_mean"])
        for name in names[:2]
        for row in written(runs / name / "evaluation" / "evaluation.csv")
        if row["gradient_steps"] == "1"
    ]
    assert float(found["maml", 1][1]) == pytest.approx(np.mean(values))
    assert "gap closed" in file.read_text()


@pytest.mark.slow
def test_runs_with_other_tests_are_tested_anew_and_nothing_is_written(runs: Path) -> None:
    """By the first's settings: two gradient steps are not compared with one."""
    other = runs / "maml-seed1"
    settings = {**SETTINGS, "seed": 1, "evaluation__steps": 2}
    shutil.rmtree(other)
    meta_train(load_experiment("navigation", **settings), out=other)
    write_own_test(load_subject(other))
    kept = (other / "evaluation" / "evaluation.csv").read_bytes()
    said: list[str] = []
    page = make_report([runs / "maml-seed0", other], None, say=said.append).read_text()
    assert "tested now" in said[0]
    assert [steps for _, _, steps, _ in scores_of(page)] == [0, 1]
    assert (other / "evaluation" / "evaluation.csv").read_bytes() == kept
    assert {p.name for p in runs.iterdir()} >= {"report.html"}
    assert not (runs / "evaluation").exists()


def benchmark(folder: Path) -> Path:
    """Give a folder of runs the results of a benchmark on the paper's tasks, made by hand."""
    subjects = load_subjects(sorted(folder.glob("*-seed*")))
    family = subjects[0].family
    tasks = papers_own(family).tasks
    rng = np.random.default_rng(0)

    def test(method: Method, seed: int, size: float, steps: int) -> Outcome:
        returns = (-rng.uniform(1, 90, (steps, 40))).tolist()
        return outcome(returns, tasks, method=method, seed=seed, step_size=size, source="paper")

    outcomes = [
        *(test("maml", seed, 0.5, 4) for seed in (0, 1)),
        test("oracle", 0, 0.5, 1),
        *(test("random", 0, size, 4) for size in (0.5, 1.0)),
    ]
    notes = {"checkpoint": "latest", "benchmark": {"name": "by_hand"}}
    write_results(folder, outcomes, Comparison.of(outcomes, family), subjects, notes)
    return folder


def test_a_benchmark_shows_every_method_with_its_step_sizes(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the paper's points where the tasks are its own: its MAML after one step -11.68."""
    # Which tests they may stand beside is tested with `points_for`; here episodes are shorter.
    points = paper_returns("navigation")
    monkeypatch.setattr(report, "points_for", lambda family, tasks: points)
    folder = benchmark(runs)
    file = make_report([folder], None, say=silent)
    assert file == folder / "report.html"
    page = file.read_text()
    assert check_against(page, folder / "evaluation.csv") == 4 + 1 + 4 + 4
    rows = list(scores_of(page))
    assert {(method, size) for method, size, _, _ in rows} >= {
        *(("maml", "0.5"), ("oracle", ""), ("random", "0.5"), ("random", "1")),
    }
    papers = {(m, steps): cells for m, _, steps, cells in rows if m.endswith("the paper's")}
    assert papers["maml, the paper's", 1]["return"] == ("-11.7", "-11.68")
    assert papers["maml, the paper's", 1]["IQM"] == ("", "")
    tables = Tables(page).rows
    assert [row[0][0] for row in tables["runs"][1:]] == [
        *("maml-seed0", "maml-seed1", "oracle-seed0", "random-seed0")
    ]
    assert [text for text, _ in tables["settings"][0]] == ["setting", "maml", "oracle", "random"]
    assert "by_hand" in page


def test_what_a_benchmark_lacks_is_said(runs: Path) -> None:
    """A run that went on since, and one that lies elsewhere."""
    folder = benchmark(runs)
    resume(folder / "maml-seed0", iterations=4)
    shutil.rmtree(folder / "maml-seed1")
    page = make_report([folder], None, say=silent).read_text()
    assert "maml-seed0 after 3 iterations; the run has done 4 by now" in page
    assert "maml-seed1 does not lie in the folder" in page
    for run in ("maml-seed0", "oracle-seed0", "random-seed0"):
        shutil.rmtree(folder / run)
    with pytest.raises(InputError, match="none of the runs"):
        make_report([folder], None, say=silent)


def test_a_summary_does_not_lead_out_of_its_folder(runs: Path, tmp_path: Path) -> None:
    folder = benchmark(runs)
    shutil.copytree(folder / "maml-seed0", tmp_path / "maml-seed0")
    file = folder / "summary.json"
    file.write_text(file.read_text().replace('"maml-seed1"', '"../maml-seed0"'))
    page = make_report([folder], None, say=silent).read_text()
    assert "../maml-seed0 does not lie in the folder" in page
    listed = {row[0][0] for row in Tables(page).rows["runs"][1:]}
    assert listed == {"maml-seed0", "oracle-seed0", "random-seed0"}


EVIL = "<script>alert(1)<!--"


def test_a_run_called_like_a_script_is_shown_as_that(runs: Path) -> None:
    """In the title, tables, legends, pictures, readings and commands; alone and beside others."""
    (runs / "maml-seed0").rename(runs / EVIL)
    other = load_experiment("navigation", **{**SETTINGS, "policy__layers": [3], "iterations": 1})
    meta_train(other, out=runs / f"{EVIL}b")
    alone = make_report([runs / EVIL], None, say=silent).read_text()
    several = make_report([runs / EVIL, runs / f"{EVIL}b"], None, say=silent).read_text()
    for page in (alone, several):
        assert page.count("<script") == 2
        assert "<!--" not in page
        assert html.escape(EVIL) in page
    assert f"<h1>{html.escape(EVIL)}</h1>" in alone
    assert f"maml ({html.escape(EVIL)}b)" in several
    readings = re.search(r'id="readings">(.*?)</script>', several, re.S)
    assert readings is not None
    names = [one["name"] for one in json.loads(readings[1])["returns"]["series"]]
    assert f"maml ({EVIL}b)" in names


def check_alone(page: str) -> None:
    """Check that a page needs nothing else: each address in it is its own or its content."""
    addresses = re.findall(r"(?:src|href|url|action|data)\s*[=(]\s*['\"]?([^'\"\s)>]+)", page)
    assert addresses
    assert [a for a in addresses if not a.startswith(("data:", "#"))] == []
    assert not re.search(r"https?://|@import|<link[^>]*stylesheet", page)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src &#39;none&#39;; ") or policy.startswith(
        "default-src 'none'; "
    )
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    assert csp_hash(script) in html.unescape(policy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::maml_rl.errors.RunWarning")  # of other versions
@pytest.mark.parametrize("name", KEPT)
def test_pages_of_the_kept_results_are_light_and_whole(name: str, tmp_path: Path) -> None:
    """Under 1 MB without videos, and without a network; their numbers are the files'."""
    folder = RESULTS / name
    page = make_report([folder], tmp_path / "page.html", say=silent).read_text()
    films = re.findall(r"data:(?:video|image)/[^\"]*", page)
    assert len(page.encode()) - sum(map(len, films)) < 1_000_000
    check_alone(page)
    here = folder / "evaluation" if (folder / "evaluation").is_dir() else folder
    assert check_against(page, here / "evaluation.csv") >= 4


def test_unusual_settings_of_the_update_are_shown_and_usual_ones_left_out() -> None:
    """Momentum and share of one run, empty for the one beside it that has neither."""
    plain = load_experiment("navigation")
    heavy = load_experiment(
        "navigation", trust_region__momentum=0.9, trust_region__metric_share=0.25
    )
    names = ("momentum of the update", "share of the tasks in Fisher products")
    alone = dict(settings_table({"maml": plain}, SHOWN).rows)
    assert not set(names) & set(alone)
    both = dict(settings_table({"heavy": heavy, "plain": plain}, SHOWN).rows)
    assert [both[name] for name in names] == [["0.9", ""], ["0.25", ""]]


def test_all_that_alpha_will_be_is_shown() -> None:
    changing = load_experiment(
        "navigation", adaptation__later_from=[9, 30], adaptation__later_step_sizes=[0.2, 0.05]
    )
    shown = dict(settings_table({"maml": changing}, SHOWN).rows)["step size alpha"]
    assert shown == ["0.5, from iteration 9 on 0.2, from iteration 30 on 0.05"]


def test_an_alpha_that_goes_with_the_noise_is_said_to() -> None:
    own = load_experiment("navigation", adaptation__times_variance=True)
    shown = dict(settings_table({"maml": own}, SHOWN).rows)["step size alpha"]
    assert shown == ["0.5; times the variance of the noise"]


def test_how_large_later_test_steps_are_is_shown_where_there_are_any() -> None:
    for changed, told in (({}, True), ({"evaluation__steps": 1}, False)):
        own = load_experiment("navigation", evaluation__later_step_scale=0.25, **changed)
        ((shown,),) = (
            value for name, value in settings_table({"maml": own}, SHOWN).rows if "own" in name
        )
        assert shown.endswith(", later ones 0.25 of alpha") is told


def test_all_that_max_kl_will_be_is_shown() -> None:
    changing = load_experiment(
        "navigation", trust_region__later_from=[40], trust_region__later_max_kls=[0.0025]
    )
    shown = dict(settings_table({"maml": changing}, SHOWN).rows)["largest KL of an update"]
    assert shown == ["0.01, from iteration 40 on 0.0025"]


def test_a_page_needs_nothing_else(runs: Path) -> None:
    page = make_report([runs / "maml-seed0"], None, say=silent).read_text()
    assert len(page.encode()) < 100_000
    check_alone(page)


def record(run: Path, **changed: object) -> Rendering:
    """Write a record of videos beside files that are no videos."""
    folder = run / "video"
    folder.mkdir(exist_ok=True)
    usual = Rendering(
        checkpoint="latest",
        iterations=3,
        mean=False,
        fps=25.0,
        slow=0.5,
        frames=50,
        tasks=((0.1, 0.2), (0.3, 0.4)),
        task_words=("the <near> goal", "the far goal"),
        columns=tuple(
            Column(step, f"steps_{step}.mp4", (-12.34 - step, -50.0), ("", "arrived at 1.3 s"))
            for step in range(4)
        ),
        video="adaptation.mp4",
        strips=(),
        trouble="",
    )
    made = dataclasses.replace(usual, **changed)  # type: ignore[arg-type]  # each test's own
    for column in made.columns:
        if column.video is not None:
            (folder / column.video).write_bytes(b"film %d" % column.gradient_steps)
    if made.video is not None:
        (folder / made.video).write_bytes(b"the grid")
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(made)})
    (folder / RECORD).write_text(text)
    return made


def test_videos_stand_in_the_page(runs: Path) -> None:
    """Each column with what it shows in words; ZmlsbSAy is "film 2"."""
    run = runs / "maml-seed0"
    record(run)
    said: list[str] = []
    page = make_report([run], None, say=said.append).read_text()
    assert page.count("<video ") == 4
    assert 'src="data:video/mp4;base64,ZmlsbSAy"' in page
    assert "after 3 gradient steps" in page
    assert "the &lt;near&gt; goal: return <b>-14.3</b>" in page
    assert "<b>-50.0</b>, arrived at 1.3 s" in page
    assert 'data-seconds="2.0"' in page
    assert "autoplay" not in page
    assert "iterations; the figures" not in page
    assert said == []
    check_alone(page)


def test_what_is_amiss_with_videos_is_said(runs: Path) -> None:
    """Older ones, images in their place, none at all, and files that are gone."""
    run = runs / "maml-seed0"
    webp = tuple(Column(s, f"steps_{s}.webp", (1.0, 2.0), ("", "")) for s in range(2))
    record(run, columns=webp, trouble="for MP4: pip install x", iterations=2, checkpoint="best")
    page = make_report([run], None, say=silent).read_text()
    assert page.count('src="data:image/webp;base64,') == 2
    assert "<video" not in page
    assert 'class="controls"' not in page
    assert "for MP4: pip install x" in page
    assert "after 2 iterations; the figures on this page are of 3 iterations" in page
    assert re.search(r'<img alt="before adapting\. the &lt;near&gt; goal: return 1\.0', page)
    nothing = tuple(dataclasses.replace(column, video=None) for column in webp)
    record(run, columns=nothing, trouble="no OpenGL")
    page = make_report([run], None, say=silent).read_text()
    assert page.count("no picture") == 2
    assert "no OpenGL" in page
    record(run)
    (run / "video" / "steps_1.mp4").unlink()
    page = make_report([run], None, say=silent).read_text()
    assert (page.count("<video "), page.count("no picture")) == (3, 1)
    # A film that is missing leaves the others to be played one by one.
    assert 'data-seconds="' not in page
    assert page.count("<video muted playsinline controls ") == 3


def test_a_record_with_wrong_numbers_is_refused(runs: Path) -> None:
    run = runs / "maml-seed0"
    record(run, fps=0.0)
    with pytest.raises(InputError, match=r"make the videos again: maml-rl render"):
        make_report([run], None, say=silent)


def test_without_videos_the_command_for_them_is_said(runs: Path) -> None:
    said: list[str] = []
    page = make_report([runs / "maml-seed0"], None, say=said.append).read_text()
    assert "maml-rl render" in said[0]
    assert "There are none yet" in page


def test_runs_are_rendered_that_have_no_videos_of_their_checkpoint(runs: Path) -> None:
    """Not one that has; older videos are made again."""
    asked: list[str] = []

    def film(subject: Subject) -> None:
        asked.append(subject.path.name)
        record(subject.path)

    targets = [runs / name for name in ("maml-seed0", "maml-seed1", "oracle-seed0")]
    record(targets[0])
    page = make_report(targets, None, say=silent, film=film).read_text()
    assert asked == ["maml-seed1", "oracle-seed0"]
    assert page.count("<video ") == 12
    record(targets[0], iterations=2)
    make_report(targets, None, say=silent, film=film)
    assert asked == ["maml-seed1", "oracle-seed0", "maml-seed0"]


def test_videos_that_were_not_made_or_are_lost_are_made(runs: Path) -> None:
    """As where there was no OpenGL, or a file was removed."""
    asked: list[str] = []
    target = [runs / "maml-seed0"]
    record(target[0], video=None)
    make_report(target, None, say=silent, film=lambda one: asked.append(one.path.name))
    record(target[0])
    make_report(target, None, say=silent, film=lambda one: asked.append(one.path.name))
    assert asked == ["maml-seed0"]
    (target[0] / "video" / "steps_2.mp4").unlink()
    make_report(target, None, say=silent, film=lambda one: asked.append(one.path.name))
    assert asked == ["maml-seed0"] * 2


@pytest.mark.slow
def test_of_a_benchmark_the_first_meta_policy_is_rendered(runs: Path) -> None:
    """Its other runs may have videos, which are shown, and are not made to have them."""
    folder = benchmark(runs)
    asked: list[str] = []
    make_report([folder], None, say=silent, film=lambda one: asked.append(one.path.name))
    assert asked == ["maml-seed0"]
    record(folder / "maml-seed0")
    make_report([folder], None, say=silent, film=lambda one: asked.append(one.path.name))
    assert asked == ["maml-seed0"]


def test_videos_of_several_runs_have_players_of_their_own(runs: Path) -> None:
    """Each under its run's name."""
    record(runs / "maml-seed0")
    record(runs / "maml-seed1")
    targets = [runs / "maml-seed0", runs / "maml-seed1"]
    page = make_report(targets, None, say=silent).read_text()
    assert page.count("<video ") == 8
    assert re.findall(r'class="player"[^>]*aria-label="([^"]*)"', page) == [
        *("Videos of maml-seed0", "Videos of maml-seed1")
    ]


def test_what_is_no_run_is_refused_with_what_was_meant(runs: Path, tmp_path: Path) -> None:
    run = runs / "maml-seed0"
    (tmp_path / "empty").mkdir()
    for targets, words in (
        ([], "expected RUN first"),
        ([tmp_path / "nowhere"], "there is no"),
        ([tmp_path / "empty"], "neither the folder of a run nor of a benchmark"),
        ([run / "evaluation"], f"did you mean {run}"),
        ([run / "config.yaml"], f"did you mean {run}"),
        ([run, run], "given twice"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            make_report(targets, None, say=silent)
    folder = benchmark(runs)
    with pytest.raises(InputError, match="a page of its own"):
        make_report([folder, run], None, say=silent)
    with pytest.raises(InputError, match="newest checkpoints"):
        make_report([folder], None, checkpoint="best", say=silent)


def test_a_damaged_test_is_refused(runs: Path) -> None:
    run = runs / "maml-seed0"
    (run / "evaluation" / "evaluation.csv").write_text("family\n")
    with pytest.raises(InputError, match=r"evaluation\.csv is damaged"):
        make_report([run], None, say=silent)


def test_the_page_goes_where_it_is_told(runs: Path, tmp_path: Path) -> None:
    """Into a new folder too; never through a link in the run, nor in place of a folder."""
    run = runs / "maml-seed0"
    out = tmp_path / "new" / "page.html"
    assert make_report([run], out, say=silent) == out
    assert "<h1>maml-seed0</h1>" in out.read_text()
    with pytest.raises(InputError, match="is a folder"):
        make_report([run], tmp_path, say=silent)
    (run / "report.html").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="link"):
        make_report([run], None, say=silent)


def test_a_full_disk_is_a_sentence_and_leaves_the_old_page(runs: Path) -> None:
    run = runs / "maml-seed0"
    (run / "report.html").write_text("old")
    with files_at_most(1000), pytest.raises(RunStopped, match="cannot be written") as stopped:
        make_report([run], None, say=silent)
    assert stopped.value.exit_code == 3
    assert (run / "report.html").read_text() == "old"
    assert not [p for p in run.iterdir() if "partial" in p.name]


def test_a_page_is_called_after_its_folders() -> None:
    """Commas and an "and" between them, the first two of many; of "." the folder's own name."""
    a, b, c, d = map(Path, "abcd")
    assert page_name([a]) == "a"
    assert page_name([a, b, c]) == "a, b and c"
    assert page_name([a, b, c, d]) == "a, b and 2 more"
    assert page_name([Path()]) == Path.cwd().name
