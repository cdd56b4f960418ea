"""Settings: file and flags give one validated tree, and a wrong one gives one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import envs
from maml_rl.config import (
    as_tree,
    find_experiment,
    load_experiment,
    shipped_experiments,
    to_yaml,
)
from maml_rl.errors import InputError, one_line
from maml_rl.settings import plain_sentence

MINIMAL = "name: small\nfamily: {name: half_cheetah_vel}\niterations: 4\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_defaults_and_what_the_protocol_decides(tmp_path: Path) -> None:
    """What the file leaves open is the paper's: alpha .1, 100-100 relu, H 200, frame_skip 1."""
    experiment = load_experiment(write(tmp_path, MINIMAL))
    assert isinstance(experiment.family, envs.HalfCheetahVel)
    assert (experiment.family.horizon, experiment.family.frame_skip) == (200, 1)
    assert experiment.policy.layers == (100, 100)
    assert experiment.adaptation.step_size == 0.1


def test_keywords_win_over_the_file(tmp_path: Path) -> None:
    """An override replaces the file's value, in nested settings and in the family too."""
    path = write(tmp_path, MINIMAL + "sampling: {tasks: 7}\n")
    experiment = load_experiment(
        path, iterations=9, sampling__tasks=5, policy__layers=[3], family__speed_low=-1.5
    )
    assert (experiment.iterations, experiment.sampling.tasks) == (9, 5)
    assert experiment.policy.layers == (3,)
    assert isinstance(experiment.family, envs.HalfCheetahVel)
    assert experiment.family.speed_low == -1.5


@pytest.mark.parametrize("name", sorted(shipped_experiments()))
def test_a_resolved_config_is_an_experiment_and_resolves_to_itself(
    name: str, tmp_path: Path
) -> None:
    """config.yaml of any run is a valid experiment, equal in every field to the one that ran."""
    experiment = load_experiment(name)
    again = load_experiment(write(tmp_path, to_yaml(experiment)))
    assert again == experiment
    assert as_tree(again) == as_tree(experiment)


