"""Single functions of verification: thresholds, residuals, edges. Proofs: tests/contract."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outdraft.errors import OutdraftError
from outdraft.sampling.sampler import sample
from outdraft.speculate.verify import (
    Verdict,
    block_residual,
    block_shares,
    verify_block,
    verify_greedy,
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
def test_the_last_draft_that_passes_its_test_stays(k: int) -> None:
    """Each test up to its chance and not beyond, restated from the formulas of the paper."""
    p, q = rows(k + 1), rows(k)
    drafts = torch.randint(VOCAB, (k,))
    finals = torch.rand(k + 1).tolist()
    share, shares = 1.0, [1.0]
    for i, d in enumerate(drafts.tolist()):
        share = min(1.0, share * float(p[i, d] / q[i, d]))
        shares.append(share)
    assert block_shares(drafts, q, p) == pytest.approx(shares, abs=1e-15)
    for i in range(k + 1):
        excess = [max(0.0, a) for a in (shares[i] * p[i] - q[i]).tolist()] if i < k else []
        mass = sum(excess)
        chance = shares[k] if i == k else mass / (mass + (1 - shares[i])) if mass else 0.0
        passes_later = any(share == 1 for share in shares[i + 1 :])  # whatever is drawn
        if passes_later or (i > 0 and chance < 1e-6):
            continue
        row = p[k] if i == k else torch.tensor(excess, dtype=torch.float64)
        want = Verdict(i, sample(row, finals[i]))
        fails = [1 - 2.0**-53] * k
        if i == 0:
            assert verify_block(drafts, q, p, fails, finals) == want
            continue
        accept_u = [*fails[: i - 1], chance - 1e-13, *fails[i:]]
        assert verify_block(drafts, q, p, accept_u, finals) == want
        accept_u[i - 1] = min(chance + 1e-13, 1 - 2.0**-53)
        assert verify_block(drafts, q, p, accept_u, finals).n_accepted < i or chance > 1 - 1e-12


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_a_point_mass_stays_where_the_target_says_the_same(k: int) -> None:
    """What is emitted is the beginning of what the target draws by itself, whatever is drafted."""
    for _ in range(30):
        p, finals = rows(k + 1), torch.rand(k + 1).tolist()
        own = [sample(p[i], finals[i]) for i in range(k + 1)]
        wrong = torch.rand(k) < 0.3
        drafts = torch.where(wrong, torch.randint(VOCAB, (k,)), torch.tensor(own[:k]).long())
        n = next((i for i in range(k) if drafts[i] != own[i]), k)
        got = verify_block(drafts, None, p, torch.rand(k).tolist(), finals)
        assert got == Verdict(n, own[n])


def test_the_algebra_of_one_row() -> None:
    """A prefix that is known with probability s stays so: what goes on and what stops add up.

    E_q[min(1, s p / q)] of what goes on to the next draft, and the chance that it stops here when
    nothing behind passed, give s again; and what is emitted behind it is s p.
    """
    for share in (1.0, 0.8, 0.3, 0.0):
        p, q = rows(1)[0], rows(1)[0]
        on = torch.minimum(share * p, q)
        excess, chance = block_residual(share, q, p)
        stops = (1 - on.sum()) * chance
        assert abs(on.sum() + stops - share) < 1e-14
        emitted = on + (stops * excess / excess.sum() if excess.sum() > 0 else 0)
        assert (emitted - share * p).abs().max() < 1e-14


def test_on_average_at_least_as_many_stay_as_draft_by_draft() -> None:
    k, better = 3, 0
    for _ in range(20):
        p, q = rows(k + 1), rows(k)
        by_token = by_block = 0.0
        for drafts in itertools.product(range(VOCAB), repeat=k):
            ids_K = torch.tensor(drafts)
            weight = float(q.gather(1, ids_K[:, None]).prod())
            ratio_K = (p[:-1] / q).gather(1, ids_K[:, None])[:, 0]
            by_token += weight * float(ratio_K.clamp(max=1).cumprod(0).sum())
            by_block += weight * sum(block_shares(ids_K, q, p)[1:])
        assert by_block > by_token - 1e-12
        better += by_block > by_token + 1e-3
    assert better > 10


def test_without_drafts_it_is_plain_sampling() -> None:
    p = rows(1)
    for u in torch.rand(20).tolist():
        assert verify_block(ids(), None, p, [], [u]) == Verdict(0, sample(p[0], u))


def test_a_token_the_target_excludes_never_stays() -> None:
    p, q = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    for drawn in (q, None):
        assert verify_block(ids(0), drawn, p, [0.0], [0.3, 0.3]) == Verdict(0, 1)


def test_equal_distributions_always_stay() -> None:
    q = rows(3).float()
    p = torch.cat([q, rows(1).float()])
    last = 1 - 2.0**-53
    for drafts in torch.randint(VOCAB, (10, 3)):
        assert verify_block(drafts, q, p, [last] * 3, [0.5] * 4).n_accepted == 3


def test_a_rejection_by_rounding_alone_falls_back_to_p() -> None:
    q = torch.tensor([0.25, 0.75])
    p = torch.nextafter(q, torch.zeros(2))
    excess, chance = block_residual(1.0, q, p)
    assert not excess.any() and chance == 0
    verdict = verify_block(ids(1), q[None], torch.stack([p, p]), [1 - 2.0**-53], [0.1, 0.1])
    assert verdict == Verdict(0, 0)


@pytest.mark.parametrize("drawn", [True, False])
def test_nan_is_an_error_and_no_token(drawn: bool) -> None:
    p, q = rows(3), rows(2) if drawn else None
    p[:] = torch.nan
    with pytest.raises(OutdraftError, match="no token can be drawn"):
        verify_block(ids(1, 2), q, p, [0.0, 0.0], [0.5] * 3)
