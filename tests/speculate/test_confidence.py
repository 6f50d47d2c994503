"""Which drafts are verified by the drafter's confidence, on made-up confidences and costs."""

import itertools
import random

import numpy as np
import pytest
import torch

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams
from outdraft.speculate.confidence import Confidence, worth_verifying
from outdraft.speculate.drafter import Draft, confident
from outdraft.speculate.length import LengthController


def best_of_all(reached: np.ndarray, cost: np.ndarray) -> float:
    """The most that any lengths gain."""
    n_most = reached.shape[1]
    most = 0.0
    for lengths in itertools.product(range(n_most + 1), repeat=reached.shape[0]):
        m = sum(lengths)
        if any(n and reached[i, n - 1] < 0 for i, n in enumerate(lengths)):
            continue
        tokens = sum(reached[i, :n].sum() for i, n in enumerate(lengths))
        most = max(most, tokens - (cost[m - 1] if m else 0.0))
    return most


@pytest.mark.parametrize("seed", range(20))
def test_no_other_lengths_gain_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [3, 2, 3]
    confidence = Confidence()
    reached = confidence.reached(rng.random((3, 3), np.float32), lengths)
    cost = np.cumsum(rng.random(sum(lengths)) * 0.8)
    cost[rng.integers(0, 7)] = np.inf
    found, kept, drafted = worth_verifying(reached, cost)
    assert all(0 <= n <= most for n, most in zip(found, lengths, strict=True))
    gained = kept - (cost[sum(found) - 1] if sum(found) else 0.0)
    assert gained == pytest.approx(best_of_all(reached, cost))
    assert kept == pytest.approx(sum(reached[i, :n].sum() for i, n in enumerate(found)))
    assert drafted == pytest.approx(reached[reached >= 0].sum())


def test_how_often_drafts_of_a_confidence_are_kept_is_learned() -> None:
    rng, confidence = random.Random(1), Confidence()
    for _ in range(3000):
        sure = rng.random()
        confidence.observe([sure], 1, int(rng.random() < sure**2))
    for sure in (0.3, 0.6, 0.9):
        assert confidence.chances([sure])[0] == pytest.approx(sure**2, abs=0.08)


def test_what_is_never_verified_is_believed_again() -> None:
    confidence = Confidence()
    for _ in range(200):
        confidence.observe([0.05], 1, 0)
    low = confidence.chances([0.05])[0]
    for _ in range(1000):
        confidence.observe([0.05], 0, 0)
    assert low < 0.1 and confidence.chances([0.05])[0] > 0.3


def test_dear_rows_are_left_to_drafts_that_are_sure() -> None:
    controller = LengthController(3)
    controller.costs.measured({n: 1.0 + 0.4 * n for n in range(1, 9)})
    controller.choose([("a", ("model",)), ("b", ("model",))])
    for _ in range(300):
        controller.confidence.observe([0.05], 1, 0)
        controller.confidence.observe([0.99], 1, 1)
    sure = np.array([[0.99, 0.99, 0.05], [0.05, 0.99, 0.99]], np.float32)
    assert controller.worth_verifying(2, sure, [3, 3]) == [2, 0]


def test_acceptance_by_position_is_that_of_all_drafts_though_some_are_left_out() -> None:
    rng, controller = random.Random(2), LengthController(2)
    for _ in range(2000):
        sure = [rng.choice((0.2, 0.95)) for _ in range(2)]
        kept = [rng.random() < s for s in sure]
        n_verified = 0 if sure[0] < 0.5 and rng.random() < 0.9 else 2
        n_accepted = 0 if not kept[0] or n_verified == 0 else 1 + kept[1]
        controller.observe_block("a", "model", n_verified, n_accepted, sure)
    shared = controller._shared_of("model")
    assert shared.rate(0, 0.6) == pytest.approx(0.575, abs=0.1)


def test_drafts_below_a_confidence_are_left_out_with_those_behind_them() -> None:
    sure = torch.tensor([[0.9, 0.4, 0.9], [0.9, 0.9, 0.1], [torch.nan] * 3, [0.1, 0.1, 0.1]])
    drawn = torch.full((3, 5), 0.2)
    draft = Draft(torch.zeros(4, 3, dtype=torch.int64), [None, None, None, drawn], [3] * 4, sure)
    assert confident(draft, [3, 3, 3, 3], 0.5) == [1, 2, 3, 3]  # unknown and drawn ones stay
    assert confident(draft, [3, 2, 1, 0], 0.5) == [1, 2, 1, 0]
    assert confident(draft, [3, 3, 3, 3], 0.0) == [3] * 4
    draft = Draft(draft.tokens_BK, [None] * 4, [3] * 4)
    assert confident(draft, [3, 3, 3, 3], 1.0) == [3] * 4


def test_a_least_confidence_changes_no_token_and_leaves_drafts_out() -> None:
    prompts = ["def add(a, b):\n", "import os\n\nclass Reader:\n", "# the smallest of "]
    params = SamplingParams(max_tokens=48)
    plain = [
        c.tokens for c in LLM("demo", EngineConfig(spec_type="off")).generate_all(prompts, params)
    ]
    drafted, kept = [], []
    for p_min in (0.0, 0.6, 1.0):
        llm = LLM("demo", EngineConfig(draft_n=4, draft_p_min=p_min))
        done = llm.generate_all(prompts, params)
        assert [c.tokens for c in done] == plain
        drafted.append(sum(c.timings["draft_n"] for c in done))
        kept.append(sum(c.timings["draft_n_accepted"] for c in done) / max(1, drafted[-1]))
    assert drafted[0] > drafted[1] > drafted[2]
    assert kept[1] > kept[0]
