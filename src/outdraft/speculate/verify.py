"""Verification: which drafts stay, and the target's token behind them.

Pure functions of one sequence's block. Whatever was drafted, what comes out is the target's: the
same tokens when greedy, the same distribution when sampled. Random numbers are arguments, so a
proof can enumerate them (proof.py). Not here: how p and q are formed (sampling/logits.py) and what
happens to memory afterwards (engine/).

**Which numbers a round reads.** Point masses and plain decoding read one TARGET number a position.
Say a round starts at position P and keeps i drafts: its outcome is a function of the numbers of
P .. P + i, and nothing that is kept depends on later ones, so given everything emitted those are
still uniform and independent. The next round starts at P + i + 1. By induction every token is
decided once, with numbers that are fresh given all tokens before it.

Drawn drafts do not have this property: whether draft i is the last to stay depends on the drafts
and numbers behind it. So their rounds read numbers that are the round's own (`sampler.uniform`,
`start`): every round begins at another position, and no number is read twice. Nothing that a round
has shown, rejected drafts included, can then tell anything of the numbers of a later one.

A rule that has nothing to do with streams: a drafter that stops early may look at q before it
draws, or stop behind a token that it keeps. Dropping a token because of what was drawn leaves
drafts that are no longer distributed as q. (A point mass may be dropped for any reason.)

Shapes: K drafts, R = K + 1 rows of the target, V vocabulary. Row i of p and q is the distribution
of draft i; the last row of p comes behind all drafts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.sampling.sampler import sample


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first `n_accepted` drafts stay, and the target's own `token` follows them."""

    n_accepted: int
    token: int


def verify_greedy(draft_ids_K: Tensor, target_ids_R: Tensor) -> Verdict:
    """Keep drafts as long as they are what the target would have chosen.

    Args:
        draft_ids_K: int64 [K]; K may be 0.
        target_ids_R: int64 [K + 1], the target's argmax of every row.
    """
    assert target_ids_R.shape[0] == draft_ids_K.shape[0] + 1
    agrees_K = draft_ids_K == target_ids_R[:-1]
    n_accepted = int(agrees_K.cumprod(0).sum())
    return Verdict(n_accepted, int(target_ids_R[n_accepted]))


def verify_own(draft_ids: Sequence[int], draw: Callable[[int], int]) -> Verdict:
    """Keep drafts as long as they are what the target says itself, whatever they came from.

    Every emitted token is the target's own of its position, so the text is that of plain decoding
    with the same numbers, token for token, and any drafter is lossless. A point mass stays with
    probability p(d), and given a rejection the token is distributed as p without d: for one draft
    that is no less than any rule can keep.

    Args:
        draft_ids: K tokens that were not drawn, or drawn in any way.
        draw: the target's own token of row i, a function of the tokens before it and the number
            of its position (`Purpose.TARGET`). It is called for i = 0, 1, … up to the first draft
            that differs, or K.
    """
    for i, draft in enumerate(draft_ids):
        token = draw(i)
        if token != draft:
            return Verdict(i, token)
    return Verdict(len(draft_ids), draw(len(draft_ids)))


def verify_block(
    draft_ids_K: Tensor,
    q_KV: Tensor | None,
    p_RV: Tensor | Sequence[Tensor],
    accept_u_K: Sequence[float],
    final_u_R: Sequence[float],
) -> Verdict:
    """Block verification (Sun et al. 2024, arXiv 2403.10444, algorithm 2).

    A draft that is more probable under p than under q makes up for one that is less. With
    s_0 = 1, s_i = min(1, s_(i-1) p_i(d_i) / q_i(d_i)) after i drafts, every i is tested by itself
    and the largest that passes is kept: K with chance s_K, and i < K with chance
    m_i / (m_i + 1 - s_i), where m_i is the mass of max(0, s_i p - q) in the row behind draft i,
    and the token behind it is drawn from. If none passes, i = 0. So a block is known to reach i
    with probability s_i whatever is drafted behind, which is all that losslessness needs. One
    draft stays with min(1, p / q), as in speculative sampling (Leviathan et al. 2023).

    Args:
        draft_ids_K: int64 [K]; with K = 0 this is plain sampling.
        q_KV: [K, V], what the drafts were drawn from; None if they were not drawn (argmax,
            n-gram): then q is 1 at the draft, whatever the drafter's scores say, and this is
            `verify_own`. None is right for drawn drafts too, but keeps fewer of them; a q they
            were not drawn from never is.
        p_RV: [K + 1, V] or its rows, the target's, after temperature and filters. Rows behind a
            draft that p excludes are not looked at.
        accept_u_K: a number in [0, 1) for the test of each draft (`Purpose.ACCEPT`).
        final_u_R: a number in [0, 1) for the target's token, for each row where the block may end
            (`Purpose.TARGET`); only the one of the row where it ends is used.

    Raises:
        OutdraftError: the target's distribution is not one (NaN).
    """
    n_drafts = draft_ids_K.shape[0]
    assert len(p_RV) == len(final_u_R) == n_drafts + 1 and len(accept_u_K) == n_drafts
    if q_KV is None:
        return verify_own(draft_ids_K.tolist(), lambda i: sample(p_RV[i], final_u_R[i]))
    shares = block_shares(draft_ids_K, q_KV, p_RV)
    i, row_V, chance = n_drafts, p_RV[n_drafts], shares[n_drafts]
    while i > 0 and accept_u_K[i - 1] >= chance:  # NaN passes; sampling then refuses it
        i -= 1
        row_V, chance = block_residual(shares[i], q_KV[i], p_RV[i])
    if not bool(row_V.any()):  # p = q here, and the rejection was one by rounding
        row_V = p_RV[i]
    return Verdict(i, sample(row_V, final_u_R[i]))


def block_shares(draft_ids_K: Tensor, q_KV: Tensor, p_RV: Tensor | Sequence[Tensor]) -> list[float]:
    """s_0 .. s_K of `verify_block`: the probability that so many drafts or more stay."""
    shares = [1.0]
    for i, draft in enumerate(draft_ids_K.tolist()):
        q = float(q_KV[i, draft])
        assert q > 0, "a token that was drawn has a probability"
        shares.append(min(shares[-1] * (float(p_RV[i][draft]) / q), 1.0))  # so NaN stays NaN
    return shares


def block_residual(share: float, q_V: Tensor, p_V: Tensor) -> tuple[Tensor, float]:
    """max(0, s p - q) [V] and the chance of its row in `verify_block`.

    Nothing is left at s = 1 only where p = q: then the next draft has s = 1 too, some row behind
    this one was kept, and the chance is not read, unless by rounding.
    """
    excess_V = (p_V * share - q_V).clamp_(min=0)
    mass = float(excess_V.sum(dtype=torch.float64))
    left = mass + (1 - share)  # in this order a share of 1 gives a chance of 1
    return excess_V, mass / left if left else 0.0
