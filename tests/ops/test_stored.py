"""Weights in their files: a part of one and several as blocks are packed as what they stand for."""

import pytest
import torch
from torch import Tensor

from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import Format
from outdraft.ops.stored import Form, Int8Rows, Rows, StoredWeight, blocks, part, to_floats

N, K = 37, 64


def stored(key: str, form: Form, rng: torch.Generator) -> StoredWeight:
    """[N, K], in floating point or with int8 rows."""
    codes = torch.randint(-127, 128, (N, K), generator=rng).to(torch.int8)
    scales = torch.rand(N, generator=rng) / 500

    def read(block: int, first: int, count: int) -> Rows:
        assert block == 0 and first >= 0 and first + count <= N
        rows = slice(first, first + count)
        whole = Int8Rows(codes[rows], scales[rows])
        return whole if form == "int8" else to_floats(whole, torch.float32)

    return StoredWeight(key, (N, K), torch.float32, form, read)


def alone(ops: CpuOps, x_TK: Tensor, weight: StoredWeight) -> Tensor:
    return ops.linear(x_TK, ops.pack(weight))


@pytest.mark.parametrize("format", ["bf16", "w8", "w4"])
@pytest.mark.parametrize("form", ["float", "int8"])
def test_a_part_gives_its_rows_of_the_whole(
    format: Format, form: Form, rng: torch.Generator
) -> None:
    ops, weight = CpuOps(format=format), stored("w", form, rng)
    x_TK = torch.randn(3, K, generator=rng)
    whole = alone(ops, x_TK, weight)
    pieces = [part(weight, 0, 20), part(weight, 20, N - 20)]
    assert len({weight.key, *(piece.key for piece in pieces)}) == 3
    assert torch.equal(torch.cat([alone(ops, x_TK, p) for p in pieces], dim=1), whole)


@pytest.mark.parametrize("format", ["bf16", "w8", "w4"])
@pytest.mark.parametrize("forms", [("float",) * 3, ("int8",) * 3, ("int8", "float", "int8")])
def test_blocks_are_the_weights_in_their_order(
    format: Format, forms: tuple[Form, ...], rng: torch.Generator
) -> None:
    ops = CpuOps(format=format)
    weights = [stored(f"w{i}", form, rng) for i, form in enumerate(forms)]
    x_TK, ids = torch.randn(2, K, generator=rng), torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    y_PN = ops.expert_linear(x_TK, ops.pack(blocks(weights)), ops.group_pairs(ids, 3), 4)
    if len(set(forms)) > 1:  # what is not alike is dequantised first
        weights = [
            StoredWeight(w.key, w.shape, w.dtype, "float", lambda *at, w=w: floats(w, at))
            for w in weights
        ]
    for pair, expert in enumerate(ids.flatten().tolist()):
        row = x_TK[pair // 2 : pair // 2 + 1]
        assert torch.equal(y_PN[pair : pair + 1], alone(ops, row, weights[expert]))


def floats(weight: StoredWeight, at: tuple[int, int, int]) -> Tensor:
    return to_floats(weight.read(*at), weight.dtype)


def test_tensors_are_stacked_and_cut(rng: torch.Generator) -> None:
    several = [torch.randn(N, K, generator=rng) for _ in range(3)]
    assert torch.equal(blocks(several), torch.stack(several))
    assert torch.equal(part(several[0], 5, 9), several[0][5:14])
