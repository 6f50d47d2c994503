"""Proofs that verification is lossless: by enumeration, and by chi-square on what is generated.

A `Decoder` is a whole speculative decoder in which the networks are tables, so that everything it
can emit is known. Both checks run its `verify` as it is, and a planted bug takes its place in
tests. Not here: the rules (verify.py), and the engine with real networks.

Shapes: K drafts, R = K + 1 rows of the target, V vocabulary, N samples, T tokens of a sample.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from outdraft.request import SamplingParams
from outdraft.sampling.logits import distribution
from outdraft.sampling.sampler import Purpose, sample
from outdraft.speculate.verify import Verdict, verify_block

BISECTIONS = 46  # a breakpoint is known to 2^-46, 1.4e-14
LAST = 1.0 - 2.0**-53  # the largest number below 1
SMALLEST_BIN = 5.0  # expected counts below this are merged: chi-square is an approximation there

Context = tuple[int, ...]
Table = Callable[[Context], Tensor]
"""A network: the distribution fp64 [V] of the token that follows a context."""

Draw = Callable[[int, Tensor], int]
"""Draws draft number i of a round from a distribution."""

Uniform = Callable[[int, Purpose, int | None], float]
"""The random number of a position, purpose and round: `sampler.uniform` of one seed."""

Verify = Callable[[Tensor, Tensor | None, Tensor, Sequence[float], Sequence[float]], Verdict]
"""`verify.verify_block` or something in its place."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """The drafts of a round and what verification is told they were drawn from."""

    ids: Context
    q_KV: Tensor | None


Propose = Callable[[Context, int, Draw], Proposal]
"""Drafts at most k tokens behind a context."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Everything a round consists of. `target` is what verification gets as p."""

    target: Table
    propose: Propose
    verify: Verify = verify_block


@dataclass(frozen=True, slots=True)
class Generation:
    """Tokens of one run and the verdicts of its rounds."""

    tokens: Context
    verdicts: list[Verdict]


def logits_table(vocab: int, seed: int, *, order: int | None = None, scale: float = 1.5) -> Table:
    """Normal logits fp64 [V], other ones for every context, or for every last `order` tokens."""
    known: dict[Context, Tensor] = {}

    def logits(context: Context) -> Tensor:
        key = context if order is None else context[-order:]
        if key not in known:
            generator = np.random.default_rng([seed, len(key), *key])
            known[key] = torch.from_numpy(generator.normal(0.0, scale, vocab))
        return known[key]

    return logits


def mixed(a: Table, b: Table, share: float) -> Table:
    """Logits that are `share` of `a` and the rest of `b`: a drafter that resembles its target."""
    return lambda context: share * a(context) + (1 - share) * b(context)


def table(logits: Table, params: SamplingParams) -> Table:
    """The distribution that `params` makes of a table of logits."""
    known: dict[Context, Tensor] = {}

    def probabilities(context: Context) -> Tensor:
        if context not in known:
            known[context] = distribution(logits(context)[None], params)[0]
        return known[context]

    return probabilities


def sampled_drafts(q: Table) -> Propose:
    """A drafter that draws from q and says so."""

    def propose(context: Context, k: int, draw: Draw) -> Proposal:
        ids: list[int] = []
        rows = []
        for i in range(k):
            rows.append(q((*context, *ids)))
            ids.append(draw(i, rows[-1]))
        return Proposal(tuple(ids), torch.stack(rows) if rows else None)

    return propose


def argmax_drafts(q: Table) -> Propose:
    """A drafter that takes the most probable token: a point mass."""

    def propose(context: Context, k: int, draw: Draw) -> Proposal:
        ids: list[int] = []
        for _ in range(k):
            ids.append(int(q((*context, *ids)).argmax()))
        return Proposal(tuple(ids), None)

    return propose


# Enumeration: one round, every draft, all random numbers integrated.


