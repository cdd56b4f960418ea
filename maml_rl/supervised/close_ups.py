"""Single tasks seen closely: a curve and what is fitted to it, images and what they are taken for.

They come from the test's stream of random numbers, and are the same for every network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from maml_rl.adapt import Params
from maml_rl.looks import Floats, words
from maml_rl.seeds import TEST
from maml_rl.supervised.evaluate import Outcome, is_oracle, with_shots
from maml_rl.supervised.few_shot import FewShotImages
from maml_rl.supervised.looks import names_of, subjects_of
from maml_rl.supervised.sinusoid import Curves, Sinusoid
from maml_rl.supervised.tasks import Batch, Examples, task_generator

FITTED, PICTURED = 0, 1
"""Numbers of the batches that curves and images come from."""
GRID = 121
"""Places that a fitted curve is drawn at."""
MOST_ROWS = 4
"""Networks whose fits are drawn."""
TASKS = 2
"""Whose images are drawn."""
Pixels = npt.NDArray[np.float32]
Classes = npt.NDArray[np.int64]


class Fit(NamedTuple):
    """A network before and after it adapts to points of a curve."""

    shots: int
    half: bool
    """Whether points lie in the upper half of x alone."""
    x: Floats
    """(K,): of the points."""
    y: Floats
    """(K,)."""
    grid: Floats
    """(G,): x of the curves."""
    true: Floats
    """(G,): y of the curve that points are of."""
    networks: Mapping[int, Floats]
    """(G,): the network's, by gradient steps taken."""


class Row(NamedTuple):
    """The fits of one network."""

    name: str
    outcome: Outcome
    fits: list[Fit]


def fits_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return what networks fit to the same curve: from all of x, then from one half, a fit a
    number of shots.

    Of each method the first network, by the first step size that it was tested with; of many
    numbers of shots the first and the last. Empty for what is no sinusoid.
    """
    subjects = subjects_of(outcomes)
    if not all(isinstance(subject.experiment.data, Sinusoid) for subject in subjects):
        return []
    tested = list(dict.fromkeys(one.shots for one in outcomes))
    names = names_of(subjects)
    firsts = {subject.method: at for at, subject in reversed(list(enumerate(subjects)))}
    rows = []
    for at in sorted(firsts.values())[:MOST_ROWS]:
        mine = [one for one in outcomes if one.subject is subjects[at]]
        fits = []
        for half in (False, True):
            for shots in dict.fromkeys((tested[0], tested[-1])):
                one = next((o for o in mine if o.shots == shots), mine[0])
                fits.append(fit(one, shots, half=half))
        rows.append(Row(names[at], mine[0], fits))
    return rows


def fit(one: Outcome, shots: int, *, half: bool) -> Fit:
    """Return what a network fits to points of the one curve that is always the same."""
    problem = one.subject.experiment.data
    assert isinstance(problem, Sinusoid), "only its tasks are curves"
    rng = task_generator(TEST, 0, FITTED)
    curves = problem.draw_curves(1, rng)
    low, high = problem.x
    x = rng.uniform((low + high) / 2 if half else low, high, (1, shots))
    grid = np.linspace(low, high, GRID)[None]
    outputs = outputs_of(
        one, Batch(problem.examples(curves, x), problem.examples(curves, grid)), shown_steps(one)
    )
    return Fit(
        shots,
        half,
        x[0],
        values_of(curves, x),
        grid[0],
        values_of(curves, grid),
        {step: out[0, :, 0].double().cpu().numpy() for step, out in outputs.items()},
    )


class State(NamedTuple):
    """A network before or after gradient steps."""

    name: str
    style: str
    values: Floats
    """(G,)."""


def states_of(one: Fit) -> list[State]:
    """Return the network of a fit: dotted before, dashed after a step, in full after the last."""
    last = max(one.networks)
    if last == 0:
        return [State("takes no step", "-", one.networks[0])]
    styles = {0: ":", 1: "--"} | {last: "-"}
    return [
        State(f"after {words(step)}" if step else "before", styles[step], values)
        for step, values in one.networks.items()
    ]


def values_of(curves: Curves, x: Floats) -> Floats:
    """Return y (S,) of the one curve at x (1, S)."""
    values: Floats = curves.values(x)[0]
    return values


def shown_steps(one: Outcome) -> list[int]:
    """Return after which gradient steps a network is shown: none, one, and the test's last."""
    last = 0 if is_oracle(one.subject.experiment.data) else len(one.scores) - 1
    return list(dict.fromkeys((0, min(1, last), last)))


def outputs_of(one: Outcome, batch: Batch, steps: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return a network's outputs (M, Q, Y) of the query by gradient steps, as it was tested."""
    learned = with_shots(one.subject.learned, one.shots)
    batch = batch.to(learned.experiment.device)
    scale = one.step_size / learned.experiment.adaptation.step_size

    def predicted(params: Params) -> torch.Tensor:
        with torch.no_grad():
            return learned.learner.predict(params, batch, transductive=one.statistics != "support")

    along = learned.learner.along(learned.meta, batch.support, steps[-1], scale)
    return {step: predicted(params) for step, params in enumerate(along) if step in steps}


class Pictured(NamedTuple):
    """A task's images, a row a class."""

    support: Pixels
    """(N, K, H, W, C) from 0 to 1."""
    query: Pixels
    """(N, Q, H, W, C)."""
    guesses: Mapping[int, Classes]
    """(N, Q): what the network takes the query's images for, by gradient steps taken."""

    def right(self, step: int) -> float:
        """Return the share of images taken for what they are."""
        return float(np.mean(self.guesses[step] == np.arange(len(self.query))[:, None]))


def pictured(one: Outcome) -> list[Pictured]:
    """Return some test tasks' images, and what a network takes them for; empty for no images."""
    problem = one.subject.experiment.data
    if not isinstance(problem, FewShotImages):
        return []
    ways = problem.ways
    query = one.subject.experiment.evaluation.query or one.shots
    source = with_shots(one.subject.learned, one.shots).source
    batch = source.sample("test", TASKS, task_generator(TEST, 0, PICTURED), query=query)
    steps = list(dict.fromkeys((0, len(one.scores) - 1)))
    outputs = outputs_of(one, batch, steps)
    guesses = {step: out.argmax(-1).cpu().numpy() for step, out in outputs.items()}

    def pixels(examples: Examples, task: int) -> Pixels:
        flat = examples.inputs[task]
        images = flat.reshape(ways, -1, *flat.shape[1:]).movedim(2, -1).numpy()
        return np.asarray(1 - images if problem.inverted else images, np.float32)

    return [
        Pictured(
            pixels(batch.support, task),
            pixels(batch.query, task),
            {step: found[task].reshape(ways, -1) for step, found in guesses.items()},
        )
        for task in range(TASKS)
    ]
