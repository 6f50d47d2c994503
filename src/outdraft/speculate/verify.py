"""Verification: which drafts stay, and the target's token behind them.

Pure functions of one sequence's block. Whatever was drafted, what comes out is the target's: the
same tokens when greedy, the same distribution when sampled. Random numbers are arguments, so a
proof can enumerate them (proof.py). Not here: how p and q are formed (sampling/logits.py) and what
happens to memory afterwards (engine/).

**One number for each position and purpose is enough**, although a position behind a rejection is
drafted again in the next round with the same DRAFT and ACCEPT numbers. Say the round starts at
position P and keeps i drafts. Its outcome, the tokens up to P + i included, is a function of the
numbers of positions <= P + i: draft j was tested with the numbers of P .. P + j, and the test at
P + i does not look at later drafts. The numbers of later positions were read, but nothing that is
kept depends on them, so given everything emitted they are still uniform and independent. The next
round starts at P + i + 1 and reads only those. By induction every token is decided once, with
numbers that are fresh given all tokens before it.

What would break it: anything that carries knowledge of numbers behind the first rejection into a
later round. The draft length, the drafter's distribution and the choice of drafter may depend on
emitted tokens, on how many drafts were kept and on the rejected draft itself. They must not depend
on whether later drafts would have been accepted (their ACCEPT numbers are used again), nor, where
drafts are drawn from q, on which tokens the later drafts were (their DRAFT numbers are used again).
Point masses use no DRAFT number, so a cache that proposes them may learn from rejected drafts.

A second rule has nothing to do with streams: a drafter that stops early may look at q before it
draws, or stop after a token that it keeps. Dropping a token because of what was drawn leaves
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


def verify_sampled(
    draft_ids_K: Tensor,
    q_KV: Tensor | None,
    p_RV: Tensor,
    accept_u_K: Sequence[float],
    final_u_R: Sequence[float],
) -> Verdict:
    """Speculative sampling (Leviathan et al. 2023; Chen et al. 2023).

    Draft i stays with probability min(1, p_i(d) / q_i(d)). At the first that does not, the token is
    drawn from the residual; behind K accepted drafts it is drawn from the last row of p. With
    K = 0 that is plain sampling. Without q it is `verify_own`, which reads no accept number.

    Args:
        draft_ids_K: int64 [K].
        q_KV: [K, V], what the drafts were drawn from; None if they were not drawn (argmax,
            n-gram): then q is 1 at the draft, whatever the drafter's scores say. None is right for
            drawn drafts too, but keeps fewer of them; a q they were not drawn from never is.
        p_RV: [K + 1, V], the target's, after temperature and filters.
        accept_u_K: a number in [0, 1) for the test of each draft (`Purpose.ACCEPT`).
        final_u_R: a number in [0, 1) for the target's token, for each row where the block may end
            (`Purpose.TARGET`); only the one of the row where it ends is used.

    Raises:
        OutdraftError: the target's distribution is not one (NaN).
    """
    n_drafts = draft_ids_K.shape[0]
    assert p_RV.shape[0] == len(final_u_R) == n_drafts + 1 and len(accept_u_K) == n_drafts
    if q_KV is None:
        return verify_own(draft_ids_K.tolist(), lambda i: sample(p_RV[i], final_u_R[i]))
    chances = accept_probabilities(draft_ids_K, q_KV, p_RV).tolist()
    for i, (chance, u) in enumerate(zip(chances, accept_u_K, strict=True)):
        accepted = u < chance  # false for NaN, which sampling then refuses
        if not accepted:
            q_V = None if q_KV is None else q_KV[i]
            residual_V = residual(int(draft_ids_K[i]), q_V, p_RV[i])
            return Verdict(i, sample(residual_V, final_u_R[i]))
    return Verdict(n_drafts, sample(p_RV[n_drafts], final_u_R[n_drafts]))


def accept_probabilities(draft_ids_K: Tensor, q_KV: Tensor | None, p_RV: Tensor) -> Tensor:
    """min(1, p(d) / q(d)) of each draft, fp64 [K]. Arguments as in `verify_sampled`."""
    rows_K = torch.arange(draft_ids_K.shape[0], device=p_RV.device)
    p_K = p_RV[rows_K, draft_ids_K].double()
    if q_KV is None:
        return p_K
    q_K = q_KV[rows_K, draft_ids_K].double()
    assert bool((q_K > 0).all()), "a token that was drawn has a probability"
    return (p_K / q_K).clamp(max=1.0)


def residual(draft_id: int, q_V: Tensor | None, p_V: Tensor) -> Tensor:
    """What the token is drawn from after a rejection: max(0, p - q), normalised, fp64 [V].

    With a point mass (`q_V` None) that is p without the draft. If nothing is left, p <= q
    everywhere: two distributions can only be so by being equal within rounding. A rejection then
    was a rounding error itself, as rare as the sums are off 1, and p is returned: no choice could
    move the emitted distribution by more than that.
    """
    excess_V = p_V.double().clone()
    if q_V is None:
        excess_V[draft_id] = 0.0
    else:
        excess_V = (excess_V - q_V.double()).clamp(min=0)
    mass = excess_V.sum()
    return excess_V / mass if mass > 0 else p_V.double()
