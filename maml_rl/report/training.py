"""What a report says of training: settings, what it took, versions, and the commands for it."""

from __future__ import annotations

import hashlib
import json
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from envs.family import TaskFamily
from maml_rl.assess import Subject
from maml_rl.checkpoints import PARAMETERS
from maml_rl.comparison import MAML, ORACLE, PRETRAINED, RANDOM, Method, method_name
from maml_rl.config import Experiment, family_name
from maml_rl.errors import RunWarning
from maml_rl.looks import title
from maml_rl.maml import AdaptationSettings
from maml_rl.report.plots import metrics_of
from maml_rl.report.tested import Tested
from maml_rl.runs import RunFolder
from maml_rl.terminal import step_words
from maml_rl.trust_region import TrustRegionSettings

Settings = Experiment[TaskFamily]

SETTINGS: Mapping[str, Callable[[Settings], str]] = {
    "task family": lambda e: e.family.name,
    "protocol": lambda e: e.family.protocol_name,
    "control steps of an episode": lambda e: str(e.family.episode_steps),
    "seconds of a control step": lambda e: (
        f"{e.family.control_seconds:g}" if e.family.protocol_name else ""
    ),
    "iterations wanted": lambda e: str(e.iterations),
    "tasks of a batch": lambda e: str(e.sampling.tasks),
    "episodes of a task": lambda e: str(e.sampling.episodes),
    "batch counted in": lambda e: e.sampling.count,
    "gradient steps to a task in training": lambda e: str(e.adaptation.inner_steps),
    "step size alpha": lambda e: alpha_words(e.adaptation),
    "inner loss": lambda e: e.adaptation.inner_loss,
    "first order": lambda e: yes_or_no(e.adaptation.first_order),
    "observes its task": lambda e: yes_or_no(e.policy.observe_task),
    "hidden layers": lambda e: (
        f"{', '.join(map(str, e.policy.layers)) or 'none'}; {e.policy.nonlinearity}"
    ),
    "discount": lambda e: f"{e.advantages.discount:g}",
    "lambda": lambda e: f"{e.advantages.gae_lambda:g}",
    "largest KL of an update": lambda e: kl_words(e.trust_region),
    "momentum of the update": lambda e: words_of(e.trust_region.momentum, usual=0.0),
    "share of the tasks in Fisher products": lambda e: words_of(
        e.trust_region.metric_share, usual=1.0
    ),
    "test of its own": lambda e: (
        f"{e.evaluation.tasks} tasks, {e.evaluation.episodes} episodes an update"
        f"{' or their steps' if e.evaluation.count == 'steps' else ''}, "
        f"{e.evaluation.steps} gradient steps"
        + (
            f", later ones {e.evaluation.later_step_scale:g} of alpha"
            if e.evaluation.steps > max(1, e.adaptation.inner_steps)
            else ""
        )
    ),
}
"""The settings that matter, in words."""


def alpha_words(settings: AdaptationSettings) -> str:
    """Return alpha, and what it is later on."""
    sizes = scheduled(settings.step_size, settings.later_from, settings.later_step_sizes)
    return f"{sizes}; times the variance of the noise" if settings.times_variance else sizes


def kl_words(settings: TrustRegionSettings) -> str:
    """Return the largest KL of an update, and what it is later on."""
    return scheduled(settings.max_kl, settings.later_from, settings.later_max_kls)


def scheduled(first: float, starts: Sequence[int], later: Sequence[float]) -> str:
    """Return what a setting is at first, and from which iterations on it is something else."""
    changes = zip(starts, later, strict=True)
    words = [f"from iteration {start} on {value:g}" for start, value in changes]
    return ", ".join([f"{first:g}", *words])


def words_of(value: float, usual: float) -> str:
    """Return a number, "" where it is the usual one."""
    return "" if value == usual else f"{value:g}"


def yes_or_no(value: bool) -> str:
    """Return a switch in words."""
    return "yes" if value else "no"


class SettingsTable(NamedTuple):
    """Settings of one or several methods."""

    heads: list[str]
    """The methods; none where all settings are the same."""
    rows: list[tuple[str, list[str]]]
    """What, and its value: one, or one a method where they differ."""


E = TypeVar("E")


def settings_table(
    experiments: Mapping[str, E], settings: Mapping[str, Callable[[E], str]]
) -> SettingsTable:
    """Return the settings that matter; those that no method has a value of are left out.

    Args:
        experiments: by method.
        settings: how each is said in words.
    """
    rows = []
    for name, words in settings.items():
        values = [words(experiment) for experiment in experiments.values()]
        if any(values):
            rows.append((name, values if len(set(values)) > 1 else values[:1]))
    differ = any(len(values) > 1 for _, values in rows)
    return SettingsTable(list(experiments) if differ else [], rows)


def experiments_of(subjects: Sequence[Subject]) -> dict[str, Settings]:
    """Return each method's experiment, its first run's."""
    found = {name_of(s): s.trained.experiment for s in reversed(subjects)}
    return dict(reversed(found.items()))


def name_of(subject: Subject) -> str:
    """Return what a run's method is called."""
    return method_name(subject.method, subject.variant)


class Training(NamedTuple):
    """What one run took, and what came of it."""

    run: str
    method: str
    seed: int
    iterations: int
    amount: str
    """Control steps or tasks that it saw."""
    time: str
    digest: str
    config: str
    """All of its settings, YAML."""


