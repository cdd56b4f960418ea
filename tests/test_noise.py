"""Random numbers by counting: the paper's vectors, no block used twice, and the two shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from maml_rl import noise
from maml_rl.noise import EpisodeDraws, philox

WORD = 0xFFFFFFFF


def plain_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox 4x32-10 in Python's own integers, after figure 2 of Salmon et al. 2011."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(x0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(x2 * 0xCD9E8D57, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


def philox_of(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    words = [torch.tensor([w]) for w in (*counter, *key)]
    a, b, c, d, left, right = words
    return [int(w) for w in philox((a, b, c, d), (left, right))]


ALL = [WORD] * 4
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ALL, ALL[:2], [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (PI, [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_published_vectors(counter: list[int], key: list[int], words: list[int]) -> None:
    """Random123's known answers for philox4x32-10; the plain one here gives them too."""
    assert philox_of(counter, key) == words
    assert plain_philox(counter, key) == words


def test_many_at_once_are_each_as_in_plain_integers() -> None:
    """200 random counters and keys, and words at the ends of their range, in one call."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**32, (200, 6))
    rows[:50] = rng.choice([0, 1, 2**31 - 1, 2**31, WORD], (50, 6))
    a, b, c, d, left, right = torch.from_numpy(rows).T
    drawn = torch.stack(philox((a, b, c, d), (left, right)), 1)
    assert drawn.tolist() == [plain_philox(row[:4], row[4:]) for row in rows.tolist()]


def draws_of(seeds: Sequence[int], episodes: Sequence[int]) -> EpisodeDraws:
    return EpisodeDraws(np.array(seeds, np.uint64), torch.tensor(episodes), "cpu")


def words_of(seed: int, episode: int, size: int) -> list[int]:
    """The first words of a stream: counter (block, episode, 0, 0), key (low word, high word)."""
    blocks = range(-(-size // 4))
    key = [seed % 2**32, seed >> 32]
    return [w for block in blocks for w in plain_philox([block, episode, 0, 0], key)][:size]


def as_uniform(words: Sequence[int]) -> Tensor:
    """(w // 2^9 + 1/2) / 2^23, which float32 holds exactly."""
    return torch.tensor([(w // 512 + 0.5) / 2**23 for w in words], dtype=torch.float32)


def test_a_stream_follows_from_its_seed_and_episode() -> None:
    """Of seeds with any of their 64 bits, each number is the next of the stream's words, and only
    whole blocks of four are used: 6 numbers take two, and the next 3 begin with the third."""
    seeds, episodes = [5, 2**63 + 2**32 + 1, 2**64 - 1], [0, 7, 2**31]
    draws = draws_of(seeds, episodes)
    first, second = draws.uniform(6), draws.uniform(3)
    for row, (seed, episode) in enumerate(zip(seeds, episodes, strict=True)):
        words = words_of(seed, episode, 12)
        assert torch.equal(first[row], as_uniform(words[:6]))
        assert torch.equal(second[row], as_uniform(words[8:11]))


def test_all_bits_of_seed_and_episode_count() -> None:
    """65 seeds that differ in one bit, and 32 episodes likewise, draw 96 different streams."""
    seeds = [77, *(77 ^ 2**bit for bit in range(64)), *[77] * 31]
    episodes = [3] * 65 + [3 ^ 2**bit for bit in range(31)]
    drawn = draws_of(seeds, episodes).uniform(4)
    assert len(set(map(tuple, drawn.tolist()))) == len(seeds) == 96


def test_what_is_drawn_together_changes_no_bit() -> None:
    """Seven streams at once, in another order and one by one, for uniform and normal numbers."""
    seeds, episodes = [3, 3, 3, 9, 9, 2**63, 4], [0, 1, 2, 0, 5, 1, 1]
    together = draws_of(seeds, episodes)
    uniform, normal = together.uniform(5), together.normal(7)
    for order in ([6, 2, 0, 5], [4], [1]):
        some = draws_of([seeds[i] for i in order], [episodes[i] for i in order])
        assert torch.equal(some.uniform(5), uniform[order])
        assert torch.equal(some.normal(7), normal[order])


def test_no_block_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of every kind and size, none of them too: counters go up by one a block of four."""
    counters: list[int] = []

    def spy(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        block, episode, *rest = counter
        counters.extend(block.tolist())
        assert episode.flatten().tolist() == [2, 2**31]
        assert not torch.stack(rest).any()
        return philox(counter, key)

    monkeypatch.setattr(noise, "philox", spy)
    draws = draws_of([1, 2], [2, 2**31])
    shapes = [draws.uniform(size).shape for size in (0, 1, 4, 5)]
    shapes += [draws.normal(size).shape for size in (0, 1, 4, 7, 9)]
    assert [s[1] for s in shapes] == [0, 1, 4, 5, 0, 1, 4, 7, 9]
    assert all(s[0] == 2 for s in shapes)
    # 1 + 1 + 2 blocks, then pairs: 2, 4, 8 and 10 numbers.
    assert counters == list(range(4 + 1 + 1 + 2 + 3))


EXTREMES = [0, 1, 511, 512, 2**31 - 1, 2**31, WORD - 512, WORD - 511, WORD]


def with_words(monkeypatch: pytest.MonkeyPatch, words: Sequence[int]) -> EpisodeDraws:
    """A stream of the words given."""
    draws = draws_of([0], [0])
    monkeypatch.setattr(draws, "_words", lambda size: torch.tensor([words[:size]]))
    return draws


def test_extreme_words_give_numbers_inside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 < u < 1, strictly, in float32; a word's complement gives 1 - u exactly."""
    uniform = with_words(monkeypatch, EXTREMES).uniform(len(EXTREMES))[0]
    assert torch.equal(uniform, as_uniform(EXTREMES))
    assert float(uniform.min()) > 0.0
    assert float(uniform.max()) < 1.0
    assert uniform.dtype == torch.float32
    other = with_words(monkeypatch, [WORD - w for w in EXTREMES]).uniform(len(EXTREMES))[0]
    assert torch.equal(uniform.double() + other.double(), torch.ones(len(EXTREMES)).double())


def test_extreme_words_give_finite_normal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of them: at most sqrt(-2 log 2^-24) = 5.77 from 0, and cos^2 + sin^2 = 1."""
    pairs = [(a, b) for a in EXTREMES for b in EXTREMES]
    words = [a for a, _ in pairs] + [b for _, b in pairs]
    drawn = with_words(monkeypatch, words).normal(2 * len(pairs))[0]
    assert torch.isfinite(drawn).all()
    assert float(drawn.abs().max()) <= math.sqrt(2 * 24 * math.log(2.0)) + 1e-5
    radius = torch.sqrt(-2.0 * torch.log(as_uniform(words[: len(pairs)]).double()))
    squared = drawn[: len(pairs)].double().square() + drawn[len(pairs) :].double().square()
    torch.testing.assert_close(squared.sqrt(), radius, rtol=1e-5, atol=1e-5)


def test_box_muller_of_known_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """u = 1/4 and 1/8 are radius sqrt(2 log 4) at an eighth of a turn, 1/2 and 3/4 are radius
    sqrt(2 log 2) at three quarters. Three numbers of two pairs: both cosines and the first sine."""
    words = [2**30, 2**31, 2**29, 3 * 2**30]
    drawn = with_words(monkeypatch, words).normal(3)[0]
    first = math.sqrt(2 * math.log(4.0)) / math.sqrt(2)
    expected = torch.tensor([first, 0.0, first])
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    last = with_words(monkeypatch, words).normal(4)[0, 3]
    assert float(last) == pytest.approx(-math.sqrt(2 * math.log(2.0)), rel=1e-5)


COUNT = 200_000


def normal_numbers() -> Tensor:
    """1,000 streams of 200 numbers: 20 seeds in a row, 50 episodes each."""
    seeds, episodes = np.divmod(np.arange(1000), 50)
    return draws_of(seeds.tolist(), episodes.tolist()).normal(200).double()


@pytest.mark.slow
def test_normal_numbers_are_normal() -> None:
    """Means of x to x^4 within 4 standard errors, their variances 1, 2, 15 and 96 over n; and the
    largest distance of the distribution from the normal below 1.63 / sqrt n (Kolmogorov, 1 %)."""
    drawn = normal_numbers().flatten()
    assert len(drawn) == COUNT
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        error = math.sqrt(variance / COUNT)
        assert abs(float((drawn**power).mean()) - moment) < 4 * error, power
    ordered = torch.special.ndtr(drawn.sort().values)
    rank = torch.arange(COUNT, dtype=torch.float64) / COUNT
    distance = max(float((ordered - rank).max()), float((rank + 1 / COUNT - ordered).max()))
    assert distance < 1.63 / math.sqrt(COUNT)


def test_uniform_numbers_are_uniform() -> None:
    """In each of 100 equal parts as many as chance allows: chi squared (99) below 148 (.1 %)."""
    drawn = draws_of(list(range(100)), [4] * 100).uniform(1000)
    counts = torch.histc(drawn.double(), 100, 0.0, 1.0)
    assert float(((counts - 1000.0).square() / 1000.0).sum()) < 148


def correlation(one: Tensor, other: Tensor) -> float:
    """Times sqrt n, which is standard normal where there is none."""
    return float((one * other).mean()) * math.sqrt(one.numel())


def test_neighbours_are_not_correlated() -> None:
    """Numbers one to five apart in a stream, the two of a Box-Muller pair, streams of episodes and
    of seeds that follow each other: products' means within 4.5 standard errors of 0, and so are
    those of the squares, which a shared radius would show."""
    drawn = normal_numbers()
    each = drawn.reshape(20, 50, 200)
    pairs = {f"{lag} apart": (drawn[:, lag:], drawn[:, :-lag]) for lag in range(1, 6)}
    pairs["a pair"] = (drawn[:, :100], drawn[:, 100:])
    pairs["episodes"] = (each[:, 1:], each[:, :-1])
    pairs["seeds"] = (each[1:], each[:-1])
    for name, (one, other) in pairs.items():
        assert abs(correlation(one, other)) < 4.5, name
        assert abs(correlation(one.square() - 1, other.square() - 1)) / 2 < 4.5, name


@pytest.mark.parametrize("of", ["seed", "episode"])
def test_streams_that_differ_in_one_bit_are_not_correlated(of: str) -> None:
    """Each of the bits: 2,000 numbers, their products' mean within 4.5 standard errors of 0."""
    bits = 64 if of == "seed" else 31
    changed = [12345 ^ 2**bit for bit in range(bits)]
    seeds, episodes = (changed, [6] * bits) if of == "seed" else ([6] * bits, changed)
    base = ([12345], [6]) if of == "seed" else ([6], [12345])
    one, others = draws_of(*base).normal(2000), draws_of(seeds, episodes).normal(2000)
    for bit, other in enumerate(others):
        assert abs(correlation(one[0], other)) < 4.5, bit
