"""A weight that is still in its file: read a range of rows at a time while it is packed.

Here: what a stored weight is, several as one, and packing one without ever holding all of it
unpacked. Not here: file formats (weights/) and the packed layout (ops/packed.py).

Shapes: N output rows, K inputs, E blocks (experts), C groups of inputs that share a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from outdraft.ops.packed import Format, PackedLinear

CHUNK_BYTES = 1 << 20
"""Most bytes of a weight, as the compute type, that are unpacked at once.

About three times as much is in memory: what is read, what it is joined to, and the last one."""

Form = Literal["float", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Rows int8 [N, K], -127..127, each with an fp32 scale [N]."""

    data_NK: Tensor
    scales_N: Tensor


@dataclass(frozen=True, slots=True)
class Int4Rows:
    """Rows uint8 [N, K], 0..15, with scales and zero-points (None: all 8) a group, [N, C]."""

    codes_NK: Tensor
    scales_NC: Tensor
    zeros_NC: Tensor | None


Rows = Tensor | Int8Rows | Int4Rows


def to_floats(rows: Rows, dtype: torch.dtype) -> Tensor:
    """The values [N, K]: multiplied in fp32, rounded once."""
    if isinstance(rows, Int8Rows):
        return (rows.data_NK.float() * rows.scales_N.float()[:, None]).to(dtype)
    if isinstance(rows, Int4Rows):
        n, k = rows.codes_NK.shape
        codes_NCG = rows.codes_NK.float().view(n, rows.scales_NC.shape[1], -1)
        zeros = 8.0 if rows.zeros_NC is None else rows.zeros_NC.float()[..., None]
        return ((codes_NCG - zeros) * rows.scales_NC.float()[..., None]).view(n, k).to(dtype)
    return rows.to(dtype)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight [N, K] or [E, N, K] in a file.

    Attributes:
        key: its name, unique within the model.
        dtype: compute type: what dequantised rows are rounded to.
        form: what `read` returns: a tensor, `Int8Rows` or `Int4Rows`.
        read: (block, first row, number of rows) -> rows.
        group: inputs that share a scale (int4), else 0.
        zero_points: int4 only: groups have zero-points of their own.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: Form
    read: Callable[[int, int, int], Rows]
    group: int = 0
    zero_points: bool = False

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        n, k = self.shape[-2:]
        return (self.shape[0] if self.ndim == 3 else 1, n, k)

    def floats(self) -> Tensor:
        """All of it, dequantised."""
        blocks = [
            to_floats(self.read(e, 0, self.sizes[1]), self.dtype) for e in range(self.sizes[0])
        ]
        return (torch.stack(blocks) if self.ndim == 3 else blocks[0]).contiguous()

    def take(self, ids_CN: Tensor) -> "StoredWeight":
        """Rows `ids_CN` of a weight [V, K] as C blocks; the first read reads all of it at once."""
        assert self.ndim == 2
        kept: list[Rows] = []

        def read(block: int, first: int, count: int) -> Rows:
            if not kept:
                kept.append(self.read(0, 0, self.shape[0]))
            (whole,) = kept
            ids = ids_CN[block, first : first + count].long()
            if isinstance(whole, Int8Rows):
                return Int8Rows(whole.data_NK[ids], whole.scales_N[ids])
            if isinstance(whole, Int4Rows):
                zeros = None if whole.zeros_NC is None else whole.zeros_NC[ids]
                return Int4Rows(whole.codes_NK[ids], whole.scales_NC[ids], zeros)
            return whole[ids]

        shape = (*ids_CN.shape, self.shape[1])
        key = f"{self.key}[blocks]"
        return StoredWeight(key, shape, self.dtype, self.form, read, self.group, self.zero_points)


def reorder(weight: Tensor | StoredWeight, ids_N: Tensor) -> Any:
    """Rows `ids_N` of a weight [N, K] as one of its kind."""
    if isinstance(weight, Tensor):
        return weight[ids_N]
    taken = weight.take(ids_N[None])
    return replace(taken, shape=taken.shape[1:], key=f"{weight.key}[reordered]")


