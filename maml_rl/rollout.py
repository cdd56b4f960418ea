"""One episode in every world: the closed loop between policy and worlds, all in lockstep.

Two places where worlds can be. On the CPU, `HostRollout` takes observations to the policy, wherever
that is, and brings actions back; on a GPU, `maml_rl/device_rollout.py` leaves everything there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.family import Floats, TaskFamily, Transition, WarpSettings, Worlds
from maml_rl.adapt import Params
from maml_rl.chunks import of_tasks
from maml_rl.episodes import Episodes
from maml_rl.policy import GaussianPolicy, log_std

Seeds = npt.NDArray[np.uint64]

Watch = Callable[[Worlds, Transition | None, Tensor], None]
"""Sees worlds as they are sampled: after their reset, then without a transition, and after each
control step. The mask (N,) says which of them are in that state now, others having ended."""


@dataclass(frozen=True)
class Divergence:
    """An episode whose simulation broke down, with all that is needed to do it again."""

    task_index: int
    """In the meta-batch."""
    task_seed: int
    episode: int
    """Of the task, from 0."""
    task: Floats
    """(P,)."""
    start: Floats
    """(S,), what `draw_start` gave."""
    actions: Floats
    """(t + 1, A), in the body's own unit, not clipped; the simulation broke down in the last."""


class SamplingError(RuntimeError):
    """Sampling cannot go on; the message says which task and seed."""

    def __init__(self, message: str, divergence: Divergence | None = None) -> None:
        super().__init__(message)
        self.divergence = divergence


class ActionError(SamplingError):
    """The policy's action is not finite."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What is sampled from, and how much of it at once."""

    family: TaskFamily
    policy: GaussianPolicy
    tasks: int
    """At once."""
    episodes: int
    """K: slots a task."""
    action_scale: float = 1.0
    threads: int = 0
    """Of physics on the CPU; 0 is one a core."""
    deterministic: bool = False
    """Whether the policy takes its mean action."""
    watch: Watch | None = None
    device: str = "cpu"
    """Where the policy is, and the worlds if they are not on the CPU."""
    warp: WarpSettings = field(default_factory=WarpSettings)

    @property
    def observed(self) -> int:
        """Numbers that the policy observes."""
        told = len(self.family.task_columns) * self.policy.observes_task
        return len(self.family.observation_columns) + told

    @cached_property
    def action_map(self) -> tuple[Tensor, Tensor]:
        """Middle and half width of the body's bounds, each (A,), on the CPU: 1 is the bound."""
        low, high = (torch.from_numpy(b).float() for b in self.family.action_bounds)
        return (low + high) / 2.0, (high - low) / 2.0 / self.action_scale

    def controls(self, actions: Tensor) -> Tensor:
        """Return actions (..., A) of the policy in the body's own unit, not clipped; on the CPU."""
        middle, half = self.action_map
        return middle + half * actions


@dataclass(frozen=True)
class Wave:
    """The episodes that a rollout is asked for: the next few of each of M tasks."""

    params: Params
    """(M, ...)."""
    tasks: Tensor
    """(M, P), on the CPU."""
    seeds: Seeds
    """(M,)."""
    taken: Tensor
    """(M,) int64: episodes that each task has had; the first index of this wave."""
    wanted: Tensor
    """(M,) int64: episodes of this wave, at most K."""
    offset: int
    """Of the first task in the meta-batch, for messages."""

    def of_tasks(self, start: int, stop: int) -> Wave:
        """Return the wave of tasks start to stop - 1."""
        return Wave(
            of_tasks(self.params, start, stop),
            self.tasks[start:stop],
            self.seeds[start:stop],
            self.taken[start:stop],
            self.wanted[start:stop],
            self.offset + start,
        )

    def running(self, slots: int) -> Tensor:
        """Return which of K slots hold an episode, (M, K) bool."""
        return torch.arange(slots) < self.wanted.unsqueeze(1)

    def divergence(self, task: int, slot: int, start: Floats, actions: Floats) -> Divergence:
        """Return what is kept of an episode that broke down; see `Divergence` for the arrays."""
        return Divergence(
            task_index=self.offset + task,
            task_seed=int(self.seeds[task]),
            episode=int(self.taken[task]) + slot,
            task=self.tasks[task].double().numpy(),
            start=start,
            actions=actions,
        )

    def refuse_actions(self, task: int, step: int) -> ActionError:
        """Return the error of an action that is not finite; `task` counts from the wave's first."""
        return ActionError(
            f"the policy's action is not finite: task {self.offset + task} (seed "
            f"{self.seeds[task]}), control step {step}"
        )


