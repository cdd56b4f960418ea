"""Write the results' tables into README.md and experiments/results/README.md.

python experiments/results/make_tables.py           # write
python experiments/results/make_tables.py --check   # exit 1 where a table is not up to date

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and comes from the summary.json of
the runs that are kept here. A test runs the check.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from compare_curves import between

from maml_rl.config import load_experiment, shipped_policies
from maml_rl.paper import paper_returns
from maml_rl.runs import read_metrics
from maml_rl.terminal import step_words

RESULTS = Path(__file__).parent
FILES = (RESULTS.parent.parent / "README.md", RESULTS / "README.md")
BENCHMARKS = ("navigation", "half_cheetah_vel", "half_cheetah_dir", "ant_vel", "ant_dir")

# What JSON holds no static type can say, hence Any.
Summary = Mapping[str, Any]


def summary(folder: str) -> Summary:
    """Return a test's summary."""
    found: Summary = json.loads((RESULTS / folder / "summary.json").read_text(encoding="utf-8"))
    return found


def with_interval(step: Summary) -> str:
    """Return a mean return with its 95 % interval."""
    interval = step["interval_95"]
    around = f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
    return f"{step['return']:.1f}{around}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one_run(folder: str) -> str:
    """Return the table of one direction run's test."""
    steps = summary(f"{folder}/evaluation")["methods"][0]["gradient_steps"]
    rows = []
    for step in steps:
        cells = [step_words(step["steps"]), with_interval(step)]
        for task in ("backward", "forward"):
            found = step["by_task"][task]
            cells += [f"{found['return']:.1f}", f"{found['velocity']:.2f}"]
        rows.append(cells)
    return table(["", "return", "backward: return", "m/s", "forward: return", "m/s"], rows)


def quickstarts() -> str:
    """Return the table of the quickstart's seeds."""
    rows = []
    for seed in range(5):
        before, after = summary(f"quickstart-seed{seed}/evaluation")["methods"][0][
            "gradient_steps"
        ][:2]
        speeds = [
            " -> ".join(f"{step['by_task'][task]['velocity']:.2f}" for step in (before, after))
            for task in ("forward", "backward")
        ]
        rows.append([str(seed), with_interval(before), with_interval(after), *speeds])
    head = ["seed", "return before", "return after 1 step", "forward, m/s", "backward, m/s"]
    return table(head, rows)


def benchmark(family: str) -> str:
    """Return the table of a benchmark, with the paper's rows below ours, and what follows."""
    found = summary(f"benchmark_{family}")
    rows = []
    for one in found["methods"]:
        steps = one["gradient_steps"]
        gaps = [step["gap_closed"] for step in steps[1:]]
        closed = " / ".join(f"{gap:.2f}" for gap in gaps if gap is not None)
        cells = [with_interval(step) for step in steps]
        rows.append([label(one, found), *cells, *[""] * (4 - len(cells)), closed])
    rows += papers_rows(family)
    head = ["method", "before", "1 step", "2 steps", "3 steps", "gap closed after 1 / 2 / 3"]
    return "\n\n".join([table(head, rows), differences(found), *over_oracle(found, family)])


def label(one: Summary, found: Summary) -> str:
    """Return a method's name with its step size, and whether that was chosen."""
    method = one["method"]
    if method not in found["step_sizes"]:
        return str(method)
    own, best = found["step_sizes"][method]["own"], found["step_sizes"][method]["best"]
    chosen = " (best on validation tasks)" if one["step_size"] == best != own else ""
    return f"{method}, step size {one['step_size']:g}{chosen}"


def differences(found: Summary) -> str:
    """Return how much more the first method returns than each other, task by task."""
    first = found["methods"][0]
    rows: dict[str, list[str]] = {}
    for one in found["differences"]:
        other = {"method": one["than"], "step_size": one["step_size"]}
        low, high = one["interval_95"]
        rows.setdefault(label(other, found), []).append(
            f"{one['difference']:.1f} ({low:.1f} to {high:.1f})"
        )
    head = [f"{label(first, found)}, minus", "1 step", "2 steps", "3 steps"]
    return table(head, [[name, *cells] for name, cells in rows.items()])