def stack(parts: Sequence[Tensor | StoredWeight]) -> Any:
    """Weights [N, K] of the same K as one of their kind, the rows of the first on top."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    stored = [part for part in parts if isinstance(part, StoredWeight)]
    assert len(stored) == len(parts) and all(part.ndim == 2 for part in stored)
    first = stored[0]
    kinds = {(part.form, part.group, part.zero_points) for part in stored}
    form: Form = first.form if len(kinds) == 1 else "float"

    def read(block: int, start: int, count: int) -> Rows:
        pieces: list[Rows] = []
        for part in stored:
            low, high = max(start, 0), min(start + count, part.shape[0])
            if low < high:
                rows = part.read(block, low, high - low)
                pieces.append(rows if form == part.form != "float" else to_floats(rows, part.dtype))
            start -= part.shape[0]
        return _joined(pieces)

    shape = (sum(part.shape[0] for part in stored), first.shape[1])
    key = "+".join(part.key for part in stored)
    if form == "float":
        return StoredWeight(key, shape, first.dtype, form, read)
    return StoredWeight(key, shape, first.dtype, form, read, first.group, first.zero_points)


def part(weight: Tensor | StoredWeight, first: int, count: int) -> Any:
    """`count` rows of a weight [N, K] from `first` on, as one of its kind."""
    if isinstance(weight, Tensor):
        return weight[first : first + count]
    whole = weight

    def read(block: int, start: int, n: int) -> Rows:
        return whole.read(block, first + start, n)

    key = f"{whole.key}[{first}:{first + count}]"
    return replace(whole, shape=(count, whole.shape[1]), key=key, read=read)


def blocks(parts: Sequence[Tensor | StoredWeight]) -> Any:
    """Weights [N, K] of one shape as one [E, N, K] of their kind."""
    tensors = [p for p in parts if isinstance(p, Tensor)]
    if len(tensors) == len(parts):
        return torch.stack(tensors)
    stored = [p for p in parts if isinstance(p, StoredWeight)]
    first = stored[0]
    assert len(stored) == len(parts) and all(p.shape == first.shape for p in stored)
    alike = len({(p.form, p.group, p.zero_points) for p in stored}) == 1

    def read(block: int, start: int, count: int) -> Rows:
        rows = stored[block].read(0, start, count)
        return rows if alike else to_floats(rows, first.dtype)

    shape, key = (len(stored), *first.shape), f"{first.key}[{len(stored)} blocks]"
    if alike:
        return replace(first, shape=shape, key=key, read=read)
    return StoredWeight(key, shape, first.dtype, "float", read)


def _joined(pieces: list[Rows]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    floats = [p for p in pieces if isinstance(p, Tensor)]
    eights = [p for p in pieces if isinstance(p, Int8Rows)]
    fours = [p for p in pieces if isinstance(p, Int4Rows)]
    if floats:
        return torch.cat(floats)
    if eights:
        return Int8Rows(
            torch.cat([p.data_NK for p in eights]), torch.cat([p.scales_N for p in eights])
        )
    zeros = [p.zeros_NC for p in fours if p.zeros_NC is not None]
    return Int4Rows(
        torch.cat([p.codes_NK for p in fours]),
        torch.cat([p.scales_NC for p in fours]),
        torch.cat(zeros) if zeros else None,
    )


Packer = Callable[[StoredWeight, Format, int], PackedLinear]
"""Packs a weight in a format, trying a number of scales, or has it packed already."""


def pack_stored(weight: StoredWeight, format: Format, candidates: int) -> PackedLinear:
    """Pack a weight chunk by chunk.

    Rows that are quantised as `format` stores them are taken over, integers and scales as they
    are; others are dequantised and rounded anew (`PackedLinear.put_floats`).
    """
    n_blocks, n, k = weight.sizes
    as_it_is = _is_taken_over(weight, format)
    group, zero_points = packed_groups(weight, format)
    packed = PackedLinear.empty(
        format, n, k, group=group, n_blocks=n_blocks, zero_points=zero_points
    )
    chunk = max(1, CHUNK_BYTES // (k * weight.dtype.itemsize))
    for block in range(n_blocks):
        for first in range(0, n, chunk):
            rows = weight.read(block, first, min(chunk, n - first))
            if as_it_is and isinstance(rows, Int8Rows):
                packed.put_w8(rows.data_NK, rows.scales_N, first=first, block=block)
            elif as_it_is and isinstance(rows, Int4Rows):
                packed.put_w4(
                    rows.codes_NK, rows.scales_NC, rows.zeros_NC, first=first, block=block
                )
            else:
                floats = to_floats(rows, weight.dtype)
                if floats.dtype not in (torch.float32, torch.bfloat16):
                    floats = floats.float()
                packed.put_floats(floats, first=first, block=block, candidates=candidates)
    return packed


def packed_groups(weight: StoredWeight, format: Format) -> tuple[int, bool]:
    """Inputs that share a scale once `weight` is packed (w4), and whether it has zero-points."""
    as_it_is = _is_taken_over(weight, format)
    return weight.group if as_it_is and weight.group else 32, as_it_is and weight.zero_points


def _is_taken_over(weight: StoredWeight, format: Format) -> bool:
    return (weight.form, format) in (("int8", "w8"), ("int4", "w4"))
