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
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import (
    PAGE_SLOTS,
    Activation,
    AttentionRows,
    KvPages,
    PageSlots,
    Role,
    Rotary,
)
from outdraft.ops.recurrent_reference import RecurrentReference

TILE_ROWS = 8
_VECTOR = 64  # elements: a multiple of what any vectorised loop takes at once
_SERIAL = 32768  # elements: PyTorch splits longer loops over threads, wherever that falls


@dataclass(slots=True)
class PagedRows:
    """One sequence's part of `AttentionRows`, in Python numbers.

    `pages` hold key positions `first_page * PAGE_SLOTS` onwards; rows `start ..` of the call see
    positions `lo[t] .. hi[t]`.
    """

    start: int
    pages: list[int]
    first_page: int
    lo: list[int]
    hi: list[int]
    masks: dict[int, Tensor] = field(default_factory=dict)  # by tile of rows


@dataclass(frozen=True, slots=True)
class ReferenceOps(RecurrentReference):
    """Row-invariant operations. `tile` is the number of rows of every matrix product."""

    tile: int = TILE_ROWS

    def describe(self) -> str:
        """See `Ops.describe`."""
        return "reference (PyTorch)" if self.tile == TILE_ROWS else "reference, row by row"

    @property
    def device(self) -> torch.device:
        """See `Ops.device`."""
        return torch.device("cpu")

    @property
    def kv_dtype(self) -> torch.dtype:
        """Attention computes in fp32, so keys and values are kept so."""
        return torch.float32

    @property
    def row_multiple(self) -> int:
        """See `Ops.row_multiple`."""
        return self.tile

    def pack(self, weight: Tensor, role: Role = "linear") -> Tensor:
        """The weight as it is."""
        del role
        return weight

    def embed(self, weight: Tensor, token_T: Tensor, scale: float) -> Tensor:
        """See `Ops.embed`."""
        return weight[token_T] * scale

    def concat(self, a_TK: Tensor, b_TN: Tensor) -> Tensor:
        """See `Ops.concat`."""
        return torch.cat((a_TK, b_TN), dim=-1)

    def linear(self, x_TK: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See `Ops.linear`."""
        n_rows = x_TK.shape[0]
        if n_rows == self.tile:
            return F.linear(x_TK, weight).to(dtype or x_TK.dtype)
        padded = pad_rows(x_TK, self.tile)
        tiles = [F.linear(tile, weight) for tile in torch.split(padded, self.tile)]
        return torch.cat(tiles)[:n_rows].to(dtype or x_TK.dtype)

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return _rms_norm_fp32(x_TK, weight_K, eps).to(x_TK.dtype)

    def add_norm(
        self,
        x_TK: Tensor,
        residual_TK: Tensor,
        weight_K: Tensor | None,
        eps: float,
        *,
        scale: float = 1.0,
        next_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_norm`."""
        y_TK = self.add(self.rms_norm(x_TK, weight_K, eps), residual_TK, scale)
        return y_TK, self.rms_norm(y_TK, next_weight, eps)

    def add(self, x_TK: Tensor, residual_TK: Tensor, scale: float = 1.0) -> Tensor:
        """See `Ops.add`."""
        y_TK = residual_TK + x_TK
        return y_TK if scale == 1.0 else y_TK * scale

    def norm_rope(
        self, x_THD: Tensor, weight_D: Tensor | None, rotary: Rotary | None, eps: float | None
    ) -> Tensor:
        """See `Ops.norm_rope`."""
        y = x_THD.float() if eps is None else _rms_norm_fp32(x_THD, weight_D, eps)
        if rotary is not None:
            at_T = rotary.position_T[: x_THD.shape[0]]  # a call's padding rows are not stored
            cos, sin = rotary.cos[at_T][:, None], rotary.sin[at_T][:, None]
            a, b = y.chunk(2, dim=-1)
            y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return y.to(x_THD.dtype)

    def write_heads(
        self,
        x_TGD: Tensor,
        pages_PGSD: Tensor,
        scales_PGS: Tensor | None,
        slots: PageSlots,
        weight_D: Tensor | None,
        rotary: Rotary | None,
        *,
        eps: float | None,
    ) -> None:
        """See `Ops.write_heads`."""
        assert scales_PGS is None
        heads_TGD = self.norm_rope(x_TGD, weight_D, rotary, eps)
        pages_PGSD[slots.page_T, :, slots.slot_T] = heads_TGD.to(pages_PGSD.dtype)

    def gated(self, gate_TK: Tensor, up_TK: Tensor, activation: Activation = "gelu_tanh") -> Tensor:
        """See `Ops.gated`.

        PyTorch computes whole vectors of these with one formula and what is left over with another,
        whose low bits differ; so the call is made of whole vectors, in lengths that run on one
        thread.
        """
        flat = gate_TK.reshape(-1)
        n = flat.shape[0]
        parts = torch.split(pad_rows(flat, _VECTOR), _SERIAL)
        done = [activate(part, activation) for part in parts]
        whole = done[0] if len(done) == 1 else torch.cat(done)
        return whole[:n].view(gate_TK.shape) * up_TK

    def gate_rows(self, x_TK: Tensor, gate_T1: Tensor) -> Tensor:
        """See `Ops.gate_rows`."""
        return x_TK * self.gated(gate_T1, torch.ones_like(gate_T1), "sigmoid").to(x_TK.dtype)

    def attention(self, q_THD: Tensor, kv: KvPages, rows: AttentionRows, scale: float) -> Tensor:
        """See `Ops.attention`. Scores and sums are fp32 whatever the inputs are."""
        if "sequences" not in rows.scratch:
            rows.scratch["sequences"] = _by_sequence(rows)
        parts = []
        for own in rows.scratch["sequences"]:
            keys, values = _pages(kv.k_PGSD, own.pages), _pages(kv.v_PGSD, own.pages)
            n_rows = len(own.lo)
            padded = pad_rows(q_THD[own.start : own.start + n_rows].float(), self.tile)
            out = [
                self._attend_tile(tile, keys, values, own, index, scale)
                for index, tile in enumerate(torch.split(padded, self.tile))
            ]
            parts.append((out[0] if len(out) == 1 else torch.cat(out))[:n_rows])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(q_THD.dtype)

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

    def route(
        self, scores_TE: Tensor, count: int, per_expert_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.route`."""
        probs_TE = torch.softmax(scores_TE, dim=-1)
        ids_TA = self.top(scores_TE, count)
        best_TA = probs_TE.gather(-1, ids_TA.long())
        weights_TA = best_TA / best_TA.sum(dim=-1, keepdim=True)
        if per_expert_E is not None:
            weights_TA = weights_TA * per_expert_E[ids_TA]
        return ids_TA, weights_TA

    def experts(
        self,
        x_TK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ids_TA: Tensor,
        weights_TA: Tensor,
        activation: Activation = "gelu_tanh",
    ) -> Tensor:
        """See `Ops.experts`. A row's experts are added in the order of its `ids_TA`."""
        parts_TAK = torch.empty(*ids_TA.shape, x_TK.shape[1], dtype=x_TK.dtype)
        for expert in torch.unique(ids_TA).tolist():
            row, slot = torch.where(ids_TA == expert)
            both, inner = self.linear(x_TK[row], gate_up[expert]), down.shape[-1]
            gated = self.gated(both[:, :inner], both[:, -inner:], activation)
            y = self.linear(gated, down[expert])
            parts_TAK[row, slot] = y * weights_TA[row, slot, None].to(y.dtype)
        total = parts_TAK[:, 0]
        for other in range(1, parts_TAK.shape[1]):
            total = total + parts_TAK[:, other]
        return total

    def top(self, scores_TE: Tensor, count: int) -> Tensor:
        """See `Ops.top`. A stable sort, unlike topk, promises the lowest id of equals."""
        return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :count].int()

    def pack_blocks(self, weight_VK: Tensor, ids_CN: Tensor) -> Tensor:
        """[C, N, K]."""
        return weight_VK[ids_CN]

    def score_blocks(
        self, x_TK: Tensor, blocks: Tensor, ids_CN: Tensor, chosen_TA: Tensor, n_vocab: int
    ) -> Tensor:
        """See `Ops.score_blocks`."""
        logits_TV = torch.full((x_TK.shape[0], n_vocab), float("-inf"))
        for row, chosen in enumerate(chosen_TA):  # each row has rows of the head of its own
            scores_N = self.linear(x_TK[row : row + 1], blocks[chosen].flatten(0, 1))[0]
            logits_TV[row, ids_CN[chosen].flatten()] = scores_N.float()
        return logits_TV

    def softcap(self, logits_TV: Tensor, cap: float) -> Tensor:
        """See `Ops.softcap`."""
        return torch.tanh(logits_TV / cap) * cap

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """See `Ops.argmax`."""
        return torch.argmax(logits_TV, dim=-1).int()  # documented to return the first maximum

    def best(self, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        """See `Ops.best`."""
        return self.argmax(logits_TV), probability_of_largest(logits_TV)

    def best_of_blocks(
        self, x_TK: Tensor, blocks: Tensor, ids_CN: Tensor, chosen_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.best_of_blocks`."""
        return self.best(self.score_blocks(x_TK, blocks, ids_CN, chosen_TA, ids_CN.numel()))


def probability_of_largest(logits_TV: Tensor) -> Tensor:
    """What softmax gives the largest of each row, [T]."""
    return 1 / torch.exp(logits_TV - logits_TV.amax(dim=-1, keepdim=True)).sum(dim=-1)


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


def _by_sequence(rows: AttentionRows) -> list[PagedRows]:
    """The rows of each sequence, with only the pages that they see."""
    sequence, lo, hi = (t.tolist() for t in (rows.sequence_T, rows.lo_T, rows.hi_T))
    parts, start = [], 0
    while start < len(sequence):
        end = start + sequence[start:].count(sequence[start])
        own_lo, own_hi = lo[start:end], hi[start:end]
        offset = int(rows.first_page_B[sequence[start]])
        first, last = min(own_lo) // PAGE_SLOTS, max(own_hi) // PAGE_SLOTS
        pages = rows.table_BP[sequence[start], first - offset : last + 1 - offset].tolist()
        parts.append(PagedRows(start, pages, first, own_lo, own_hi))
        start = end
    return parts


def activate(x: Tensor, activation: Activation) -> Tensor:
    """gelu_tanh, silu, sigmoid or relu of x."""
    if activation == "sigmoid":
        return torch.sigmoid(x)
    if activation == "relu":
        return F.relu(x)
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


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
