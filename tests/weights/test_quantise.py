"""Int8 per output channel: the error per row, the layout, and what is declared."""

import copy
from typing import Any

import pytest
import torch

from outdraft.errors import ModelError
from outdraft.weights.quantise import (
    dequantise_rows,
    int8_channel_config,
    is_int8_channel,
    quantise_int8_channel,
    quantise_rows,
)


def squared_error(weight: torch.Tensor, int8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (int8.double() * scale.double() - weight.double()).square().sum(dim=1)


@pytest.mark.parametrize("shape", [(5, 64), (3, 1), (17, 333)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_is_worse_than_with_the_plain_absmax_scale(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    int8, scale = quantise_rows(weight)
    assert (int8.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (int8.shape, scale.shape) == (weight.shape, (shape[0], 1))
    assert int8.min() >= -127
    absmax = weight.float().abs().amax(dim=1, keepdim=True) / 127
    plain = (weight.float() / absmax).round().to(torch.int8)
    error = squared_error(weight, int8, scale)
    assert (error <= squared_error(weight, plain, absmax)).all()
    assert (error <= (absmax.double().square() * shape[1] / 4).squeeze(1)).all()


def test_an_outlier_is_clipped_where_that_helps() -> None:
    weight = torch.randn(1, 4096).clamp(-2, 2)
    weight[0, 7] = 2.3
    int8, scale = quantise_rows(weight)
    assert scale.item() < weight.abs().max().item() / 127
    assert int8[0, 7] == 127


def test_rows_do_not_depend_on_each_other() -> None:
    weight = torch.rand(9, 4096) * 2 - 1
    weight[:, 7] = torch.linspace(1, 1.2, 9)  # each row is best clipped at another place
    weight *= torch.logspace(-6, 3, 9)[:, None]
    int8, scale = quantise_rows(weight)
    assert len(set((scale.squeeze(1) / weight.abs().amax(dim=1)).tolist())) > 3
    for row in range(9):
        alone = quantise_rows(weight[row : row + 1])
        assert torch.equal(alone[0][0], int8[row]) and torch.equal(alone[1][0], scale[row])


def test_a_row_of_zeros_stays_zero() -> None:
    int8, scale = quantise_rows(torch.zeros(2, 3))
    assert dequantise_rows(int8, scale, torch.bfloat16).tolist() == [[0.0] * 3] * 2


def test_only_the_named_tensors_change() -> None:
    tensors = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(3, 4)}
    result = quantise_int8_channel(tensors, ["a.weight"])
    assert sorted(result) == ["a.weight", "a.weight_scale", "b.weight"]
    assert result["b.weight"] is tensors["b.weight"]
    assert tensors["a.weight"].dtype == torch.float32
    restored = dequantise_rows(result["a.weight"], result["a.weight_scale"], torch.float32)
    assert (restored - tensors["a.weight"]).abs().max() < tensors["a.weight"].abs().max() * 0.3


def test_the_declaration_is_understood() -> None:
    assert is_int8_channel({"quantization_config": int8_channel_config(ignore=["lm_head"])})
    assert not is_int8_channel({})
    assert not is_int8_channel({"quantization_config": None})


WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("quant_method",), "gptq"),
        (("format",), "pack-quantized"),
        ((*WEIGHTS, "num_bits"), 4),
        ((*WEIGHTS, "type"), "float"),
        ((*WEIGHTS, "symmetric"), False),
        ((*WEIGHTS, "strategy"), "group"),
        (("config_groups",), {}),
        (("config_groups",), {"group_0": None}),
        (("config_groups",), {"group_0": {"weights": None}}),
        ((), "int8"),
    ],
)
def test_other_quantisation_is_refused_by_name(path: tuple[str, ...], value: object) -> None:
    config: dict[str, Any] = {"quantization_config": copy.deepcopy(int8_channel_config())}
    *parents, last = ("quantization_config", *path)
    place = config
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(ModelError) as caught:
        is_int8_channel(config)
    assert caught.value.hint
    if isinstance(value, str) and path:
        assert "not supported yet" in caught.value.message
        assert repr(value) in caught.value.message
