"""The page of supervised runs: whose numbers it holds, what it refuses, what it never holds."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from maml_rl.checkpoints import digest
from maml_rl.cli import run
from maml_rl.config import load_experiment as load_reinforced
from maml_rl.errors import InputError, RunStopped
from maml_rl.supervised import evaluate, page
from maml_rl.supervised.config import load_experiment
from maml_rl.supervised.drawn_characters import draw_characters
from maml_rl.supervised.evaluate import Outcome, load_subjects
from maml_rl.supervised.page import make_report, write_own_test
from maml_rl.supervised.plots import steps_charts
from maml_rl.supervised.stored import stored_test
from maml_rl.supervised.train import meta_train, resume
from maml_rl.train import meta_train as train_reinforced
from tests.conftest import files_at_most
from tests.test_report import Tables, check_alone, silent
from tests.tiny import SETTINGS

SINUSOID = {
    "iterations": 4,
    "record_every": 2,
    "threads": 1,
    "network__layers": [7, 6],
    "evaluation__tasks": 6,
    "evaluation__steps": 2,
    "evaluation__query": 5,
    "evaluation__validation_tasks": 3,
}
NO_STEPS = {"adaptation__inner_steps": 0}
ORACLE = {**NO_STEPS, "data__observe_task": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tested runs: sinusoids and drawn characters, whose images lie beside them."""
    folder = tmp_path_factory.mktemp("trained")
    for name, changed in (("maml", {}), ("pretrained", NO_STEPS), ("oracle", ORACLE)):
        meta_train(load_experiment("sinusoid", **{**SINUSOID, **changed}), out=folder / name)
    draw_characters(folder / "images", characters=10, drawings=4)
    file = folder / "few.yaml"
    file.write_text(
        "name: few\ndata: {name: drawn_characters, root: images, ways: 3, shots: 2, "
        "train_classes: 4, validation_classes: 3}\niterations: 2\nrecord_every: 1\n"
        "threads: 1\nnetwork: {kind: strided-conv, filters: 3}\nouter: {tasks: 2}\n"
        "evaluation: {steps: 2, tasks: 4, validation_tasks: 2}\n"
    )
    experiment = load_experiment(file, data__root=str(folder / "images"))
    meta_train(experiment, out=folder / "few")
    for name in ("maml", "pretrained", "oracle", "few"):
        write_own_test(load_subjects([folder / name])[0])
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """Copies of them; the images stay where they were."""
    ignored = shutil.ignore_patterns("images", "tensorboard")
    return shutil.copytree(trained, tmp_path / "runs", ignore=ignored)


def refuse(*given: object, **named: object) -> None:
    raise AssertionError("tested again")


