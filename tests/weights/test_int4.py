"""Packed int4 checkpoints: every layout unpacks to the numbers that were packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from outdraft.errors import ModelError, WeightsError
from outdraft.ops.packed import PackedLinear
from outdraft.ops.stored import Int4Rows, StoredWeight, pack_stored, stack, to_floats
from outdraft.weights.checkpoint import SINGLE_NAME, Checkpoint
from outdraft.weights.int4 import Int4Scheme, int4_scheme
from outdraft.weights.load import ExpectedTensor, Weights, load_tensors, open_tensors

N, K = 24, 256
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers along `dim` an int32, one by one: the plain version of packing."""
    moved = codes.movedim(dim, -1).long().unflatten(-1, (-1, 8))
    packed = torch.zeros(moved.shape[:-1], dtype=torch.int64)
    for nibble, place in enumerate(order):
        packed |= moved[..., place] << (4 * nibble)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def numbers(group: int, zero_points: bool, seed: int) -> Int4Rows:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=rng, dtype=torch.uint8)
    scales = torch.rand(N, K // group, generator=rng).half() + 0.01
    zeros = torch.randint(1, 16, (N, K // group), generator=rng, dtype=torch.uint8)
    return Int4Rows(codes, scales, zeros if zero_points else None)


def stored(rows: Int4Rows, scheme: Int4Scheme, stem: str) -> dict[str, Tensor]:
    codes, scales = rows.codes_NK, rows.scales_NC
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    zeros = zeros if rows.zeros_NC is None else rows.zeros_NC
    if scheme.method == "compressed-tensors":
        parts = {"weight_packed": words(codes, 1), "weight_scale": scales}
        parts["weight_shape"] = torch.tensor([N, K])
        if rows.zeros_NC is not None:
            parts["weight_zero_point"] = words(zeros, 0)
    elif scheme.method == "gptq":
        parts = {
            "qweight": words(codes.T, 0),
            "qzeros": words(zeros.T - int(scheme.zero_less_one), 1),
            "scales": scales.T.contiguous(),
            "g_idx": (torch.arange(K) // scheme.group).int(),
        }
    else:
        parts = {
            "qweight": words(codes.T, 1, AWQ_ORDER),
            "qzeros": words(zeros.T, 1, AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
    return {stem + name: part for name, part in parts.items()}


SCHEMES = [
    Int4Scheme("compressed-tensors", 32, False),
    Int4Scheme("compressed-tensors", 128, True),
    Int4Scheme("gptq", 128, False, zero_less_one=True),
    Int4Scheme("gptq", 64, True, zero_less_one=True),
    Int4Scheme("gptq", 32, True),
    Int4Scheme("awq", 128, True),
]


def opened(
    directory: Path, tensors: dict[str, Tensor], scheme: Int4Scheme, names: tuple[str, ...]
) -> Weights:
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    save_file(tensors | {f"{prefix}norm.weight": torch.ones(K)}, directory / SINGLE_NAME)
    expected = {f"{name}.weight": ExpectedTensor((N, K)) for name in names}
    expected["norm.weight"] = ExpectedTensor((K,))
    weights, _ = open_tensors(
        Checkpoint.open(directory),
        expected,
        [],
        prefixes=("model.",),
        dtype=torch.bfloat16,
        int4=scheme,
        stored=True,
    )
    return weights


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_numbers_scales_and_zero_points_come_back(tmp_path: Path, scheme: Int4Scheme) -> None:
    rows = {name: numbers(scheme.group, scheme.zero_points, i) for i, name in enumerate("qk")}
    tensors = {}
    for name, part in rows.items():
        tensors |= stored(part, scheme, f"model.{name}.")
    weights = opened(tmp_path, tensors, scheme, ("q", "k"))
    for name, part in rows.items():
        weight = weights[f"{name}.weight"]
        assert isinstance(weight, StoredWeight)
        for first, count in ((0, N), (3, 18)):
            read = weight.read(0, first, count)
            assert isinstance(read, Int4Rows)
            assert torch.equal(read.codes_NK, part.codes_NK[first : first + count])
            assert torch.equal(read.scales_NC.half(), part.scales_NC[first : first + count])
            if part.zeros_NC is not None:
                assert read.zeros_NC is not None
                assert torch.equal(read.zeros_NC, part.zeros_NC[first : first + count])
    whole = Int4Rows(
        torch.cat([part.codes_NK for part in rows.values()]),
        torch.cat([part.scales_NC for part in rows.values()]),
        torch.cat([part.zeros_NC for part in rows.values() if part.zeros_NC is not None])
        if scheme.zero_points
        else None,
    )
    packed = pack_stored(stack([weights["q.weight"], weights["k.weight"]]), "w4", candidates=4)
    direct = PackedLinear.empty("w4", 2 * N, K, group=scheme.group, zero_points=scheme.zero_points)
    direct.put_w4(whole.codes_NK, whole.scales_NC, whole.zeros_NC)
    for part_name in ("data", "scales", "zeros"):
        assert torch.equal(getattr(packed, part_name), getattr(direct, part_name))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantised_in_fp64(tmp_path: Path, scheme: Int4Scheme) -> None:
    rows = numbers(scheme.group, scheme.zero_points, 5)
    save_file(stored(rows, scheme, "q."), tmp_path / SINGLE_NAME)
    tensors, report = load_tensors(
        Checkpoint.open(tmp_path),
        {"q.weight": ExpectedTensor((N, K))},
        [],
        prefixes=(),
        dtype=torch.float32,
        int4=scheme,
    )
    zeros = torch.tensor(8.0) if rows.zeros_NC is None else rows.zeros_NC.double()
    group = torch.arange(K) // scheme.group
    expected = rows.codes_NK.double() - (zeros if zeros.ndim == 0 else zeros[:, group])
    expected *= rows.scales_NC.double()[:, group]
    torch.testing.assert_close(tensors["q.weight"].double(), expected, rtol=1e-6, atol=0)
    assert report.params_by_dtype == {"int4": N * K}
    assert torch.equal(to_floats(rows, torch.float32), tensors["q.weight"])


def test_order_of_activations_is_refused(tmp_path: Path) -> None:
    scheme = Int4Scheme("gptq", 64, False, zero_less_one=True)
    tensors = stored(numbers(64, False, 2), scheme, "q.")
    tensors["q.g_idx"] = tensors["q.g_idx"].flip(0).contiguous()
    weight = opened(tmp_path, tensors, scheme, ("q",))["q.weight"]
    assert isinstance(weight, StoredWeight)
    with pytest.raises(WeightsError, match="desc_act"):
        weight.read(0, 0, N)


def test_parts_of_a_wrong_shape_are_named(tmp_path: Path) -> None:
    scheme = Int4Scheme("awq", 64, True)
    tensors = stored(numbers(64, True, 2), scheme, "q.")
    tensors["q.scales"] = tensors["q.scales"][:, :-1].contiguous()
    del tensors["q.qzeros"]
    with pytest.raises(WeightsError, match=r"q\.qzeros is not there; q\.scales is \[4, 23\]"):
        opened(tmp_path, tensors, scheme, ("q",))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (None, None),
        (GPTQ, Int4Scheme("gptq", 128, False, True)),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, Int4Scheme("gptq", 128, False)),
        (AWQ, Int4Scheme("awq", 64, True)),
    ],
)
def test_declared(declared: Any, expected: Int4Scheme | None) -> None:
    assert int4_scheme({"quantization_config": declared}) == expected


@pytest.mark.parametrize(
    "change",
    [{"bits": 8}, {"bits": True}, {"group_size": -1}, {"group_size": "128"}, {"sym": None}],
)
def test_variants_that_cannot_be_read(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="not supported"):
        int4_scheme({"quantization_config": GPTQ | change})
