"""`CudaOps`: a model's operations on one GPU, from Triton kernels (kernels.py).

Activations are fp32, weights bf16, int8 with a scale a row or 4 bits with a scale for 32, products
bf16 with fp32 sums. PyTorch's own part (lookups, soft-cap, arg-max by comparison) has no sum but
`best`'s, which decides no token.
Recording is a CUDA graph. A linear's tiles are chosen by its weight's shape, never by its rows.

Shapes: as in ops/base.py.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench_cudagraph

from outdraft.ops.base import PAGE_SLOTS, AttentionRows, KvPages, PageSlots, Role, Rotary
from outdraft.ops.cuda import kernels
from outdraft.ops.reference import probability_of_largest

SPLIT_KEYS = 2 * PAGE_SLOTS
WAVES = 132 * 2  # programs under which tiles of N alone leave processors idle
MAX_PAIRS = 1024


@dataclass(frozen=True, slots=True)
class Cut:
    """How a linear is cut: outputs and inputs a tile, warps, pipeline stages, parts of K."""

    tile_n: int = 64
    tile_k: int = 128
    warps: int = 4
    stages: int = 4
    split: int = 1

    @classmethod
    def of(cls, n: int, k: int) -> "Cut":
        """A cut for any card."""
        split = 1
        while split < 4 and n * split // 64 < WAVES and k // (split * 2) >= 512:
            split *= 2
        return cls(split=split)


def cuts_to_try(n: int, k: int) -> list[Cut]:
    """What `CudaOps.tune` measures."""
    tiles = [(64, 128, 4, 4), (64, 128, 4, 5), (32, 256, 4, 4), (128, 64, 4, 5), (64, 64, 4, 6),
             (32, 128, 4, 6)]  # fmt: skip
    splits = [s for s in (1, 2, 4) if s == 1 or (n * s <= 64 * WAVES * 4 and k // s >= 512)]
    return [Cut(*tile, split) for tile in tiles for split in splits]


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """[N, K] or [E, N, K] on the device; of 4 bits `data` is [N, K / 2]."""

    data: Tensor
    scales: Tensor | None = None
    bits: int = 16

    @property
    def n(self) -> int:
        """Outputs."""
        return self.data.shape[-2]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.data.shape[-1] * (2 if self.bits == 4 else 1)

    @property
    def n_bytes(self) -> int:
        """Memory of all parts."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.data.nbytes + scales