def written(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation" / "evaluation.csv").open(newline="") as opened:
        return list(csv.DictReader(opened))


def readings_of(text: str) -> dict[str, dict[str, list[dict[str, object]]]]:
    """What the page's charts are read by."""
    found = re.search(r'id="readings">(.*?)</script>', text, re.S)
    assert found is not None
    result: dict[str, dict[str, list[dict[str, object]]]] = json.loads(found[1])
    return result


def test_the_tables_numbers_are_those_of_evaluation_csv(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the stored test, which is not made again: mean, interval and spread, and the paper's."""
    monkeypatch.setattr(page, "outcomes_of", refuse)
    file = make_report([runs / "maml"], None, say=silent)
    assert file == runs / "maml" / "report.html"
    tables = Tables(file.read_text()).rows
    for number, shots in ((1, "5"), (2, "10")):
        heads, *rows = tables[f"scores-{number}-name"]
        assert [text for text, _ in heads] == [
            *("method", "step size", "steps", "mean squared error", "± 95 %", "spread", "worse")
        ]
        assert [text for text, _ in rows[0][:2]] == ["maml", "0.001"]
        errors = np.zeros((3, 6))
        for row in written(runs / "maml"):
            if row["shots"] == shots:
                errors[int(row["gradient_steps"]), int(row["task"])] = float(row["error"])
        for step, cells in enumerate(rows[:3]):
            (steps, _), (text, mean), (_, half), (_, spread), (_, worse) = cells[-5:]
            assert steps == str(step)
            assert float(mean) == pytest.approx(errors[step].mean())
            assert text == f"{errors[step].mean():.3f}"
            assert float(spread) == pytest.approx(errors[step].std())
            assert float(half) == pytest.approx(1.96 * errors[step].std() / np.sqrt(6))
            share = (errors[step] > errors[0]).mean()
            assert (float(worse) == pytest.approx(share)) if step else worse == ""
    theirs = tables["scores-1-name"][4]
    assert [text for text, _ in theirs[:4]] == ["maml, the paper's", "", "1", "0.670"]
    assert len(tables["scores-2-name"]) == 1 + 3


def test_what_the_charts_are_read_by_is_what_was_measured(runs: Path) -> None:
    """Score and interval; learning curves of metrics.csv; the curve's points."""
    readings = readings_of(make_report([runs / "maml"], None, say=silent).read_text())
    ours, theirs = readings["steps-0"]["series"]
    errors = np.zeros((3, 6))
    for row in written(runs / "maml"):
        if row["shots"] == "5":
            errors[int(row["gradient_steps"]), int(row["task"])] = float(row["error"])
    half = 1.96 * errors.std(1) / np.sqrt(6)
    assert ours["points"] == [
        [
            step,
            *(pytest.approx(v, rel=1e-5) for v in (mean, mean - half[step], mean + half[step])),
            words,
        ]
        for step, (mean, words) in enumerate(
            zip(
                errors.mean(1),
                ("before adapting", "after 1 gradient step", "after 2 gradient steps"),
                strict=True,
            )
        )
    ]
    assert theirs["points"] == [[1, 0.67, None, None, "after 1 gradient step"]]
    with (runs / "maml" / "metrics.csv").open(newline="") as opened:
        metrics = list(csv.DictReader(opened))
    curves = {one["name"]: one["points"] for one in readings["curves-0"]["series"]}
    assert curves["validation tasks, after 1 gradient step"] == [
        [done, pytest.approx(float(row["validation_error_1"]), rel=1e-5)]
        for done, row in zip((2, 4), metrics, strict=True)
    ]
    fits = [name for name in readings if name.startswith("fit-")]
    assert len(fits) == 4
    names = [one["name"] for one in readings["fit-3"]["series"]]
    assert names == ["the curve", "before", "after 1 step", "after 2 steps", "points to adapt to"]


def test_the_page_says_what_was_trained(runs: Path) -> None:
    """Settings, seed, iterations, tasks, versions, digest, config, and the commands."""
    folder = runs / "maml"
    text = make_report([folder], None, say=silent).read_text()
    tables = Tables(text).rows
    parameters = (folder / "checkpoints" / "latest" / "parameters.safetensors").read_bytes()
    row = [cell for cell, _ in tables["runs"][1]]
    assert row[:5] == ["maml", "maml", "0", "4", "100"]
    assert row[-1] == digest(parameters)[:16]
    settings = {row[0][0]: row[1][0] for row in tables["settings"]}
    assert settings["problem"] == "sinusoid"
    assert settings["step size alpha"] == "0.001"
    assert settings["network"] == "fully connected, hidden layers 7, 6"
    assert "trained with batch norm by" not in settings
    assert html.escape((folder / "config.yaml").read_text()) in text
    assert "meta-trained so that 1 gradient step on 10 points adapts it to a task" in text
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text))
    assert "maml-rl train maml/config.yaml --out maml-again" in plain
    assert "maml-rl evaluate maml" in plain
    assert "maml-rl render" not in plain
    assert "Videos" not in plain
    check_alone(text)
    assert len(text.encode()) < 200_000


def test_a_run_without_a_test_is_tested_and_keeps_it(runs: Path) -> None:
    folder = runs / "maml"
    expected = (folder / "evaluation" / "evaluation.csv").read_bytes()
    shutil.rmtree(folder / "evaluation")
    said: list[str] = []
    make_report([folder], None, say=said.append)
    assert "is tested now" in said[0]
    assert (folder / "evaluation" / "evaluation.csv").read_bytes() == expected


def test_another_checkpoint_is_tested_and_the_newest_ones_test_stays(runs: Path) -> None:
    folder = runs / "maml"
    before = (folder / "evaluation" / "evaluation.csv").read_bytes()
    text = make_report([folder], None, checkpoint="previous", say=silent).read_text()
    assert (folder / "evaluation" / "evaluation.csv").read_bytes() == before
    row = [cell for cell, _ in Tables(text).rows["runs"][1]]
    parameters = (folder / "checkpoints" / "previous" / "parameters.safetensors").read_bytes()
    assert (row[3], row[-1]) == ("2", digest(parameters)[:16])
    assert "checkpoints/previous/parameters.safetensors" in text


def test_only_the_runs_own_test_of_now_is_taken(runs: Path) -> None:
    """Not one by other settings, nor of fewer iterations; a folder may be called otherwise."""
    folder = (runs / "maml").rename(runs / "renamed")
    (subject,) = load_subjects([folder])
    found = stored_test(subject)
    assert found is not None
    assert [one.shots for one in found.outcomes] == [5, 10]
    summary = folder / "evaluation" / "summary.json"
    before = summary.read_text()
    summary.write_text(before.replace('"query": 5', '"query": 6'))
    assert stored_test(subject) is None
    summary.write_text(before)
    resume(folder, iterations=5)
    (subject,) = load_subjects([folder])
    assert stored_test(subject) is None


