"""Worlds, policy, noise and what is written down, all on one device (`physics: warp`).

Nothing is waited for within an episode: all worlds go on to the horizon, those that have ended
included, and one control step, with its physics, is one launch where the device can. What went
wrong is looked at when the episodes are over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maml_rl.adapt import Params
from maml_rl.episodes import Episodes
from maml_rl.noise import EpisodeDraws
from maml_rl.policy import log_std
from maml_rl.rollout import Divergence, Loop, Wave, log_probs_of


@dataclass(frozen=True)
class Tape:
    """What a control step reads and writes, always in the same place: (H, T, K, ...)."""

    noise: Tensor
    observations: Tensor
    actions: Tensor
    rewards: Tensor
    running: Tensor
    """bool: the step was taken by an episode that had not ended."""
    diverged: Tensor
    """bool: that step broke the simulation."""
    measures: Tensor

    @classmethod
    def blank(cls, loop: Loop) -> Tape:
        """Make room for one episode in every slot."""
        shape = (loop.family.episode_steps, loop.tasks, loop.episodes)
        widths = {
            "noise": loop.policy.action_size,
            "observations": loop.observed,
            "actions": loop.policy.action_size,
            "measures": len(loop.family.measure_columns),
        }
        wide = {n: torch.zeros(*shape, w, device=loop.device) for n, w in widths.items()}
        flags = torch.zeros(2, *shape, dtype=torch.bool, device=loop.device)
        rewards = torch.zeros(*shape, device=loop.device)
        return cls(**wide, rewards=rewards, running=flags[0], diverged=flags[1])

    def write(self, step: Tensor, **values: Tensor) -> None:
        """Write values (T, K, ...) down at a step (1,) that is known on the device alone."""
        for name, value in values.items():
            into = getattr(self, name)
            into.index_copy_(0, step, value.reshape(1, *into.shape[1:]))

    def episodes(self, name: str, tasks: int) -> Tensor:
        """Return what was written of the first tasks, (M, K, H, ...), a copy."""
        value: Tensor = getattr(self, name)
        # Not `contiguous`, which of one step, or of one world, would be the tape itself.
        return value[:, :tasks].movedim(0, 2).clone(memory_format=torch.contiguous_format)


class DeviceRollout:
    """Worlds on a device, and the policy beside them."""

    def __init__(self, loop: Loop) -> None:
        """Make the worlds.

        Raises:
            FamilyError: if the family can only be simulated on the CPU.
            ImportError: if the simulator is not installed.
        """
        if loop.watch is not None:
            raise ValueError("only worlds on the CPU can be watched")
        self._loop = loop
        self.divergence: Divergence | None = None
        T, K = loop.tasks, loop.episodes
        self._worlds = loop.family.make_device_worlds(T * K, device=loop.device, settings=loop.warp)
        device = self._worlds.device
        self._tape = Tape.blank(loop)
        self._now = torch.zeros(1, dtype=torch.int64, device=device)
        self._where = torch.zeros(T * K, dtype=torch.bool, device=device)
        self._seen = torch.zeros(T, K, loop.observed, device=device)
        self._own = len(loop.family.observation_columns)
        self._middle, self._half = (number.to(device) for number in loop.action_map)
        self._params: Params = {}
        self._std = torch.zeros(T, 1, loop.policy.action_size, device=device)
        self._step: Callable[[], None] | None = None

    def run(self, wave: Wave) -> Episodes:
        """Run the wave."""
        loop, tape, device = self._loop, self._tape, self._worlds.device
        M, T, K, H = len(wave.tasks), loop.tasks, loop.episodes, loop.family.episode_steps
        self._take_parameters(wave.params)
        if self._step is None:
            # It may be run to be captured: nothing is running yet, and all is set below.
            self._where.zero_()
            self._step = self._worlds.as_graph(self._control_step)
        slots = torch.arange(K)
        seeds = wave.seeds.repeat(K)
        indices = (wave.taken.unsqueeze(1) + slots).flatten()
        draws = EpisodeDraws(seeds, indices, device)
        starts = self._padded(loop.family.draw_starts(draws), T * K)
        noise = draws.normal(H * loop.policy.action_size).reshape(M, K, H, -1)
        if loop.deterministic:
            noise.zero_()
        tape.noise[:, :M] = noise.movedim(2, 0)
        told = self._padded(wave.tasks.to(device), T)
        if loop.policy.observes_task:
            self._seen[:, :, self._own :] = told.unsqueeze(1)
        running = self._padded(wave.running(K).to(device), T).flatten()
        first = self._worlds.reset(told.repeat_interleave(K, 0), starts, running)
        self._seen[:, :, : self._own] = first.reshape(T, K, -1)
        self._where.copy_(running)
        self._now.zero_()
        for _ in range(H):
            self._step()
        taken, broken = tape.episodes("running", M), tape.episodes("diverged", M)
        episodes = Episodes(
            observations=tape.episodes("observations", M),
            actions=tape.episodes("actions", M),
            rewards=tape.episodes("rewards", M),
            alive=taken & ~broken,
            log_probs=log_probs_of(noise, wave.params),
            measures=tape.episodes("measures", M),
            diverged=broken.any(2),
        )
        self._look(wave, episodes, taken, broken, starts)
        return episodes

    def _take_parameters(self, params: Params) -> None:
        """Copy parameters (M, ...) to where the control step reads them."""
        T, M = self._loop.tasks, len(next(iter(params.values())))
        if not self._params:
            self._params = {n: p.new_zeros(T, *p.shape[1:]) for n, p in params.items()}
        for name, value in params.items():
            self._params[name][:M] = value
        self._std[:M] = torch.exp(log_std(params)).unsqueeze(1)

    @staticmethod
    def _padded(values: Tensor, rows: int) -> Tensor:
        """Add rows of zeros for tasks that a batch of fewer leaves idle."""
        missing = rows - len(values)
        return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])

    def _control_step(self) -> None:
        """Do one control step of all worlds, and write it down."""
        loop, tape, now = self._loop, self._tape, self._now
        means = loop.policy.network.of_tasks(self._params, self._seen)
        actions = means + self._std * tape.noise.index_select(0, now)[0]
        tape.write(now, observations=self._seen, actions=actions, running=self._where)
        controls = self._middle + self._half * actions
        step = self._worlds.step(controls.flatten(0, 1), self._where)
        tape.write(
            now,
            rewards=step.rewards,
            measures=step.measures,
            diverged=step.diverged & self._where,
        )
        self._where.logical_and_(~(step.diverged | step.terminated))
        self._seen[:, :, : self._own] = step.observations.reshape(*self._seen.shape[:2], -1)
        # Begins anew after the last: a graph's rehearsal may be longer than an episode.
        self._now.add_(1).remainder_(loop.family.episode_steps)

    def _look(
        self, wave: Wave, episodes: Episodes, taken: Tensor, broken: Tensor, starts: Tensor
    ) -> None:
        """Raise for actions that are not finite; note the first simulation that broke down."""
        bad = taken & ~torch.isfinite(episodes.actions).all(-1)
        wrong, diverged = torch.stack([bad.any(), broken.any()]).tolist()
        if wrong:
            step, task, _ = bad.movedim(2, 0).nonzero()[0].tolist()
            raise wave.refuse_actions(task, step)
        if diverged and self.divergence is None:
            step, task, slot = broken.movedim(2, 0).nonzero()[0].tolist()
            actions = episodes.actions[task, slot, : step + 1].cpu()
            start = starts[task * self._loop.episodes + slot].double().cpu().numpy()
            controls = self._loop.controls(actions).double().numpy()
            self.divergence = wave.divergence(task, slot, start, controls)

    def trouble(self) -> str:
        """Return what the physics had no room for since this was last asked."""
        return self._worlds.trouble()

    def close(self) -> None:
        """Release the worlds."""
        self._worlds.close()
