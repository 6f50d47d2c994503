"""Random numbers that are a function of seed, position and purpose; drawing from a distribution."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outdraft.errors import OutdraftError
from outdraft.sampling.sampler import Purpose, sample, uniform

BELOW_ONE = 1 - 2.0**-53


def test_numbers_are_a_function_of_their_name() -> None:
    names = list(itertools.product((0, 1, 2**63 - 1), (0, 1, 5000), Purpose))
    once = {name: uniform(*name) for name in names}
    again = {name: uniform(*name) for name in reversed(names)}
    assert once == again
    assert len(set(once.values())) == len(names)


def test_numbers_do_not_change_between_releases() -> None:
    """A seed that a user wrote down keeps its meaning."""
    assert uniform(7, 11, Purpose.DRAFT) == 0.3403921666056233
    assert uniform(7, 11, Purpose.TARGET) == 0.4274015543081007


def test_numbers_are_uniform_and_uncorrelated() -> None:
    """Each moment within five standard errors: over positions, seeds, and pairs of purposes."""
    n = 4000
    streams = [
        *(np.array([uniform(3, at, purpose) for at in range(n)]) for purpose in Purpose),
        np.array([uniform(seed, 9, Purpose.ACCEPT) for seed in range(n)]),
    ]
    for numbers in streams:
        assert numbers.min() >= 0 and numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * n)
        assert abs((numbers**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / n)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / np.sqrt(n)
    for one, other in itertools.combinations(streams, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(n)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.1, 3.0]), min_size=1, max_size=12),
    st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, BELOW_ONE])),
)
def test_a_token_of_probability_0_is_never_drawn(weights: list[float], u: float) -> None:
    probs = torch.tensor(weights)
    if probs.sum() == 0:
        return
    assert probs[sample(probs, u)] > 0


@pytest.mark.parametrize("scale", [1.0, 1 - 1e-6, 1 + 1e-6])
def test_each_token_has_its_share_of_the_interval(scale: float) -> None:
    probs = torch.softmax(torch.randn(9, dtype=torch.float64), 0)
    probs[4] = 0
    probs /= probs.sum()
    edges = probs.cumsum(0)
    for token in torch.nonzero(probs).flatten().tolist():
        start = float(edges[token] - probs[token])
        for u in (start + 1e-9, float(edges[token]) - 1e-9):
            assert sample(probs * scale, u) == token


def test_many_tokens_of_little_weight() -> None:
    """In fp32 the cumulative sum of 262,144 tokens would stop well before 1."""
    probs = torch.full((262_144,), 1 / 262_144)
    assert sample(probs, BELOW_ONE) == 262_143
    assert sample(probs, 0.5) == 131_072


@pytest.mark.parametrize("vocab", [16_384, 40_001])
def test_chunks_give_the_token_of_the_whole_sum(vocab: int) -> None:
    probs = torch.softmax(4 * torch.randn(vocab), 0)
    probs[torch.rand(vocab) < 0.5] = 0
    probs[: vocab // 3] = 0
    probs[-1] = 1e-3
    mass = probs.double().cumsum(0)
    shares = mass / mass[-1]
    numbers = [0.0, BELOW_ONE, *torch.rand(2000, dtype=torch.float64).tolist()]
    for u in numbers:
        token = sample(probs, u)
        assert probs[token] > 0
        before = float(shares[token - 1]) if token else 0.0
        assert before - 1e-6 <= u <= float(shares[token]) + 1e-6


@pytest.mark.parametrize("bad", [[0.0, 0.0], [0.5, torch.nan], [torch.inf, 1.0]])
def test_what_is_no_distribution_is_an_error(bad: list[float]) -> None:
    for row in (bad, bad * 10_000):
        with pytest.raises(OutdraftError, match="no token can be drawn"):
            sample(torch.tensor(row), 0.5)