class Rollout(Protocol):
    """Worlds that episodes are run in, wave after wave."""

    divergence: Divergence | None
    """The first simulation that broke down since this was last set to None."""

    def run(self, wave: Wave) -> Episodes:
        """Run the wave; slots that are not wanted are dead from their first step on.

        Products always have K rows a task, used or not, so that a task's bits depend on neither
        the other tasks nor on how many episodes are still wanted.

        Raises:
            ActionError: if an action is not finite.
        """

    def trouble(self) -> str:
        """Return what the physics had no room for since this was last asked."""

    def close(self) -> None:
        """Release the worlds."""


def log_probs_of(noise: Tensor, params: Params) -> Tensor:
    """Return log N(a; mean, std) of a = mean + std noise, (M, K, H), from noise (M, K, H, A)."""
    constant = 0.5 * math.log(2.0 * math.pi)
    logs = log_std(params)[:, None, None]
    return (-0.5 * noise.square() - logs - constant).sum(-1)


class Exchange:
    """The policy of some tasks, on its own device: observations go there and actions come back.

    One transfer each way a step, from and to memory that a GPU reaches without help; the host may
    do something else between `ask` and `answer`.
    """

    def __init__(
        self, loop: Loop, wave: Wave, noise: Tensor, observations: Tensor, actions: Tensor
    ) -> None:
        """Prepare for one wave.

        Args:
            loop: whose policy it is.
            wave: whose parameters.
            noise: (M, K, H, A), on the policy's device, like all that follow.
            observations: (M, K, H, O), to be filled.
            actions: (M, K, H, A), likewise.
        """
        M, K, _, A = noise.shape
        on_gpu = noise.device.type == "cuda"
        self._network = loop.policy.network
        self._params = wave.params
        self._noise = noise
        self._std = torch.exp(log_std(wave.params)).unsqueeze(1)
        self._sent = torch.zeros(M, K, loop.observed, pin_memory=on_gpu)
        self._received = torch.zeros(M, K, A, pin_memory=on_gpu)
        self._done = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._own = len(loop.family.observation_columns)
        if loop.policy.observes_task:
            self._sent[:, :, self._own :] = wave.tasks.unsqueeze(1)
        self._observations = observations
        self.actions = actions

    def ask(self, step: int, observations: Tensor) -> None:
        """Send what K worlds of each task see, (M, K, O), at a control step."""
        self._sent[:, :, : self._own] = observations
        seen = self._sent.to(self._noise.device, non_blocking=True)
        means = self._network.of_tasks(self._params, seen)
        actions = means + self._std * self._noise[:, :, step]
        self._observations[:, :, step] = seen
        self.actions[:, :, step] = actions
        self._received.copy_(actions, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def answer(self) -> Tensor:
        """Wait for the actions (M, K, A), on the CPU; valid until the next `ask`."""
        if self._done is not None:
            self._done.synchronize()
        return self._received


class HostRollout:
    """Worlds on the CPU, and a policy anywhere.

    Where the policy is on a GPU the tasks go in two lanes: while the policy serves the one, the
    physics of the other is stepped.
    """

    def __init__(self, loop: Loop, lanes: int | None = None) -> None:
        """Make worlds in so many lanes; None is as many as the policy's device wants."""
        self._loop = loop
        self.divergence: Divergence | None = None
        if lanes is None:
            lanes = 1 if loop.device == "cpu" or loop.watch is not None else 2
        lanes = min(lanes, loop.tasks)
        # The first lanes take one task more where they cannot be alike.
        sizes = [loop.tasks // lanes + (i < loop.tasks % lanes) for i in range(lanes)]
        self._lanes = [
            (size, loop.family.make_worlds(size * loop.episodes, threads=loop.threads))
            for size in sizes
        ]

    def run(self, wave: Wave) -> Episodes:
        """Run the wave."""
        M, K, H = len(wave.tasks), self._loop.episodes, self._loop.family.episode_steps
        starts, noise = self._draw(wave)
        device = next(iter(wave.params.values())).device
        host = Record.zeros(M, K, H, len(self._loop.family.measure_columns))
        observations = torch.zeros(M, K, H, self._loop.observed, device=device)
        actions = torch.zeros(noise.shape, device=device)
        there = noise.to(device)
        going: list[Iterator[None]] = []
        first = 0
        for size, worlds in self._lanes:
            last = min(first + size, M)
            if first == last:
                break
            part, rows = wave.of_tasks(first, last), slice(first, last)
            exchange = Exchange(self._loop, part, there[rows], observations[rows], actions[rows])
            record = host.of_tasks(first, last)
            going.append(self._episodes(worlds, part, starts[rows], exchange, record))
            first = last
        while going:
            # Each lane in turn is taken up to where it waits for actions, until it is over.
            going = [lane for lane in going if next(lane, "over") is None]
        # On the CPU: the log-probabilities are the same bits wherever the policy is.
        on_host = {name: p.cpu() for name, p in wave.params.items()}
        return Episodes(
            observations=observations,
            actions=actions,
            log_probs=log_probs_of(noise, on_host).to(device),
            **{name: value.to(device) for name, value in vars(host).items()},
        )

    def _episodes(
        self, worlds: Worlds, wave: Wave, starts: Floats, exchange: Exchange, out: Record
    ) -> Iterator[None]:
        """Run one lane's episodes; whatever is yielded, actions have been asked for."""
        loop = self._loop
        M, K, H, Q = out.measures.shape
        rows = M * K
        spare = worlds.count - rows

        def widen(values: Tensor) -> Tensor:
            """Add rows for worlds that a batch of fewer tasks leaves idle."""
            return (
                values
                if spare == 0
                else torch.cat([values, values.new_zeros(spare, *values.shape[1:])])
            )

        where = widen(wave.running(K).flatten())
        padded = np.concatenate([starts.reshape(rows, -1), np.zeros((spare, starts.shape[2]))])
        observations = worlds.reset(widen(wave.tasks.repeat_interleave(K, 0)), padded, where)
        if loop.watch is not None:
            loop.watch(worlds, None, where)
        for t in range(H):
            exchange.ask(t, observations[:rows].reshape(M, K, -1))
            yield
            actions = exchange.answer()
            if not bool(torch.isfinite(actions).all()):
                bad = ~torch.isfinite(actions).all(-1) & where[:rows].reshape(M, K)
                if bool(bad.any()):
                    raise wave.refuse_actions(int(bad.nonzero()[0][0]), t)
            everyone = bool(where.all())
            controls = loop.controls(actions).reshape(rows, -1)
            step = worlds.step(widen(controls), None if everyone else where)
            if loop.watch is not None:
                loop.watch(worlds, step, where)
            good = where & ~step.diverged
            out.rewards[:, :, t] = step.rewards[:rows].reshape(M, K)
            out.alive[:, :, t] = good[:rows].reshape(M, K)
            out.measures[:, :, t] = step.measures[:rows].reshape(M, K, Q)
            broken = (where & step.diverged)[:rows].reshape(M, K)
            out.diverged.logical_or_(broken)
            if self.divergence is None and bool(broken.any()):
                m, k = broken.nonzero()[0].tolist()
                done = exchange.actions[m, k, : t + 1].cpu()
                controls_done = loop.controls(done).double().numpy()
                self.divergence = wave.divergence(m, k, starts[m, k], controls_done)
            where = good & ~step.terminated
            observations = step.observations
            if not everyone and not bool(where.any()):
                break

    def _draw(self, wave: Wave) -> tuple[Floats, Tensor]:
        """Draw starts (M, K, S) and action noise (M, K, H, A), each episode's from its index."""
        loop = self._loop
        M, K, H = len(wave.tasks), loop.episodes, loop.family.episode_steps
        noise = np.zeros((M, K, H, loop.policy.action_size), np.float32)
        starts: Floats | None = None
        for task in range(M):
            for slot in range(int(wave.wanted[task])):
                index = int(wave.taken[task]) + slot
                # Not a list of ints, which NumPy rounds to 53 bits where one is above 2^63.
                key = np.array([wave.seeds[task], index], np.uint64)
                rng = np.random.Generator(np.random.Philox(key=key))
                start = loop.family.draw_start(rng)
                if starts is None:
                    starts = np.zeros((M, K, len(start)))
                starts[task, slot] = start
                if not loop.deterministic:
                    rng.standard_normal(dtype=np.float32, out=noise[task, slot])
        assert starts is not None  # a wave has at least one episode
        return starts, torch.from_numpy(noise)

    def trouble(self) -> str:
        """Return "": MuJoCo takes the memory that it needs."""
        return ""

    def close(self) -> None:
        """Release the worlds."""
        for _, worlds in self._lanes:
            worlds.close()


@dataclass(frozen=True)
class Record:
    """What worlds on the CPU give, step by step; see `Episodes`."""

    rewards: Tensor
    alive: Tensor
    measures: Tensor
    diverged: Tensor

    @classmethod
    def zeros(cls, tasks: int, slots: int, steps: int, measures: int) -> Record:
        """Make room for episodes of so many steps."""
        return cls(
            rewards=torch.zeros(tasks, slots, steps),
            alive=torch.zeros(tasks, slots, steps, dtype=torch.bool),
            measures=torch.zeros(tasks, slots, steps, measures),
            diverged=torch.zeros(tasks, slots, dtype=torch.bool),
        )

    def of_tasks(self, start: int, stop: int) -> Record:
        """Return views of tasks start to stop - 1."""
        return Record(**{name: value[start:stop] for name, value in vars(self).items()})
