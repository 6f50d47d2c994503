"""Packed int4 weights as GPTQ, AWQ and compressed-tensors store them.

Here: what a config declares, finding a weight's parts, unpacking a range of rows. Not here: other
quantisations (quantise.py) and the kernels' own layout (ops/packed.py).

All three put eight 4-bit numbers into an int32, weight = (number - zero-point) * scale:

- compressed-tensors "pack-quantized": `weight_packed` [N, K/8], eight inputs from the lowest bits
  up, stored + 8; `weight_scale` [N, C]; with zero-points `weight_zero_point` [N/8, C], packed along
  the rows. `weight_shape` repeats (N, K).
- GPTQ: `qweight` [K/8, N], eight inputs from the lowest bits up; `scales` [C, N]; `qzeros`
  [C, N/8], one less than the zero-point (checkpoint_format "gptq_v2": the zero-point itself);
  `g_idx` [K] names the group of each input.
- AWQ "gemm": `qweight` [K, N/8], eight rows in the order 0 2 4 6 1 3 5 7 from the lowest bits up;
  `scales` [C, N]; `qzeros` [C, N/8] in the same order.

Shapes: N output rows, K inputs, C groups of inputs that share a scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from outdraft.errors import ModelError, WeightsError
from outdraft.ops.packed import GROUP_SIZES
from outdraft.ops.stored import Int4Rows
from outdraft.weights.checkpoint import Checkpoint

Method = Literal["compressed-tensors", "gptq", "awq"]

_PER_WORD = 8
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ELSE = "use another quantised version, or the bf16 version of the model"


@dataclass(frozen=True, slots=True)
class Int4Scheme:
    """What a config declares. `zero_less_one`: zero-points are stored less one (GPTQ)."""

    method: Method
    group: int
    zero_points: bool
    zero_less_one: bool = False


def int4_scheme(config: Mapping[str, Any]) -> Int4Scheme | None:
    """The packed int4 layout that a model's config declares, None when it declares none of them.

    Raises:
        ModelError: one of these layouts, in a variant that cannot be read.
    """
    declared = config.get("quantization_config")
    if not isinstance(declared, Mapping):
        return None
    method = declared.get("quant_method")
    if method == "compressed-tensors" and declared.get("format") == "pack-quantized":
        return _compressed_tensors(declared)
    if method == "gptq":
        _require("bits", declared.get("bits"), (4,))
        group = _group(declared.get("group_size"))
        sym, version = declared.get("sym"), declared.get("checkpoint_format", "gptq")
        _require("sym", sym, (True, False))
        _require("checkpoint_format", version, ("gptq", "gptq_v2"))
        return Int4Scheme("gptq", group, not sym, version == "gptq")
    if method == "awq":
        _require("bits", declared.get("bits", declared.get("w_bit")), (4,))
        group = _group(declared.get("group_size", declared.get("q_group_size")))
        _require("zero_point", declared.get("zero_point"), (True,))
        version = declared.get("version")
        _require("version", version.lower() if isinstance(version, str) else version, ("gemm",))
        return Int4Scheme("awq", group, True)
    return None


def _compressed_tensors(declared: Mapping[str, Any]) -> Int4Scheme:
    groups = declared.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ModelError("int4 weights with several config_groups are not supported", _ELSE)
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ModelError("quantization_config has no weights", "download config.json again")
    _require("num_bits", weights.get("num_bits"), (4,))
    _require("type", weights.get("type"), ("int",))
    _require("strategy", weights.get("strategy"), ("group",))
    _require("actorder", weights.get("actorder"), (None, False, "static", "weight"))
    symmetric = weights.get("symmetric")
    _require("symmetric", symmetric, (True, False))
    return Int4Scheme("compressed-tensors", _group(weights.get("group_size")), not symmetric)


def _group(size: object) -> int:
    _require("group_size", size, GROUP_SIZES)
    assert isinstance(size, int)
    return size


def _require(key: str, found: object, supported: tuple[object, ...]) -> None:
    # JSON's true is equal to 1 in Python
    if not any(found == value and type(found) is type(value) for value in supported):
        listed = " or ".join(str(value) for value in supported)
        raise ModelError(
            f"int4 weights with {key} {found!r:.40} are not supported, only {listed}", _ELSE
        )


@dataclass(slots=True)
class Int4Source:
    """The parts of one weight [N, K] in a checkpoint; `problems` are what is wrong with them."""

    checkpoint: Checkpoint
    scheme: Int4Scheme
    stem: str
    shape: tuple[int, int]
    names: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def n_params(self) -> int:
        """Weights, not words."""
        return math.prod(self.shape)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.scheme.group

    @property
    def zero_points(self) -> bool:
        """Whether groups have zero-points of their own."""
        return self.scheme.zero_points

    def read(self, block: int, first: int, count: int) -> Int4Rows:
        """Rows `first` onwards; `block` is 0.

        Raises:
            WeightsError: order of activations (`g_idx`), or zero-points that are not what the
                config says.
        """
        assert block == 0
        if self.scheme.method == "compressed-tensors":
            rows = self._read_compressed(first, count)
        else:
            rows = self._read_columns(first, count)
        if not bool(torch.isfinite(rows.scales_NC).all()):
            raise WeightsError(f"{self.stem}: a scale is not finite", _ELSE)
        return rows

    def _read_compressed(self, first: int, count: int) -> Int4Rows:
        get = self.checkpoint
        codes = _unpack(get.rows(self.stem + "weight_packed", first, count), dim=1)
        scales = get.rows(self.stem + "weight_scale", first, count).float()
        zeros = None
        if self.zero_points:
            packed = get.get(self.stem + "weight_zero_point")
            zeros = _unpack(packed, dim=0)[first : first + count]
        return Int4Rows(codes[:, : self.shape[1]].contiguous(), scales, zeros)

    def _read_columns(self, first: int, count: int) -> Int4Rows:
        """GPTQ and AWQ: outputs are columns, so all of the weight's words are read."""
        part, awq = self.checkpoint.get, self.scheme.method == "awq"
        columns = slice(first, first + count)
        if awq:
            words = slice(first // _PER_WORD, -(-(first + count) // _PER_WORD))
            inside = slice(first % _PER_WORD, first % _PER_WORD + count)
            codes_KN = _unpack(part(self.stem + "qweight")[:, words], 1, _AWQ_ORDER)[:, inside]
        else:
            self._check_order()
            codes_KN = _unpack(part(self.stem + "qweight")[:, columns], dim=0)
        order = _AWQ_ORDER if awq else tuple(range(_PER_WORD))
        zeros_CN = _unpack(part(self.stem + "qzeros"), 1, order)[:, columns]
        if self.scheme.zero_less_one:
            if bool((zeros_CN == 15).any()):
                raise WeightsError(f"{self.stem}qzeros: a zero-point of 16 has no 4 bits", _ELSE)
            zeros_CN = zeros_CN + 1
        if not self.zero_points and not bool((zeros_CN == 8).all()):
            raise WeightsError(
                f"{self.stem}qzeros: zero-points differ from 8, but config.json says sym", _ELSE
            )
        scales_CN = part(self.stem + "scales")[:, columns].float()
        zeros = zeros_CN.T.contiguous() if self.zero_points else None
        return Int4Rows(codes_KN.T.contiguous(), scales_CN.T.contiguous(), zeros)

    def _check_order(self) -> None:
        name = self.stem + "g_idx"
        if name not in self.names:
            return
        plain = torch.arange(self.shape[1]) // self.group
        if not torch.equal(self.checkpoint.get(name).long(), plain):
            raise WeightsError(
                f"{name}: inputs are in the order of their activations (desc_act), "
                "which is not supported",
                _ELSE,
            )


def find_int4(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], scheme: Int4Scheme
) -> Int4Source | None:
    """The parts of the weight `name` (in the file's spelling, ending in "weight"), checked."""
    stem = name.removesuffix("weight")
    main = "weight_packed" if scheme.method == "compressed-tensors" else "qweight"
    if stem == name or stem + main not in checkpoint:
        return None
    n, k = shape
    source = Int4Source(checkpoint, scheme, stem, shape)
    if k % scheme.group or n % _PER_WORD:
        source.problems.append(f"{stem}{main} is [{n}, {k}] in groups of {scheme.group}")
    groups, integer = k // scheme.group, (torch.int32,)
    floating = (torch.float16, torch.bfloat16, torch.float32)
    parts: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
    if scheme.method == "compressed-tensors":
        parts = {main: ((n, k // _PER_WORD), integer), "weight_scale": ((n, groups), floating)}
        if scheme.zero_points:
            parts["weight_zero_point"] = ((n // _PER_WORD, groups), integer)
        extra = {"weight_shape": ((2,), (torch.int64, torch.int32))}
    else:
        words = (k, n // _PER_WORD) if scheme.method == "awq" else (k // _PER_WORD, n)
        parts = {
            main: (words, integer),
            "qzeros": ((groups, n // _PER_WORD), integer),
            "scales": ((groups, n), floating),
        }
        extra = {"g_idx": ((k,), (torch.int32, torch.int64))} if scheme.method == "gptq" else {}
    parts |= {part: kind for part, kind in extra.items() if stem + part in checkpoint}
    for part, (wanted, dtypes) in parts.items():
        _check_part(source, stem + part, wanted, dtypes)
    return source


def _check_part(
    source: Int4Source, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if name not in source.checkpoint:
        source.problems.append(f"{name} is not there")
        return
    source.names.append(name)
    spec = source.checkpoint.spec(name)
    if spec.shape != shape:
        source.problems.append(f"{name} is {list(spec.shape)}, expected {list(shape)}")
    if spec.dtype not in dtypes:
        source.problems.append(f"{name} is {str(spec.dtype).removeprefix('torch.')}")


def _unpack(words: Tensor, dim: int, order: tuple[int, ...] = tuple(range(_PER_WORD))) -> Tensor:
    """uint8 numbers, eight along `dim` for each int32; nibble i goes to place `order[i]`."""
    nibbles = [((words >> (4 * i)) & 15).to(torch.uint8) for i in range(_PER_WORD)]
    places = [nibbles[order.index(place)] for place in range(_PER_WORD)]
    return torch.stack(places, dim + 1).flatten(dim, dim + 1)