def over_oracle(found: Summary, family: str) -> Iterator[str]:
    """Yield the share of the oracle's return that maml reaches, where returns are above 0."""
    oracle = next(one for one in found["methods"] if one["method"] == "oracle")
    best = oracle["gradient_steps"][0]["return"]
    after = found["methods"][0]["gradient_steps"][1]["return"]
    points = paper_returns(family)
    theirs = points["maml"][1].mean / points["oracle"][0].mean
    if best > 0:
        yield f"MAML over oracle after one step: {after / best:.2f}, the paper's {theirs:.2f}."


def papers_rows(family: str) -> Iterator[list[str]]:
    """Yield the paper's own numbers as rows of a benchmark's table."""
    points = paper_returns(family)
    oracle = points["oracle"][0].mean
    for method, found in points.items():
        means = [point.mean for point in found if point.steps <= 3]
        closed = [(mean - means[0]) / (oracle - means[0]) for mean in means[1:]]
        cells = [f"{mean:.1f}" for mean in means]
        gaps = " / ".join(f"{gap:.2f}" for gap in closed)
        yield [f"*{method}, the paper's*", *cells, *[""] * (4 - len(cells)), gaps]


def training() -> str:
    """Return what the benchmarks' runs took, and what each seed reached by its own step size."""
    rows = []
    for family in BENCHMARKS:
        found = summary(f"benchmark_{family}")
        for run in found["runs"]:
            steps = next(m for m in found["methods"] if m["method"] == run["method"])
            place = steps["seeds"].index(run["seed"])
            reached = [f"{step['by_seed'][place]:.1f}" for step in steps["gradient_steps"]]
            rows.append(
                [
                    f"[{family}, {run['run']}](benchmark_{family}/{run['run']})",
                    str(run["iterations"]),
                    f"{run['env_steps'] / 1e6:.1f}",
                    f"{run['seconds'] / 60:.0f}",
                    " / ".join(reached),
                ]
            )
    head = ["run", "iterations", "million control steps", "minutes", "return after 0 / 1 / 2 / 3"]
    return table(head, rows)


def shipped(test: str) -> str:
    """Return what the policies that ship reach, and on the paper's tasks what the paper's did.

    Args:
        test: papers_tasks; or evaluation, the own test of those that have no such tasks.
    """
    rows = []
    papers = test == "papers_tasks"
    for name, folder in shipped_policies().items():
        if (folder / "papers_tasks").is_dir() != papers:
            continue
        found = summary(f"../checkpoints/{name}/{test}")
        (run,), (method,) = found["runs"], found["methods"]
        returns = [with_interval(step) for step in method["gradient_steps"]]
        link = f"[{name}](experiments/checkpoints/{name})"
        rows.append([link, str(run["iterations"]), *returns])
        if papers:
            theirs = [f"{p.mean:.1f}" for p in paper_returns(name)["maml"] if p.steps <= 3]
            rows.append(["*the paper's*", "", *theirs])
    return table(["policy", "iterations", "before", "1 step", "2 steps", "3 steps"], rows)


