"""Random numbers that are a function of a key and a count, on any device.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): what an episode
draws follows from its task's seed and its own index, so any number of episodes are drawn at once
and no order matters. In torch's 64-bit integers, whose lower halves hold the 32-bit words.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four random words of 32 bits for every counter.

    Args:
        counter: four int64 tensors of words, shapes that broadcast.
        key: two, likewise.
    """
    a, b, c, d = counter
    left, right = key
    for _ in range(ROUNDS):
        # A product of two words overflows the sign; its bits are right all the same.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & WORD) ^ b ^ left,
            second & WORD,
            ((first >> 32) & WORD) ^ d ^ right,
            first & WORD,
        )
        left, right = (left + KEY_STEPS[0]) & WORD, (right + KEY_STEPS[1]) & WORD
    return a, b, c, d


class EpisodeDraws:
    """A stream of random numbers for each of N episodes; see `envs.family.Draws`."""

    def __init__(
        self, seeds: npt.NDArray[np.uint64], episodes: Tensor, device: torch.device | str
    ) -> None:
        """Begin the streams.

        Args:
            seeds: (N,) of each episode's task.
            episodes: (N,) int64: each one's index among its task's.
            device: where the numbers are made.
        """
        words = np.stack([seeds & np.uint64(WORD), seeds >> np.uint64(32)]).astype(np.int64)
        self._key = torch.from_numpy(words).to(device).unsqueeze(-1)
        self._episodes = episodes.to(device).unsqueeze(-1)
        self._used = 0

    def _words(self, size: int) -> Tensor:
        """Return the next `size` words of each stream, (N, size); what is over is left out."""
        blocks = -(-size // 4)
        count = torch.arange(self._used, self._used + blocks, device=self._key.device)
        self._used += blocks
        zero = torch.zeros_like(count)
        words = philox((count, self._episodes, zero, zero), (self._key[0], self._key[1]))
        return torch.stack(words, -1).flatten(1)[:, :size]

    def uniform(self, size: int) -> Tensor:
        """Draw numbers that are uniform in (0, 1), (N, size) float32: 2^23 values, no bound."""
        return ((self._words(size) >> 9).float() + 0.5) * 2.0**-23

    def normal(self, size: int) -> Tensor:
        """Draw standard normal numbers, (N, size) float32 (Box and Muller 1958)."""
        pairs = -(-size // 2)
        uniform = self.uniform(2 * pairs)
        radius = torch.sqrt(-2.0 * torch.log(uniform[:, :pairs]))
        angle = (2.0 * math.pi) * uniform[:, pairs:]
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
        return both[:, :size]