def test_a_stored_test_reads_as_it_was(runs: Path) -> None:
    """To the six digits of its file; also where a network diverged."""
    (subject,) = load_subjects([runs / "maml"])
    (first, _) = evaluate.outcomes_of(subject, subject.experiment.evaluation)
    table = runs / "maml" / "evaluation" / "evaluation.csv"
    lines = table.read_text().splitlines()
    number = lines[0].split(",").index("error")
    cells = lines[2].split(",")
    cells[number] = "inf"
    table.write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
    found = stored_test(subject)
    assert found is not None
    again = found.outcomes[0]
    assert again.scores[1, 0] == np.inf
    np.testing.assert_allclose(again.scores[:, 1:], first.scores[:, 1:], rtol=1e-5)
    np.testing.assert_allclose(again.losses, first.losses, rtol=1e-5)
    text = make_report([runs / "maml"], None, say=silent).read_text()
    assert "maml (diverges)" in text
    check_alone(text)


@pytest.mark.parametrize("broken", ["", "problem\n1\n", "rows", "{"])
def test_a_damaged_test_is_refused(runs: Path, broken: str) -> None:
    """Cut short, of other columns, without some rows, no JSON."""
    folder = runs / "maml" / "evaluation"
    table = folder / "evaluation.csv"
    if broken == "{":
        (folder / "summary.json").write_text(broken)
    else:
        lines = table.read_text().splitlines()
        table.write_text("\n".join(lines[:-1]) + "\n" if broken == "rows" else broken)
    with pytest.raises(InputError, match=r"is damaged.*remove it"):
        make_report([runs / "maml"], None, say=silent)


