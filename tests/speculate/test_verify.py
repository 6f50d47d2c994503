"""Single functions of verification: thresholds, residuals, edges. Proofs: tests/contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outdraft.errors import OutdraftError
from outdraft.sampling.sampler import sample
from outdraft.speculate.verify import (
    Verdict,
    accept_probabilities,
    residual,
    verify_greedy,
    verify_sampled,
)

VOCAB = 6


def rows(n: int) -> Tensor:
    return torch.softmax(2 * torch.randn(n, VOCAB, dtype=torch.float64), -1)


def ids(*tokens: int) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=7), st.integers(0, 2))
def test_greedy_is_the_loop_that_defines_it(pairs: list[tuple[int, int]], last: int) -> None:
    drafts, targets = [d for d, _ in pairs], [*(t for _, t in pairs), last]
    n = 0
    while n < len(drafts) and drafts[n] == targets[n]:
        n += 1
    assert verify_greedy(ids(*drafts), ids(*targets)) == Verdict(n, targets[n])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_drawn_draft_stays_up_to_its_probability_and_not_beyond(k: int) -> None:
    p, q = rows(k + 1), rows(k)
    drafts = torch.randint(VOCAB, (k,))
    finals = torch.rand(k + 1).tolist()
    for i in range(k):
        d = int(drafts[i])
        chance = min(1.0, float(p[i, d]) / float(q[i, d]))
        accept_u = [0.0] * k
        accept_u[i] = math.nextafter(chance, 0)
        all_kept = Verdict(k, sample(p[k], finals[k]))
        assert verify_sampled(drafts, q, p, accept_u, finals) == all_kept
        if chance == 1:
            continue
        accept_u[i] = chance
        rest = residual(d, q[i], p[i])
        expected = Verdict(i, sample(rest, finals[i]))
        assert verify_sampled(drafts, q, p, accept_u, finals) == expected
        assert expected.token != d


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_a_point_mass_stays_where_the_target_says_the_same(k: int) -> None:
    """What is emitted is the beginning of what the target draws by itself, whatever is drafted."""
    for _ in range(30):
        p, finals = rows(k + 1), torch.rand(k + 1).tolist()
        own = [sample(p[i], finals[i]) for i in range(k + 1)]
        wrong = torch.rand(k) < 0.3
        drafts = torch.where(wrong, torch.randint(VOCAB, (k,)), torch.tensor(own[:k]).long())
        n = next((i for i in range(k) if drafts[i] != own[i]), k)
        got = verify_sampled(drafts, None, p, torch.rand(k).tolist(), finals)
        assert got == Verdict(n, own[n])


def test_the_algebra_of_one_position() -> None:
    """q(x) a(x) + P(rejected) r(x) = p(x), and drafts stay at the rate sum min(p, q)."""
    for _ in range(20):
        p, q = rows(1)[0], rows(1)[0]
        every = torch.arange(VOCAB)
        kept = q * accept_probabilities(every, q.expand(VOCAB, -1), p.expand(VOCAB + 1, -1))
        assert abs(kept.sum() - torch.minimum(p, q).sum()) < 1e-14
        draft = int((q - p).argmax())
        emitted = kept + (1 - kept.sum()) * residual(draft, q, p)
        assert (emitted - p).abs().max() < 1e-14


def test_a_point_mass_stays_at_the_rate_of_its_probability() -> None:
    p = rows(1)[0]
    for d in range(VOCAB):
        a = accept_probabilities(ids(d), None, p.expand(2, -1))[0]
        emitted = (1 - a) * residual(d, None, p)
        emitted[d] += a
        assert (emitted - p).abs().max() < 1e-14


def test_without_drafts_it_is_plain_sampling() -> None:
    p = rows(1)
    for u in torch.rand(20).tolist():
        assert verify_sampled(ids(), None, p, [], [u]) == Verdict(0, sample(p[0], u))


def test_a_token_the_target_excludes_never_stays() -> None:
    p, q = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    for drawn in (q, None):
        assert verify_sampled(ids(0), drawn, p, [0.0], [0.3, 0.3]) == Verdict(0, 1)


def test_equal_distributions_always_stay() -> None:
    q = rows(3).float()
    p = torch.cat([q, rows(1).float()])
    last = 1 - 2.0**-53
    for drafts in torch.randint(VOCAB, (10, 3)):
        assert verify_sampled(drafts, q, p, [last] * 3, [0.5] * 4).n_accepted == 3


def test_a_rejection_by_rounding_alone_falls_back_to_p() -> None:
    q = torch.tensor([0.25, 0.75])
    p = torch.nextafter(q, torch.zeros(2))
    assert torch.equal(residual(0, q, p), p.double())
    verdict = verify_sampled(ids(1), q[None], torch.stack([p, p]), [1 - 2.0**-53], [0.1, 0.1])
    assert verdict == Verdict(0, 0)
    certain = torch.tensor([0.0, 1 - 1e-7])
    assert torch.equal(residual(1, None, certain), certain.double())


@pytest.mark.parametrize("drawn", [True, False])
def test_nan_is_an_error_and_no_token(drawn: bool) -> None:
    p, q = rows(3), rows(2) if drawn else None
    p[0] = torch.nan
    with pytest.raises(OutdraftError, match="no token can be drawn"):
        verify_sampled(ids(1, 2), q, p, [0.0, 0.0], [0.5] * 3)
