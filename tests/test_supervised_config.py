"""Settings of supervised experiments: a wrong one is one sentence that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from maml_rl import config
from maml_rl.config import shipped_supervised
from maml_rl.errors import InputError
from maml_rl.plain_yaml import parse_yaml
from maml_rl.supervised.config import as_tree, experiment_from, load_experiment, origin_of
from maml_rl.supervised.few_shot import Omniglot
from maml_rl.supervised.sinusoid import Sinusoid

MINIMAL = "name: small\ndata: {name: sinusoid}\niterations: 4\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_the_papers_settings_where_it_says_nothing(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, MINIMAL))
    assert isinstance(experiment.data, Sinusoid)
    assert experiment.network.layers == (40, 40)
    assert (experiment.adaptation.inner_steps, experiment.adaptation.step_size) == (1, 0.01)
    assert (experiment.outer.tasks, experiment.outer.learning_rate) == (25, 1e-3)
    assert experiment.evaluation.tasks == 600


def test_overrides_win_and_may_choose_another_problem(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "outer: {tasks: 7}\n")
    experiment = load_experiment(path, outer__tasks=5, data__shots=3, network__layers=[4])
    assert (experiment.outer.tasks, experiment.data.shots) == (5, 3)
    assert experiment.network.layers == (4,)
    other = load_experiment(path, data__name="omniglot", data__ways=3)
    assert isinstance(other.data, Omniglot)
    assert other.data.outputs == 3


@pytest.mark.parametrize("name", sorted(shipped_supervised()))
def test_a_resolved_config_is_an_experiment_and_resolves_to_itself(name: str) -> None:
    """config.yaml of any run is a valid experiment, equal in every field to the one that ran."""
    experiment = load_experiment(name, seed=3)
    text = origin_of(experiment).config
    again = experiment_from(parse_yaml(text, "config.yaml"), "config.yaml")
    assert again == experiment
    assert as_tree(again) == as_tree(experiment)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {nam: sinusoid}", "data.name is missing; one of sinusoid, omniglot"),
        ("data: sinusoid", "data must hold settings of its own"),
        ("data: {name: sinusoid, shotz: 3}", "'data.shotz': did you mean 'data.shots'"),
        ("data: {name: sinusoid, shots: many}", "data.shots must be a whole number, got 'many'"),
        ("data: {name: sinusoid, amplitude: [1]}", "data.amplitude must be a list of 2 numbers"),
        ("data: {name: sinusoid, amplitude: [2, 1]}", "data.amplitude must be two numbers"),
        ("data: {name: sinusoid, ways: 5}", "no setting 'data.ways'"),
        ("data: {name: omniglot, ways: 1}", "data.ways must be at least 2, got 1"),
        ("data: {name: sinusoid}\nouter: {clip: 0}", "outer.clip must be above 0"),
        ("data: {name: sinusoid}\nouter: {learning_rate: .nan}", "outer.learning_rate must be"),
        ("data: {name: sinusoid}\nouter: {tasks_at_once: -1}", "outer.tasks_at_once must be from"),
        ("data: {name: sinusoid}\nnetwork: {layers: []}", "network.layers must be 1 to 100"),
        ("data: {name: sinusoid}\nnetwork: {filters: 0}", "network.filters must be from 1"),
        ("data: {name: sinusoid}\nadaptation: {adapted: first}", "must be one of all, last-layer"),
        ("data: {name: sinusoid}\nadaptation: {loss: sum}", "must be one of sum-over-classes"),
        ("data: {name: sinusoid}\nadaptation: {inner_steps: 101}", "inner_steps must be from 0"),
        (
            "data: {name: sinusoid}\nadaptation: {inner_steps: 0, first_order: true}",
            "adaptation.first_order needs adaptation.inner_steps of 1 or more",
        ),
        ("data: {name: sinusoid}\nevaluation: {steps: 1001}", "evaluation.steps must be from 0"),
        ("data: {name: sinusoid}\nevaluation: {step_sizes: [0]}", "step_sizes must all be above"),
        ("data: {name: sinusoid}\nrecord_every: 0", "record_every must be from 1 to"),
        ("data: {name: sinusoid}\nseed: -1", "seed must be from 0 to"),
        ("data: {name: sinusoid}\nsampling: {tasks: 3}", "no setting 'sampling.tasks'"),
        ("data: {name: sinusoid}\nfamily: {name: navigation}", "no setting 'data'|'data.name'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, f"name: small\niterations: 4\n{text}\n")
    loader = config.load_experiment if "family" in text else load_experiment
    with pytest.raises(InputError, match=words) as found:
        loader(path)
    assert "\n" not in str(found.value)


def test_each_mode_sends_the_other_ones_files_away() -> None:
    with pytest.raises(InputError, match="is no experiment of supervised learning"):
        load_experiment("navigation")
    with pytest.raises(InputError, match="is an experiment of supervised learning"):
        config.load_experiment("sinusoid")
    with pytest.raises(InputError, match="did you mean 'sinusoid'"):
        load_experiment("sinusoids")