@pytest.mark.parametrize("name", sorted(shipped_experiments()))
def test_an_experiment_is_named_after_its_file_and_says_how_to_run_it(name: str) -> None:
    """The header of each file tells paper section or purpose, and the command."""
    text = shipped_experiments()[name].read_text()
    assert yaml.safe_load(text)["name"] == name
    assert f"maml-rl train {name}" in text.split("name:")[0] or name == "quickstart"
    assert text.startswith("# ")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no settings"),
        ("- 1\n", "holds no settings"),
        ("name: [\n", "is not plain YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not plain YAML"),
        ("name: x\niterations: 1\n", "family.name is missing"),
        ("family: 3\n", "family must hold settings of its own"),
        ("family: {name: half_cheetah_velo}\n", "did you mean 'half_cheetah_vel'"),
        (MINIMAL + "policy: 5\n", "policy must hold settings of its own"),
        (MINIMAL + "polcy: {layers: [3]}\n", "did you mean 'policy.layers'"),
        (MINIMAL + "sampling: {taks: 3}\n", "did you mean 'sampling.tasks'"),
        (MINIMAL.replace("4", "{a: 4}"), "iterations must be a whole number, so there is no"),
        (MINIMAL.replace("4", "many"), "iterations must be a whole number, got 'many'"),
        (MINIMAL.replace("4", "1.5"), "iterations must be a whole number, got 1.5"),
        (MINIMAL.replace("4", "true"), "iterations must be a whole number, got True"),
        (MINIMAL.replace("4", ""), "iterations must be a whole number, got null"),
        (MINIMAL.replace("4", "[4]"), "iterations must be a whole number, got [4]"),
        (MINIMAL.replace("4", "2020-13-45"), "iterations must be a whole number, got '2020-13-45'"),
        (MINIMAL.replace("4", "0b_"), "iterations must be a whole number, got '0b_'"),
        (MINIMAL.replace("4", "0x" + "f" * 5000), "iterations must be at most 1000 characters"),
        (MINIMAL.replace("4", "9" * 401), "got 99999999999999999999...9999999999 (401 characters)"),
        ("family: {name: half_cheetah_vel}\n", "name and iterations are missing"),
        (MINIMAL.replace("small", "7"), "name must be text, got 7"),
        (MINIMAL + "policy: {layers: 3}\n", "policy.layers must be a list of whole numbers, got 3"),
        (MINIMAL + "policy: {layers: [-h]}\n", "a list of whole numbers, got ['-h']"),
        (MINIMAL + "policy: {}\n", "policy must hold settings of its own"),
        (MINIMAL + "adaptation: {first_order: 1}\n", "first_order must be True or False, got 1"),
        (MINIMAL + "seed: &a 1\nthreads: *a\n", "line 5, column 10: threads: aliases (*a)"),
        (MINIMAL + "seed: !!int '1'\n", "line 4, column 7: seed: tags (!!int) are not allowed"),
        (MINIMAL + "seed: 1\nseed: 2\n", "line 5, column 1: seed stands there twice"),
        (
            MINIMAL + "sampling: {tasks: 3}\nsampling.tasks: 4\n",
            "sampling.tasks stands there twice",
        ),
        (MINIMAL + "seed: " + "[" * 30 + "]" * 30, "seed: nested too deeply"),
        (MINIMAL + "#" * 2**17, "is too large for an experiment: more than 131072 bytes"),
        (MINIMAL + "seed: \0\n", "line 4: character #x0000 is not allowed"),
        (MINIMAL.replace("4", "-4"), "iterations must be at least 0, got -4"),
        (MINIMAL + "sampling: {tasks: 0}\n", "sampling.tasks must be at least 1, got 0"),
        (MINIMAL + "advantages: {discount: 1.5}\n", "advantages.discount must be between 0 and 1"),
        (
            MINIMAL + "trust_region: {max_kl: .nan}\n",
            "trust_region.max_kl must be finite and above 0",
        ),
        (MINIMAL + "adaptation: {inner_loss: dise}\n", "got 'dise'; did you mean 'dice'?"),
        (MINIMAL + "device: tpu\n", "device must be one of cpu, cuda, got 'tpu'"),
        (MINIMAL + "seed: -1\n", "seed must be between 0"),
        (MINIMAL.replace("small", "../up"), "name must be at most 100 letters"),
        (MINIMAL.replace("small", "a" * 101), "name must be at most 100 letters"),
        (MINIMAL.replace("{name: half_cheetah_vel}", "{name: 'mine:Family'}"), "--allow-import"),
        (MINIMAL.replace("vel}", "vel, horizon: 0}"), "horizon must be a whole number between 1"),
        (MINIMAL.replace("vel}", "vel, protocol: papr}"), "did you mean 'paper'?"),
        (
            MINIMAL.replace("vel}", "vel, speed_high: 1e39}"),
            "speed_high must be between 0 and 1e+06",
        ),
    ],
)
def test_a_wrong_file_gives_one_sentence_that_names_the_key(
    text: str, complaint: str, tmp_path: Path
) -> None:
    """Every mistake is an InputError (or FamilyError) with what was expected, never a box."""
    with pytest.raises((InputError, envs.FamilyError)) as caught:
        load_experiment(write(tmp_path, text))
    message = str(caught.value)
    assert complaint in message
    assert "\n" not in message
    assert "──" not in message
    assert "----" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, binary and foreign files each get their own sentence."""
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        load_experiment("quikstart")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\x00\xff\xfe")
    with pytest.raises(InputError, match="not a text file"):
        load_experiment(binary)
    with pytest.raises(InputError, match=r"such as its config\.yaml"):
        load_experiment(tmp_path)


def test_a_name_that_no_file_can_have() -> None:
    """Too long for a path, or with a character that none may hold."""
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(InputError, match="there is no experiment file"):
            find_experiment(name)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"seed": 10**5000}, "seed is too large a number"),
        ({"policy__layers": ["-h"]}, "policy.layers holds '-h', which would be read as a flag"),
        (
            {"policy__layers": [3.5]},
            r"policy.layers must be a list of whole numbers, got \['3.5'\]",
        ),
        ({"sampling__tasks": True}, "sampling.tasks must be a whole number, got 'True'"),
        ({"sampling__tasks": 10**6}, "sampling.tasks must be at most 100000, got 1000000"),
        ({"family__horizon": float("nan")}, "family.horizon must be a whole number, got 'nan'"),
    ],
)
def test_a_wrong_override_gives_one_sentence(overrides: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load_experiment("quickstart", **overrides)


def test_a_message_is_one_line_that_a_terminal_can_show() -> None:
    """Control characters are written out, words of more than 60 characters and long lists cut."""
    assert one_line("got 'é'") == "got 'é'"
    assert one_line("a\nb\x1b[31m\ud800\u202e") == "a\\nb\\x1b[31m\\ud800\\u202e"
    assert one_line("got " + "1" * 60) == "got " + "1" * 60
    assert one_line("got " + "1" * 61) == f"got {'1' * 20}...{'1' * 10} (61 characters)"
    assert len(one_line("1, " * 1000)) < 1000


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Value error ───────────╮\n│ Error parsing --n: bad  │\n│ 'x' -1                  │\n"
        "│ ─────────────────────── │\n│ For full helptext, see  │\n╰─────────────────────────╯\n",
        "Value error\n-----------\nError parsing --n: bad\n'x' -1\n-----------\nFor full help\n",
    ],
)
def test_the_complaint_is_taken_out_of_either_kind_of_box(box: str) -> None:
    """tyro draws with lines on a terminal and with hyphens elsewhere."""
    assert plain_sentence(box) == "Error parsing --n: bad 'x' -1"


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ("invalid literal for int() with base 10: 'x'", "n must be a whole number, got 'x'"),
        (
            "no type matching {None}|INT could be instantiated from ['x'].  Got errors: - <class "
            "'int'>: invalid literal for int() with base 10: 'x'",
            "n must be a whole number, got 'x'",
        ),
        ("could not convert string to float: 'x'", "n must be a number, got 'x'"),
    ],
)
def test_a_conversion_that_fails_is_put_in_words(box: str, sentence: str) -> None:
    """Options of a command that are no settings are left to tyro, as in `resume --iterations x`."""
    assert plain_sentence(f"Error parsing --n: {box}\n") == sentence
