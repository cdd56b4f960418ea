"""Who may import whom, and who may write files: the design's rules over the syntax trees."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

ALGORITHM = frozenset(
    f"maml_rl.{name}"
    for name in (
        "adapt",
        "advantages",
        "chunks",
        "curvature",
        "episodes",
        "losses",
        "maml",
        "noise",
        "policy",
        "schedule",
        "seeds",
        "stateless",
        "sums",
        "supervised.learner",
        "supervised.networks",
        "supervised.tasks",
        "trust_region",
    )
)
"""What can be lifted out whole: these import torch, the standard library and one another."""

SIMULATORS = ("envs", "gymnasium", "mujoco", "mujoco_warp", "warp")
FILES = (
    *("csv", "h5py", "imageio", "json", "matplotlib", "pathlib", "pickle", "safetensors"),
    *("shutil", "tempfile", "tomllib", "torch.utils.tensorboard", "yaml", "zipfile"),
)
COMMAND_LINE = ("argparse", "click", "rich", "tyro")

WRITERS: Mapping[str, str] = {
    "maml_rl.runs": "run folders, evaluations, summaries",
    "maml_rl.checkpoints": "the checkpoints of a run folder, for runs.py",
    "maml_rl.locks": "the lock of a run folder, for runs.py",
    "maml_rl.results": "evaluation.csv and summary.json",
    "maml_rl.figures": "figures",
    "maml_rl.render": "videos",
    "maml_rl.movies": "files of videos, for render.py",
    "maml_rl.report.sheet": "report.html",
    "maml_rl.supervised.decoded_images": "images decoded once, beside them or in data.cache",
    "maml_rl.supervised.drawn_characters": "made-up characters, in a folder of the user's",
}
"""The only modules that write files, and what. No other may, under envs/ or maml_rl/."""


class Rule(NamedTuple):
    """Names that some modules must not import."""

    words: str
    banned: tuple[str, ...]
    binds: Callable[[str], bool]


RULES = (
    Rule("envs imports nothing of maml_rl", ("maml_rl",), lambda m: is_within(m, "envs")),
    Rule(
        "the algorithm imports no simulator, no files, no command line",
        SIMULATORS + FILES + COMMAND_LINE,
        lambda m: m in ALGORITHM,
    ),
    Rule(
        "only envs/physics.py imports mujoco.batch",
        ("mujoco.batch", "mujoco._batch"),
        lambda m: m != "envs.physics",
    ),
    Rule("only envs/warp.py imports warp", ("warp", "mujoco_warp"), lambda m: m != "envs.warp"),
    Rule("only maml_rl/cluster.py imports ray", ("ray",), lambda m: m != "maml_rl.cluster"),
    Rule("nothing imports torchvision", ("torchvision",), lambda m: True),
)


def is_within(name: str, package: str) -> bool:
    """Whether a dotted name is a package or lies in it."""
    return name == package or name.startswith(f"{package}.")


def dotted(node: ast.expr) -> str:
    """The dotted name an expression spells, or an empty string: `a.b.c`, but not `f().c`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, at any depth, for typing or by a string.

    A submodule reached as an attribute of an imported package counts: `mujoco.batch.Batch`.
    """
    packages = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                packages.add(alias.asname or alias.name.partition(".")[0])
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, source if alias.name == "*" else f"{source}.{alias.name}"
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node).partition(".")[0] in packages:
            yield node.lineno, dotted(node)


def last_name(call: ast.Call) -> str:
    """The name a call ends in: `c` of `a.b.c()`, and of `f().c()`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else dotted(call.func)


WRITING_CALLS = frozenset(
    (
        *("write_text", "write_bytes", "mkdir", "makedirs", "touch", "rename", "unlink"),
        *("savefig", "imwrite", "save_file", "savez", "savez_compressed", "savetxt"),
        *("copyfile", "copytree", "rmtree", "mkdtemp", "mkstemp", "NamedTemporaryFile"),
        *("SummaryWriter", "symlink_to", "hardlink_to"),
    )
)
WRITING_NAMES = frozenset(
    ("np.save", "numpy.save", "torch.save", "safetensors.torch.save", "os.replace", "json.dump")
)
MODE = re.compile(r"[rwaxbt+]{1,4}")


def opens_to_write(call: ast.Call) -> bool:
    """Whether `open(path, mode)` or `path.open(mode)` is given a mode that writes."""
    if dotted(call.func) == "os.open":
        return any("O_RDONLY" not in ast.unparse(a) for a in call.args[1:2])
    first = 1 if isinstance(call.func, ast.Name) else 0
    modes = [k.value for k in call.keywords if k.arg == "mode"] + call.args[first:2]
    texts = [str(m.value) for m in modes if isinstance(m, ast.Constant)]
    return any(MODE.fullmatch(text) and set(text) & set("wax+") for text in texts)