TRIED: Mapping[str, Mapping[str, str]] = {
    "half_cheetah_dir": {
        "half_cheetah_dir_variants/relu_log_prob": "relu, log-prob, directions drawn one by one",
        "half_cheetah_dir_variants/relu_log_prob_balanced": "relu, log-prob",
        "half_cheetah_dir_variants/relu_likelihood_ratio": "relu, likelihood-ratio",
        "half_cheetah_dir_variants/relu_gamma95": "relu, likelihood-ratio, discount .95",
        "half_cheetah_dir_variants/relu_likelihood_ratio_from_100": (
            "relu; log-prob to iteration 100, then likelihood-ratio"
        ),
        "half_cheetah_dir_variants/tanh_log_prob": "tanh, log-prob",
        "benchmark_half_cheetah_dir/maml-seed0": "tanh, likelihood-ratio",
    },
    "half_cheetah_vel": {
        "half_cheetah_vel_variants/relu_log_prob": "relu, log-prob",
        "half_cheetah_vel_variants/lambda_9_momentum_0": "tanh, likelihood-ratio, lambda .9",
        "benchmark_half_cheetah_vel/maml-seed0": (
            "tanh, likelihood-ratio, lambda .95, momentum .9, smaller steps later"
        ),
        "half_cheetah_vel_variants/seed_1": "the same, seed 1",
        "half_cheetah_vel_variants/lambda_1": "the same with lambda 1",
        "half_cheetah_vel_variants/times_variance": (
            "as the third, step size .3 times the variance of the noise"
        ),
    },
    "ant_dir": {
        "ant_dir_variants/alpha2_gamma95": "A: step size .2, discount .95, lambda 1",
        "ant_dir_variants/alpha3_gamma95_lambda9": "B: step size .3, discount .95, lambda .9",
        "ant_dir_variants/at_101": (
            "C: B, from iteration 49 on discount .99, lambda .95, from 82 on lambda .98"
        ),
        "ant_dir_variants/from_63_kl06": "D: C, from iteration 63 on .06 nats",
        "ant_dir_variants/at_358": "E: C, from iteration 101 on momentum .9",
        "ant_dir_variants/from_122_momentum95_m10": (
            "F: E, from iteration 122 on momentum .95 and 10 tasks in place of 20"
        ),
        "ant_dir_variants/from_265_kl01": "G: E, from iteration 265 on .01 nats",
        "ant_dir_variants/from_358_alpha15": "H: E, from iteration 358 on step size .15",
        "benchmark_ant_dir/maml-seed0": (
            "I: E, from iteration 358 on step size .1, from 423 on .05, from 474 on .03 to .04, "
            "from 491 on .01 nats, from 607 on 40 tasks and .005 nats"
        ),
        "ant_dir_variants/from_373_alpha06": "J: I, from iteration 373 on step size .06",
        "ant_dir_variants/from_600_lambda95": "K: I, from iteration 600 on lambda .95",
        "ant_dir_variants/as_ant_dir_yaml": "L: the experiment ant_dir as it stands",
    },
    "ant_vel": {
        "ant_vel_variants/lambda_98_40x20": "40 tasks x 20 episodes, lambda .98",
        "benchmark_ant_vel/maml-seed0": "20 x 40, lambda .95; from 186 on 40 x 20, shorter steps",
        "ant_vel_variants/as_ant_vel_yaml": "the experiment ant_vel as it stands",
    },
    "half_cheetah_dir from 600": {
        "half_cheetah_dir_variants/from_600_gamma95": "`advantages.discount .95`",
        "half_cheetah_dir_variants/from_600_alpha2": "`adaptation.step_size .2`",
        "half_cheetah_dir_variants/from_600_kl05": "`trust_region.max_kl .05`",
        "half_cheetah_dir_variants/from_600_first_order": "`adaptation.first_order True`",
        "half_cheetah_dir_variants/from_600_k40": "`sampling.episodes 40`",
    },
}
"""Runs that were tried, and what the page calls them."""


def tried(name: str) -> str:
    """Return how far runs came: return of their last ten batches, before and after one step."""
    rows = []
    for folder, words in TRIED[name].items():
        metrics = read_metrics(RESULTS / folder / "metrics.csv")
        last = {phase: metrics[f"return_{phase}"][-10:] for phase in (0, 1)}
        after = last[1]
        rows.append(
            [
                f"[{words}]({folder})",
                str(int(metrics["iteration"][-1]) + 1),
                f"{sum(last[0]) / len(last[0]):.0f}",
                f"{sum(after) / len(after):.0f} ({min(after):.0f} to {max(after):.0f})",
            ]
        )
    return table(["run", "iterations", "before", "after one step"], rows)


STANDING: Mapping[str, tuple[Sequence[int], Mapping[str, str]]] = {
    "ant_dir": (
        (0, 10, 20, 30, 40, 48),
        {
            "benchmark_ant_dir/maml-seed0": "I",
            "ant_dir_variants/as_ant_dir_yaml": "L: ant_dir as it stands",
        },
    ),
    "ant_vel": (
        (0, 4, 8, 12, 16),
        {
            "benchmark_ant_vel/maml-seed0": "20 x 40 at first",
            "ant_vel_variants/as_ant_vel_yaml": "ant_vel as it stands",
        },
    ),
}
"""Between how many million control steps a published run and its experiment are compared."""


def standing(name: str) -> str:
    """Return what runs returned after one step, mean over the iterations that end in each part."""
    edges, runs = STANDING[name]
    parts = list(itertools.pairwise(edges))
    rows = []
    for folder, words in runs.items():
        metrics = read_metrics(RESULTS / folder / "metrics.csv")
        means = (np.mean(between(metrics, low * 1e6, high * 1e6)) for low, high in parts)
        rows.append([f"[{words}]({folder})", *(f"{mean:.0f}" for mean in means)])
    return table(["million control steps", *(f"{low} to {high}" for low, high in parts)], rows)


