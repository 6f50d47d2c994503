"""Chunked losses against whole ones in fp64, values and gradients; the schedule; Muon."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from outdraft.train import losses
from outdraft.train.optimiser import Optimiser, OptimiserConfig, orthogonalise, schedule

N_ROWS, WIDTH, VOCAB = 77, 12, 31


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 20)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N_ROWS, WIDTH, dtype=torch.float64, generator=generator)
    head = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator)
    return hidden.requires_grad_(), head.requires_grad_()


def test_cross_entropy_equals_the_whole() -> None:
    hidden, head = rows()
    targets = torch.randint(VOCAB, (N_ROWS,))
    expected = F.cross_entropy(hidden @ head.T, targets)
    found = losses.cross_entropy(hidden, targets, lambda h: h @ head.T)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(expected, (hidden, head)),
        torch.autograd.grad(found, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)


def test_kl_equals_its_definition() -> None:
    hidden, head = rows()
    target_logits = 3 * torch.randn(N_ROWS, VOCAB, dtype=torch.float64)
    p, q = torch.softmax(target_logits, -1), torch.softmax(hidden @ head.T, -1)
    expected = (p * (p / q).log()).sum(-1).mean()
    probs, entropy = losses.probs_and_entropy(target_logits, torch.float64)
    found = losses.kl_divergence(hidden, probs, entropy, lambda h: h @ head.T)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, head)[0],
        torch.autograd.grad(expected, head)[0],
        rtol=1e-4,
        atol=1e-7,
    )


def test_step_weights() -> None:
    weights = losses.step_weights(4)
    assert sum(weights) == pytest.approx(1)
    assert [b / a for a, b in pairwise(weights)] == pytest.approx([0.8] * 3)


def test_orthogonalise_keeps_directions_and_evens_out_sizes() -> None:
    for shape in ((24, 40), (40, 24), (16, 16)):
        matrix = torch.randn(shape, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        sizes = torch.diagonal(u.T @ orthogonalise(matrix, torch.float64) @ vh.T)
        assert shape[0] == shape[1] or bool(((sizes > 0.6) & (sizes < 1.3)).all())
        off = u.T @ orthogonalise(matrix, torch.float64) @ vh.T - torch.diag(sizes)
        assert float(off.abs().max()) < 1e-6


def test_adamw_follows_torchs() -> None:
    config = OptimiserConfig(muon_lr=1.0, adam_lr=1e-2, max_grad_norm=1e9, betas=(0.9, 0.95))
    mine = torch.randn(9, dtype=torch.float64).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    optimiser = Optimiser({"norm.weight": mine}, config)
    for step in range(5):
        grad = torch.randn(9, dtype=torch.float64)
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        optimiser.step(step, 1.0)
        reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_are_clipped_together() -> None:
    weights = {f"w{i}": torch.zeros(3).requires_grad_() for i in range(2)}
    optimiser = Optimiser(weights, OptimiserConfig(muon_lr=1, adam_lr=1, max_grad_norm=1.0))
    for weight in weights.values():
        weight.grad = torch.full((3,), 4.0)
    assert optimiser.step(0, 1.0) == pytest.approx(4 * 6**0.5)
    squares = sum(float(optimiser.state[f"square.w{i}"].sum()) for i in range(2)) / (1 - 0.95)
    assert squares == pytest.approx(1.0, rel=1e-4)


def test_schedule_rises_holds_and_falls() -> None:
    config = OptimiserConfig(muon_lr=1, adam_lr=1, warmup=0.1, cooldown=0.5)
    factors = [schedule(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:50] == [1.0] * 41
    assert factors[-1] == pytest.approx(0.02) and min(factors) > 0
    assert schedule(0, 1, config) == 1.0