def training_of(subject: Subject, checkpoint: str) -> Training:
    """Return what a run took."""
    metrics = metrics_of(subject.path, subject.iterations)
    seconds = sum(sum(metrics.get(f"seconds_{n}", ())) for n in ("sampling", "updating"))
    return Training(
        run=run_name(subject.path),
        method=name_of(subject),
        seed=subject.seed,
        iterations=subject.iterations,
        amount=f"{subject.env_steps:,}",
        time=duration(seconds),
        digest=checkpoint_digest(subject.path, checkpoint),
        config=config_text(subject.path),
    )


def run_name(run: Path) -> str:
    """Return the name of a run's folder."""
    return run.resolve().name


def config_text(run: Path) -> str:
    """Return all of a run's settings as they are written."""
    return (run / "config.yaml").read_text(encoding="utf-8", errors="replace")


def duration(seconds: float) -> str:
    """Return a time in minutes or hours."""
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def checkpoint_digest(run: Path, checkpoint: str) -> str:
    """Return the sha256 of the parameters' file of a run's checkpoint."""
    with warnings.catch_warnings():
        # Said when the policy was loaded.
        warnings.simplefilter("ignore", RunWarning)
        found = RunFolder.open(run).load(checkpoint)
    return hashlib.sha256((found.path / PARAMETERS).read_bytes()).hexdigest()


class Versions(NamedTuple):
    """Versions that runs were trained with, or that tests were made with."""

    what: str
    versions: Mapping[str, str]


def versions_tables(runs: Sequence[Path], tests: Sequence[Mapping[str, str]]) -> list[Versions]:
    """Return what runs and tests were made with, those with the same versions together."""
    trained: dict[str, list[str]] = {}
    for run in runs:
        trained.setdefault(json.dumps(made_with(run)), []).append(run_name(run))
    result = []
    for text, names in trained.items():
        what = "training" if len(trained) == 1 else f"training of {', '.join(names)}"
        result.append(Versions(what, json.loads(text)))
    for number, versions in enumerate({json.dumps(dict(v)): v for v in tests}.values()):
        result.append(Versions("test" if number == 0 else f"test {number + 1}", versions))
    return result


def made_with(run: Path) -> Mapping[str, str]:
    """Return what a run's versions.json says; nothing where it cannot be read."""
    try:
        found = json.loads((run / "versions.json").read_text(encoding="utf-8"))
        return {str(name): str(version) for name, version in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


WHAT: Mapping[Method, Callable[[Settings], str]] = {
    MAML: lambda e: (
        f"meta-trained so that {step_words(e.adaptation.inner_steps).removeprefix('after ')} on "
        f"{e.sampling.episodes} episodes adapts it to a task"
    ),
    PRETRAINED: lambda e: "trained on all tasks alike, and adapted in the test alone",
    ORACLE: lambda e: "trained with its task among its observations, so it takes no step",
    RANDOM: lambda e: "not trained, and adapted in the test alone",
}
"""What became of a method's policy."""


class Sentence(NamedTuple):
    """What was trained."""

    method: str
    """Whose policy; "" where there is one method alone."""
    text: str


def sentences(subjects: Sequence[Subject]) -> list[Sentence]:
    """Return in a sentence for each method what was trained."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(name_of(subject), []).append(subject)
    result = []
    for name, runs in groups.items():
        first = runs[0]
        text = WHAT[first.method](first.trained.experiment)
        if first.iterations:
            text += f"; {first.iterations} iteration{'s' * (first.iterations != 1)}"
            text += f", {million(first.env_steps)} control steps"
            text += " each" if len(runs) > 1 else ""
        text += f"; seed{'s' * (len(runs) > 1)} {', '.join(str(run.seed) for run in runs)}."
        alone = len(groups) == 1
        whose = f"These are {len(runs)} policies" if len(runs) > 1 else "This is a policy"
        whose += f" for {title(first.family)}, "
        result.append(Sentence("", whose + text) if alone else Sentence(name, text))
    return result


def million(steps: int) -> str:
    """Return a number of control steps in words."""
    return f"{steps / 1e6:.1f} million" if steps >= 1e5 else f"{steps:,}"


class Command(NamedTuple):
    """What to type."""

    what: str
    line: str


def commands(tested: Tested, checkpoint: str) -> list[Command]:
    """Return what to type to make a page and all that is in it again.

    Args:
        tested: what it is of.
        checkpoint: which of the runs.
    """
    folder = tested.folder
    runs = [run_name(subject.path) for subject in tested.subjects]
    own_code = ":" in family_name(tested.subjects[0].family)
    allow = ["--allow-import"] if own_code else []
    which = [] if checkpoint == "latest" else ["--checkpoint", checkpoint]

    def line(command: str, *words: str) -> str:
        return shlex.join(["maml-rl", command, *words, *allow])

    likewise = ", likewise of the others" if len(runs) > 1 else ""
    films = f"videos of {runs[0]}{likewise}"
    if folder:
        again = line("benchmark", tested.benchmark or folder, "--out", folder)
        return [
            Command("training and test, with the flags it was first given", again),
            Command(films, line("render", f"{folder}/{runs[0]}")),
            Command("this page", line("report", folder)),
        ]
    return [
        *(
            Command(
                f"training of {run}", line("train", f"{run}/config.yaml", "--out", f"{run}-again")
            )
            for run in runs
        ),
        Command("test", line("evaluate", *runs, *which)),
        Command(films, line("render", runs[0], *which)),
        Command("this page", line("report", *runs, *which)),
    ]
