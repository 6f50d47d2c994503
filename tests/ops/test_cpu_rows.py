"""Norms, rotation, gates, soft-cap, choosing and experts of the compiled core against fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import Rotary
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import PackedLinear

WIDTHS = [16, 70, 512]


def norm64(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("k", WIDTHS)
def test_norms(ops: CpuOps, k: int, rng: torch.Generator) -> None:
    x, residual = torch.randn(2, 5, k, generator=rng)
    weight, following = torch.rand(2, k, generator=rng) + 0.5
    near(ops.rms_norm(x, weight, 1e-6), norm64(x, weight, 1e-6))
    near(ops.rms_norm(x, None, 0.5), norm64(x, None, 0.5))
    y, after = ops.add_norm(x, residual, weight, 1e-6, scale=0.7, next_weight=following)
    expected = (residual.double() + norm64(x, weight, 1e-6)) * 0.7
    near(y, expected)
    near(after, norm64(expected, following, 1e-6))
    near(ops.add(x, residual, 2.0), (x.double() + residual.double()) * 2.0)
    half = x.bfloat16()
    assert torch.equal(
        ops.rms_norm(half, weight, 1e-6), ops.rms_norm(half.float(), weight, 1e-6).bfloat16()
    )


@pytest.mark.parametrize("dim", [32, 96, 512])
def test_rotation(ops: CpuOps, dim: int, rng: torch.Generator) -> None:
    wide = torch.randn(6, 7, dim, generator=rng)
    x = wide[:, 2:5]  # heads inside a wider row
    weight = torch.rand(dim, generator=rng) + 0.5
    angles = torch.randn(20, dim // 2, generator=rng)
    position = torch.randint(0, 20, (6,), generator=rng, dtype=torch.int32)
    y = norm64(x, weight, 1e-6)
    cos, sin = (f(angles.double())[position.long()][:, None] for f in (torch.cos, torch.sin))
    first, second = y[..., : dim // 2], y[..., dim // 2 :]
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    near(ops.norm_rope(x, weight, Rotary(angles.cos(), angles.sin(), position), 1e-6), expected)
    near(ops.norm_rope(x, None, None, 1e-6), norm64(x, None, 1e-6))


@pytest.mark.parametrize("k", WIDTHS)
def test_gates_and_softcap(ops: CpuOps, k: int, rng: torch.Generator) -> None:
    wide = 4 * torch.randn(5, 2 * k, generator=rng)
    gate, up = wide[:, :k], wide[:, k:]
    near(ops.gated(gate, up), F.gelu(gate.double(), approximate="tanh") * up.double())
    near(ops.activate(gate, up, "silu"), F.silu(gate.double()) * up.double())
    logits = 30 * torch.randn(5, k, generator=rng)
    expected = torch.tanh(logits.double() / 30) * 30
    torch.testing.assert_close(ops.softcap(logits, 30.0).double(), expected, rtol=0, atol=1e-5)


def test_extreme_gates(ops: CpuOps) -> None:
    gate = torch.tensor([[-1e4, -200.0, -1e-30, 0.0, 1e-30, 200.0, 1e4]])
    ones = torch.ones_like(gate)
    near(ops.gated(gate, ones), F.gelu(gate.double(), approximate="tanh"))
    near(ops.activate(gate, ones, "silu"), F.silu(gate.double()))


@pytest.mark.parametrize("n", [1, 15, 64, 1003])
def test_argmax_and_top(ops: CpuOps, n: int, rng: torch.Generator) -> None:
    scores = torch.randint(-40, 40, (9, n), generator=rng).float()  # many ties
    order = scores.sort(dim=1, descending=True, stable=True).indices.int()
    assert torch.equal(ops.argmax(scores), order[:, 0])
    count = min(n, 12)
    assert torch.equal(ops.top(scores, count), order[:, :count])


def test_argmax_of_chosen_blocks(ops: CpuOps, rng: torch.Generator) -> None:
    n_blocks, block, count = 10, 12, 4
    ids = torch.randperm(n_blocks * block, generator=rng).int().view(n_blocks, block)
    ids[:, -1] = -1
    chosen = torch.stack([torch.randperm(n_blocks, generator=rng)[:count] for _ in range(5)]).int()
    scores = torch.randint(0, 9, (5, count * block), generator=rng).float()
    scores.view(5, count, block)[:, :, -1] = 100.0
    best = ops.argmax_of_blocks(scores, ids, chosen)
    for t in range(5):
        pairs = zip(scores[t].tolist(), ids[chosen[t].long()].flatten().tolist(), strict=True)
        assert best[t] == min((-score, token) for score, token in pairs if token >= 0)[1]


@pytest.mark.parametrize("n", [1, 5, 16, 33, 4097])
@pytest.mark.parametrize("spread", [0.01, 3.0, 60.0])
def test_best_is_the_argmax_with_its_probability(
    ops: CpuOps, n: int, spread: float, rng: torch.Generator
) -> None:
    logits = torch.randn(5, n, generator=rng) * spread + 100
    logits[1, ::3] = logits[1].max()  # equals share
    logits[2, 1:] = float("-inf")
    ids, sure = ops.best(logits)
    want = torch.softmax(logits.double(), dim=-1).amax(dim=-1)
    assert torch.equal(ids, ops.argmax(logits))
    assert sure.dtype == torch.float32
    torch.testing.assert_close(sure.double(), want, rtol=3e-6, atol=0)
    for t in range(5):
        alone = ops.best(logits[t : t + 1])
        assert torch.equal(alone[0], ids[t : t + 1]) and torch.equal(alone[1], sure[t : t + 1])


@pytest.mark.parametrize("n_rows", [1, 3, 9])
def test_blocks_scattered_and_chosen_from(ops: CpuOps, n_rows: int, rng: torch.Generator) -> None:
    n_blocks, block, count, k = 13, 21, 4, 70
    weight = torch.randn(n_blocks * block, k, generator=rng)
    ids = torch.randperm(n_blocks * block, generator=rng).int().view(n_blocks, block)
    packed = ops.pack_blocks(weight, ids)
    x = torch.randn(n_rows, k, generator=rng)
    chosen = torch.stack([torch.randperm(n_blocks, generator=rng)[:count] for _ in range(n_rows)])
    chosen = chosen.int()
    logits = ops.score_blocks(x, packed, ids, chosen, n_blocks * block)
    head = PackedLinear.pack(weight, "w8")
    everything = ops.linear(x, head, torch.float32)  # a row's sums do not depend on its neighbours
    for t in range(n_rows):
        seen = ids[chosen[t].long()].flatten().long()
        assert torch.equal(logits[t, seen], everything[t, seen])
        assert int(torch.isinf(logits[t]).sum()) == (n_blocks - count) * block
    best, sure = ops.best_of_blocks(x, packed, ids, chosen)
    assert torch.equal(best, ops.argmax(logits))
    want = torch.softmax(logits.double(), dim=-1).amax(dim=-1)
    torch.testing.assert_close(sure.double(), want, rtol=3e-6, atol=0)


def test_route(ops: CpuOps, rng: torch.Generator) -> None:
    scores = torch.randn(6, 128, generator=rng)
    per_expert = torch.rand(128, generator=rng) + 0.5
    ids, weights = ops.route(scores, 8, per_expert)
    best, expected_ids = torch.softmax(scores.double(), dim=-1).topk(8, dim=-1)
    assert torch.equal(ids.long(), expected_ids)
    near(weights, best / best.sum(dim=-1, keepdim=True) * per_expert[expected_ids])


@pytest.mark.parametrize("format", ["bf16", "w8", "w4"])
def test_experts_equal_their_linear_layers(ops: CpuOps, format: str, rng: torch.Generator) -> None:
    n_experts, n_rows, count = 7, 19, 3
    weight = torch.randn(n_experts, 40, 70, generator=rng)
    packed = PackedLinear.pack(weight, format)
    single = [PackedLinear.pack(w, format) for w in weight]
    ids = torch.stack(
        [torch.randperm(n_experts - 1, generator=rng)[:count] for _ in range(n_rows)]
    ).int()
    groups = ops.group_pairs(ids, n_experts)
    x = torch.randn(n_rows, 70, generator=rng)
    y = ops.expert_linear(x, packed, groups, n_rows * count)
    each = torch.randn(n_rows * count, 70, generator=rng)
    z = ops.expert_linear(each, packed, groups, n_rows * count)
    for p, expert in enumerate(ids.flatten().tolist()):
        row = p // count
        assert torch.equal(y[p], ops.linear(x[row : row + 1], single[expert])[0])
        assert torch.equal(z[p], ops.linear(each[p : p + 1], single[expert])[0])
    weights = torch.rand(n_rows, count, generator=rng)
    expected = (y.double().view(n_rows, count, -1) * weights.double()[..., None]).sum(dim=1)
    near(ops.combine(y, weights), expected)


def test_copying_rows(ops: CpuOps, rng: torch.Generator) -> None:
    x = torch.randn(9, 70, generator=rng)
    rows = torch.tensor([8, 0, 3, 3], dtype=torch.int32)
    wide = torch.zeros(4, 100)
    ops.copy_rows(x, wide[:, 20:90], rows)
    assert torch.equal(wide[:, 20:90], x[rows.long()])
    assert (wide[:, :20] == 0).all()
    assert (wide[:, 90:] == 0).all()
    half = torch.empty(9, 70, dtype=torch.bfloat16)
    assert torch.equal(ops.copy_rows(x, half), x.bfloat16())


@pytest.mark.parametrize("k", [70, 512])
def test_a_row_does_not_see_its_neighbours(ops: CpuOps, k: int, rng: torch.Generator) -> None:
    x, residual = torch.randn(2, 17, k, generator=rng)
    weight = torch.rand(k, generator=rng)

    def everything(index: Tensor) -> Tensor:
        a, b = x[index], residual[index]
        y, after = ops.add_norm(a, b, weight, 1e-6)
        parts = (y, after, ops.gated(a, b), ops.rms_norm(a, weight, 1e-6))
        return torch.cat([*parts, ops.softcap(a.clone(), 30.0)], dim=1)

    alone = torch.cat([everything(torch.tensor([t])) for t in range(17)])
    for n_rows in range(1, 18):
        index = torch.randperm(17, generator=rng)[:n_rows]
        assert torch.equal(everything(index), alone[index])