def writes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and words of every call that writes, makes, moves or deletes a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        last = last_name(node)
        if (
            last in WRITING_CALLS
            or dotted(node.func) in WRITING_NAMES
            or (last == "open" and opens_to_write(node))
        ):
            yield node.lineno, ast.unparse(node.func)


def violations(module: str, source: str) -> list[str]:
    """Every rule that a module's source breaks, with its line."""
    tree = ast.parse(source)
    found = []
    for line, name in imports(module, tree):
        found += [
            f"{module}:{line} imports {name}: {rule.words}"
            for rule in RULES
            if rule.binds(module) and any(is_within(name, banned) for banned in rule.banned)
        ]
        neighbours = any(is_within(name, own) for own in ALGORITHM)
        if module in ALGORITHM and is_within(name, "maml_rl") and not neighbours:
            found.append(f"{module}:{line} imports {name}: the algorithm stands alone")
    if module not in WRITERS:
        found += [f"{module}:{line} calls {call}: it may not write" for line, call in writes(tree)]
    return found


def modules() -> dict[str, Path]:
    """Every module under envs/ and maml_rl/, by dotted name."""
    paths = [p for package in ("envs", "maml_rl") for p in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(paths)}


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_to_its_layer(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_the_modules_that_rules_name_are_there() -> None:
    """A rule about a module that has moved would hold of nothing."""
    assert MODULES.keys() >= ALGORITHM
    assert MODULES.keys() >= {"envs.family", "envs.physics", "maml_rl.sampler", "maml_rl.runs"}


def test_no_module_is_called_utils() -> None:
    names = {part for module in MODULES for part in module.split(".")}
    names |= {path.stem for path in (ROOT / "tests").rglob("*.py")}
    assert not names & {"util", "utils", "helpers", "misc"}


def test_tests_import_no_torchvision() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [name for _, name in imports(f"tests.{path.stem}", tree)]
        assert not [name for name in names if is_within(name, "torchvision")], path.name


def test_the_algorithm_runs_without_simulator_or_command_line() -> None:
    """Importing all of it in a fresh interpreter loads nothing it must not, however far down."""
    # Not argparse, json or pathlib: torch itself loads those.
    unwanted = {*SIMULATORS, "click", "ray", "rich", "safetensors", "torchvision", "tyro", "yaml"}
    code = (
        f"import sys, {', '.join(sorted(ALGORITHM))}\n"
        f"print(sorted({unwanted!r} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


BAD = (
    ("envs.ant", "import maml_rl", "envs imports nothing"),
    ("envs.ant", "from maml_rl.policy import Mlp", "envs imports nothing"),
    ("envs.ant", "def f():\n    from maml_rl import adapt", "envs imports nothing"),
    ("envs.ant", "from ..maml_rl import adapt", "envs imports nothing"),
    ("maml_rl.adapt", "import mujoco", "no simulator"),
    ("maml_rl.adapt", "from envs.family import TaskFamily", "no simulator"),
    ("maml_rl.adapt", "from pathlib import Path", "no files"),
    ("maml_rl.adapt", "import safetensors.torch as st", "no files"),
    ("maml_rl.losses", "import importlib\nimportlib.import_module('yaml')", "no files"),
    (
        "maml_rl.maml",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gymnasium",
        "no simulator",
    ),
    ("maml_rl.policy", "import tyro", "no command line"),
    ("maml_rl.maml", "from maml_rl.config import Experiment", "stands alone"),
    ("maml_rl.maml", "from maml_rl import runs", "stands alone"),
    ("maml_rl.maml", "from .train import train", "stands alone"),
    ("maml_rl.maml", "from . import sampler", "stands alone"),
    ("maml_rl.maml", "import maml_rl", "stands alone"),
    ("envs.locomotion", "from mujoco.batch import Batch", "mujoco.batch"),
    ("envs.locomotion", "from mujoco import batch", "mujoco.batch"),
    ("envs.locomotion", "import mujoco\nmujoco.batch.Batch(m, 3)", "mujoco.batch"),
    ("maml_rl.sampler", "import mujoco_warp as mjw", "warp"),
    ("maml_rl.train", "import ray", "ray"),
    ("maml_rl.supervised.omniglot", "import torchvision.transforms", "torchvision"),
    ("maml_rl.train", "open('a', 'w')", "may not write"),
    ("maml_rl.train", "open('a', mode='ab')", "may not write"),
    ("maml_rl.train", "path.open('x')", "may not write"),
    ("maml_rl.train", "gzip.open('a', 'wt')", "may not write"),
    ("maml_rl.train", "(folder / 'a').write_text('b')", "may not write"),
    ("maml_rl.train", "folder().mkdir(parents=True)", "may not write"),
    ("maml_rl.train", "import torch\ntorch.save(x, 'a')", "may not write"),
    ("maml_rl.train", "from safetensors.torch import save_file\nsave_file({}, 'a')", "not write"),
    ("maml_rl.train", "import os\nos.open('a', os.O_WRONLY)", "may not write"),
    ("envs.navigation", "path.write_bytes(b'')", "may not write"),
)


@pytest.mark.parametrize(("module", "source", "words"), BAD)
def test_what_breaks_a_rule_is_found(module: str, source: str, words: str) -> None:
    """The checker itself, on snippets that are wrong on purpose; the last line is at fault."""
    (found, *_) = violations(module, source) or ["nothing"]
    assert words in found
    assert found.startswith(f"{module}:{len(source.splitlines())} ")


GOOD = (
    ("envs.physics", "from mujoco.batch import Batch"),
    ("envs.warp", "import warp as wp\nimport mujoco_warp"),
    ("envs.ant", "import mujoco\nfrom envs.family import Column\nmujoco.MjSpec()"),
    ("maml_rl.cluster", "import ray"),
    ("maml_rl.maml", "from maml_rl.adapt import adapt\nfrom . import losses\nimport torch"),
    ("maml_rl.sampler", "from envs.family import TaskFamily"),
    ("maml_rl.runs", "open('a', 'w')\nfolder.mkdir()"),
    ("maml_rl.train", "open('a')\npath.open('rb')\nRunFolder.open(path)\nfolder.save(theta)"),
    ("maml_rl.train", "import os\nos.open('a', os.O_RDONLY)\nraymond = 1"),
    ("maml_rl.train", "import raylib\nfrom warped import speed"),
)


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_what_keeps_the_rules_is_let_through(module: str, source: str) -> None:
    assert violations(module, source) == []


# --- One inner step.

DERIVATIVES = (
    *("torch.autograd.grad", "torch.autograd.backward", "torch.autograd.functional"),
    *(f"torch.func.{name}" for name in ("grad", "grad_and_value", "vjp", "jvp", "linearize")),
    *(f"torch.func.{name}" for name in ("jacrev", "jacfwd", "hessian")),
)
DIFFERENTIATE: Mapping[str, str] = {
    "maml_rl.adapt": "the inner step",
    "maml_rl.curvature": "products with the derivative of what adapt() returns",
    "maml_rl.maml": "the outer gradient of reinforcement learning",
    "maml_rl.supervised.learner": "the outer gradient of the supervised mode",
    "maml_rl.supervised.speed": "a plain loop to measure the learner against; nothing learns by it",
}
"""The only modules that differentiate, and what."""


def derivatives(module: str, tree: ast.Module) -> set[str]:
    """Names under which a module reaches torch's derivatives, in full."""
    names = {name for _, name in imports(module, tree)}
    return {name for name in names if any(is_within(name, one) for one in DERIVATIVES)}


def descents(module: str, tree: ast.Module) -> list[str]:
    """Functions that take a derivative and subtract a product: p - size * slope."""
    slopes = {name.rpartition(".")[2] for name in DERIVATIVES}
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        calls = {last_name(n) for n in nodes if isinstance(n, ast.Call)}
        subtracted = [
            *(n.right for n in nodes if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub)),
            *(n.value for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.op, ast.Sub)),
        ]
        steps = [n for n in subtracted if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult)]
        if steps and calls & slopes:
            found.append(f"{module}.{function.name}")
    return found