def test_runs_stand_side_by_side(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their stored tests, if they are by the same settings; the page lies beside them."""
    monkeypatch.setattr(page, "outcomes_of", refuse)
    targets = [runs / name for name in ("maml", "pretrained", "oracle")]
    file = make_report(targets, None, say=silent)
    assert file == runs / "report.html"
    text = file.read_text()
    readings = readings_of(text)
    assert [one["name"] for one in readings["steps-0"]["series"]] == [
        *("maml", "pretrained", "oracle", "maml, the paper's", "pretrained, the paper's")
    ]
    oracle = readings["steps-0"]["series"][2]["points"]
    assert isinstance(oracle, list)
    assert [(p[0], p[4]) for p in oracle] == [(x, "takes no gradient step") for x in (0, 2)]
    assert len([name for name in readings if name.startswith("fit-")]) == 12
    heads = [text for text, _ in Tables(text).rows["settings"][0]]
    assert heads == ["setting", "maml", "pretrained", "oracle"]
    check_alone(text)


@pytest.mark.slow
def test_runs_with_other_tests_are_tested_anew_and_nothing_is_written(runs: Path) -> None:
    shutil.rmtree(runs / "oracle" / "evaluation")
    said: list[str] = []
    make_report([runs / "maml", runs / "oracle"], None, say=said.append)
    assert "tested now by those of" in said[0]
    assert not (runs / "oracle" / "evaluation").exists()
    assert not (runs / "evaluation").exists()


EVIL = "<script>alert(1)<!--"


def test_a_run_called_like_a_script_is_shown_as_that(runs: Path) -> None:
    """In the title, tables, legends, pictures, readings and commands."""
    (runs / "maml").rename(runs / EVIL)
    shutil.copytree(runs / EVIL, runs / f"{EVIL}b")
    text = make_report([runs / EVIL, runs / f"{EVIL}b"], None, say=silent).read_text()
    assert text.count("<script") == 2
    assert "<!--" not in text
    assert f"{html.escape(EVIL)}b" in text
    names = [one["name"] for one in readings_of(text)["steps-0"]["series"]]
    assert names[:2] == [EVIL, f"{EVIL}b"]


@pytest.mark.slow
def test_images_stand_in_the_page(runs: Path) -> None:
    """With what they are taken for in words; a table for both kinds of batch normalisation."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    text = make_report([runs / "few"], None, say=silent).read_text()
    (picture,) = re.findall(r'<img class="examples" alt="([^"]*)" src="([^"]*)"', text)
    assert re.search(r"task 1: \d+% right before adapting, \d+% right after 2 gra", picture[0])
    assert picture[1].startswith("data:image/png;base64,iVBORw0KGgo")
    tables = Tables(text).rows
    assert len(tables["scores-2-name"]) == 1 + 3
    assert "batch norm by the support&#39;s statistics" in text
    assert [text for text, _ in tables["scores-1-name"][0]][3] == "accuracy (%)"
    first = written(runs / "few")
    accuracies = [
        float(row["accuracy"])
        for row in first
        if (row["batch_norm"], row["gradient_steps"]) == ("batch", "0")
    ]
    value = float(tables["scores-1-name"][1][3][1])
    assert value == pytest.approx(100 * np.mean(accuracies), rel=1e-5)
    settings = {row[0][0]: row[1][0] for row in tables["settings"]}
    assert settings["trained with batch norm by"] == "query's statistics"
    check_alone(text)


@pytest.mark.slow
def test_without_its_images_a_stored_test_is_shown(
    runs: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a sentence; not where there is no test; and with them where they are now."""
    folder = runs / "few"
    monkeypatch.chdir(tmp_path)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(trained / "images"), "gone"))
    said: list[str] = []
    text = make_report([folder], None, say=said.append).read_text()
    assert "no examples are shown, for the images are not there" in text
    assert "<img" not in text
    assert "gone" in said[0]
    assert len(Tables(text).rows["scores-1-name"]) == 1 + 3
    root = str(trained / "images")
    with_them = make_report([folder], None, root=root, say=silent).read_text()
    assert "the images are not there" not in with_them
    assert "--data.root" in with_them
    shutil.rmtree(folder / "evaluation")
    with pytest.raises(InputError, match="gone"):
        make_report([folder], None, say=silent)


def test_without_matplotlib_the_page_has_no_examples(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said: list[str] = []
    text = make_report([runs / "few"], None, say=said.append).read_text()
    assert "<img" not in text
    assert "pip install 'maml-rl[plot]'" in said[0]
    assert "There are none on this page" in text


def test_what_means_nothing_is_refused_with_what_to_do(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Films and benchmarks of supervised runs, and options of the other mode; a sentence each."""
    other = tmp_path / "navigation"
    train_reinforced(load_reinforced("navigation", **SETTINGS), out=other)
    maml = str(runs / "maml")
    shutil.copytree(runs / "maml" / "evaluation", runs / "beside")
    for words, wanted in (
        (["render", maml], f"maml-rl evaluate {maml}"),
        (["benchmark", "sinusoid"], "maml-rl evaluate RUN RUN"),
        (["benchmark", f"{maml}/config.yaml"], "maml-rl evaluate RUN RUN"),
        (["benchmark", maml], f"maml-rl evaluate {maml} RUN"),
        (["benchmark", "benchmark_navigation", "--experiment", "sinusoid"], "maml-rl train"),
        (["report", maml, "--no-render"], "--no-render means nothing for a run of supervised"),
        (["report", maml, "--allow-import"], "--allow-import means nothing"),
        (["report", str(other), "--data.root", "x"], "--data.root means nothing"),
        (["report", maml, str(other)], "they cannot be compared"),
        (["report", maml, str(runs / "few")], "cannot be compared: the first learns"),
        (["report", str(runs / "beside")], "give the run folders"),
        (["report", f"{maml}/evaluation"], f"did you mean {maml}?"),
    ):
        assert run(words) == 2, words
        error = capsys.readouterr().err
        assert wanted in error, (words, error)
        assert error.count("\n") == 1


def test_the_command_writes_the_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "new" / "page.html"
    assert run(["report", str(runs / "maml"), "--out", str(out)]) == 0
    assert f"Written: {out}" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "<h1>maml</h1>" in out.read_text()


def test_a_full_disk_is_a_sentence_and_leaves_the_old_page(runs: Path) -> None:
    folder = runs / "maml"
    (folder / "report.html").write_text("old")
    with files_at_most(1000), pytest.raises(RunStopped, match="cannot be written") as stopped:
        make_report([folder], None, say=silent)
    assert stopped.value.exit_code == 3
    assert (folder / "report.html").read_text() == "old"


def test_a_diverged_network_leaves_a_chart_that_can_be_drawn(runs: Path) -> None:
    """Its values leave the axis; what has none is left out of what is read."""
    (subject,) = load_subjects([runs / "maml"])
    scatter = 0.01 * np.array([-1.0, 0.0, 1.0])
    scores = np.array([3.0, 1.0, 0.5, 1e27])[:, None] + scatter
    one = Outcome(subject, 5, "", 0.001, scores, scores)
    (chart,) = steps_charts([one])
    assert chart.y.high < 10
    assert chart.series[0].name == "maml (rises to 1e+27)"
    assert "from 3.000 to 1e+27" in chart.summary


@pytest.mark.filterwarnings("ignore::maml_rl.errors.RunWarning")  # of other versions
def test_the_page_of_a_kept_run_is_light_and_whole(tmp_path: Path) -> None:
    """Its images are not kept, and its numbers are those of its test."""
    run_ = Path(__file__).parent.parent / "experiments" / "results" / "drawn_characters-seed0"
    text = make_report([run_], tmp_path / "page.html", say=silent).read_text()
    assert len(text) < 500_000
    check_alone(text)
    summary = json.loads((run_ / "evaluation" / "summary.json").read_text())
    last = summary["tests"][0]["gradient_steps"][-1]
    assert f"{100 * last['mean']:.2f}" in text
