"""Linear layers of the compiled core against fp64, and bit for bit alone against in company."""

import pytest
import torch
from torch import Tensor

from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import Format, PackedLinear

SHAPES = [(16, 32), (33, 70), (40, 704), (128, 257)]
CASES = [("bf16", 32, False), ("w8", 32, False), ("w4", 32, False), ("w4", 64, False)]
CASES += [("w4", 32, True), ("w4", 128, True)]


def random_packed(
    case: tuple[Format, int, bool], n: int, k: int, rng: torch.Generator
) -> tuple[PackedLinear, Tensor]:
    """A packed weight and the fp64 values that it holds."""
    format, group, zero_points = case
    packed = PackedLinear.empty(format, n, k, group=group, zero_points=zero_points)
    if format == "bf16":
        weight = torch.randn(n, k, generator=rng).bfloat16()
        packed.put_floats(weight)
        return packed, weight.double()
    if format == "w8":
        q = torch.randint(-127, 128, (n, k), generator=rng, dtype=torch.int8)
        scale = torch.rand(n, generator=rng) + 0.1
        packed.put_w8(q, scale)
        return packed, q.double() * scale.double()[:, None]
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, k), generator=rng, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=rng) + 0.1).half().float()
    zero = torch.randint(0, 16, (n, groups), generator=rng, dtype=torch.uint8)
    packed.put_w4(q, scale, zero if zero_points else None)
    offset = zero.double() if zero_points else torch.full((n, groups), 8.0).double()
    wide = [x.double().repeat_interleave(group, dim=1)[:, :k] for x in (offset, scale)]
    return packed, (q.double() - wide[0]) * wide[1]


def rounded_rows(x_TK: Tensor, case: tuple[Format, int, bool]) -> Tensor:
    """The fp64 activations that a format computes with: int8 per row or per group."""
    format, group, _ = case
    if format == "bf16":
        return x_TK.double()
    size = x_TK.shape[1] if format == "w8" else group
    parts = []
    for part in x_TK.split(size, dim=1):
        limit = part.abs().amax(dim=1, keepdim=True)
        # One rounding, as in the kernel: `127 / limit` would be a reciprocal times 127.
        q = (part * torch.full_like(limit, 127).div(limit)).round()
        parts.append(q.double() * (limit / 127).double())
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_equals_fp64(
    ops: CpuOps, case: tuple[Format, int, bool], n: int, k: int, rng: torch.Generator
) -> None:
    packed, weight = random_packed(case, n, k, rng)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, k, generator=rng).to(dtype)
        expected = rounded_rows(x.float(), case) @ weight.T
        size = rounded_rows(x.float(), case).abs() @ weight.abs().T
        y = ops.linear(x, packed, torch.float32)
        # fp32 adds: the error is relative to the sum of sizes.
        assert ((y - expected).abs() <= 2e-6 * size + 1e-6).all()
        assert torch.equal(ops.linear(x, packed, torch.bfloat16), y.bfloat16())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantised_rows_are_near_the_plain_product(
    ops: CpuOps, case: tuple[Format, int, bool], rng: torch.Generator
) -> None:
    packed, weight = random_packed(case, 48, 512, rng)
    x = torch.randn(4, 512, generator=rng)
    expected = x.double() @ weight.T
    error = (ops.linear(x, packed) - expected).norm() / expected.norm()
    assert error < (1e-6 if case[0] == "bf16" else 0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_does_not_see_its_neighbours(
    ops: CpuOps, case: tuple[Format, int, bool], rng: torch.Generator
) -> None:
    n, k = 40, 203
    packed, _ = random_packed(case, n, k, rng)
    x = torch.randn(17, k, generator=rng)
    alone = torch.cat([ops.linear(row[None], packed) for row in x])
    for n_rows in range(1, 18):
        order = torch.randperm(17, generator=rng)[:n_rows]
        assert torch.equal(ops.linear(x[order], packed), alone[order])
    many = x[torch.randint(0, 17, (300,), generator=rng)]
    many = torch.where(torch.rand(300, 1, generator=rng) < 0.5, many, 1e3 * many)
    single = torch.cat([ops.linear(row[None], packed) for row in many[100:140]])
    assert torch.equal(ops.linear(many, packed)[100:140], single)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("k", [257, 512])
def test_a_row_of_a_prompt_has_the_bits_that_it_has_alone(
    ops: CpuOps, case: tuple[Format, int, bool], k: int, rng: torch.Generator
) -> None:
    packed, _ = random_packed(case, 150, k, rng)
    x = torch.randn(150, k, generator=rng) * torch.logspace(-3, 3, 150)[:, None]
    x[7] = 0.0
    alone = torch.cat([ops.linear(row[None], packed) for row in x])
    # Whole blocks of rows, and a last one with too few, and with enough, to be computed as a block.
    for n_rows in (127, 128, 130, 135, 150):
        assert torch.equal(ops.linear(x[:n_rows], packed), alone[:n_rows])
    half = ops.linear(x.bfloat16(), packed, torch.bfloat16)
    assert torch.equal(half[140:141], ops.linear(x[140:141].bfloat16(), packed, torch.bfloat16))


@pytest.mark.parametrize("format", ["w8", "w4"])
def test_packing_floats_quantises_to_the_nearest(format: Format, rng: torch.Generator) -> None:
    weight = torch.randn(37, 100, generator=rng)
    packed = PackedLinear.pack(weight, format)
    better = PackedLinear.pack(weight, format, candidates=16)
    ops = CpuOps()
    rows = torch.arange(37, dtype=torch.int32)
    plain = ops.embed_into(packed, rows, 1.0, torch.empty(37, 100))
    tuned = ops.embed_into(better, rows, 1.0, torch.empty(37, 100))
    steps = 254 if format == "w8" else 15
    widest = weight.abs().amax(dim=1, keepdim=True)
    assert ((plain - weight).abs() <= 1.05 * 2 * widest / steps).all()
    assert (tuned - weight).norm() <= (plain - weight).norm()
    assert (tuned - weight).norm() < (0.01 if format == "w8" else 0.1) * weight.norm()


def test_rows_may_be_packed_some_at_a_time(rng: torch.Generator) -> None:
    weight = torch.randn(50, 64, generator=rng)
    for format in ("bf16", "w8", "w4"):
        whole = PackedLinear.pack(weight, format)
        parts = PackedLinear.empty(format, 50, 64)
        for first in (30, 0, 7):
            last = {30: 50, 0: 7, 7: 30}[first]
            parts.put_floats(weight[first:last], first=first)
        assert torch.equal(whole.data, parts.data)
        assert torch.equal(whole.scales, parts.scales)
        assert torch.equal(whole.zeros, parts.zeros)


def test_zero_rows_stay_zero(ops: CpuOps, rng: torch.Generator) -> None:
    weight = torch.randn(20, 96, generator=rng)
    weight[3] = 0
    for format in ("bf16", "w8", "w4"):
        packed = PackedLinear.pack(weight, format)
        x = torch.randn(3, 96, generator=rng)
        x[1] = 0
        y = ops.linear(x, packed)
        assert (y[:, 3] == 0).all()
        assert (y[1] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embedding_rows(ops: CpuOps, case: tuple[Format, int, bool], rng: torch.Generator) -> None:
    packed, weight = random_packed(case, 45, 70, rng)
    tokens = torch.randint(0, 45, (9,), generator=rng, dtype=torch.int32)
    rows = ops.embed_into(packed, tokens, 3.5, torch.empty(9, 70))
    torch.testing.assert_close(rows.double(), weight[tokens.long()] * 3.5, rtol=3e-7, atol=1e-7)