def block_distribution(decoder: Decoder, truth: Table, vocab: int, k: int) -> Tensor:
    """Joint distribution of the next k + 1 tokens when a round of k drafts comes first.

    A round that emits fewer is continued by `truth`. The sum runs over every sequence of drafts;
    for each, `verify` itself is integrated over its random numbers.

    Returns:
        fp64 [V] * (k + 1).
    """
    joint = torch.zeros([vocab] * (k + 1), dtype=torch.float64)
    for weight, proposal in _proposals(decoder.propose, vocab, k):
        p_RV = target_rows(decoder.target, (), proposal.ids)
        for share, verdict in integrate(decoder.verify, proposal, p_RV):
            emitted = (*proposal.ids[: verdict.n_accepted], verdict.token)
            rest = continuation(truth, emitted, vocab, k + 1 - len(emitted))
            joint[emitted] += weight * share * rest
    return joint


def continuation(truth: Table, context: Context, vocab: int, n: int) -> Tensor:
    """Joint distribution of the n tokens behind a context, fp64 [V] * n (n = 0: the number 1)."""
    joint = torch.ones([vocab] * n, dtype=torch.float64)
    for length in range(n):
        for tokens in itertools.product(range(vocab), repeat=length):
            row_V = truth((*context, *tokens))
            joint[tokens] *= row_V.reshape(vocab, *[1] * (n - length - 1))
    return joint


def target_rows(target: Table, context: Context, drafts: Context) -> Tensor:
    """p of every draft and of the token behind them, fp64 [K + 1, V]."""
    return torch.stack([target((*context, *drafts[:i])) for i in range(len(drafts) + 1)])


def _proposals(propose: Propose, vocab: int, k: int) -> Iterator[tuple[float, Proposal]]:
    """Every proposal behind the empty context with its probability."""
    found: dict[Context, Proposal] = {}
    weights: dict[Context, float] = {}
    for script in itertools.product(range(vocab), repeat=k):
        # A draft that is not drawn does not read the script: all its readings count as one.
        factors = [1.0 / vocab] * k
        proposal = propose((), k, _scripted(script, factors))
        found[proposal.ids] = proposal
        weights[proposal.ids] = weights.get(proposal.ids, 0.0) + float(np.prod(factors))
    return ((weights[ids], proposal) for ids, proposal in found.items() if weights[ids] > 0)


def _scripted(script: Context, factors: list[float]) -> Draw:
    """Reads its draws from a script and notes how likely each was."""

    def draw(i: int, q_V: Tensor) -> int:
        factors[i] = float(q_V[script[i]])
        return script[i]

    return draw


def integrate(verify: Verify, proposal: Proposal, p_RV: Tensor) -> Iterator[tuple[float, Verdict]]:
    """Every verdict on a proposal with its probability over the random numbers.

    `verify` is a step function of each number. The steps are found by bisection: first of each
    accept number with the others at 0 and with the others near 1 (what passes all other tests, and
    none), then, for one point of every combination of steps, of the final numbers, one row after
    another as far as the block goes. This is exact if an accept number's steps do not depend on
    other numbers, and a final number's only on the accept numbers and the final ones of rows
    before it; `steps` needs that equal ends mean no step between them. The rules of verify.py are
    of this kind; a bug that is not shows all the same.
    """
    ids_K = torch.tensor(proposal.ids, dtype=torch.int64)
    n = len(proposal.ids)

    def verdict(accept_u: Sequence[float], final_u: tuple[float, ...]) -> Verdict:
        rest = [0.5] * (n + 1 - len(final_u))
        return verify(ids_K, proposal.q_KV, p_RV, accept_u, [*final_u, *rest])

    def n_accepted(i: int, u: float) -> tuple[int, ...]:
        return tuple(
            verdict([u if j == i else other for j in range(n)], ()).n_accepted
            for other in (0.0, LAST)
        )

    def by_rows(
        accept_u: Sequence[float], known: tuple[float, ...], weight: float
    ) -> Iterator[tuple[float, Verdict]]:
        for low, high in steps(lambda u: verdict(accept_u, (*known, u))):
            final_u = (*known, min((low + high) / 2, LAST))
            found = verdict(accept_u, final_u)
            if len(final_u) > found.n_accepted:  # the row where the block ends has its number
                yield weight * (high - low), found
            else:
                yield from by_rows(accept_u, final_u, weight * (high - low))

    axes = [steps(partial(n_accepted, i)) for i in range(n)]
    for pieces in itertools.product(*axes):
        accept_u = [min((low + high) / 2, LAST) for low, high in pieces]
        weight = float(np.prod([high - low for low, high in pieces]))
        yield from by_rows(accept_u, (), weight)


