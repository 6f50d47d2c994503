"""Plain PyTorch operations for decoding: the specification that fast kernels are tested against.

They are row-invariant by construction. A BLAS picks its kernel, and with it the order of its adds,
by the shape of the call, so every matrix product here is made of calls of one shape: rows go in
tiles of a fixed number of rows (padded with zeros), keys in pages aligned to their absolute
position, and sums over pages run in page order, where an unseen page adds exact zeros. What is left
to trust is that inside one such call a row's bits do not depend on the slot it sits in;
`rows_are_independent` measures that for the shapes of a model, and where it fails the tile is
one row.

Shapes: see ops/base.py. Not here: gradients (ops/batched.py), memory management (cache/).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import PAGE_SLOTS, PagedRows

TILE_ROWS = 8
_VECTOR = 64  # elements: a multiple of what any vectorised loop takes at once
_SERIAL = 32768  # elements: PyTorch splits longer loops over threads, wherever that falls


@dataclass(frozen=True, slots=True)
class ReferenceOps:
    """Row-invariant operations. `tile` is the number of rows of every matrix product."""

    tile: int = TILE_ROWS

    def linear(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        """See `Ops.linear`."""
        n_rows = x_TK.shape[0]
        if n_rows == self.tile:
            return F.linear(x_TK, weight_NK)
        padded = pad_rows(x_TK, self.tile)
        tiles = [F.linear(tile, weight_NK) for tile in torch.split(padded, self.tile)]
        return torch.cat(tiles)[:n_rows]

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return _rms_norm_fp32(x_TK, weight_K, eps).to(x_TK.dtype)

    def norm_rope(
        self,
        x_THD: Tensor,
        weight_D: Tensor | None,
        cos_TD: Tensor | None,
        sin_TD: Tensor | None,
        eps: float,
    ) -> Tensor:
        """See `Ops.norm_rope`."""
        y = _rms_norm_fp32(x_THD, weight_D, eps)
        if cos_TD is not None and sin_TD is not None:
            half = y.shape[-1] // 2
            turned = torch.cat((-y[..., half:], y[..., :half]), dim=-1)
            y = y * cos_TD[:, None] + turned * sin_TD[:, None]
        return y.to(x_THD.dtype)

    def gated_gelu(self, gate_up_TK: Tensor) -> Tensor:
        """See `Ops.gated_gelu`."""
        gate, up = gate_up_TK.chunk(2, dim=-1)
        return self.gelu(gate) * up

    def gelu(self, x_TK: Tensor) -> Tensor:
        """gelu with the tanh approximation.

        PyTorch computes whole vectors with one formula and what is left over with another, whose
        low bits differ; so the call is made of whole vectors, in lengths that run on one thread.
        """
        flat = x_TK.reshape(-1)
        n = flat.shape[0]
        parts = torch.split(pad_rows(flat, _VECTOR), _SERIAL)
        done = [F.gelu(part, approximate="tanh") for part in parts]
        whole = done[0] if len(done) == 1 else torch.cat(done)
        return whole[:n].view(x_TK.shape)

    def attention(
        self, q_THD: Tensor, k_PGSD: Tensor, v_PGSD: Tensor, rows: PagedRows, scale: float
    ) -> Tensor:
        """See `Ops.attention`. Scores and sums are fp32 whatever the inputs are."""
        keys = _pages(k_PGSD, rows.pages)
        values = _pages(v_PGSD, rows.pages)
        n_rows = q_THD.shape[0]
        padded = pad_rows(q_THD.float(), self.tile)
        out = [
            self._attend_tile(tile, keys, values, rows, index, scale)
            for index, tile in enumerate(torch.split(padded, self.tile))
        ]
        return (out[0] if len(out) == 1 else torch.cat(out))[:n_rows].to(q_THD.dtype)

    def _attend_tile(
        self,
        q_THD: Tensor,
        k_PGSD: Tensor,
        v_PGSD: Tensor,
        rows: PagedRows,
        tile: int,
        scale: float,
    ) -> Tensor:
        if tile not in rows.masks:
            rows.masks[tile] = _hidden_keys(rows, tile * self.tile, self.tile)
        hidden_PTS = rows.masks[tile]
        n_pages, n_kv, n_slots, dim = k_PGSD.shape
        n_rows, n_heads, _ = q_THD.shape
        group = n_heads // n_kv
        # Rows of one product: every query head of a key/value head, for the rows of the tile.
        q = q_THD.view(n_rows, n_kv, group, dim).permute(1, 0, 2, 3).reshape(n_kv, -1, dim)
        q = q.expand(n_pages, *q.shape).reshape(n_pages * n_kv, -1, dim)
        scores = torch.bmm(q, k_PGSD.reshape(-1, n_slots, dim).transpose(1, 2))
        if scale != 1.0:
            scores = scores * scale
        scores = scores.view(n_pages, n_kv, n_rows, group, n_slots)
        scores = scores.masked_fill(hidden_PTS[:, None, :, None, :], float("-inf"))
        weights = torch.exp(scores - scores.amax(dim=(0, 4), keepdim=True))
        total = _sum_pages(weights.sum(dim=-1))
        weights = weights.view(n_pages * n_kv, -1, n_slots)
        mixed = torch.bmm(weights, v_PGSD.reshape(-1, n_slots, dim))
        mixed = _sum_pages(mixed.view(n_pages, n_kv, n_rows, group, dim)) / total[..., None]
        return mixed.permute(1, 0, 2, 3).reshape(n_rows, n_heads, dim)

    def experts(
        self,
        x_TK: Tensor,
        gate_up_EIK: Tensor,
        down_EKI: Tensor,
        ids_TA: Tensor,
        weights_TA: Tensor,
    ) -> Tensor:
        """See `Ops.experts`. A row's experts are added in the order of its `ids_TA`."""
        parts_TAK = torch.empty(*ids_TA.shape, x_TK.shape[1], dtype=x_TK.dtype)
        for expert in torch.unique(ids_TA).tolist():
            row, slot = torch.where(ids_TA == expert)
            y = self.linear(
                self.gated_gelu(self.linear(x_TK[row], gate_up_EIK[expert])), down_EKI[expert]
            )
            parts_TAK[row, slot] = y * weights_TA[row, slot, None].to(y.dtype)
        total = parts_TAK[:, 0]
        for other in range(1, parts_TAK.shape[1]):
            total = total + parts_TAK[:, other]
        return total


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """x with zero rows appended until their number is a multiple."""
    missing = -x.shape[0] % multiple
    return x if missing == 0 else torch.cat((x, x.new_zeros(missing, *x.shape[1:])))