def test_both_modes_adapt_with_the_one_function() -> None:
    """Nothing else differentiates and steps; a second inner step would drift from the first."""
    # Not `import maml_rl.curvature as curvature`: here a module is asked for by its name.
    modes = (f"maml_rl.{name}" for name in ("adapt", "curvature", "supervised.learner"))
    (one, *others) = (vars(importlib.import_module(name))["adapt"] for name in modes)
    assert all(other is one for other in others)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert {name for name, tree in trees.items() if derivatives(name, tree)} == set(DIFFERENTIATE)
    found = [function for name, tree in trees.items() for function in descents(name, tree)]
    loop = "maml_rl.supervised.speed.plain_loop"
    assert sorted(found) == ["maml_rl.adapt.adapt", "maml_rl.adapt.step", loop]
    imported = {what for name, tree in trees.items() for _, what in imports(name, tree)}
    assert loop not in imported


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ndef f(p, a):\n    g = torch.autograd.grad(l(p), p)\n    return p - a * g[0]",
        "from torch.func import grad\ndef f(p, a):\n    return p - a * grad(l)(p)",
        "from torch import func\ndef f(p, a):\n    p -= func.grad(l)(p) * a",
        "import torch\ndef f(p, a):\n    l(p).backward()\n    p.data = p - a * p.grad",
    ],
)
def test_a_second_inner_step_is_found(source: str) -> None:
    """The checker itself, on steps down a loss that are written again."""
    assert descents("maml_rl.train", ast.parse(source)) == ["maml_rl.train.f"]