@dataclass(slots=True)
class CudaOps:
    """See the module docstring."""

    device: torch.device
    format: Literal["bf16", "w8", "w4"] = "bf16"
    kv_dtype: torch.dtype = torch.bfloat16
    tune: bool = False
    cuts: dict[tuple[int, int, int], Cut] = field(default_factory=dict)
    tickets: dict[int, Tensor] = field(default_factory=dict)

    def describe(self) -> str:
        """See `Ops.describe`."""
        return f"{self.device.type} (Triton), {self.format}"

    @property
    def row_multiple(self) -> int:
        """Kernels pad by themselves."""
        return 1

    @property
    def _dot(self) -> tl.dtype:
        """Type of a product's inputs; Triton's interpreter, on a CPU, has no bf16 products."""
        return tl.float32 if self.device.type == "cpu" else tl.bfloat16

    def pack(self, weight: Tensor, role: Role = "linear") -> CudaWeight:
        """See `Ops.pack`."""
        if self.format == "bf16" or role == "router" or weight.ndim == 3:
            return CudaWeight(weight.to(self.device, torch.bfloat16).contiguous())
        rows = weight.to(self.device, torch.float32)
        if self.format == "w4" and weight.shape[1] % 64 == 0:
            return pack4(rows)
        scales = rows.abs().amax(1).clamp(min=1e-30) / 127
        data = (rows / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        return CudaWeight(data, scales, 8)

    def pack_blocks(self, weight_VK: Tensor, ids_CN: Tensor) -> CudaWeight:
        """See `Ops.pack_blocks`."""
        blocks = weight_VK.to(self.device)[ids_CN.to(self.device).long()]
        return CudaWeight(blocks.to(torch.bfloat16).contiguous())

    def embed(self, weight: CudaWeight, token_T: Tensor, scale: float) -> Tensor:
        """See `Ops.embed`; fp32."""
        if weight.bits == 4:
            assert weight.scales is not None
            return unpack4(weight.data[token_T.long()], weight.scales[token_T.long()]) * scale
        rows_TK = weight.data[token_T.long()].float()
        if weight.scales is not None:
            rows_TK = rows_TK * weight.scales[token_T.long(), None]
        return rows_TK * scale

    def concat(self, a_TK: Tensor, b_TN: Tensor) -> Tensor:
        """See `Ops.concat`."""
        return torch.cat((a_TK, b_TN), dim=-1)

    def linear(self, x_TK: Tensor, weight: CudaWeight, dtype: torch.dtype | None = None) -> Tensor:
        """See `Ops.linear`."""
        x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
        out = torch.empty(x_TK.shape[0], weight.n, device=self.device, dtype=dtype or x_TK.dtype)
        self._launch(x_TK, weight, out, self._cut(weight))
        return out

    def _cut(self, weight: CudaWeight) -> Cut:
        """One a shape of weight, for as long as this object lives."""
        key = (weight.n, weight.k, weight.bits)
        if key not in self.cuts:
            cut = Cut.of(weight.n, weight.k)
            if self.tune and not torch.cuda.is_current_stream_capturing():
                x_TK = torch.randn(16, weight.k, device=self.device)
                out = torch.empty(16, weight.n, device=self.device)
                cut = min(
                    cuts_to_try(weight.n, weight.k),
                    key=lambda cut: do_bench_cudagraph(
                        lambda: self._launch(x_TK, weight, out, cut), rep=2
                    ),
                )
            self.cuts[key] = cut
        return self.cuts[key]

    def _launch(self, x_TK: Tensor, weight: CudaWeight, out: Tensor, cut: Cut) -> None:
        t, n, k = x_TK.shape[0], weight.n, weight.k
        parts = tickets = out
        grid = (triton.cdiv(n, cut.tile_n), cut.split, triton.cdiv(t, 16))
        if cut.split > 1:
            parts = torch.empty(cut.split, t, n, device=self.device, dtype=torch.float32)
            size = triton.next_power_of_2(grid[0] * grid[2])
            if size not in self.tickets:
                self.tickets[size] = torch.zeros(size, device=self.device, dtype=torch.int32)
            tickets = self.tickets[size]
        shared = {"SPLIT": cut.split, "BN": cut.tile_n, "num_warps": cut.warps,
                  "num_stages": cut.stages, "DOT": self._dot}  # fmt: skip
        on_card = self.device.type != "cpu"
        scales = x_TK if weight.scales is None else weight.scales
        if weight.bits == 4:
            tile_k = max(32, cut.tile_k // 2)
            n_tiles = triton.cdiv(triton.cdiv(k // 2, tile_k), cut.split)
            kernels.linear4_kernel[grid](
                x_TK, weight.data, scales, parts, out, tickets, t, n_tiles, n, k, x_TK.stride(0),
                BK=tile_k, TILES=0 if on_card else n_tiles, **shared,
            )  # fmt: skip
            return
        n_tiles = triton.cdiv(triton.cdiv(k, cut.tile_k), cut.split)
        even = n % cut.tile_n == 0 and n_tiles * cut.split * cut.tile_k == k
        kernels.linear_kernel[grid](
            x_TK, weight.data, scales, parts, out, tickets, t, n_tiles, n, k, x_TK.stride(0),
            SCALED=weight.scales is not None, BK=cut.tile_k, EVEN=even,
            TILES=0 if on_card else n_tiles, **shared,
        )  # fmt: skip

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        x_TK = x_TK.contiguous()
        out = torch.empty_like(x_TK)
        w = x_TK if weight_K is None else weight_K
        k = x_TK.shape[1]
        kernels.norm_kernel[(x_TK.shape[0],)](
            x_TK, x_TK, w, w, out, out, k, eps, 1.0, ADD=False, HAS_W=weight_K is not None,
            HAS_NEXT=False, BLOCK=triton.next_power_of_2(k), num_warps=16 if k > 2048 else 4,
        )  # fmt: skip
        return out

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
        y, out = torch.empty_like(x_TK), torch.empty_like(x_TK)
        k = x_TK.shape[1]
        kernels.norm_kernel[(x_TK.shape[0],)](
            x_TK, residual_TK, x_TK if weight_K is None else weight_K,
            x_TK if next_weight is None else next_weight, y, out, k, eps, scale, ADD=True,
            HAS_W=weight_K is not None, HAS_NEXT=next_weight is not None,
            BLOCK=triton.next_power_of_2(k), num_warps=16 if k > 2048 else 4,
        )  # fmt: skip
        return y, out

    def add(self, x_TK: Tensor, residual_TK: Tensor, scale: float = 1.0) -> Tensor:
        """See `Ops.add`."""
        return (residual_TK + x_TK) * scale

    def norm_rope(
        self, x_THD: Tensor, weight_D: Tensor | None, rotary: Rotary | None, eps: float
    ) -> Tensor:
        """See `Ops.norm_rope`."""
        out = torch.empty(x_THD.shape, device=self.device, dtype=x_THD.dtype)
        self._heads(x_THD, weight_D, rotary, eps, out, None)
        return out

    def write_heads(
        self,
        x_TGD: Tensor,
        pages_PGSD: Tensor,
        scales_PGS: Tensor | None,
        slots: PageSlots,
        weight_D: Tensor | None,
        rotary: Rotary | None,
        *,
        eps: float,
    ) -> None:
        """See `Ops.write_heads`."""
        assert scales_PGS is None
        self._heads(x_TGD, weight_D, rotary, eps, pages_PGSD, slots)

    def _heads(
        self,
        x_TGD: Tensor,
        weight_D: Tensor | None,
        rotary: Rotary | None,
        eps: float,
        out: Tensor,
        slots: PageSlots | None,
    ) -> None:
        t, g, d = x_TGD.shape
        assert x_TGD.stride(1) == d and x_TGD.stride(2) == 1
        cos, sin, position = (x_TGD,) * 3
        if rotary is not None:
            cos, sin, position = rotary.cos, rotary.sin, rotary.position_T
        kernels.head_kernel[(t, g)](
            x_TGD, x_TGD if weight_D is None else weight_D, cos, sin, position,
            x_TGD if slots is None else slots.page_T, x_TGD if slots is None else slots.slot_T,
            out, x_TGD.stride(0), g, out.stride(0), out.stride(1), eps, D=d,
            HAS_W=weight_D is not None, ROPE=rotary is not None, PAGED=slots is not None,
        )  # fmt: skip

    def gated(self, gate_TK: Tensor, up_TK: Tensor) -> Tensor:
        """See `Ops.gated`."""
        t, k = gate_TK.shape
        out = torch.empty(t, k, device=self.device, dtype=gate_TK.dtype)
        kernels.gated_kernel[(t, triton.cdiv(k, 1024))](
            gate_TK, up_TK, out, gate_TK.stride(0), up_TK.stride(0), k, BLOCK=1024
        )
        return out

    def attention(self, q_THD: Tensor, kv: KvPages, rows: AttentionRows, scale: float) -> Tensor:
        """See `Ops.attention`."""
        t, h, d = q_THD.shape
        g = kv.k_PGSD.shape[1]
        q_THD = q_THD.contiguous()
        width = rows.table_BP.shape[1]
        n_splits = triton.cdiv(width * PAGE_SLOTS, SPLIT_KEYS)
        part = torch.empty(t, n_splits, h, d, device=self.device, dtype=torch.float32)
        stats = torch.empty(t, n_splits, h, 2, device=self.device, dtype=torch.float32)
        out = torch.empty_like(q_THD)
        kernels.attention_kernel[(t, g, n_splits)](
            q_THD, kv.k_PGSD, kv.v_PGSD, rows.table_BP, rows.first_page_B, rows.sequence_T,
            rows.lo_T, rows.hi_T, part, stats, scale, width, n_splits, g, D=d, GROUP=h // g,
            GP=max(16, triton.next_power_of_2(h // g)), SLOTS=PAGE_SLOTS,
            TILE=32 if d > 256 else 64, SPLIT_KEYS=SPLIT_KEYS, num_stages=2,
            num_warps=8 if d > 256 else 4,
        )  # fmt: skip
        kernels.attention_merge_kernel[(t, h)](
            part, stats, rows.lo_T, rows.hi_T, out, n_splits, h, D=d, SLOTS=PAGE_SLOTS,
            SPLIT_KEYS=SPLIT_KEYS,
        )  # fmt: skip
        return out

    def route(
        self, scores_TE: Tensor, count: int, per_expert_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.route`."""
        t, e = scores_TE.shape
        ids_TA = torch.empty(t, count, device=self.device, dtype=torch.int32)
        weights_TA = torch.empty(t, count, device=self.device, dtype=torch.float32)
        kernels.route_kernel[(t,)](
            scores_TE, scores_TE if per_expert_E is None else per_expert_E, ids_TA, weights_TA, e,
            A=count, SCALED=per_expert_E is not None, BLOCK=triton.next_power_of_2(e),
        )  # fmt: skip
        return ids_TA, weights_TA

    def experts(
        self,
        x_TK: Tensor,
        gate_up: CudaWeight,
        down: CudaWeight,
        ids_TA: Tensor,
        weights_TA: Tensor,
    ) -> Tensor:
        """See `Ops.experts`."""
        t, count = ids_TA.shape
        inner, k = down.k, x_TK.shape[1]
        both = self._blocks(x_TK, gate_up, ids_TA, per_pair=False)
        y = self._blocks(self.gated(both[:, :inner], both[:, inner:]), down, ids_TA, per_pair=True)
        out = torch.empty(t, k, device=self.device, dtype=x_TK.dtype)
        kernels.combine_kernel[(t, triton.cdiv(k, 1024))](
            y, weights_TA, out, k, A=count, BLOCK=1024
        )
        return out

    def _blocks(self, x: Tensor, weight: CudaWeight, ids_TA: Tensor, *, per_pair: bool) -> Tensor:
        """fp32 [pairs, N]."""
        n, count = weight.n, ids_TA.shape[1]
        x, ids_TA = x.contiguous(), ids_TA.contiguous()
        out = torch.empty(ids_TA.numel(), n, device=self.device, dtype=torch.float32)
        rows = MAX_PAIRS // count
        for t in range(0, ids_TA.shape[0], rows):
            ids = ids_TA[t : t + rows]
            kernels.expert_kernel[(triton.cdiv(n, 32), ids.numel())](
                x[t * (count if per_pair else 1) :], weight.data, ids, out[t * count :],
                ids.numel(), n, weight.k, A=count, PER_PAIR=per_pair, BN=32, BK=128, DOT=self._dot,
                PAIRS=max(16, triton.next_power_of_2(ids.numel())), num_stages=4,
            )  # fmt: skip
        return out

    def top(self, scores_TE: Tensor, count: int) -> Tensor:
        """See `Ops.top`."""
        return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :count].int()

    def score_blocks(
        self, x_TK: Tensor, blocks: CudaWeight, ids_CN: Tensor, chosen_TA: Tensor, n_vocab: int
    ) -> Tensor:
        """See `Ops.score_blocks`."""
        scores = self._blocks(x_TK, blocks, chosen_TA.contiguous(), per_pair=False)
        logits_TV = torch.full((x_TK.shape[0], n_vocab), float("-inf"), device=self.device)
        ids_TX = ids_CN[chosen_TA.long()].flatten(1).long()
        return logits_TV.scatter_(1, ids_TX, scores.view(ids_TX.shape))

    def softcap(self, logits_TV: Tensor, cap: float) -> Tensor:
        """See `Ops.softcap`."""
        return torch.tanh(logits_TV / cap) * cap

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """See `Ops.argmax`; by comparison, so that equals cannot depend on the order of a scan."""
        ids_V = torch.arange(logits_TV.shape[1], device=self.device, dtype=torch.int32)
        is_largest_TV = logits_TV == logits_TV.amax(dim=-1, keepdim=True)
        return torch.where(is_largest_TV, ids_V, len(ids_V)).amin(dim=-1)

    def best(self, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        """See `Ops.best`."""
        return self.argmax(logits_TV), probability_of_largest(logits_TV)

    def best_of_blocks(
        self, x_TK: Tensor, blocks: CudaWeight, ids_CN: Tensor, chosen_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.best_of_blocks`."""
        return self.best(self.score_blocks(x_TK, blocks, ids_CN, chosen_TA, ids_CN.numel()))


def pack4(rows_NK: Tensor) -> CudaWeight:
    """Symmetric, -7 to 7, a bf16 scale for 32; byte j of a row as in kernels.linear4_kernel."""
    n, k = rows_NK.shape
    groups = rows_NK.view(n, k // 32, 32)
    scales = (groups.abs().amax(2).clamp(min=1e-30) / 7).to(torch.bfloat16)
    q = (groups / scales.float()[:, :, None]).round().clamp(-7, 7).to(torch.int16) + 8
    pairs = q.view(n, k // 64, 2, 32)
    data = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).to(torch.uint8)
    return CudaWeight(data.reshape(n, k // 2), scales, 4)


def unpack4(data: Tensor, scales: Tensor) -> Tensor:
    """fp32 rows of what `pack4` made."""
    n = data.shape[0]
    q = data.view(n, -1, 1, 32)
    values = torch.cat((q & 15, q >> 4), dim=2).to(torch.float32) - 8
    return (values * scales.float().view(n, -1, 2, 1)).view(n, -1)
