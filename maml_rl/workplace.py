"""Where a command's work is done: in this process, or in those of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from envs.family import TaskFamily
from maml_rl.assess import BrokenDown, Trial, trials_here
from maml_rl.cluster_settings import ClusterSettings
from maml_rl.config import Experiment
from maml_rl.devices import check_place
from maml_rl.errors import InputError
from maml_rl.evaluate import Evaluation
from maml_rl.memory import check_memory
from maml_rl.policy import GaussianPolicy
from maml_rl.train import Engine, MakeEngine, local


class Workplace(Protocol):
    """What trains and tests."""

    def check(self, experiment: Experiment[TaskFamily], *sections: str, runs: int = 1) -> None:
        """Raise InputError if there is no place for an experiment.

        Args:
            experiment: all settings.
            sections: "sampling" for training, "evaluation" for a test.
            runs: as many of the first are to be done.
        """

    def engine(
        self, experiment: Experiment[TaskFamily], policy: GaussianPolicy, chunk: int
    ) -> Engine:
        """Make what the iterations of a run are done with; see `maml_rl.train.MakeEngine`."""

    def test(self, trials: Sequence[Trial]) -> Iterable[Evaluation | BrokenDown]:
        """Do tests; see `maml_rl.assess.Tester`."""

    def at_once(self, runs: int) -> int:
        """Return how many of so many runs to train side by side, each in a thread of its own."""

    def to_come(self, runs: int) -> None:
        """Share what there is among so many runs from here on."""

    def drop(self) -> None:
        """Let everything end that other threads wait for."""


def checked(place: Workplace) -> MakeEngine:
    """Return what makes engines of a workplace for experiments that have a place there."""

    def make(experiment: Experiment[TaskFamily], policy: GaussianPolicy, chunk: int) -> Engine:
        place.check(experiment, "sampling")
        return place.engine(experiment, policy, chunk)

    return make


class Here:
    """This process, one run after the other."""

    def check(self, experiment: Experiment[TaskFamily], *sections: str, runs: int = 1) -> None:
        """Raise InputError if device, physics or memory do not suffice."""
        check_place(experiment.device, experiment.physics)
        check_memory(experiment, *sections)

    def engine(
        self, experiment: Experiment[TaskFamily], policy: GaussianPolicy, chunk: int
    ) -> Engine:
        """Make worlds and threads."""
        return local(experiment, policy, chunk)

    def test(self, trials: Sequence[Trial]) -> Iterable[Evaluation | BrokenDown]:
        """Do one test after the other."""
        return trials_here(trials)

    def at_once(self, runs: int) -> int:
        """Return 1: a run has all threads."""
        return 1

    def to_come(self, runs: int) -> None:
        """Share nothing."""

    def drop(self) -> None:
        """Nothing waits."""


@contextmanager
def workplace_for(cluster: ClusterSettings) -> Iterator[Workplace]:
    """Work on the cluster, if an address is given, or here.

    Raises:
        InputError: if ray is not installed.
    """
    if not cluster.address:
        yield Here()
        return
    try:
        # On demand: it imports ray, which is an extra.
        from maml_rl.spread import Spread
    except ImportError as error:
        raise InputError(str(error)) from error
    with Spread(cluster) as spread:
        yield spread
