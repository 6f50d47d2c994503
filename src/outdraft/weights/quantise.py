"""Int8 weights with one scale an output channel, in the compressed-tensors layout.

Here: quantising, dequantising and the `quantization_config` that declares the layout. Not here:
kernels that compute with int8 (ops), and choosing what to quantise (the caller's list of names).

Layout (vllm-project/compressed-tensors, format "int-quantized", strategy "channel", symmetric):
`X.weight` int8 [out, in] and `X.weight_scale` [out, 1]; weight ~ int8 * scale.

Shape suffixes: N output channels (rows), K inputs (columns).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from outdraft.errors import ModelError

SCALE_SUFFIX = "_scale"  # of the weight's full name: `q_proj.weight` has `q_proj.weight_scale`
INT8_LIMIT = 127  # -128 is left out so that the range is symmetric
_CLIP_STEPS = 32
_LOWEST_CLIP = 0.7


def int8_channel_config(ignore: Iterable[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of config.json for weights of this layout.

    Args:
        ignore: names of modules that are left in floating point.
    """
    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
        "group_size": None,
    }
    group = {
        "targets": ["Linear", "Embedding"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def is_int8_channel(config: Mapping[str, Any]) -> bool:
    """True when a model's config declares this layout, False when it declares no quantisation.

    Raises:
        ModelError: another quantisation is declared.
    """
    declared = config.get("quantization_config")
    if declared is None:
        return False
    if not isinstance(declared, Mapping):
        raise ModelError("quantization_config is not a JSON object", "download config.json again")
    _require("quant_method", declared.get("quant_method"), "compressed-tensors")
    _require("format", declared.get("format"), "int-quantized")
    groups = declared.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError("quantization_config has no config_groups", "download config.json again")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise ModelError(f"{name} of quantization_config has no weights", "use another version")
        for key, value in {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
        }.items():
            _require(f"{name}.weights.{key}", weights.get(key), value)
    return True


def _require(key: str, found: object, supported: object) -> None:
    if found != supported:
        raise ModelError(
            f"weights quantised with {key} {found!r} are not supported yet",
            f"only {supported!r} is; use the bf16 version of the model",
        )


def quantise_int8_channel(
    tensors: Mapping[str, torch.Tensor], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """`tensors` with each of `names` (floating, [N, K]) as int8 and an fp32 scale [N, 1]."""
    result = dict(tensors)
    for name in names:
        result[name], result[name + SCALE_SUFFIX] = quantise_rows(tensors[name])
    return result


def quantise_rows(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 [N, K] and fp32 scales [N, 1] with the least squared error per row.

    The scale is searched among absmax/127 times factors from 0.7 to 1: clipping a row's few largest
    weights a little often costs less than the coarser grid that they would force on all others.
    """
    weight_NK = weight_NK.float()
    widest_N1 = weight_NK.abs().amax(dim=1, keepdim=True) / INT8_LIMIT
    widest_N1 = widest_N1.clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros
    best_N1 = widest_N1
    best_error_N1 = torch.full_like(widest_N1, torch.inf)
    for factor in torch.linspace(1.0, _LOWEST_CLIP, _CLIP_STEPS).tolist():
        scale_N1 = widest_N1 * factor
        restored_NK = _round(weight_NK, scale_N1) * scale_N1
        error_N1 = (restored_NK - weight_NK).square().sum(dim=1, keepdim=True)
        better_N1 = error_N1 < best_error_N1
        best_N1 = torch.where(better_N1, scale_N1, best_N1)
        best_error_N1 = torch.where(better_N1, error_N1, best_error_N1)
    return _round(weight_NK, best_N1).to(torch.int8), best_N1


def _round(weight_NK: torch.Tensor, scale_N1: torch.Tensor) -> torch.Tensor:
    return (weight_NK / scale_N1).round().clamp(-INT8_LIMIT, INT8_LIMIT)


def dequantise_rows(
    int8_NK: torch.Tensor, scale_N1: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The weights [N, K] in `dtype`: multiplied in fp32, rounded once."""
    return (int8_NK.float() * scale_N1.float()).to(dtype)
