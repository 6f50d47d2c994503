"""The checkers themselves: what they integrate, and that chi-square's p-values are right."""

import math

import pytest
import torch

from outdraft.request import SamplingParams
from outdraft.speculate.proof import (
    Proposal,
    chi_square_p_value,
    continuation,
    integrate,
    logits_table,
    pair_p_values,
    steps,
    table,
)
from outdraft.speculate.verify import verify_block


def test_steps_are_found_to_the_last_bits() -> None:
    edges = [0.1, 1 / 3, 0.7000001, 0.99]
    pieces = steps(lambda u: sum(u >= edge for edge in edges))
    assert [low for low, _ in pieces] == pytest.approx([0.0, *edges], abs=1e-13)
    assert pieces[-1][1] == 1.0
    assert steps(lambda u: 1) == [(0.0, 1.0)]


def test_integration_finds_every_verdict() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.6, 0.15]], dtype=torch.float64)
    found: dict[tuple[int, int], float] = {}
    for share, verdict in integrate(verify_block, Proposal((1,), q), p):
        key = (verdict.n_accepted, verdict.token)
        found[key] = found.get(key, 0.0) + share
    # Stays with 1/2; the residual is 0.25 : 0 : 0.05.
    expected = {(0, 0): 5 / 12, (0, 2): 1 / 12, (1, 0): 0.05, (1, 1): 0.05, (1, 2): 0.4}
    assert found == pytest.approx(expected, abs=1e-13)


def test_continuation_multiplies_the_conditionals() -> None:
    truth = table(logits_table(3, 1), SamplingParams(1.0))
    joint = continuation(truth, (2,), 3, 2)
    assert float(joint.sum()) == pytest.approx(1, abs=1e-14)
    assert float(joint[1, 0]) == pytest.approx(float(truth((2,))[1] * truth((2, 1))[0]), abs=1e-15)
    assert float(continuation(truth, (2,), 3, 0)) == 1


def test_p_values_of_chi_square() -> None:
    """With 2 degrees of freedom the tail is exp(-x / 2), with 4 it is (1 + x / 2) exp(-x / 2)."""
    x = 2 * 13**2 / 40
    for bins, tail in ((3, math.exp(-x / 2)), (5, (1 + x / 2) * math.exp(-x / 2))):
        expected = torch.full((bins,), 40.0, dtype=torch.float64)
        observed = expected.clone()
        observed[0] += 13
        observed[-1] -= 13
        assert chi_square_p_value(observed, expected) == pytest.approx(tail, rel=1e-12)


def test_small_bins_are_merged_and_impossible_ones_are_fatal() -> None:
    expected = torch.tensor([0.0, 1.0, 1.5, 1.0, 3.0, 60.0, 2.0], dtype=torch.float64)
    observed = torch.tensor([0.0, 4.0, 0.0, 3.0, 0.0, 59.5, 2.0], dtype=torch.float64)
    # 1 + 1 + 1.5 + 2 against 9; what is left, 3, joins 60 or stands in one bin with it.
    x = (9 - 5.5) ** 2 / 5.5 + (59.5 - 63) ** 2 / 63
    assert chi_square_p_value(observed, expected) == pytest.approx(math.erfc(math.sqrt(x / 2)))
    observed[0] = 1
    assert chi_square_p_value(observed, expected) == 0
    assert chi_square_p_value(torch.tensor([3.0]), torch.tensor([3.0])) == 1


def test_p_values_of_true_samples_are_uniform() -> None:
    truth = table(logits_table(4, 2, order=1), SamplingParams(1.0))
    first, after = truth(()), torch.stack([truth((t,)) for t in range(4)])
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for _ in range(300):
        one = torch.multinomial(first, 400, replacement=True, generator=generator)
        two = torch.multinomial(after[one], 1, generator=generator)[:, 0]
        p_values += pair_p_values(torch.stack([one, two], 1), truth, 4)
    ranked = torch.tensor(p_values).sort().values
    uniform = (torch.arange(300) + 0.5) / 300
    assert (ranked - uniform).abs().max() < 1.63 / math.sqrt(300)  # Kolmogorov-Smirnov at 1 %
