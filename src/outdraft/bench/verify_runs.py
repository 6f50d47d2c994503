"""Requests of the losslessness ladder: run, and compared token by token and bit by bit.

Here: what the rungs share. Not here: the rungs (verify.py).

Shapes: N tokens emitted, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams

N_NEW = 32
MAX_LENGTHS = 8  # draft lengths tried


class Broken(Exception):
    """A promise that does not hold; the message says where."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """What one request gave: tokens, and logits [N, V] behind them."""

    tokens: list[int]
    logits_NV: Tensor
    n_cached: int


@dataclass(slots=True)
class Ladder:
    """The model under test, the prompts, what plain decoding gives, and the smallest margin.

    Attributes:
        prompts: a handful of short ones.
        long: a stream of token ids to cut long prompts from.
        plain: of every prompt alone, without drafts, computed once.
        worst_margin: between the two largest logits of any emitted greedy token.
    """

    llm: LLM
    prompts: list[list[int]]
    long: list[int]
    plain: dict[tuple[int, ...], Emitted]
    worst_margin: float = float("inf")

    @property
    def lengths(self) -> list[int]:
        """Draft lengths to try, the longest included; empty without a drafter."""
        n = self.llm.pairing.n_draft_max if self.llm.pairing.drafter else 0
        return sorted({*range(1, min(n, MAX_LENGTHS) + 1), n} - {0})

    @property
    def longest(self) -> int:
        """The longest draft, 0 without a drafter."""
        return max(self.lengths, default=0)

    def cut(self, n: int, which: int = 0) -> list[int]:
        """A long prompt of n tokens; those of other numbers are of other places."""
        at = 1 + (which * n) % max(1, len(self.long) - n - 1)
        return [self.long[0], *self.long[at : at + n - 1]]


@contextmanager
def fixed_drafts(llm: LLM, lengths: Sequence[int]) -> Iterator[None]:
    """Draft these lengths, by place among the decoding sequences, whatever would pay."""
    scheduler = llm.scheduler
    before, n_before = scheduler.draft_lengths, scheduler.n_draft_max
    llm.set_draft_n_max(max(lengths))
    scheduler.draft_lengths = lambda running: [
        lengths[i % len(lengths)] for i in range(len(running))
    ]
    try:
        yield
    finally:
        scheduler.draft_lengths, scheduler.n_draft_max = before, n_before


def forget_prefixes(llm: LLM) -> None:
    """So that the next request computes its whole prompt."""
    if llm.memory.books.prefix is not None:
        llm.memory.books.prefix.clear()


def emit(
    ladder: Ladder, prompts: Sequence[list[int]], lengths: Sequence[int], *, cold: bool = True
) -> list[Emitted]:
    """Greedy runs of prompts side by side."""
    llm = ladder.llm
    if cold:
        forget_prefixes(llm)
    log: dict[str, list[Tensor]] = {}
    llm.runner.logits_log = log
    params = SamplingParams(max_tokens=N_NEW, ignore_eos=True)
    with fixed_drafts(llm, lengths):
        sequences = [llm.add(prompt, params) for prompt in prompts]
        while llm.scheduler.busy:
            llm.step()
    failed = next((s for s in sequences if s.error is not None), None)
    if failed is not None:
        raise Broken(f"a request failed: {failed.error}")
    found = [Emitted(s.output, torch.stack(log[s.id]), s.n_cached) for s in sequences]
    for one in found:
        top_N2 = one.logits_NV.float().topk(2, dim=-1).values
        ladder.worst_margin = min(ladder.worst_margin, float((top_N2[:, 0] - top_N2[:, 1]).min()))
    return found


def plain(ladder: Ladder, prompt: list[int]) -> Emitted:
    """Plain decoding of a prompt alone."""
    key = tuple(prompt)
    if key not in ladder.plain:
        ladder.plain[key] = emit(ladder, [prompt], [0])[0]
    return ladder.plain[key]


def compare(got: Emitted, want: Emitted, where: str) -> None:
    """Raises: Broken: a token or a bit of its logits differs."""
    for i, (token, right) in enumerate(zip(got.tokens, want.tokens, strict=True)):
        same = torch.equal(got.logits_NV[i], want.logits_NV[i])
        if token != right:
            raise Broken(f"{where}: token {i} is {token} instead of {right}")
        if not same:
            off = float((got.logits_NV[i] - want.logits_NV[i]).abs().max())
            raise Broken(
                f"{where}: same tokens so far, but the logits of token {i} are {off:.2g} off"
            )