class Planned(NamedTuple):
    """What was planned for a family, and what an iteration of it takes."""

    batch: str
    seconds: float
    """An iteration of the meta-policy, of 600."""
    baseline_seconds: float
    """Half a meta-iteration's control steps without inner step, of 1,200 each for two baselines."""


PLAN: Mapping[str, Planned] = {
    "half_cheetah_dir": Planned("40 x 20", 10.8, 2.4),
    "ant_dir": Planned("20 x 40, from 607 on 40 x 40", 28.3, 8.5),
    "half_cheetah_vel": Planned("40 x 10", 5.7, 1.2),
    "ant_vel": Planned("20 x 40, from 186 on 40 x 20", 26.7, 9.3),
    "navigation": Planned("20 x 20", 2.5, 0.6),
}
"""By family, in the order in which they were run."""


def done(run: Path) -> tuple[int, float, float]:
    """Return how many iterations there are of a run, how many control steps, and its hours."""
    metrics = read_metrics(run / "metrics.csv")
    seconds = sum(sum(metrics[f"seconds_{name}"]) for name in ("sampling", "updating"))
    return int(metrics["iteration"][-1]) + 1, float(metrics["env_steps"][-1]), seconds / 3600


def plan() -> str:
    """Return what was planned for the five experiments, what was done, and the hours of both."""
    rows = []
    for family, one in PLAN.items():
        folder = RESULTS / f"benchmark_{family}"
        runs = [folder / f"{method}-seed0" for method in ("maml", "pretrained", "oracle")]
        iterations, steps, hours = zip(*map(done, runs), strict=True)
        planned = (600 * one.seconds + 2 * 1200 * one.baseline_seconds) / 3600
        cells = [f"{one.seconds:.1f}", f"{one.baseline_seconds:.1f}", f"{planned:.1f}"]
        cells += [" / ".join(map(str, iterations)), " / ".join(f"{s / 1e6:.0f}" for s in steps)]
        rows.append([family, one.batch, *cells, " / ".join(f"{h:.1f}" for h in hours)])
    head = ["family", "meta-policy's batch", "seconds: meta-policy", "seconds: baseline"]
    head += ["hours planned", "iterations done", "million control steps", "hours they took"]
    return table(head, rows)


def inner_signal() -> str:
    """Return the share of the inner gradient that belongs to the task, lowest and highest seed."""
    shares: dict[tuple[str, str, str, str], list[float]] = {}
    for line in (RESULTS / "inner_signal.txt").read_text(encoding="utf-8").splitlines():
        match line.split():
            case ["$", *_, family, "--policy.nonlinearity", nonlinearity]:
                where = (family, nonlinearity)
            case [seed, discount, gae_lambda, _, _, share] if seed.isdecimal():
                found = shares.setdefault((*where, discount, gae_lambda), [])
                found.append(float(share.rstrip("%")))
    columns = list(dict.fromkeys(key[2:] for key in shares))
    rows = [
        [
            *where,
            *(
                f"{min(shares[(*where, *c)]):.0f} to {max(shares[(*where, *c)]):.0f} %"
                for c in columns
            ),
        ]
        for where in dict.fromkeys(key[:2] for key in shares)
    ]
    return table(["family", "nonlinearity", *(f"{d}, {g}" for d, g in columns)], rows)


def outer_signal() -> str:
    """Return the slopes along a step of the ant's, on its own batch and on others."""
    rows = []
    text = (RESULTS / "outer_signal.txt").read_text(encoding="utf-8")
    first, momentum = text.split("\n\n")
    for line in first.splitlines()[2:]:
        *settings, own, _, own_error, others, _, error = line.split()
        rows.append([*settings, f"{own} ± {own_error}", f"{others} ± {error}"])
    head = ["lambda after adapting", "damping", "products", "share of the tasks in them"]
    slopes = table([*head, "on its own batch", "on the others"], rows)
    lines = (line.partition(": ") for line in momentum.splitlines())
    cells = [[name, value.replace("+-", "±")] for name, _, value in lines]
    return "\n\n".join([slopes, table(["of .03 nats by the later batch's metric", ""], cells)])


