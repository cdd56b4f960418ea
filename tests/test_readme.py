"""The README, taken at its word: every command is run, every block of Python executed."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from maml_rl.cli import COMMANDS, run
from tests.tiny import TINY
from tests.tiny_supervised import CHARACTERS, SINUSOID, flags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


CURVES = flags(SINUSOID)
SUPERVISED = {
    **dict.fromkeys(("sinusoid", "sinusoid_pretrained", "sinusoid_oracle"), CURVES),
    "drawn_characters": flags(CHARACTERS),
}
"""What cuts the training of each down."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every maml-rl command of the README's shell blocks, in order, as words after the name."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(p, comments=True)[1:] for p in parts if p.startswith("maml-rl ")]


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in an empty folder; training and speed with their scale cut by flags."""
    monkeypatch.chdir(tmp_path)
    # Commands write into the policies' folders.
    without = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=without)
    fewer = ["--seeds", "0", "--candidates", "0.1", "--validation-tasks", "1"]
    small = ["--size", "64"]
    cuts = {
        "train": TINY,
        "data": ["--drawings", "3"],
        "render": small,
        "speed": ["--scale", "0.02"],
        "resume": ["--iterations", "2"],
        "benchmark": [*TINY, *fewer],
    }
    seen = set()
    for words in commands():
        seen.add(words[0])
        tiny = SUPERVISED.get(words[1]) if words[0] == "train" else None
        # Where there is no GPU, or no cluster, that is told, and nothing is done.
        refused = "cuda" in words and not torch.cuda.is_available()
        refused |= "--cluster.address" in words
        if words[:2] == ["speed", "--cluster.address"]:
            # Workers are started in tests/cluster.
            continue
        assert run([*words, *(tiny or cuts.get(words[0], []))]) == 2 * refused, words
    assert seen == {*COMMANDS} - {"replay"}


@pytest.mark.slow
def test_every_block_of_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    # A module that can be found by its name, as the interpreter's __main__ can.
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    found = blocks("python")
    assert len(found) == 6
    for block in found:
        exec(compile(block, "README.md", "exec"), vars(module))


def test_the_users_own_family_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The family of "Add your own task family", saved as the README says, by its own command."""
    monkeypatch.chdir(tmp_path)
    code = next(b for b in blocks("python") if "class HalfCheetahThrift" in b)
    (tmp_path / "thrift.py").write_text(code)
    (tmp_path / "thrift.yaml").write_text(
        'name: thrift\nfamily: {name: "thrift:HalfCheetahThrift"}\niterations: 1\n'
    )
    assert "maml-rl train thrift.yaml --allow-import" in README
    assert run(["train", "thrift.yaml", "--allow-import", *TINY]) == 0


def test_every_link_and_file_exists() -> None:
    """Relative links and pictures point to files of the repository."""
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            name, _, heading = target.partition("#")
            name = name or "README.md"
            assert (ROOT / name).exists(), target
            if heading:
                lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
                titles = [line.lstrip("# ") for line in lines if line.startswith("#")]
                slugs = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
                assert heading in slugs, target
    assert not re.search(r"@@", README)
