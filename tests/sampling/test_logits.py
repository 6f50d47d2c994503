"""Filters against a restatement in plain Python, rows against their neighbours, ties, damage."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams
from outdraft.sampling.logits import NUCLEUS_GUESS, candidates, distribution, greedy

OPTIONS = [
    SamplingParams(0.7),
    SamplingParams(1.3, top_k=5),
    SamplingParams(0.9, top_p=0.8),
    SamplingParams(1.1, min_p=0.2),
    SamplingParams(0.8, top_k=40, top_p=0.9, min_p=0.02),
]


def softmax(scores: dict[int, float]) -> dict[int, float]:
    best = max(scores.values())
    weights = {i: math.exp(s - best) for i, s in scores.items()}
    total = math.fsum(weights.values())
    return {i: w / total for i, w in weights.items()}


def restated(logits: list[float], params: SamplingParams) -> list[float]:
    """The documented order, one step after another, renormalised after each."""
    best = max(logits)
    scores = {i: (x - best) / params.temperature for i, x in enumerate(logits)}
    ranked = sorted(scores, key=lambda i: (-scores[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        probs = softmax({i: scores[i] for i in ranked})
        mass, nucleus = 0.0, []
        for i in ranked:
            nucleus.append(i)
            mass += probs[i]
            if mass >= params.top_p:
                break
        ranked = nucleus
    probs = softmax({i: scores[i] for i in ranked})
    largest = max(probs.values())
    probs = softmax({i: scores[i] for i in ranked if probs[i] >= params.min_p * largest})
    return [probs.get(i, 0.0) for i in range(len(logits))]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    st.floats(0.2, 3),
    st.integers(0, 31),
    st.floats(0.05, 1),
    st.floats(0, 1),
)
def test_it_is_the_documented_order(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p)
    got = distribution(torch.tensor([logits], dtype=torch.float64), params)[0]
    want = torch.tensor(restated(logits, params), dtype=torch.float64)
    if torch.equal(got > 0, want > 0):
        assert (got - want).abs().max() < 1e-12
    else:
        # A mass or ratio that meets its limit within rounding may fall on either side of it.
        assert _on_the_edge(logits, params)


def _on_the_edge(logits: list[float], params: SamplingParams) -> bool:
    low, high = (
        restated(logits, SamplingParams(params.temperature, params.top_k, p, m))
        for p, m in (
            (min(1.0, params.top_p + 1e-9), max(0.0, params.min_p - 1e-9)),
            (params.top_p - 1e-9, min(1.0, params.min_p + 1e-9)),
        )
    )
    return [x > 0 for x in low] != [x > 0 for x in high]


def test_filters_together_are_the_documented_order() -> None:
    """Normal logits, on which every filter has something to cut after the one before it."""
    draw = random.Random(4)
    for _ in range(200):
        logits = [draw.gauss(0, 2) for _ in range(24)]
        params = SamplingParams(
            draw.uniform(0.5, 2), draw.randint(2, 12), draw.uniform(0.6, 1), draw.uniform(0, 0.3)
        )
        want = torch.tensor(restated(logits, params), dtype=torch.float64)
        got = distribution(torch.tensor([logits], dtype=torch.float64), params)[0]
        assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("vocab", [300, 4099, 140_001])
@pytest.mark.parametrize("ties", [False, True])
def test_large_vocabularies_are_cut_like_small_ones(vocab: int, ties: bool) -> None:
    """The best are looked for chunk by chunk; with ties many scores are equal to the last."""
    draw = torch.Generator().manual_seed(vocab)
    for scale, params in (
        (6.0, SamplingParams(0.9, top_k=50)),
        (3.0, SamplingParams(0.7, top_k=1000, top_p=0.9)),
        (6.0, SamplingParams(1.0, top_p=0.95)),
        (0.5, SamplingParams(1.0, top_p=0.7)),  # a nucleus of most tokens
        (4.0, SamplingParams(0.9, min_p=0.01)),
    ):
        logits_V = torch.randn(vocab, generator=draw, dtype=torch.float64) * scale
        if ties:
            logits_V = (2 * logits_V).round() / 2
        logits_V[torch.randint(vocab, (vocab // 5,), generator=draw)] = -torch.inf
        logits_V[3] = 1.0
        want = torch.tensor(restated(logits_V.tolist(), params), dtype=torch.float64)
        got = distribution(logits_V[None], params)[0]
        assert torch.equal(got > 0, want > 0) and (got - want).abs().max() < 1e-12
        ids_C, probs_C = candidates(logits_V, params)
        assert ids_C is not None and torch.equal(ids_C, torch.nonzero(want).flatten())
        assert torch.equal(probs_C, got[ids_C])


@pytest.mark.parametrize("params", OPTIONS, ids=str)
def test_fp32_is_close_to_fp64(params: SamplingParams) -> None:
    logits = torch.randn(3, 517, generator=torch.Generator().manual_seed(6)) * 3
    got = distribution(logits, params)
    assert got.dtype == torch.float32
    want = distribution(logits.double(), params)
    assert torch.equal(got > 0, want > 0)
    assert (got - want).abs().max() < 5e-6
    assert (got.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [7, 512, 4099])
@pytest.mark.parametrize("params", OPTIONS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(params: SamplingParams, vocab: int) -> None:
    row = torch.randn(vocab) * 2
    alone = distribution(row[None], params)[0]
    for n_rows in range(1, 18):
        others = torch.randn(n_rows, vocab) * 4
        place = n_rows // 2
        others[place] = row
        assert torch.equal(distribution(others, params)[place], alone)
        assert greedy(others)[place] == greedy(row[None])[0]


def test_lowest_ids_stay_among_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 2.0]])
    kept = distribution(logits, SamplingParams(1.0, top_k=3))[0] > 0
    assert kept.tolist() == [False, True, True, True, False, False]
    kept = distribution(torch.zeros(1, 8), SamplingParams(1.0, top_p=0.5))[0] > 0
    assert kept.tolist() == [True] * 4 + [False] * 4


def test_min_p_treats_equals_alike() -> None:
    logits = torch.tensor([[2.0, 0.0, 2.0, 0.0]])
    kept = distribution(logits, SamplingParams(1.0, min_p=0.5))[0] > 0
    assert kept.tolist() == [True, False, True, False]


@pytest.mark.parametrize("top_p", [0.7, 0.97, 0.9999])
def test_a_nucleus_wider_than_the_guess(top_p: float) -> None:
    logits = torch.randn(1, 5 * NUCLEUS_GUESS, dtype=torch.float64)
    params = SamplingParams(1.0, top_p=top_p)
    want = restated(logits[0].tolist(), params)
    got = distribution(logits, params)[0]
    assert (got > 0).sum() > NUCLEUS_GUESS
    assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [5e-324, 1e-42, 1e-8])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    logits = torch.randn(4, 33)
    probs = distribution(logits, SamplingParams(temperature))
    assert torch.equal(probs.argmax(-1), greedy(logits)) and (probs.amax(-1) == 1).all()


def test_excluded_tokens_stay_excluded() -> None:
    logits = torch.randn(1, 9)
    logits[0, [2, 5]] = -torch.inf
    for params in OPTIONS:
        probs = distribution(logits, params)[0]
        assert probs[[2, 5]].tolist() == [0, 0] and probs.isfinite().all()


def test_greedy_takes_the_lowest_of_equals() -> None:
    for vocab in (3, 64, 1000, 70_001):
        logits = torch.randn(5, vocab).clamp(max=0)
        first = torch.randint(vocab - 1, (5,))
        logits[torch.arange(5), first] = 3.0
        logits[:, -1] = 3.0
        assert torch.equal(greedy(logits), first)


def damaged(value: float) -> Tensor:
    logits = torch.randn(2, 40)
    logits[1, 13] = value
    return logits


@pytest.mark.parametrize(
    "logits", [damaged(torch.nan), damaged(torch.inf), torch.full((1, 4), -torch.inf)]
)
def test_damaged_logits_are_an_error(logits: Tensor) -> None:
    with pytest.raises(OutdraftError, match="not finite"):
        greedy(logits)
    for params in OPTIONS:
        with pytest.raises(OutdraftError, match="not finite"):
            distribution(logits, params)