PHASES = {
    71: "",
    101: "momentum of gradients, .9",
    122: "the sum begun anew",
    166: "products of 8 of the 20 tasks",
    292: "of all again",
    308: "momentum of natural gradients",
    358: "step size .1",
    386: "",
    423: "step size .05",
    451: "",
    474: "step size .03",
    491: "a trust region of .01 nats",
    525: "",
    540: "step size .04",
    576: "step size .035, .003 nats",
    600: "step size .03, lambda .95, .01 nats",
    607: "40 tasks in place of 20, lambda .98 again, .005 nats",
    630: "",
}
"""Iterations from which the ant was trained in another way."""


def ant_slopes() -> str:
    """Return by how much the ant's return rose an iteration, by a straight line."""
    run = RESULTS / "benchmark_ant_dir" / "maml-seed0"
    found = read_metrics(run / "metrics.csv")["return_1"]
    rows = []
    for (begin, what), end in zip(PHASES.items(), [*list(PHASES)[1:], len(found)], strict=True):
        (slope, _), spread = np.polyfit(np.arange(end - begin), found[begin:end], 1, cov=True)
        cells = [f"{begin} to {end - 1}", f"{slope:+.1f} ± {spread[0, 0] ** 0.5:.1f}"]
        rows.append([*cells, f"{np.mean(found[end - 10 : end]):.0f}", what])
    return table(["iterations", "an iteration", "mean of the last ten", "from there on"], rows)


def step_sizes() -> str:
    """Return what one step of other sizes gives of the ant's policies."""
    rows: dict[str, list[str]] = {}
    sizes: list[str] = []
    for line in (RESULTS / "ant_dir_variants" / "step_sizes.txt").read_text().splitlines():
        match line.split():
            case ["$", "maml-rl", "evaluate", run, *_]:
                cells = rows.setdefault(run.rpartition("_")[2], [])
                sizes = []
            case ["maml", size, "0", before, _]:
                sizes.append(size)
                cells[:1] = [before]
            case ["1", after, _]:
                cells.append(after)
    return table(["iterations", "before", *sizes], [[name, *cells] for name, cells in rows.items()])


def noise() -> str:
    """Return step sizes beside the variance of the noise that the policy acted with."""
    rows, wanted = [], range(0, 601, 100)
    for family in ("half_cheetah_dir", "half_cheetah_vel", "ant_dir", "ant_vel"):
        folder = f"benchmark_{family}/maml-seed0"
        experiment = load_experiment(RESULTS / folder / "config.yaml")
        actions = len(experiment.family.action_columns)
        entropy = read_metrics(RESULTS / folder / "metrics.csv")["entropy"]
        cells = [f"[{family}]({folder})"]
        for iteration in wanted:
            if iteration >= len(entropy):
                cells.append("")
                continue
            # Of a Gaussian: log_std, mean over actions, and half of log 2 pi e each.
            log_std = entropy[iteration] / actions - math.log(2 * math.pi * math.e) / 2
            variance, alpha = math.exp(2 * log_std), experiment.adaptation.size_at(iteration)
            cells.append(f"{alpha:g} / {variance:.3f} = {alpha / variance:.2f}")
        rows.append(cells)
    return table(["iteration", *map(str, wanted)], rows)


CURVES = {
    "sinusoid-seed0": "maml, seed 0",
    "sinusoid-seed1": "maml, seed 1",
    "sinusoid_pretrained-seed0": "pretrained, seed 0",
    "sinusoid_pretrained-seed1": "pretrained, seed 1",
    "sinusoid_oracle-seed0": "oracle, seed 0",
    "sinusoid_alpha_01-seed0": "maml, step size .01, seed 0",
    "sinusoid_alpha_01-seed1": "maml, step size .01, seed 1",
}
"""The runs on sine curves, and what the table calls them."""


def sinusoid() -> str:
    """Return the errors from 5 points of the runs on sine curves, with the paper's."""
    rows: list[list[str]] = []
    papers: dict[tuple[str, int], float] = {}
    for folder, name in CURVES.items():
        found = summary(f"sinusoid/{folder}/evaluation")
        # The oracle is not adapted, so the number of points is of no matter to it.
        test = next(one for one in found["tests"] if one["shots"] == 5 or "oracle" in name)
        steps = test["gradient_steps"]
        cells = [around(steps[step], 1.0, 3) for step in (0, 1, 5, 10) if step < len(steps)]
        size = f"{test['step_size']:g}" if len(steps) > 1 else ""
        link = f"[{name}](experiments/results/sinusoid/{folder})"
        rows.append([link, size, *cells, *[""] * (4 - len(cells))])
        papers |= {(one["method"], one["steps"]): one["mean"] for one in found["paper"]}
    for method in dict.fromkeys(method for method, _ in papers):
        cells = [f"{papers[method, step]:.2f}" for step in (1, 5, 10)]
        rows.append([f"*{method}, the paper's*", "", "", *cells])
    return table(["", "step size", "before", "1 step", "5 steps", "10 steps"], rows)


