"""`CudaOps`: a model's operations on one GPU, from Triton kernels.

The residual stream and what linears give is fp32; what only linears read is bf16, as is every
product's input; sums are fp32. Recording is a CUDA graph. Not here: the kernels (linears.py,
kernels.py), packing (weights.py), how linears are cut (cuts.py).

Shapes: as in ops/base.py.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from outdraft.ops.base import (
    Activation,
    AttentionRows,
    KvPages,
    PageSlots,
    Role,
    Rotary,
)
from outdraft.ops.cuda import kernels, linears, norms
from outdraft.ops.cuda.attention import attend
from outdraft.ops.cuda.cuts import Cut, cut_of
from outdraft.ops.cuda.delta import DeltaOps, NoStateSpace
from outdraft.ops.cuda.fused import FusedOps, launch_norm
from outdraft.ops.cuda.graph import GraphProgram
from outdraft.ops.cuda.product import Gate, launch
from outdraft.ops.cuda.weights import CudaWeight, pack
from outdraft.ops.packed import Format
from outdraft.ops.record import Replayable
from outdraft.ops.stored import StoredWeight

MAX_PAIRS = 1024
BLOCK = 1024


@dataclass(slots=True)
class CudaOps(DeltaOps, NoStateSpace, FusedOps):
    """See the module docstring. A `device` of type cpu is Triton's interpreter, for tests.

    Attributes:
        format: how `pack` stores weights: `w4`, `w8` or `bf16`. Embeddings and heads get at least
            8 bits; routers and experts are bf16.
        pdl: kernels may be launched before their predecessor is done (compute capability 9.0).
    """

    device: torch.device
    format: Format = "bf16"
    kv_dtype: torch.dtype = torch.bfloat16
    pdl: bool = False
    tickets: dict[int, Tensor] = field(default_factory=dict)
    program: GraphProgram | None = None
    pool: Any = None

    def describe(self) -> str:
        """See `Ops.describe`."""
        name = torch.cuda.get_device_name(self.device) if self._on_card else "Triton's interpreter"
        kv = str(self.kv_dtype).removeprefix("torch.")
        return f"cuda ({name}), {self.format}, {kv} keys"

    @property
    def _on_card(self) -> bool:
        return self.device.type != "cpu"

    @property
    def _dot(self) -> tl.dtype:
        """Type of a product's inputs; Triton's interpreter has no bf16 products."""
        return tl.bfloat16 if self._on_card else tl.float32

    @property
    def _launch(self) -> dict[str, Any]:
        """What every kernel is told."""
        return {"PDL": True, "launch_pdl": True} if self.pdl else {"PDL": False}

    @property
    def row_multiple(self) -> int:
        """Kernels pad by themselves."""
        return 1

    @property
    def records_all(self) -> bool:
        """A graph holds PyTorch's operations too."""
        return True

    @property
    def warms_up(self) -> bool:
        """Kernels are compiled and loaded before they are recorded."""
        return True

    def begin(self, program: Replayable | None) -> GraphProgram:
        """See `Recordable`."""
        assert self.program is None and (program is None or isinstance(program, GraphProgram))
        if program is None:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            program = GraphProgram(self.pool, self.device)
        self.program = program
        program.enter()
        return program

    def end(self) -> None:
        """See `Recordable`."""
        program, self.program = self.program, None
        if program is not None:
            program.leave()

    def stored_as(self, role: Role) -> Format:
        """How `pack` stores weights of this role."""
        if role == "router":
            return "bf16"
        return "w8" if role == "embedding" and self.format == "w4" else self.format

    def pack(self, weight: Tensor | StoredWeight, role: Role = "linear") -> CudaWeight:
        """See `Ops.pack`. A `StoredWeight` is packed range by range while it is read."""
        return pack(weight, self.stored_as(role), self.device)

    def pack_blocks(self, weight_VK: Tensor | StoredWeight, ids_CN: Tensor) -> CudaWeight:
        """See `Ops.pack_blocks`."""
        if isinstance(weight_VK, StoredWeight):
            return pack(weight_VK.take(ids_CN.cpu()), "bf16", self.device)
        return pack(weight_VK[ids_CN.to(weight_VK.device).long()], "bf16", self.device)

    def embed(self, weight: CudaWeight, token_T: Tensor, scale: float) -> Tensor:
        """See `Ops.embed`; fp32."""
        t, k = token_T.shape[0], weight.k
        out = self._empty(t, k)
        scales = out if weight.scales is None else weight.scales
        linears.embed_kernel[(t, triton.cdiv(k, BLOCK))](
            weight.data, scales, token_T, out, scale, k, weight.k_tiles, scales.stride(0),
            BITS=weight.bits, BLOCK=BLOCK, **self._launch,
        )  # fmt: skip
        return out

    def concat(self, a_TK: Tensor, b_TN: Tensor) -> Tensor:
        """See `Ops.concat`."""
        (t, k), n = a_TK.shape, b_TN.shape[1]
        out = self._empty(t, k + n, dtype=torch.promote_types(a_TK.dtype, b_TN.dtype))
        kernels.concat_kernel[(t, triton.cdiv(k + n, BLOCK))](
            a_TK, b_TN, out, a_TK.stride(0), b_TN.stride(0), k, n, BLOCK=BLOCK, **self._launch
        )
        return out

    def copy_rows(self, x_TK: Tensor, out_TK: Tensor) -> None:
        """See `Recordable`."""
        out_TK.copy_(x_TK)

    def linear(self, x_TK: Tensor, weight: CudaWeight, dtype: torch.dtype | None = None) -> Tensor:
        """See `Ops.linear`; fp32 unless told."""
        out = self._empty(x_TK.shape[0], weight.n, dtype=dtype or torch.float32)
        self.launch_linear(x_TK, weight, out, cut_of(weight.n, weight.k, weight.bits))
        return out

    def launch_linear(
        self, x_TK: Tensor, weight: CudaWeight, out: Tensor, cut: Cut, gate: Gate | None = None
    ) -> None:
        """x W^T into `out`, cut and gated like this."""
        x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
        if self.program is not None:
            self.program.product()
        launch(x_TK, weight, out, cut, self.tickets, self._dot, self._launch, gate)

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        x_TK = x_TK.contiguous()
        out = self._empty(*x_TK.shape, dtype=x_TK.dtype)
        launch_norm(x_TK, None, out, [out], weight_K, [None], eps, 1.0, self._launch)
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
        """See `Ops.add_norm`; the norm, which linears read, in bf16."""
        y, out = self._empty(*x_TK.shape), self._empty(*x_TK.shape, dtype=torch.bfloat16)
        launch_norm(x_TK, residual_TK, y, [out], weight_K, [next_weight], eps, scale, self._launch)
        return y, out

    def add(self, x_TK: Tensor, residual_TK: Tensor, scale: float = 1.0) -> Tensor:
        """See `Ops.add`."""
        x_TK, residual_TK = x_TK.contiguous(), residual_TK.contiguous()
        out, n = self._empty(*x_TK.shape), x_TK.numel()
        kernels.add_kernel[(triton.cdiv(n, BLOCK),)](
            x_TK, residual_TK, out, scale, n, BLOCK=BLOCK, **self._launch
        )
        return out

    def norm_rope(
        self, x_THD: Tensor, weight_D: Tensor | None, rotary: Rotary | None, eps: float | None
    ) -> Tensor:
        """See `Ops.norm_rope`."""
        out = self._empty(*x_THD.shape, dtype=x_THD.dtype)
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
        eps: float | None,
    ) -> None:
        """See `Ops.write_heads`."""
        assert scales_PGS is None
        self._heads(x_TGD, weight_D, rotary, eps, pages_PGSD, slots)

    def _heads(
        self,
        x_TGD: Tensor,
        weight_D: Tensor | None,
        rotary: Rotary | None,
        eps: float | None,
        out: Tensor,
        slots: PageSlots | None,
    ) -> None:
        t, g, d = x_TGD.shape
        assert x_TGD.stride(1) == d and x_TGD.stride(2) == 1
        cos, sin, position = (x_TGD,) * 3
        if rotary is not None:
            cos, sin, position = rotary.cos, rotary.sin, rotary.position_T
        norms.head_kernel[(t, g)](
            x_TGD, x_TGD if weight_D is None else weight_D, cos, sin, position,
            x_TGD if slots is None else slots.page_T, x_TGD if slots is None else slots.slot_T,
            out, x_TGD.stride(0), g, out.stride(0), out.stride(1), eps or 0.0, D=d,
            NORM=eps is not None, HAS_W=weight_D is not None, ROPE=rotary is not None,
            PAGED=slots is not None, **self._launch,
        )  # fmt: skip

    def gated(self, gate_TK: Tensor, up_TK: Tensor, activation: Activation = "gelu_tanh") -> Tensor:
        """See `Ops.gated`; bf16, which linears read."""
        assert activation in ("gelu_tanh", "silu", "sigmoid"), "models that need others are refused"
        t, k = gate_TK.shape
        out = self._empty(t, k, dtype=torch.bfloat16)
        kernels.gated_kernel[(t, triton.cdiv(k, BLOCK))](
            gate_TK, up_TK, out, gate_TK.stride(0), up_TK.stride(0), k,
            SILU=activation == "silu", SIGMOID=activation == "sigmoid", BLOCK=BLOCK, **self._launch,
        )  # fmt: skip
        return out

    def attention(self, q_THD: Tensor, kv: KvPages, rows: AttentionRows, scale: float) -> Tensor:
        """See `Ops.attention`; bf16, which linears read."""
        return attend(q_THD.contiguous(), kv, rows, scale, self._dot, self._launch)

    def route(
        self, scores_TE: Tensor, count: int, per_expert_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.route`."""
        t, e = scores_TE.shape
        ids_TA, weights_TA = self._empty(t, count, dtype=torch.int32), self._empty(t, count)
        kernels.route_kernel[(t,)](
            scores_TE, scores_TE if per_expert_E is None else per_expert_E, ids_TA, weights_TA, e,
            A=count, SCALED=per_expert_E is not None, BLOCK=triton.next_power_of_2(e),
            **self._launch,
        )  # fmt: skip
        return ids_TA, weights_TA

    def experts(
        self,
        x_TK: Tensor,
        gate_up: CudaWeight,
        down: CudaWeight,
        ids_TA: Tensor,
        weights_TA: Tensor,
        activation: Activation = "gelu_tanh",
    ) -> Tensor:
        """See `Ops.experts`."""
        t, count = ids_TA.shape
        k = x_TK.shape[1]
        inner = self.blocks(x_TK, gate_up, ids_TA, per_pair=False, gate=activation)
        y = self.blocks(inner, down, ids_TA, per_pair=True)
        out = self._empty(t, k)
        kernels.combine_kernel[(t, triton.cdiv(k, BLOCK))](
            y, weights_TA, out, k, A=count, BLOCK=BLOCK, **self._launch
        )
        return out

    def blocks(
        self,
        x: Tensor,
        weight: CudaWeight,
        ids_TA: Tensor,
        *,
        per_pair: bool,
        gate: Activation | None = None,
    ) -> Tensor:
        """Rows times their blocks, fp32 [pairs, N]; gated by their second half bf16 [pairs, N / 2].

        Args:
            x: [T, K], or `per_pair` [pairs, K].
        """
        n, count = weight.n if gate is None else weight.n // 2, ids_TA.shape[1]
        x, ids_TA = x.contiguous(), ids_TA.contiguous()
        dtype = torch.float32 if gate is None else torch.bfloat16
        out = self._empty(ids_TA.numel(), n, dtype=dtype)
        rows, tile_n = MAX_PAIRS // count, 32 if gate is None else 16
        for t in range(0, ids_TA.shape[0], rows):
            ids = ids_TA[t : t + rows]
            step = count if per_pair else 1
            linears.expert_kernel[(triton.cdiv(n, tile_n), ids.numel())](
                x[t * step :], weight.data, ids, out[t * count :], ids.numel(), weight.n, weight.k,
                A=count, PER_PAIR=per_pair, PAIRS=max(16, triton.next_power_of_2(ids.numel())),
                GATE=int(gate is not None), SILU=gate == "silu", BN=tile_n, BK=128,
                DOT=self._dot, num_stages=4, **self._launch,
            )  # fmt: skip
        return out

    def top(self, scores_TE: Tensor, count: int) -> Tensor:
        """See `Ops.top`."""
        t, e = scores_TE.shape
        out = self._empty(t, count, dtype=torch.int32)
        kernels.top_kernel[(t, triton.cdiv(e, 64))](
            scores_TE, out, e, A=count, BLOCK=triton.next_power_of_2(e), **self._launch
        )
        return out

    def score_blocks(
        self, x_TK: Tensor, blocks: CudaWeight, ids_CN: Tensor, chosen_TA: Tensor, n_vocab: int
    ) -> Tensor:
        """See `Ops.score_blocks`."""
        scores = self.blocks(x_TK, blocks, chosen_TA.contiguous(), per_pair=False)
        logits_TV = torch.full((x_TK.shape[0], n_vocab), float("-inf"), device=self.device)
        ids_TX = ids_CN[chosen_TA.long()].flatten(1).long()
        return logits_TV.scatter_(1, ids_TX, scores.view(ids_TX.shape))

    def softcap(self, logits_TV: Tensor, cap: float) -> Tensor:
        """See `Ops.softcap`; in place."""
        n = logits_TV.numel()
        kernels.softcap_kernel[(triton.cdiv(n, BLOCK),)](
            logits_TV, cap, n, BLOCK=BLOCK, **self._launch
        )
        return logits_TV

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """See `Ops.argmax`."""
        return self.best(logits_TV)[0]

    def best(self, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        """See `Ops.best`."""
        return self._best(logits_TV, finite=False)

    def best_of_blocks(
        self, x_TK: Tensor, blocks: CudaWeight, ids_CN: Tensor, chosen_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.best_of_blocks`."""
        t, count = chosen_TA.shape
        scores = self.blocks(x_TK, blocks, chosen_TA.contiguous(), per_pair=False)
        out, sure = self._empty(t, dtype=torch.int32), self._empty(t)
        kernels.best_of_blocks_kernel[(t,)](
            scores, ids_CN, chosen_TA.contiguous(), out, sure, ids_CN.shape[1], A=count,
            BLOCK=triton.next_power_of_2(count * ids_CN.shape[1]), num_warps=8, **self._launch,
        )  # fmt: skip
        return out, sure
