"""What a drafter is: the interface that everything which guesses tokens keeps to.

A drafter sees the target through a `TargetView` and returns a `Draft`. It never decides what is
emitted: `verify.py` does, and what it emits is the target's whatever was drafted. Not here: which
drafter a model gets (build.py), how many tokens to draft (engine/plan.py).

Shapes: B sequences, K draft length, V vocabulary, H hidden size of the target.
"""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from outdraft.cache.memory import Memory
from outdraft.ops.base import Ops
from outdraft.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Taps:
    """What a drafter reads of the target's last step. The default is nothing.

    `final_hidden`: states after the final norm. `hidden_layers`: outputs of these layers.
    `kv_groups`: groups of the target's memory whose last owning layer is read.
    """

    final_hidden: bool = False
    hidden_layers: tuple[int, ...] = ()
    kv_groups: tuple[str, ...] = ()


def draws(params: SamplingParams) -> bool:
    """Whether drafts of such a request may be drawn from the drafter's distribution.

    The text of a seed must not depend on what was drafted: with a seed they are point masses.
    """
    return not params.greedy and params.seed is None


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence of a `TargetView`.

    `tokens` are all committed tokens; the newest has not been through the target. `seed` is the
    request's, already drawn if the user gave none.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    seed: int
    hidden_H: Tensor | None

    @property
    def n(self) -> int:
        """Committed tokens; the target's valid keys and values are positions 0 .. n - 2."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class TargetView:
    """What drafters may read: committed tokens, the taps asked for, and the target's embedding.

    `ops` are the target's operations, which `embed` uses.
    """

    sequences: list[SequenceView]
    memory: Memory
    embed: Callable[[Tensor], Tensor]
    ops: Ops


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses for the next tokens of B sequences.

    `tokens_BK` is int64, of which the first `lengths[b]` count. `probs[b]` is None for a point mass
    (argmax, n-gram); otherwise the distributions fp32 [K, V] that the tokens were drawn from.
    `confidence_BK`, fp32, is the probability that the drafter itself gives each token (softmax of
    its raw scores, whatever the request's parameters); NaN or None where it does not know.
    With `left_K`, int32 on the device, nobody has read the tokens of the only sequence: they are
    there, and `tokens_BK` is zeros.
    """

    tokens_BK: Tensor
    probs: list[Tensor | None]
    lengths: list[int]
    confidence_BK: Tensor | None = None
    left_K: Tensor | None = None


def confident(draft: Draft, lengths: Sequence[int], p_min: float) -> list[int]:
    """Of each sequence how many drafts come before the first of less confidence than `p_min`.

    All, where the drafter does not know, and where drafts were drawn: those must not be left out
    for what they are, or the output would not have the target's distribution.
    """
    if draft.confidence_BK is None:
        return list(lengths)
    unsure_BK = (draft.confidence_BK < p_min).tolist()  # False of NaN
    return [
        n if probs is not None else next((i for i in range(n) if unsure_K[i]), n)
        for n, probs, unsure_K in zip(lengths, draft.probs, unsure_BK, strict=True)
    ]


def no_drafts(n: int, k: int) -> Draft:
    """Of n sequences, each of length 0."""
    return Draft(torch.zeros(n, k, dtype=torch.int64), [None] * n, [0] * n)


def with_own(draft: Draft, own: Draft, rows: Sequence[int]) -> Draft:
    """A draft of all sequences, changed in place, with those of some, `own`, as these rows."""
    width = own.tokens_BK.shape[1]
    for i, b in enumerate(rows):
        draft.tokens_BK[b, :width] = own.tokens_BK[i]
        draft.probs[b], draft.lengths[b] = own.probs[i], own.lengths[i]
    if own.confidence_BK is None:
        return draft
    confidence_BK = torch.full(draft.tokens_BK.shape, torch.nan)
    confidence_BK[list(rows), :width] = own.confidence_BK
    return replace(draft, confidence_BK=confidence_BK)


class Drafter(Protocol):
    """Guesses tokens. `name` is the value of `--spec-type` that asks for it."""

    name: str
    needs: Taps

    def open(self, sequence: str) -> None:
        """A sequence begins."""
        ...

    def close(self, sequence: str) -> None:
        """A sequence has ended."""
        ...

    def propose(self, view: TargetView, k: int) -> Draft:
        """Guess up to k tokens for every sequence of the view."""
        ...

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        """The target has kept `n_accepted[b]` of the drafts; the view is the one proposed from."""
        ...


@runtime_checkable
class ReadsStates(Protocol):
    """A drafter that reads the target's final hidden states of every committed token but the
    newest, each once and in order.
    """

    def begin(self, sequence: str, tokens: Seq[int], salt: str, n_cached: int) -> None:
        """An open sequence has these tokens. States of the first `n_cached` do not come.

        The target has those in its prefix cache, where requests of another salt share nothing.
        """
        ...

    def read(self, sequence: str, first: int, hidden_TH: Tensor) -> None:
        """States of the tokens from position `first` on; the tensor may be overwritten later."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """A pass that is under way, of one sequence: its newest token and drafts of it, T rows.

    All on the device. `best_T` is the best token behind each row, -1 where there is none.
    """

    token_T: Tensor
    best_T: Tensor
    hidden_TH: Tensor


@runtime_checkable
class LeavesTokens(Protocol):
    """A drafter whose drafts can stay on the device, so that nothing there waits for the host."""

    @property
    def leaves(self) -> bool:
        """Whether this one can; without it the rest is not asked for."""
        ...

    def leave(self, view: TargetView, k: int) -> Draft:
        """As `propose`, for one sequence that decodes greedily, without waiting: see `left_K`."""
        ...

    def follow(self, view: TargetView, k: int, scored: Scored) -> None:
        """Launch the round after the one of this view, behind the pass that verifies that one.

        Which drafts stay is decided on the device. The next `leave` gives it, if the sequence went
        on from there.
        """
        ...


@runtime_checkable
class ManySources(Protocol):
    """A drafter whose drafts come from sources that differ in quality and cost.

    Which one drafts for a sequence is chosen before `propose`, from committed tokens and from how
    many drafts of each source were kept before.
    """

    def sources(self, sequence: str, tokens: list[int]) -> Seq[str]:
        """Who could draft for a sequence of these tokens now, the preferred one first."""
        ...

    def use(self, chosen: Mapping[str, tuple[str, int]]) -> None:
        """For the next `propose`: the source of each sequence, and how many drafts it needs."""
        ...