def steps(f: Callable[[float], object]) -> list[tuple[float, float]]:
    """Intervals of [0, 1) on which f is constant; equal ends are taken for a constant."""

    def split(low: float, at_low: object, high: float, at_high: object, depth: int) -> list[float]:
        if at_low == at_high:
            return []
        if depth == 0:
            return [high]
        middle = (low + high) / 2
        value = f(middle)
        return split(low, at_low, middle, value, depth - 1) + split(
            middle, value, high, at_high, depth - 1
        )

    edges = [0.0, *split(0.0, f(0.0), LAST, f(LAST), BISECTIONS), 1.0]
    return list(itertools.pairwise(edges))


# Generation: many rounds with the streams of random numbers that the engine uses.


def generate(decoder: Decoder, uniform: Uniform, n_tokens: int, k: int) -> Generation:
    """Rounds of at most k drafts from the empty context until `n_tokens` are there."""
    tokens: Context = ()
    verdicts = []
    while len(tokens) < n_tokens:
        at = len(tokens)
        proposal = decoder.propose(tokens, min(k, n_tokens - at - 1), _drawn(uniform, at))
        rows = range(at, at + len(proposal.ids) + 1)
        start = None if proposal.q_KV is None else at  # as the engine does
        verdict = decoder.verify(
            torch.tensor(proposal.ids, dtype=torch.int64),
            proposal.q_KV,
            target_rows(decoder.target, tokens, proposal.ids),
            [uniform(position, Purpose.ACCEPT, start) for position in rows[:-1]],
            [uniform(position, Purpose.TARGET, start) for position in rows],
        )
        tokens = (*tokens, *proposal.ids[: verdict.n_accepted], verdict.token)
        verdicts.append(verdict)
    return Generation(tokens, verdicts)


def _drawn(uniform: Uniform, at: int) -> Draw:
    """Draws of a round that starts at position `at`."""
    return lambda i, q_V: sample(q_V, uniform(at + i, Purpose.DRAFT, at))


def pair_p_values(samples_NT: Tensor, truth: Table, vocab: int) -> list[float]:
    """Chi-square of every two neighbouring tokens against a table of order 1.

    Args:
        samples_NT: int64, runs from the empty context.
        truth: depends on the last token only.

    Returns:
        T - 1 p-values.
    """
    rows_VV = torch.stack([truth((token,)) for token in range(vocab)])
    first_V = truth(())
    n = samples_NT.shape[0]
    p_values = []
    for t in range(samples_NT.shape[1] - 1):
        pair_VV = first_V[:, None] * rows_VV
        cells_N = samples_NT[:, t] * vocab + samples_NT[:, t + 1]
        observed = torch.bincount(cells_N, minlength=vocab * vocab).double()
        p_values.append(chi_square_p_value(observed, n * pair_VV.flatten()))
        first_V = pair_VV.sum(0)
    return p_values


def chi_square_p_value(observed: Tensor, expected: Tensor) -> float:
    """Pearson's test of counts against expectations that are known in full.

    Bins with an expectation below 5 are merged, the smallest first. A count where nothing is
    expected gives 0.

    Args:
        observed: counts, fp64 [bins].
        expected: fp64 [bins], with the same sum.
    """
    if bool((observed[expected == 0] > 0).any()):
        return 0.0
    order = expected.argsort()
    bins: list[list[float]] = [[0.0, 0.0]]
    for count, mean in zip(observed[order].tolist(), expected[order].tolist(), strict=True):
        if bins[-1][1] >= SMALLEST_BIN:
            bins.append([0.0, 0.0])
        bins[-1][0] += count
        bins[-1][1] += mean
    if bins[-1][1] < SMALLEST_BIN and len(bins) > 1:
        count, mean = bins.pop()
        bins[-1][0] += count
        bins[-1][1] += mean
    freedom = len(bins) - 1
    if freedom == 0:
        return 1.0
    statistic = sum((count - mean) ** 2 / mean for count, mean in bins)
    # The tail of chi-square is the regularised upper incomplete gamma function Q(df / 2, x / 2).
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
