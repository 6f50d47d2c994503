"""`CudaOps`: a model's operations on one GPU, from Triton kernels (kernels.py).

Activations are fp32, weights bf16 or int8 with a scale a row, products bf16 with fp32 sums. What
PyTorch is left with (lookups, soft-cap, arg-max by comparison) has no sum whose order could change.
Recording is a CUDA graph. Weights of 4 bits are not supported.

Shapes: as in ops/base.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from outdraft.ops.base import PAGE_SLOTS, AttentionRows, KvPages, PageSlots, Role, Rotary
from outdraft.ops.cuda import kernels

SPLIT_KEYS = 4 * PAGE_SLOTS
SMALL_N = 132 * 64 * 2  # outputs under which tiles of N alone leave processors idle


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """[N, K] or [E, N, K] on the device, and how `linear` cuts it: functions of N and K only."""

    data: Tensor
    scales: Tensor | None
    split: int
    tile_k: int

    @classmethod
    def of(cls, data: Tensor, scales: Tensor | None = None) -> "CudaWeight":
        """With its cut."""
        n, k = data.shape[-2:]
        split = 1
        while split < 8 and n * split * 2 <= SMALL_N and k // (split * 2) >= 512:
            split *= 2
        return cls(data, scales, split, 128)

    @property
    def n(self) -> int:
        """Outputs."""
        return self.data.shape[-2]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.data.shape[-1]

    @property
    def n_bytes(self) -> int:
        """Memory of all parts."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.data.nbytes + scales


@dataclass(slots=True)
class CudaOps:
    """See the module docstring."""

    device: torch.device
    format: Literal["bf16", "w8"] = "bf16"
    kv_dtype: torch.dtype = torch.bfloat16

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
            return CudaWeight.of(weight.to(self.device, torch.bfloat16).contiguous())
        rows = weight.to(self.device, torch.float32)
        scales = rows.abs().amax(1).clamp(min=1e-30) / 127
        data = (rows / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        return CudaWeight.of(data, scales)

    def pack_blocks(self, weight_VK: Tensor, ids_CN: Tensor) -> CudaWeight:
        """See `Ops.pack_blocks`."""
        blocks = weight_VK.to(self.device)[ids_CN.to(self.device).long()]
        return CudaWeight.of(blocks.to(torch.bfloat16).contiguous())

    def embed(self, weight: CudaWeight, token_T: Tensor, scale: float) -> Tensor:
        """See `Ops.embed`; fp32."""
        rows_TK = weight.data[token_T.long()].float()
        if weight.scales is not None:
            rows_TK = rows_TK * weight.scales[token_T.long(), None]
        return rows_TK * scale

    def concat(self, a_TK: Tensor, b_TN: Tensor) -> Tensor:
        """See `Ops.concat`."""
        return torch.cat((a_TK, b_TN), dim=-1)

    def linear(self, x_TK: Tensor, weight: CudaWeight, dtype: torch.dtype | None = None) -> Tensor:
        """See `Ops.linear`."""
        t, n, k, split = x_TK.shape[0], weight.n, weight.k, weight.split
        x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
        out = torch.empty(t, n, device=self.device, dtype=dtype or x_TK.dtype)
        scaled = weight.scales is not None
        parts = out
        if split > 1:
            parts = torch.empty(split, t, n, device=self.device, dtype=torch.float32)
        grid = (triton.cdiv(n, 64), split, triton.cdiv(t, 16))
        kernels.linear_kernel[grid](
            x_TK, weight.data, weight.scales if scaled else x_TK, parts, t, n, k, x_TK.stride(0),
            TILES=triton.cdiv(triton.cdiv(k, weight.tile_k), split), SCALED=scaled, BN=64,
            BK=weight.tile_k, num_warps=4, num_stages=4, DOT=self._dot,
        )  # fmt: skip
        if split > 1:
            grid_1 = (triton.cdiv(t * n, 1024),)
            kernels.merge_kernel[grid_1](parts, out, t * n, SPLIT=split, BLOCK=1024)
        return out

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        x_TK = x_TK.contiguous()
        out = torch.empty_like(x_TK)
        w = x_TK if weight_K is None else weight_K
        k = x_TK.shape[1]
        kernels.norm_kernel[(x_TK.shape[0],)](
            x_TK, x_TK, w, w, out, out, k, eps, 1.0, ADD=False, HAS_W=weight_K is not None,
            HAS_NEXT=False, BLOCK=triton.next_power_of_2(k),
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
            BLOCK=triton.next_power_of_2(k),
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
        n_pairs, n = ids_TA.numel(), weight.n
        out = torch.empty(n_pairs, n, device=self.device, dtype=torch.float32)
        kernels.expert_kernel[(n_pairs, triton.cdiv(n, 16))](
            x.contiguous(), weight.data, ids_TA, out, n, weight.k, A=ids_TA.shape[1],
            PER_PAIR=per_pair, BN=16, BK=256,
        )  # fmt: skip
        return out

    def top(self, scores_TE: Tensor, count: int) -> Tensor:
        """See `Ops.top`."""
        return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :count].int()

    def score_blocks(
        self, x_TK: Tensor, blocks: CudaWeight, ids_CN: Tensor, chosen_TA: Tensor, n_vocab: int
    ) -> Tensor:
        """See `Ops.score_blocks`."""
        n_rows = x_TK.shape[0]
        scores = self._blocks(x_TK, blocks, chosen_TA.contiguous(), per_pair=False)
        logits_TV = torch.full((n_rows, n_vocab), float("-inf"), device=self.device)
        ids_TX = ids_CN[chosen_TA.long()].flatten(1).long()
        return logits_TV.scatter_(1, ids_TX, scores.view(n_rows, -1))

    def softcap(self, logits_TV: Tensor, cap: float) -> Tensor:
        """See `Ops.softcap`."""
        return torch.tanh(logits_TV / cap) * cap

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """See `Ops.argmax`; by comparison, so that equals cannot depend on the order of a scan."""
        n = logits_TV.shape[1]
        ids_V = torch.arange(n, device=self.device, dtype=torch.int32)
        largest_T1 = logits_TV.amax(dim=-1, keepdim=True)
        return torch.where(logits_TV == largest_T1, ids_V, n).amin(dim=-1)
