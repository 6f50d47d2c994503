"""Weights on a GPU: bf16 as they are, 8 and 4 bits in tiles of 64 outputs and 128 inputs.

Here: packing, range by range of rows, and what it takes. Not here: the kernels (linears.py).

Shapes: N outputs, K inputs, E experts, C groups of inputs that share a scale, W words a row of a
tile.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outdraft.ops.packed import Format
from outdraft.ops.stored import CHUNK_BYTES, Int4Rows, Int8Rows, Rows, StoredWeight, to_floats

TILE_N, TILE_K = 64, 128
GROUP = 32
BITS: dict[Format, int] = {"bf16": 16, "w8": 8, "w4": 4}


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """[N, K] or [E, N, K] on the device.

    Attributes:
        data: bf16 as it is; else int16 [N / 64, K / 128, 64, W], rounded up and padded with zeros:
            word j of a row holds inputs j, j + W, … of the tile, lowest bits first, as numbers
            from 0 (8 bits: less 128, 4 bits: less 8).
        scales: fp32 [N] of 8 bits; of 4 bits int32 [2 K / 128, N], N rounded up, in each two of
            bf16 for 32 inputs, the first in the low half.
        bits: 16, 8 or 4.
        shape: without padding.
    """

    data: Tensor
    scales: Tensor | None
    bits: int
    shape: tuple[int, ...]

    @property
    def n(self) -> int:
        """Outputs."""
        return self.shape[-2]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.shape[-1]

    @property
    def n_blocks(self) -> int:
        """Experts, or 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def k_tiles(self) -> int:
        """Tiles along K."""
        return -(-self.k // TILE_K)

    @property
    def n_bytes(self) -> int:
        """Memory of all parts."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def part(self, block: int) -> "CudaWeight":
        """One expert."""
        assert self.bits == 16
        return replace(self, data=self.data[block], shape=self.shape[1:])


def packed_bytes(shape: tuple[int, ...], format: Format) -> int:
    """`CudaWeight.n_bytes` of a weight that does not exist yet."""
    n, k = shape[-2:]
    if format == "bf16" or len(shape) == 3:
        return 2 * n * k * (shape[0] if len(shape) == 3 else 1)
    tiles = -(-n // TILE_N) * -(-k // TILE_K)
    if format == "w8":
        return tiles * TILE_N * TILE_K + 4 * n
    return tiles * TILE_N * TILE_K // 2 + 8 * _scales_n(n) * -(-k // TILE_K)


def empty_weight(shape: tuple[int, ...], format: Format, device: torch.device) -> CudaWeight:
    """A weight of zeros' size whose padding counts as zero; `put` fills it."""
    if format == "bf16" or len(shape) == 3:
        return CudaWeight(torch.empty(shape, dtype=torch.bfloat16, device=device), None, 16, shape)
    n, k = shape
    n_tiles, n_blocks, bits = -(-n // TILE_N), -(-k // TILE_K), BITS[format]
    zero = {8: 0x8080 - 0x10000, 4: 0x8888 - 0x10000}[bits]
    words = (n_tiles, n_blocks, TILE_N, 8 * bits)
    data = torch.full(words, zero, dtype=torch.int16, device=device)
    if bits == 8:
        return CudaWeight(data, torch.zeros(n, device=device), 8, shape)
    scales = torch.zeros(2 * n_blocks, _scales_n(n), dtype=torch.int32, device=device)
    return CudaWeight(data, scales, 4, shape)


def pack(weight: Tensor | StoredWeight, format: Format, device: torch.device) -> CudaWeight:
    """A weight on the device; a `StoredWeight` is read and packed in ranges of rows.

    Rows that are quantised as `format` stores them keep their integers and scales; others are
    dequantised and rounded anew. Weights of three dimensions, and of 4 bits with zero-points, are
    bf16.
    """
    if isinstance(weight, StoredWeight):
        shape = tuple(weight.shape)
        if weight.zero_points:
            format = "bf16"
        packed, read = empty_weight(shape, format, device), weight.read
        row_bytes = 4 * shape[-1]
    else:
        shape = tuple(weight.shape)
        packed = empty_weight(shape, format, device)
        whole = weight if weight.ndim == 3 else weight[None]

        def read(block: int, first: int, count: int) -> Rows:
            return whole[block, first : first + count]

        row_bytes = 4 * shape[-1]
    step = max(1, 8 * CHUNK_BYTES // row_bytes)
    for block in range(shape[0] if len(shape) == 3 else 1):
        into = packed.part(block) if len(shape) == 3 else packed
        for first in range(0, shape[-2], step):
            put(into, first, read(block, first, min(step, shape[-2] - first)))
    return packed


def put(weight: CudaWeight, first: int, rows: Rows) -> None:
    """Fill rows `first` onwards."""
    device = weight.data.device
    if weight.bits == 16:
        floats_NK = to_floats(_on(rows, device), torch.bfloat16)
        weight.data[first : first + floats_NK.shape[0]].copy_(floats_NK)
        return
    assert weight.scales is not None
    if weight.bits == 8:
        codes_NK, scales_N = _eight(_on(rows, device))
        weight.scales[first : first + codes_NK.shape[0]] = scales_N
        _put_codes(weight, first, codes_NK.to(torch.int32) + 128)
        return
    codes_NK, scales_NC = _four(_on(rows, device))
    scales_NC = torch.nn.functional.pad(scales_NC, (0, -scales_NC.shape[1] % 4))
    halves = scales_NC.view(torch.int16).to(torch.int32).view(len(scales_NC), -1, 2)
    words = (halves[..., 0] & 0xFFFF) | (halves[..., 1] << 16)
    weight.scales[:, first : first + codes_NK.shape[0]] = words.T
    _put_codes(weight, first, codes_NK.to(torch.int32))


def unpack(weight: CudaWeight) -> Tensor:
    """The values, fp32 [N, K]."""
    n, k = weight.shape
    if weight.bits == 16:
        return weight.data.float()
    assert weight.scales is not None
    words = weight.data.to(torch.int32) & 0xFFFF
    mask = (1 << weight.bits) - 1
    planes = [(words >> at) & mask for at in range(0, 16, weight.bits)]
    codes = torch.stack(planes, dim=3).flatten(3)  # [N / 64, K / 128, 64, 128]
    values_NK = codes.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k].float() - (mask + 1) // 2
    if weight.bits == 8:
        return values_NK * weight.scales[:, None]
    words = weight.scales[:, :n].T
    halves = torch.stack((words << 16, words >> 16 << 16), dim=2)
    scales_NC = halves.contiguous().view(torch.float32).flatten(1)
    return (values_NK * scales_NC.repeat_interleave(GROUP, dim=1)[:, :k]).bfloat16().float()


def _scales_n(n: int) -> int:
    """Outputs with scales: a program may read those of two tiles."""
    return -(-n // (2 * TILE_N)) * 2 * TILE_N


def _on(rows: Rows, device: torch.device) -> Rows:
    if isinstance(rows, Int8Rows):
        return Int8Rows(rows.data_NK.to(device), rows.scales_N.to(device))
    if isinstance(rows, Int4Rows):
        zeros = None if rows.zeros_NC is None else rows.zeros_NC.to(device)
        return Int4Rows(rows.codes_NK.to(device), rows.scales_NC.to(device), zeros)
    return rows.to(device)


def _eight(rows: Rows) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and scales [N]."""
    if isinstance(rows, Int8Rows):
        return rows.data_NK, rows.scales_N.float()
    floats_NK = to_floats(rows, torch.float32)
    scales_N = floats_NK.abs().amax(1).clamp(min=1e-30) / 127
    return (floats_NK / scales_N[:, None]).round().clamp(-127, 127).to(torch.int8), scales_N


def _four(rows: Rows) -> tuple[Tensor, Tensor]:
    """0 .. 15 [N, K] and bf16 scales [N, C], one for 32."""
    if isinstance(rows, Int4Rows) and rows.zeros_NC is None:
        k = rows.codes_NK.shape[1]
        group = k // rows.scales_NC.shape[1]
        if group % GROUP == 0:
            return rows.codes_NK, rows.scales_NC.bfloat16().repeat_interleave(group // GROUP, dim=1)
    floats_NK = to_floats(rows, torch.float32)
    n, k = floats_NK.shape
    padded = torch.nn.functional.pad(floats_NK, (0, -k % GROUP)).view(n, -1, GROUP)
    scales_NC = (padded.abs().amax(2) / 7).clamp(min=1e-30).bfloat16()
    codes = (padded / scales_NC.float()[..., None]).round().clamp(-7, 7) + 8
    return codes.view(n, -1)[:, :k].to(torch.uint8), scales_NC


def _put_codes(weight: CudaWeight, first: int, codes_NK: Tensor) -> None:
    """int32 numbers from 0 into the words of their tiles, row by row."""
    n, k = codes_NK.shape
    bits = weight.bits
    codes_NK = torch.nn.functional.pad(codes_NK, (0, -k % TILE_K), value=1 << (bits - 1))
    planes = codes_NK.view(n, weight.k_tiles, 16 // bits, 8 * bits)
    words = planes[:, :, 0]
    for i in range(1, 16 // bits):
        words = words | (planes[:, :, i] << (bits * i))
    words = (words - ((words & 0x8000) << 1)).to(torch.int16)
    rows_N = torch.arange(first, first + n, device=words.device)
    weight.data[rows_N // TILE_N, :, rows_N % TILE_N] = words