def rows_are_independent(weights: Iterable[Tensor], tile: int = TILE_ROWS) -> bool:
    """Whether a row's product with weights [N, K] of these shapes is the same in every slot.

    Each row of a random tile is computed in its own slot and again in another slot among other
    rows; a kernel whose order of adds depends on the slot gives other low bits in some of the N
    columns. One weight of a shape and type stands for all.
    """
    generator = torch.Generator().manual_seed(0)
    even = torch.arange(tile)[:, None] % 2 == 0
    for weight in {(w.shape, w.dtype): w for w in weights}.values():
        shape = (tile, weight.shape[1])
        rows = torch.randn(shape, generator=generator).to(weight.dtype)
        others = torch.randn(shape, generator=generator).to(weight.dtype)
        expected = F.linear(rows, weight)
        for shift in range(1, tile):
            mixed = torch.where(even, rows.roll(shift, 0), others)
            if not torch.equal(F.linear(mixed, weight)[::2], expected.roll(shift, 0)[::2]):
                return False
    return True


def _rms_norm_fp32(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.float()
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight.float()


def _pages(pool_PGSD: Tensor, pages: list[int]) -> Tensor:
    """The pages in order, fp32; a view where they lie side by side."""
    first, n = pages[0], len(pages)
    if pages == list(range(first, first + n)):
        return pool_PGSD[first : first + n].float()
    return pool_PGSD[torch.tensor(pages)].float()


def _hidden_keys(rows: PagedRows, start: int, tile: int) -> Tensor:
    """True where a row must not see a key: [P, tile, S]. Padding rows see the first key only."""
    lo = rows.lo[start : start + tile]
    hi = rows.hi[start : start + tile]
    base = rows.first_page * PAGE_SLOTS
    missing = tile - len(lo)
    lo_T = torch.tensor(lo + [base] * missing)[None, :, None]
    hi_T = torch.tensor(hi + [base] * missing)[None, :, None]
    key = torch.arange(base, base + len(rows.pages) * PAGE_SLOTS).view(-1, 1, PAGE_SLOTS)
    return (key < lo_T) | (key > hi_T)


def _sum_pages(x: Tensor) -> Tensor:
    """Sum over the first dimension in order, so that zeros at either end change nothing."""
    return x[0] if x.shape[0] == 1 else x.cumsum(dim=0)[-1]
