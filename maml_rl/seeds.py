"""Where randomness comes from: streams of seeds that never meet."""

from __future__ import annotations

import numpy as np

TRAINING, TEST, VALIDATION = 1, 2, 3
"""Streams of seeds. Training draws from neither of the others, and nothing is chosen on TEST."""
TASKS, EPISODES = 1, 2
"""What a seed is for."""
TEST_SEED = 1703_03400
"""Every run, method and seed is tested on the same tasks."""


def seed_sequence(stream: int, seed: int, *path: int) -> np.random.SeedSequence:
    """Return the root of one purpose's randomness, e.g. (TRAINING, run seed, TASKS, iteration)."""
    return np.random.SeedSequence(seed, spawn_key=(stream, *path))
