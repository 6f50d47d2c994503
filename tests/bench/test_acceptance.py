"""Acceptance on given texts: against what decoding does, and figures worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from outdraft.bench.acceptance import (
    Scored,
    Text,
    acceptance_figures,
    continuations,
    score_texts,
)
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams

K = 4
CONFIG = EngineConfig(backend="cpu", max_sequences=3, ctx_size=512, draft_n_max=K, threads=1)
PROMPT = "def read(path):\n    with open(path) as file:\n"


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo", CONFIG)


def test_rounds_are_those_of_decoding(demo: LLM) -> None:
    """Along its own text, going on behind what was accepted gives the engine's own counts."""
    demo.set_draft_n_max(K)
    prompt = list(demo.encode(PROMPT))
    done = demo.generate(prompt, SamplingParams(max_tokens=300, ignore_eos=True))  # past the window
    (scored,) = score_texts(demo, [Text([*prompt, *done.tokens], len(prompt) + 1)], K)
    assert torch.equal(scored.best_P[:-1], torch.tensor(done.tokens[1:]))
    accepted, at = [0] * K, 0
    n_rounds = done.stats.n_passes - 1 - 1  # neither the prompt's pass, nor a last block cut short
    for _ in range(n_rounds):
        m = int(scored.accepted_P[at])
        assert scored.drafts_PK[at, :m].tolist() == done.tokens[at + 1 : at + 1 + m]
        for i in range(m):
            accepted[i] += 1
        at += m + 1
    last = [a - b for a, b in zip(done.stats.accepted, accepted, strict=True)]
    assert all(0 <= more <= 1 for more in last) and sum(accepted) > 50


def test_texts_side_by_side_are_scored_as_alone(demo: LLM) -> None:
    starts = [list(demo.encode(PROMPT))[:n] for n in (5, 12, 9, 7)]
    texts = list(continuations(demo, starts, 20))
    texts[1] = Text(texts[1].tokens[:-9], 2)
    together = score_texts(demo, texts, K)
    for text, scored in zip(texts, together, strict=True):
        (alone,) = score_texts(demo, [text], K)
        assert len(scored.best_P) == len(text.tokens) - text.first + 1
        for part in ("best_P", "drafts_PK", "accepted_P"):
            assert torch.equal(getattr(alone, part), getattr(scored, part))
    demo.check()
    assert demo.memory.lengths == {}


def test_a_continuation_is_greedy_and_counted_behind_its_beginning(demo: LLM) -> None:
    start = list(demo.encode(PROMPT))
    (text,) = continuations(demo, [start], 6)
    alone = demo.generate(start, SamplingParams(max_tokens=6, ignore_eos=True))
    assert text == Text([*start, *alone.tokens], len(start))
    fewer = LLM("demo", replace(CONFIG, draft_n_max=1))
    (scored,) = score_texts(fewer, [text], 1)
    assert scored.drafts_PK.shape == (7, 1)


def scored(best: list[int], drafts: list[list[int]], accepted: list[int]) -> Scored:
    return Scored(torch.tensor(best), torch.tensor(drafts), torch.tensor(accepted))


BASE = [
    scored([3, 4, 5], [[3, 1], [4, 2], [9, 9]], [1, 2, 0]),
    scored([6, 7], [[6, 2], [7, -1]], [2, 1]),
]
OWN = [
    scored([3, 4, 8], [[3, 1], [1, 2], [9, 9]], [1, 0, 0]),
    scored([6, 7], [[6, 2], [7, -1]], [1, 1]),
]


def test_figures_by_hand() -> None:
    base = acceptance_figures(BASE, None)
    assert base["n_texts"] == 2 and base["n_positions"] == 5
    assert base["conditional"] == pytest.approx([4 / 5, 2 / 3])  # the last has no second draft
    assert base["accepted"] == pytest.approx(6 / 9)
    assert base["tokens_per_pass"] == pytest.approx(1 + 6 / 5)
    # texts give 2 of 3 and 2 of 2; influences (2 - 2.4) / 5 and (2 - 1.6) / 5
    assert base["conditional_standard_error"][0] == pytest.approx(math.sqrt(2 * 2 * 0.08**2))
    own = acceptance_figures(OWN, BASE)
    assert own["conditional"] == pytest.approx([3 / 5, 0])
    assert own["conditional_change"] == pytest.approx([-1 / 5, -2 / 3])
    assert own["accepted_change"] == pytest.approx(3 / 9 - 6 / 9)
    # first drafts: influences (1 - 1.8) / 5 and (2 - 1.2) / 5, less those of the base
    expected = math.sqrt(2 * ((-0.16 + 0.08) ** 2 + (0.16 - 0.08) ** 2))
    assert own["conditional_change_standard_error"][0] == pytest.approx(expected)
    assert own["same_top"] == pytest.approx(4 / 5)
    assert own["same_first_draft"] == pytest.approx(4 / 5)
    assert own["first_of_bf16_drafts"] == pytest.approx(4 / 5)
    assert own["bf16_of_first_drafts"] == pytest.approx(3 / 5)


def test_errors_of_ratios_are_those_that_sampling_gives() -> None:
    """Over many draws of texts, the estimate is the spread of the ratio."""
    rng = torch.Generator().manual_seed(3)
    ratios, errors = [], []
    for _ in range(300):
        texts = []
        for _ in range(40):
            p = 0.4 + 0.5 * float(torch.rand(1, generator=rng))  # texts differ
            n = int(torch.randint(5, 40, (1,), generator=rng))
            hit = (torch.rand(n, generator=rng) < p).long()
            texts.append(Scored(torch.zeros(n), torch.zeros(n, 1), hit))
        figures = acceptance_figures(texts, None)
        ratios.append(figures["conditional"][0])
        errors.append(figures["conditional_standard_error"][0])
    spread = float(torch.tensor(ratios).std())
    assert torch.tensor(errors).mean().item() == pytest.approx(spread, rel=0.15)


def test_one_text_has_no_error() -> None:
    figures = acceptance_figures(OWN[:1], BASE[:1])
    assert figures["conditional_standard_error"] == [None, None]
    assert figures["accepted_change_standard_error"] is None
