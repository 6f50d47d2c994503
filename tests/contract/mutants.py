"""Planted bugs in verification: each is a small departure from what is right.

`rule` is speculative sampling, draft by draft, and `block_rule` is block verification, each written
once more with its parts exchangeable; without an exchange both must pass every check (`HEALTHY`),
so a mutant differs by its bug alone. What is
mathematically no bug is not here: `<` for `<=` on a continuous number, or the rule for point masses
on drafts that were drawn, which is lossless for any draft and merely accepts fewer.

Shapes: K drafts, R = K + 1 rows of the target, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outdraft.request import SamplingParams
from outdraft.sampling.sampler import Purpose, sample
from outdraft.speculate.proof import (
    Context,
    Decoder,
    Draw,
    Proposal,
    Propose,
    Table,
    Uniform,
    Verify,
    argmax_drafts,
    sampled_drafts,
    table,
    target_rows,
)
from outdraft.speculate.verify import Verdict, verify_block, verify_greedy


@dataclass(frozen=True)
class Setting:
    """Logits of target and drafter, and what the user asked for."""

    target: Table
    drafter: Table
    params: SamplingParams

    @property
    def p(self) -> Table:
        return table(self.target, self.params)

    @property
    def q(self) -> Table:
        return table(self.drafter, self.params)


@dataclass(frozen=True)
class Mutant:
    """A decoder with a bug; `streams` tampers with the random numbers of generation."""

    name: str
    decoder: Callable[[Setting], Decoder]
    streams: Callable[[Uniform], Uniform] = lambda uniform: uniform
    drafts: str = "sampled"


# --- The three parts, right ---


def chance(i: int, ids_K: Tensor, q_KV: Tensor | None, p_RV: Tensor) -> float:
    q = 1.0 if q_KV is None else float(q_KV[i, ids_K[i]])
    return min(1.0, float(p_RV[i, ids_K[i]]) / q)


def rest(i: int, ids_K: Tensor, q_KV: Tensor | None, p_RV: Tensor) -> Tensor:
    if q_KV is None:
        return without(p_RV[i], int(ids_K[i]))
    return (p_RV[i] - q_KV[i]).clamp(min=0)


def bonus(q_KV: Tensor | None, p_RV: Tensor) -> Tensor:
    return p_RV[-1]


def without(row_V: Tensor, token: int) -> Tensor:
    row_V = row_V.clone()
    row_V[token] = 0
    return row_V


def rule(
    chance: Callable[..., float] = chance,
    rest: Callable[..., Tensor] = rest,
    bonus: Callable[..., Tensor] = bonus,
    draw: Callable[[Tensor, float], int] = sample,
) -> Verify:
    def verify(
        ids_K: Tensor,
        q_KV: Tensor | None,
        p_RV: Tensor,
        accept_u: Sequence[float],
        final_u: Sequence[float],
    ) -> Verdict:
        for i, u in enumerate(accept_u):
            if u >= chance(i, ids_K, q_KV, p_RV):
                return Verdict(i, draw(rest(i, ids_K, q_KV, p_RV), final_u[i]))
        return Verdict(len(accept_u), draw(bonus(q_KV, p_RV), final_u[-1]))

    return verify


# --- The same for block verification ---


def capped(share: float, ratio: float) -> float:
    return min(1.0, share * ratio)


def excess(i: int, shares: list[float], q_KV: Tensor, p_RV: Tensor) -> Tensor:
    return (shares[i] * p_RV[i] - q_KV[i]).clamp(min=0)


def block_chance(i: int, shares: list[float], q_KV: Tensor, p_RV: Tensor) -> float:
    if i == len(q_KV):
        return shares[i]
    mass = float(excess(i, shares, q_KV, p_RV).sum())
    left = mass + 1 - shares[i]
    return mass / left if left else 0.0


def largest(passed: list[bool]) -> int:
    return max((i + 1 for i, good in enumerate(passed) if good), default=0)


def block_rule(
    share: Callable[[float, float], float] = capped,
    chance: Callable[..., float] = block_chance,
    rest: Callable[..., Tensor] = excess,
    last: Callable[[list[bool]], int] = largest,
) -> Verify:
    def verify(
        ids_K: Tensor,
        q_KV: Tensor,
        p_RV: Tensor,
        accept_u: Sequence[float],
        final_u: Sequence[float],
    ) -> Verdict:
        if q_KV is None:
            return Verdict(0, sample(p_RV[0], final_u[0]))
        shares = [1.0]
        for i, d in enumerate(ids_K.tolist()):
            shares.append(share(shares[-1], float(p_RV[i, d]) / float(q_KV[i, d])))
        passed = [u < chance(i + 1, shares, q_KV, p_RV) for i, u in enumerate(accept_u)]
        n = last(passed)
        row_V = p_RV[n] if n == len(q_KV) else rest(n, shares, q_KV, p_RV)
        return Verdict(n, sample(row_V if row_V.sum() > 0 else p_RV[n], final_u[n]))

    return verify


# --- Bugs of block verification ---


def capped_alone(share: float, ratio: float) -> float:
    return share * min(1.0, ratio)


def last_ratio(share: float, ratio: float) -> float:
    return min(1.0, ratio)


def share_as_chance(i: int, shares: list[float], q_KV: Tensor, p_RV: Tensor) -> float:
    return shares[i]


def chance_without_what_is_missing(
    i: int, shares: list[float], q_KV: Tensor, p_RV: Tensor
) -> float:
    mass = float(excess(i, shares, q_KV, p_RV).sum()) if i < len(q_KV) else 0.0
    return min(1.0, mass + shares[i]) if i < len(q_KV) else shares[i]


def chance_by_plain_residual(i: int, shares: list[float], q_KV: Tensor, p_RV: Tensor) -> float:
    return block_chance(i, [1.0] * i + shares[i:] if i == len(q_KV) else [1.0] * 9, q_KV, p_RV)


def plain_residual(i: int, shares: list[float], q_KV: Tensor, p_RV: Tensor) -> Tensor:
    return (p_RV[i] - q_KV[i]).clamp(min=0)


def residual_of_next_share(i: int, shares: list[float], q_KV: Tensor, p_RV: Tensor) -> Tensor:
    return excess(i, shares[1:], q_KV, p_RV)


def first_failure_ends(passed: list[bool]) -> int:
    return passed.index(False) if False in passed else len(passed)


def number_passed(passed: list[bool]) -> int:
    return sum(passed)


# --- Bugs of the accept test ---


def ratio_upside_down(i: int, ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> float:
    return min(1.0, float(q_KV[i, ids_K[i]]) / max(float(p_RV[i, ids_K[i]]), 1e-300))


def all_or_nothing(i: int, ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> float:
    return float(p_RV[i, ids_K[i]] >= q_KV[i, ids_K[i]])


def always(i: int, ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> float:
    return 1.0


def row_behind(i: int, ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> float:
    return chance(i, ids_K, q_KV, p_RV[1:])


def first_q_row(i: int, ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> float:
    stale = q_KV[:1].expand_as(q_KV).clamp(min=1e-300)
    return chance(i, ids_K, stale, p_RV)


def any_accepted(
    ids_K: Tensor, q_KV: Tensor, p_RV: Tensor, accept_u: Sequence[float], final_u: Sequence[float]
) -> Verdict:
    """Counts accepted drafts without stopping at the first that is not."""
    kept = [u < chance(i, ids_K, q_KV, p_RV) for i, u in enumerate(accept_u)]
    n = sum(kept)
    row_V = bonus(q_KV, p_RV) if all(kept) else rest(n, ids_K, q_KV, p_RV)
    return Verdict(n, sample(row_V if row_V.sum() > 0 else p_RV[n], final_u[n]))


# --- Bugs of the token that the target adds ---


def whole_p(i: int, ids_K: Tensor, q_KV: Tensor | None, p_RV: Tensor) -> Tensor:
    return p_RV[i]


def p_without_draft(i: int, ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> Tensor:
    return without(p_RV[i], int(ids_K[i]))


def absolute_difference(i: int, ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> Tensor:
    return (p_RV[i] - q_KV[i]).abs()


def residual_of_next_row(i: int, ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> Tensor:
    row_V = (p_RV[i + 1] - q_KV[i]).clamp(min=0)
    return row_V if row_V.sum() > 0 else p_RV[i + 1]


def draw_unnormalised(row_V: Tensor, u: float) -> int:
    beyond = torch.nonzero(row_V.cumsum(0) > u).flatten()
    return int(beyond[0]) if len(beyond) else row_V.shape[0] - 1


def bonus_from_q(q_KV: Tensor | None, p_RV: Tensor) -> Tensor:
    return p_RV[-1] if q_KV is None else q_KV[-1]


def bonus_from_row_before(q_KV: Tensor, p_RV: Tensor) -> Tensor:
    return p_RV[max(0, len(p_RV) - 2)]


# --- Bugs of the random numbers ---


def accept_number_again(
    ids_K: Tensor, q_KV: Tensor, p_RV: Tensor, accept_u: Sequence[float], final_u: Sequence[float]
) -> Verdict:
    return verify_block(ids_K, q_KV, p_RV, accept_u, [*accept_u, final_u[-1]])


def one_number_a_block(
    ids_K: Tensor, q_KV: Tensor, p_RV: Tensor, accept_u: Sequence[float], final_u: Sequence[float]
) -> Verdict:
    return verify_block(ids_K, q_KV, p_RV, [*accept_u[:1]] * len(accept_u), final_u)


def same_stream(one: Purpose, other: Purpose) -> Callable[[Uniform], Uniform]:
    return lambda uniform: (
        lambda position, purpose, start: uniform(
            position, one if purpose is other else purpose, start
        )
    )


def same_for_all_positions(purpose: Purpose) -> Callable[[Uniform], Uniform]:
    return lambda uniform: (
        lambda position, wanted, start: uniform(
            0 if wanted is purpose else position, wanted, None if start is None else 0
        )
    )


def same_for_all_rounds(uniform: Uniform) -> Uniform:
    """A position behind a rejection has the numbers again that the rejection depended on."""
    return lambda position, purpose, start: uniform(position, purpose, None)


# --- Bugs of the drafter and of what verification is told ---


def says(told: Callable[[Proposal, Context], Tensor], propose: Propose) -> Propose:
    """Drafts with `propose`, and claims another q."""

    def lying(context: Context, k: int, draw: Draw) -> Proposal:
        proposal = propose(context, k, draw)
        return replace(proposal, q_KV=told(proposal, context)) if proposal.ids else proposal

    return lying


def claims(q: Table) -> Callable[[Proposal, Context], Tensor]:
    return lambda proposal, context: target_rows(q, context, proposal.ids)[:-1]


def drops_unlikely_drafts(q: Table) -> Propose:
    """Ends the block before a draft that was drawn with little confidence."""
    honest = sampled_drafts(q)

    def propose(context: Context, k: int, draw: Draw) -> Proposal:
        proposal = honest(context, k, draw)
        n = 0
        while n < len(proposal.ids) and float(proposal.q_KV[n, proposal.ids[n]]) >= 0.3:
            n += 1
        return Proposal(proposal.ids[:n], proposal.q_KV[:n] if n else None)

    return propose


# --- Bugs of greedy verification ---


def greedy_counts_all(draft_ids_K: Tensor, target_ids_R: Tensor) -> Verdict:
    n = int((draft_ids_K == target_ids_R[:-1]).sum())
    return Verdict(n, int(target_ids_R[n]))


def greedy_takes_last_row(draft_ids_K: Tensor, target_ids_R: Tensor) -> Verdict:
    return replace(verify_greedy(draft_ids_K, target_ids_R), token=int(target_ids_R[-1]))


def greedy_compares_next_row(draft_ids_K: Tensor, target_ids_R: Tensor) -> Verdict:
    n = int((draft_ids_K == target_ids_R[1:]).cumprod(0).sum())
    return Verdict(n, int(target_ids_R[n]))


def greedy_accepts_nothing(draft_ids_K: Tensor, target_ids_R: Tensor) -> Verdict:
    return Verdict(0, int(target_ids_R[0]))


GREEDY_MUTANTS = [
    greedy_counts_all,
    greedy_takes_last_row,
    greedy_compares_next_row,
    greedy_accepts_nothing,
]

# --- The list ---


def verifies(name: str, verify: Verify, *, drafts: str = "sampled") -> Mutant:
    make = sampled_drafts if drafts == "sampled" else argmax_drafts
    return Mutant(name, lambda s: Decoder(s.p, make(s.q), verify), drafts=drafts)


def drafted(name: str, propose: Callable[[Setting], Propose]) -> Mutant:
    return Mutant(name, lambda s: Decoder(s.p, propose(s)))


def streamed(name: str, streams: Callable[[Uniform], Uniform]) -> Mutant:
    return Mutant(name, lambda s: Decoder(s.p, sampled_drafts(s.q)), streams)


def filters_missing(name: str, **off: float) -> Mutant:
    """The target is verified without an option that drafts and the user have."""
    return Mutant(
        name,
        lambda s: Decoder(
            table(s.target, replace(s.params, **off)),  # type: ignore[arg-type]
            sampled_drafts(s.q),
        ),
    )


HEALTHY = [
    verifies("the rule restated, sampled drafts", rule()),
    verifies("the rule restated, point masses", rule(), drafts="argmax"),
    verifies("block verification restated", block_rule()),
]

MUTANTS = [
    verifies("accept with q/p", rule(chance=ratio_upside_down)),
    verifies("accept only where p >= q", rule(chance=all_or_nothing)),
    verifies("accept always", rule(chance=always)),
    verifies("accept by the target's next row", rule(chance=row_behind)),
    verifies("accept by a stale row of q", rule(chance=first_q_row)),
    verifies("accept behind a rejection", any_accepted),
    verifies("residual is p", rule(rest=whole_p)),
    verifies("residual is p without the draft", rule(rest=p_without_draft)),
    verifies("residual is |p - q|", rule(rest=absolute_difference)),
    verifies("residual of the target's next row", rule(rest=residual_of_next_row)),
    verifies("residual not renormalised", rule(draw=draw_unnormalised)),
    verifies("rejected point mass stays in the residual", rule(rest=whole_p), drafts="argmax"),
    verifies("bonus from q", rule(bonus=bonus_from_q)),
    verifies("bonus from the row before", rule(bonus=bonus_from_row_before)),
    verifies("residual drawn with the accept number", accept_number_again),
    verifies("one accept number for the block", one_number_a_block),
    filters_missing("temperature on the draft only", temperature=1.0),
    filters_missing("top-k on the draft only", top_k=0),
    filters_missing("top-p on the draft only", top_p=1.0),
    filters_missing("min-p on the draft only", min_p=0.0),
    drafted("softmax q for an argmax draft", lambda s: says(claims(s.q), argmax_drafts(s.q))),
    drafted(
        "q before the filters",
        lambda s: says(
            claims(table(s.drafter, SamplingParams(s.params.temperature))), sampled_drafts(s.q)
        ),
    ),
    drafted("unlikely drafts dropped", lambda s: drops_unlikely_drafts(s.q)),
    verifies("shares not capped", block_rule(share=lambda share, ratio: share * ratio)),
    verifies("shares of ratios capped one by one", block_rule(share=capped_alone)),
    verifies("share is the last ratio", block_rule(share=last_ratio)),
    verifies("a draft inside stays by its share", block_rule(chance=share_as_chance)),
    verifies("a draft inside stays too often", block_rule(chance=chance_without_what_is_missing)),
    verifies("chance by the plain residual", block_rule(chance=chance_by_plain_residual)),
    verifies("plain residual behind a block", block_rule(rest=plain_residual)),
    verifies("residual of the next share", block_rule(rest=residual_of_next_share)),
    verifies("block ends at the first failure", block_rule(last=first_failure_ends)),
    verifies("as many stay as passed", block_rule(last=number_passed)),
    streamed("rounds share their numbers", same_for_all_rounds),
    streamed("ACCEPT and TARGET share a stream", same_stream(Purpose.ACCEPT, Purpose.TARGET)),
    streamed("DRAFT and ACCEPT share a stream", same_stream(Purpose.DRAFT, Purpose.ACCEPT)),
    streamed("DRAFT and TARGET share a stream", same_stream(Purpose.DRAFT, Purpose.TARGET)),
    streamed("TARGET ignores the position", same_for_all_positions(Purpose.TARGET)),
]
