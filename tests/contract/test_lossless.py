"""Sampled output has exactly the target's distribution: the ladder's first three rungs.

1. Enumeration: every draft, every step of `verify_block`, integrated in fp64.
2. Chi-square on what many rounds generate with the engine's streams of random numbers.
3. Mutants: every planted bug fails a check that the real code passes.

Greedy verification is enumerated here too. Not here: the algebra of single functions
(tests/speculate/test_verify.py) and the engine with networks.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from outdraft.request import SamplingParams
from outdraft.sampling.sampler import Purpose, uniform
from outdraft.speculate.proof import (
    Decoder,
    Table,
    Uniform,
    argmax_drafts,
    block_distribution,
    chi_square_p_value,
    continuation,
    generate,
    logits_table,
    mixed,
    pair_p_values,
    sampled_drafts,
)
from outdraft.speculate.verify import Verdict, verify_greedy
from tests.contract.mutants import GREEDY_MUTANTS, HEALTHY, MUTANTS, Mutant, Setting

GreedyVerify = Callable[[Tensor, Tensor], Verdict]

EXACT = 1e-12
SIGNIFICANCE = 1e-3  # of a whole check, shared among its tests (Bonferroni)
OPTIONS = [
    SamplingParams(1.0),
    SamplingParams(0.6),
    SamplingParams(1.5, top_k=2),
    SamplingParams(0.8, top_p=0.85),
    SamplingParams(1.2, min_p=0.15),
    SamplingParams(0.9, top_k=3, top_p=0.9, min_p=0.1),
]
DRAFTERS = {"sampled": sampled_drafts, "argmax": argmax_drafts}


def setting(
    vocab: int, params: SamplingParams, *, order: int | None = None, seed: int = 5
) -> Setting:
    target = logits_table(vocab, seed, order=order)
    other = logits_table(vocab, seed + 1, order=order)
    return Setting(target, mixed(target, other, 0.5), params)


def enumeration_error(decoder: Decoder, truth: Table, vocab: int, k: int) -> float:
    joint = block_distribution(decoder, truth, vocab, k)
    return float((joint - continuation(truth, (), vocab, k + 1)).abs().max())


def stream(seed: int) -> Uniform:
    return lambda position, purpose, start: uniform(seed, position, purpose, start)


def chi_square_holds(mutant: Mutant, s: Setting, vocab: int, k: int, n: int) -> bool:
    """Whether n runs, long enough for a bonus and a second round, look like the target."""
    decoder = mutant.decoder(s)
    runs = [generate(decoder, mutant.streams(stream(seed)), k + 2, k).tokens for seed in range(n)]
    p_values = pair_p_values(torch.tensor(runs), s.p, vocab)
    return min(p_values) > SIGNIFICANCE / len(p_values)


def real(drafts: str) -> Mutant:
    return Mutant("none", lambda s: Decoder(s.p, DRAFTERS[drafts](s.q)), drafts=drafts)


# --- Rung 1 ---


@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("params", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab,k", [(2, 3), (3, 0), (3, 3), (5, 1), (5, 2)])
def test_enumerated_blocks_are_the_targets(
    vocab: int, k: int, params: SamplingParams, drafts: str
) -> None:
    s = setting(vocab, params, seed=vocab + 10 * k)
    assert enumeration_error(real(drafts).decoder(s), s.p, vocab, k) < EXACT


@pytest.mark.prove
@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("params", OPTIONS, ids=str)
def test_enumerated_blocks_are_the_targets_at_full_size(
    params: SamplingParams, drafts: str
) -> None:
    s = setting(5, params)
    assert enumeration_error(real(drafts).decoder(s), s.p, 5, 3) < EXACT


def greedy_blocks_are_right(verify: GreedyVerify, vocab: int, k: int) -> bool:
    """Whether every draft gives a beginning of plain decoding, one longer than what agrees."""
    choose = logits_table(vocab, 3)

    def best(context: tuple[int, ...]) -> int:
        return int(choose(context).argmax())

    plain: tuple[int, ...] = ()
    for _ in range(k + 1):
        plain = (*plain, best(plain))
    for ids in itertools.product(range(vocab), repeat=k):
        targets = torch.tensor([best(ids[:i]) for i in range(k + 1)])
        verdict = verify(torch.tensor(ids, dtype=torch.int64), targets)
        n_agree = next((i for i in range(k) if ids[i] != plain[i]), k)
        if (*ids[: verdict.n_accepted], verdict.token) != plain[: n_agree + 1]:
            return False
    return True


@pytest.mark.parametrize("vocab,k", [(2, 3), (3, 3), (5, 2), (5, 0)])
def test_greedy_blocks_are_plain_decoding(vocab: int, k: int) -> None:
    assert greedy_blocks_are_right(verify_greedy, vocab, k)


# --- Many rounds, exactly: a later round reads a position's number again ---


def coins(numerators: tuple[int, ...]) -> Table:
    """Coins whose chances are quarters, another one in every context."""

    def row(context: tuple[int, ...]) -> Tensor:
        heads = numerators[sum((i + 2) * t for i, t in enumerate(context)) % len(numerators)] / 4
        return torch.tensor([heads, 1 - heads], dtype=torch.float64)

    return row


def rounds_error(mutant: Mutant, n_tokens: int, k: int, read: tuple[Purpose, ...]) -> float:
    """Departure of the joint distribution of point masses' rounds, for every random number.

    With p in quarters all steps are multiples of 1/4, so the middles between them stand for all
    numbers. Rounds of drawn drafts have numbers of their own, of which there are too many.

    Args:
        read: purposes of the numbers that the rule reads.
    """
    decoder = mutant.decoder(Setting(log(COIN), log(FAIR), SamplingParams(1.0)))
    names = [(at, purpose) for at in range(n_tokens - 1) for purpose in read]
    names.append((n_tokens - 1, Purpose.TARGET))  # the last position is never drafted
    joint = torch.zeros([2] * n_tokens, dtype=torch.float64)
    for numbers in itertools.product(QUARTERS, repeat=len(names)):
        known = dict(zip(names, numbers, strict=True))

        def number(at: int, purpose: Purpose, start: int | None, known: Any = known) -> float:
            return known[at, purpose] if purpose in read else math.nan

        joint[generate(decoder, number, n_tokens, k).tokens] += 1
    return float((joint / joint.sum() - continuation(COIN, (), 2, n_tokens)).abs().max())


def log(probabilities: Table) -> Table:
    return lambda context: probabilities(context).log()


FAIR, COIN = coins((2,)), coins((1, 3, 3, 1, 2))
QUARTERS = (0.125, 0.375, 0.625, 0.875)
OWN = (Purpose.TARGET,)


def test_numbers_read_again_by_a_later_round_are_lossless() -> None:
    assert rounds_error(real("argmax"), 4, 2, OWN) < EXACT


@pytest.mark.prove
@pytest.mark.parametrize("k", [1, 2, 3])
def test_five_tokens_of_rounds_are_lossless(k: int) -> None:
    assert rounds_error(real("argmax"), 5, k, OWN) < EXACT


def test_no_number_of_a_round_with_drawn_drafts_is_read_by_another() -> None:
    s = setting(4, SamplingParams(0.8), order=1)
    n_again = 0
    for seed in range(60):
        names: list[tuple[int, Purpose, int | None]] = []

        def number(at: int, why: Purpose, start: int | None, seed: int = seed) -> float:
            assert start is not None or why is Purpose.TARGET
            names.append((at, why, start))  # noqa: B023
            return uniform(seed, at, why, start)

        generate(real("sampled").decoder(s), number, 8, 3)
        assert len(set(names)) == len(names)
        n_again += len(names) - len({name[:2] for name in names})
    assert n_again > 100, "positions were drafted again"


# --- Rung 2 ---

COMBINATIONS = [
    (k, temperature, top_k, top_p, min_p)
    for k, (temperature, top_k, top_p, min_p) in zip(
        itertools.cycle((1, 2, 3, 4, 5)),
        itertools.product((0.7, 1.3), (0, 5), (1.0, 0.9), (0.0, 0.08)),
        strict=False,
    )
]


def holds(combination: tuple[int, float, int, float, float], drafts: str, n: int) -> None:
    k, *options = combination
    s = setting(8, SamplingParams(*options), order=1, seed=40 + k)  # type: ignore[arg-type]
    assert chi_square_holds(real(drafts), s, 8, k, n)


@pytest.mark.parametrize("i", range(len(COMBINATIONS)))
def test_generated_pairs_follow_the_target(i: int) -> None:
    holds(COMBINATIONS[i], ("sampled", "argmax")[(i + i // 5) % 2], 400)


@pytest.mark.prove
@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_many_generated_pairs_follow_the_target(
    combination: tuple[int, float, int, float, float], drafts: str
) -> None:
    holds(combination, drafts, 4_000)


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_acceptance_is_what_theory_says(drafts: str) -> None:
    """Accepting nothing is lossless as well: a first draft stays at the rate sum min(p, q)."""
    s = setting(8, SamplingParams(0.8, top_k=6), order=1)
    p, q = s.p(()), s.q(())
    rate = torch.minimum(p, q).sum() if drafts == "sampled" else p[q.argmax()]
    n = 1500
    runs = [generate(real(drafts).decoder(s), stream(seed), 2, 1) for seed in range(n)]
    accepted = sum(run.verdicts[0].n_accepted for run in runs)
    counts = torch.tensor([accepted, n - accepted], dtype=torch.float64)
    assert chi_square_p_value(counts, n * torch.stack([rate, 1 - rate])) > SIGNIFICANCE


# --- Rung 3 ---

MUTANT_PARAMS = [
    SamplingParams(0.8),
    SamplingParams(0.8, top_k=3, top_p=0.8),
    SamplingParams(0.8, top_k=2, min_p=0.3),
]


def caught_by_enumeration(mutant: Mutant) -> bool:
    settings = [setting(4, params, seed=seed) for params in MUTANT_PARAMS for seed in (5, 9)]
    return any(enumeration_error(mutant.decoder(s), s.p, 4, 2) > EXACT for s in settings)


def caught_by_rounds(mutant: Mutant) -> bool:
    read = (Purpose.ACCEPT, Purpose.TARGET)
    return mutant.drafts == "argmax" and rounds_error(mutant, 3, 2, read) > EXACT


def caught_by_chi_square(mutant: Mutant) -> bool:
    if not chi_square_holds(mutant, setting(3, MUTANT_PARAMS[0], order=1, seed=6), 3, 3, 1500):
        return True
    settings = [setting(8, params, order=1) for params in MUTANT_PARAMS[:2]]
    return not all(chi_square_holds(mutant, s, 8, 3, 1000) for s in settings)


CHECKS = (caught_by_enumeration, caught_by_rounds, caught_by_chi_square)


@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda m: m.name)
def test_the_restated_rule_passes_every_check(healthy: Mutant) -> None:
    assert not any(check(healthy) for check in CHECKS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_are_caught(mutant: Mutant) -> None:
    assert any(check(mutant) for check in CHECKS)


@pytest.mark.parametrize("mutant", GREEDY_MUTANTS)
def test_greedy_mutants_are_caught(mutant: GreedyVerify) -> None:
    assert not greedy_blocks_are_right(mutant, 3, 3)
