"""Lossless with options that depend on the text: the ladder's rungs 1 to 3 through `decide`.

The networks are tables; penalties, bias and a grammar are the real state inside the real decision.
The truth is counted from the whole text at every place (tests/sampling/test_state.py).
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from outdraft.engine import decide as decision
from outdraft.request import SamplingParams
from outdraft.sampling.logits import distribution
from outdraft.sampling.sampler import Purpose, uniform
from outdraft.sampling.state import SamplerState
from outdraft.speculate.proof import (
    Context,
    Decoder,
    Propose,
    Table,
    Verify,
    argmax_drafts,
    block_distribution,
    chi_square_p_value,
    continuation,
    generate,
    logits_table,
    mixed,
    sampled_drafts,
    table,
)
from outdraft.speculate.verify import Verdict
from tests.sampling.test_state import restated

PROMPT = (0, 1)
EXACT = 1e-12
OPTIONS = {
    "penalties": SamplingParams(
        0.8, presence_penalty=0.9, frequency_penalty=0.6, repetition_penalty=1.5
    ),
    "window": SamplingParams(1.0, repetition_penalty=2.0, presence_penalty=1.5, repeat_last_n=2),
    "bias": SamplingParams(1.2, logit_bias={0: 1.5, 2: -math.inf}, top_k=3),
    "bad words": SamplingParams(0.9, bad_words=((1, 1), (0, 2)), top_p=0.9),
    "grammar": SamplingParams(1.0),
    "all": SamplingParams(
        0.7,
        presence_penalty=0.5,
        repetition_penalty=1.3,
        repeat_last_n=3,
        logit_bias={1: 0.5},
        bad_words=((1, 0),),
        min_p=0.05,
    ),
}
DRAFTERS: dict[str, Callable[[Table], Propose]] = {
    "sampled": sampled_drafts,
    "argmax": argmax_drafts,
}


class NoRepeat:
    """A grammar without tokenizer: no token follows itself."""

    def __init__(self, last: int) -> None:
        self.last = last

    def fork(self) -> "NoRepeat":
        return type(self)(self.last)

    def push(self, token: int) -> None:
        self.last = token

    def allowed(self, vocab: int) -> Tensor:
        return torch.arange(vocab) != self.last

    def end_id(self) -> None:
        return None


def state_of(params: SamplingParams, name: str, make: type[SamplerState]) -> SamplerState:
    words = tuple(w for w in params.bad_words if not isinstance(w, str))
    grammar: Any = NoRepeat(PROMPT[-1]) if name in ("grammar", "all") else None
    return make(params, PROMPT, end_ids=frozenset(), bad_words=words, grammar=grammar)


def truth_of(logits: Table, params: SamplingParams, name: str) -> Table:
    known: dict[Context, Tensor] = {}

    def row(context: Context) -> Tensor:
        if context not in known:
            values = restated(logits(context).tolist(), params, list(PROMPT), list(context))
            if name in ("grammar", "all"):
                values[(*PROMPT, *context)[-1]] = -math.inf
            known[context] = distribution(torch.tensor([values], dtype=torch.float64), params)[0]
        return known[context]

    return row


def verify_with(
    params: SamplingParams, name: str, make: type[SamplerState], context: Callable[[], Context]
) -> Verify:
    def verify(
        ids_K: Tensor,
        q_KV: Tensor | None,
        logits_RV: Tensor,
        accept_u: Sequence[float],
        final_u: Sequence[float],
    ) -> Verdict:
        state = state_of(params, name, make)
        for token in context():
            state.push(token)
        tokens = [*PROMPT, *context()]
        numbers = {Purpose.ACCEPT: accept_u, Purpose.TARGET: final_u}
        sequence: Any = SimpleNamespace(
            request=SimpleNamespace(params=params), tokens=tokens, sampler=state, seed=0
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                decision, "uniform", lambda _, at, why, *_start: numbers[why][at - len(tokens)]
            )
            block = decision.Block(ids_K.tolist(), q_KV if len(ids_K) else None)
            verdict = decision.decide(sequence, block, logits_RV, [])
        assert state.tokens == tokens or make is not SamplerState
        return verdict

    return verify


def enumeration_error(
    name: str, drafts: str, vocab: int, k: int, make: type[SamplerState] = SamplerState
) -> float:
    params = OPTIONS[name]
    target, other = logits_table(vocab, 3), logits_table(vocab, 4)
    truth = truth_of(target, params, name)
    q = table(mixed(target, other, 0.5), SamplingParams(params.temperature, top_k=params.top_k))
    verify = verify_with(params, name, make, lambda: ())
    joint = block_distribution(Decoder(target, DRAFTERS[drafts](q), verify), truth, vocab, k)
    return float((joint - continuation(truth, (), vocab, k + 1)).abs().max())


@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_enumerated_blocks_with_options_are_the_targets(name: str, drafts: str) -> None:
    assert enumeration_error(name, drafts, 3, 2) < EXACT
    assert enumeration_error(name, drafts, 4, 1) < EXACT


@pytest.mark.prove
@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_longer_blocks_with_options_are_the_targets(name: str, drafts: str) -> None:
    assert enumeration_error(name, drafts, 4, 3) < EXACT


@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("name", ["penalties", "grammar", "all"])
def test_generated_text_with_options_follows_the_target(name: str, drafts: str) -> None:
    params, vocab, k, n = OPTIONS[name], 4, 2, 1200
    target, other = logits_table(vocab, 8, order=1), logits_table(vocab, 9, order=1)
    truth = truth_of(target, params, name)
    honest = DRAFTERS[drafts](table(mixed(target, other, 0.5), SamplingParams(params.temperature)))
    here: list[Context] = [()]

    def propose(context: Context, k: int, draw: Any) -> Any:
        here[0] = context
        return honest(context, k, draw)

    decoder = Decoder(target, propose, verify_with(params, name, SamplerState, lambda: here[0]))
    runs = []
    for seed in range(n):

        def numbers(at: int, why: Purpose, start: int | None, seed: int = seed) -> float:
            return uniform(seed, at, why, start)

        runs.append(generate(decoder, numbers, 3, k).tokens)
    places = torch.tensor(runs) @ torch.tensor([vocab**2, vocab, 1])
    counts = torch.bincount(places, minlength=vocab**3).double()
    expected = n * continuation(truth, (), vocab, 3).flatten()
    assert chi_square_p_value(counts, expected) > 1e-4


# --- Planted bugs ---


class StaleInBlock(SamplerState):
    """Nothing advances inside the block."""

    def push(self, token: int) -> None:
        if self._mark is None:
            super().push(token)


class StalePenalties(SamplerState):
    """Penalties do not see the drafts before them."""

    def _count(self, at: int, change: int) -> None:
        if getattr(self, "_mark", None) is None:
            super()._count(at, change)


class StaleGrammar(SamplerState):
    """The mask stays that of the block's first row."""

    def push(self, token: int) -> None:
        kept, self.grammar = self.grammar, None
        super().push(token)
        self.grammar = kept