def around(step: Summary, unit: float, digits: int) -> str:
    """Return a mean with half the width of its interval."""
    if step["mean"] is None:
        return "diverged"
    values = (unit * step["mean"], unit * step["half_width_95"])
    return " ± ".join(f"{v:.3g}" if v >= 1000 else f"{v:.{digits}f}" for v in values)


def characters() -> str:
    """Return the accuracy on drawn characters after each number of steps."""
    tests = summary("drawn_characters-seed0/evaluation")["tests"]
    whose = {"batch": "query", "support": "support"}
    rows = [
        [
            f"batch normalisation by the {whose[one['batch_norm']]}'s statistics",
            *(f"{around(step, 100.0, 1)} %" for step in one["gradient_steps"]),
        ]
        for one in tests
    ]
    return table(["5 ways, 1 shot", "before", "1 step", "2 steps", "3 steps"], rows)


VARIANTS = {
    "drawn_characters-seed0": "maml",
    "drawn_characters_variants/meta_sgd-seed0": "`--adaptation.learned-step-sizes True`: Meta-SGD",
    "drawn_characters_variants/first_order-seed0": "`--adaptation.first-order True`",
    "drawn_characters_variants/first_order_04-seed0": (
        "`--adaptation.first-order True --adaptation.step-size .4`"
    ),
    "drawn_characters_variants/anil-seed0": "`--adaptation.adapted last-layer`: ANIL",
    "drawn_characters_variants/anil_04-seed0": (
        "`--adaptation.adapted last-layer --adaptation.step-size .4`"
    ),
}
"""Runs on drawn characters, by what was added to the command."""


def variants() -> str:
    """Return the accuracy of each variant after one and three steps."""
    rows = []
    for folder, name in VARIANTS.items():
        steps = summary(f"{folder}/evaluation")["tests"][0]["gradient_steps"]
        cells = [f"{around(steps[step], 100.0, 1)} %" for step in (1, 3)]
        rows.append([f"[{name}]({folder})", *cells])
    return table(["run", "1 step", "3 steps"], rows)


def supervised_training() -> str:
    """Return what the supervised runs took."""
    rows = []
    for folder in (*(f"sinusoid/{name}" for name in CURVES), "drawn_characters-seed0"):
        (run,) = summary(f"{folder}/evaluation")["runs"]
        iterations = f"{run['iterations']:,}"
        rows.append([f"[{folder}]({folder})", iterations, f"{run['seconds'] / 60:.1f}"])
    return table(["run", "iterations", "minutes"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "quickstart": lambda: one_run("quickstart-seed0"),
    "quickstart seeds": quickstarts,
    "half_cheetah_dir": lambda: one_run("../checkpoints/half_cheetah_dir"),
    "half_cheetah_dir relu": lambda: one_run(
        "half_cheetah_dir_variants/relu_likelihood_ratio_from_100"
    ),
    "inner signal": inner_signal,
    "shipped": partial(shipped, "papers_tasks"),
    "shipped gymnasium": partial(shipped, "evaluation"),
    "training": training,
    "sinusoid": sinusoid,
    "drawn_characters": characters,
    "drawn_characters variants": variants,
    "supervised training": supervised_training,
    "plan": plan,
    "outer signal": outer_signal,
    "ant slopes": ant_slopes,
    "step sizes": step_sizes,
    "noise": noise,
    **{f"tried {name}": partial(tried, name) for name in TRIED},
    **{f"standing {name}": partial(standing, name) for name in STANDING},
    **{f"benchmark {family}": partial(benchmark, family) for family in BENCHMARKS},
}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- table (.*?) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def main() -> int:
    """Write the tables, or with --check tell which pages are not up to date."""
    stale = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(str(file))
            if "--check" not in sys.argv[1:]:
                file.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'not up to date' if '--check' in sys.argv[1:] else 'written'}")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