class DraftOnly(SamplerState):
    """The target's row is not processed."""

    def process(self, logits_V: Tensor) -> Tensor:
        return logits_V


class OneAhead(SamplerState):
    """Row i sees draft i as well: its own token is penalised before it is judged."""

    def process(self, logits_V: Tensor) -> Tensor:
        kept = dict(self._output_counts)
        for token in range(2):
            self._output_counts[token] = self._output_counts.get(token, 0) + 1
        row_V = super().process(logits_V)
        self._output_counts = kept
        return row_V


class PresenceCountsThePrompt(SamplerState):
    """Output penalties over prompt and output."""

    def process(self, logits_V: Tensor) -> Tensor:
        kept, self._output_counts = self._output_counts, self._counts
        row_V = super().process(logits_V)
        self._output_counts = kept
        return row_V


class WindowIgnored(SamplerState):
    """`repeat_last_n` is not looked at."""

    def push(self, token: int) -> None:
        self._window = math.inf
        super().push(token)


MUTANTS = [
    (StaleInBlock, "penalties"),
    (StaleInBlock, "bad words"),
    (StaleInBlock, "grammar"),
    (StalePenalties, "penalties"),
    (StaleGrammar, "grammar"),
    (DraftOnly, "bias"),
    (OneAhead, "penalties"),
    (PresenceCountsThePrompt, "penalties"),
    (WindowIgnored, "window"),
]


@pytest.mark.parametrize("mutant,name", MUTANTS, ids=lambda x: getattr(x, "__name__", x))
def test_mutants_of_the_state_are_caught(mutant: type[SamplerState], name: str) -> None:
    assert any(enumeration_error(name, drafts, 3, 2, mutant) > 1e-6 for drafts in DRAFTERS)
