"""The compiled CPU kernels: the same call runs an operation or records it into a program.

Every operation is row-invariant: a row's bits do not depend on the number of rows, on the other
rows or on the number of threads. They do depend on the instruction set. Not here: what a model
calls (ops/cpu.py), packing weights (ops/packed.py).
Shapes: T rows, K inputs, N outputs, H query heads, G key/value heads, D head dimension, P pages,
S slots in a page, B sequences, E experts, A experts used by a row, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.base import Activation, AttentionRows, KvPages, PageSlots, Rotary
from outdraft.ops.packed import PackedLinear, dtype_code, matrix, no_matrix
from outdraft.ops.program import Program

_ACTIVATIONS: dict[Activation, int] = {"gelu_tanh": 0, "silu": 1}


@dataclass(slots=True, kw_only=True)
class Kernels:
    """Kernel calls that run at once, or are recorded when `program` is set."""

    program: Program | None = None
    _prepared_rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def linear(
        self, x_TK: Tensor, weight: PackedLinear, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x W^T [T, N] in `dtype`, by default that of x.

        w8 quantises each row of x to int8, w4 each group of a row.
        """
        assert x_TK.shape[1] == weight.k and weight.n_blocks == 1
        y_TN = torch.empty(x_TK.shape[0], weight.n, dtype=dtype or x_TK.dtype)
        prepared = self._prepared(weight, x_TK.shape[0])
        _core.linear(
            self._target(x_TK, weight, y_TN, prepared),
            weight.core,
            matrix(x_TK),
            prepared.data_ptr(),
            matrix(y_TN),
            x_TK.shape[0],
        )
        return y_TN

    def group_pairs(self, ids_TA: Tensor, n_experts: int) -> Tensor:
        """The pairs (row, expert) of int32 ids sorted by expert, for `expert_linear`."""
        assert ids_TA.dtype == torch.int32 and ids_TA.is_contiguous()
        groups = torch.empty(_core.pair_groups_size(ids_TA.numel(), n_experts), dtype=torch.int32)
        _core.group_pairs(
            self._target(ids_TA, groups),
            ids_TA.data_ptr(),
            groups.data_ptr(),
            ids_TA.numel(),
            n_experts,
        )
        return groups

    def expert_linear(
        self,
        x: Tensor,
        weight: PackedLinear,
        groups: Tensor,
        n_pairs: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Row p of the result [T * A, N]: the weight of pair p's expert times x.

        Args:
            x: [T, K], shared by a row's A pairs, or [T * A, K], one a pair.
            groups: from `group_pairs` with the E blocks of the weight.
            n_pairs: T * A.
        """
        assert x.shape[1] == weight.k and n_pairs % x.shape[0] == 0
        y_PN = torch.empty(n_pairs, weight.n, dtype=dtype or x.dtype)
        prepared = self._prepared(weight, x.shape[0])
        _core.expert_linear(
            self._target(x, weight, groups, y_PN, prepared),
            weight.core,
            matrix(x),
            prepared.data_ptr(),
            matrix(y_PN),
            groups.data_ptr(),
            x.shape[0],
            n_pairs,
        )
        return y_PN

    def combine(self, x_PK: Tensor, weights_TA: Tensor) -> Tensor:
        """Weighted sum of each row's A results, [T, K], added in the order of A."""
        n_rows, count = weights_TA.shape
        assert x_PK.shape[0] == n_rows * count
        _check(weights_TA, torch.float32)
        y_TK = torch.empty(n_rows, x_PK.shape[1], dtype=x_PK.dtype)
        _core.combine(
            self._target(x_PK, weights_TA, y_TK),
            matrix(x_PK),
            weights_TA.data_ptr(),
            matrix(y_TK),
            count,
            n_rows,
            x_PK.shape[1],
        )
        return y_TK

    def attention(self, q_THD: Tensor, kv: KvPages, rows: AttentionRows, scale: float) -> Tensor:
        """Grouped-query softmax attention, [T, H, D] in the type of q; sums are fp32."""
        n_rows, n_heads, dim = q_THD.shape
        n_kv_heads = kv.k_PGSD.shape[1]
        assert n_heads % n_kv_heads == 0 and kv.k_PGSD.shape[3] == dim and dim % 16 == 0
        for index in (rows.first_page_B, rows.sequence_T, rows.lo_T, rows.hi_T):
            _check(index, torch.int32)
        assert rows.table_BP.dtype == torch.int32 and rows.table_BP.stride(1) == 1
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
        _core.attention(
            self._target(q_THD, out_THD, kv, rows),
            matrix(q_THD),
            matrix(out_THD),
            _kv_pages(kv),
            rows.table_BP.data_ptr(),
            rows.table_BP.stride(0),
            rows.first_page_B.data_ptr(),
            rows.sequence_T.data_ptr(),
            rows.lo_T.data_ptr(),
            rows.hi_T.data_ptr(),
            n_rows,
            n_heads,
            scale,
        )
        return out_THD

    def rms_norm(
        self, x_TK: Tensor, weight_K: Tensor | None, eps: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight (fp32), in `dtype` or that of x."""
        y_TK = torch.empty(x_TK.shape, dtype=dtype or x_TK.dtype)
        self._norm(x_TK, None, y_TK, None, weight_K, None, eps, 1.0, False)
        return y_TK

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
        """y = (residual + norm(x) * weight) * scale and norm(y) * next_weight, as the residual."""
        y_TK, next_TK = torch.empty_like(residual_TK), torch.empty_like(residual_TK)
        self._norm(x_TK, residual_TK, y_TK, next_TK, weight_K, next_weight, eps, scale, False)
        return y_TK, next_TK

    def add(self, x_TK: Tensor, residual_TK: Tensor, scale: float = 1.0) -> Tensor:
        """(residual + x) * scale in the type of the residual."""
        y_TK = torch.empty_like(residual_TK)
        self._norm(x_TK, residual_TK, y_TK, None, None, None, 0.0, scale, True)
        return y_TK

    def norm_rope(
        self, x_THD: Tensor, weight_D: Tensor | None, rotary: Rotary | None, eps: float | None
    ) -> Tensor:
        """RMS norm of each head (`eps` None: none), then rotation of pairs (i, i + D/2)."""
        out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype)
        self._head_norm(x_THD, out_THD, None, None, None, weight_D, rotary, eps)
        return out_THD

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
        """As `norm_rope`, written into pages of keys or of values (int8 ones with their scale)."""
        assert pages_PGSD.is_contiguous() and pages_PGSD.shape[1] == x_TGD.shape[1]
        assert (scales_PGS is not None) == (pages_PGSD.dtype == torch.int8)
        self._head_norm(x_TGD, None, pages_PGSD, scales_PGS, slots, weight_D, rotary, eps)

    def activate(self, gate_TK: Tensor, up_TK: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up in the type of the gate."""
        out_TK = torch.empty(gate_TK.shape, dtype=gate_TK.dtype)
        _core.gated(
            self._target(gate_TK, up_TK, out_TK),
            matrix(gate_TK),
            matrix(up_TK),
            matrix(out_TK),
            _ACTIVATIONS[activation],
            *gate_TK.shape,
        )
        return out_TK

    def embed_into(
        self, weight: PackedLinear, token_T: Tensor, scale: float, out_TK: Tensor
    ) -> Tensor:
        """Rows `token_T` (int32) of a packed weight times scale, into `out_TK`."""
        _check(token_T, torch.int32)
        assert out_TK.shape == (token_T.shape[0], weight.k)
        _core.embed(
            self._target(weight, token_T, out_TK),
            weight.core,
            token_T.data_ptr(),
            matrix(out_TK),
            scale,
            token_T.shape[0],
        )
        return out_TK

    def copy_rows(self, x: Tensor, out_TK: Tensor, row_T: Tensor | None = None) -> Tensor:
        """Rows `row_T` (int32; None: all, in order) of x into `out_TK`, changing type if needed."""
        if row_T is not None:
            _check(row_T, torch.int32)
        _core.copy_rows(
            self._target(x, row_T, out_TK),
            matrix(x),
            0 if row_T is None else row_T.data_ptr(),
            matrix(out_TK),
            *out_TK.shape,
        )
        return out_TK

    def softcap(self, logits_TV: Tensor, cap: float) -> Tensor:
        """tanh(logits / cap) * cap in place, fp32."""
        assert logits_TV.dtype == torch.float32
        _core.softcap(self._target(logits_TV), matrix(logits_TV), cap, *logits_TV.shape)
        return logits_TV

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """int32 id of each row's largest fp32 logit, the lowest of equals."""
        return self._argmax(logits_TV, None, None, 0)

    def argmax_of_blocks(self, scores_TX: Tensor, ids_EN: Tensor, chosen_TA: Tensor) -> Tensor:
        """As `argmax`, where row t has scores of the blocks `chosen_TA[t]` of ids (int32) only."""
        _check(ids_EN, torch.int32)
        _check(chosen_TA, torch.int32)
        assert scores_TX.shape[1] == chosen_TA.shape[1] * ids_EN.shape[1]
        return self._argmax(scores_TX, ids_EN, chosen_TA, ids_EN.shape[1])

    def top(self, scores_TE: Tensor, count: int) -> Tensor:
        """int32 [T, count]: the largest of each row of fp32 scores, largest first, then lowest."""
        return self._top(scores_TE, count, None, None)

    def route(
        self, scores_TE: Tensor, count: int, per_expert_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`top` and its fp32 weights: softmax made to sum to one, times `per_expert_E`."""
        weights_TA = torch.empty(scores_TE.shape[0], count)
        return self._top(scores_TE, count, weights_TA, per_expert_E), weights_TA

    def _norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        out: Tensor,
        next_out: Tensor | None,
        weight: Tensor | None,
        next_weight: Tensor | None,
        eps: float,
        scale: float,
        plain: bool,
    ) -> None:
        for w in (weight, next_weight):
            assert w is None or (w.dtype == torch.float32 and w.shape == x.shape[1:])
        _core.norm(
            self._target(x, residual, out, next_out, weight, next_weight),
            matrix(x),
            _optional(residual),
            matrix(out),
            _optional(next_out),
            _address(weight),
            _address(next_weight),
            eps,
            scale,
            plain,
            *x.shape,
        )

    def _head_norm(
        self,
        x_THD: Tensor,
        out: Tensor | None,
        pages: Tensor | None,
        scales: Tensor | None,
        slots: PageSlots | None,
        weight: Tensor | None,
        rotary: Rotary | None,
        eps: float | None,
    ) -> None:
        n_rows, n_heads, dim = x_THD.shape
        assert dim % (16 if rotary is None else 32) == 0
        assert weight is None or weight.dtype == torch.float32
        if rotary is not None:
            _check(rotary.cos, torch.float32)
            _check(rotary.sin, torch.float32)
            _check(rotary.position_T, torch.int32)
        _core.head_norm(
            self._target(x_THD, out, pages, scales, slots, weight, rotary),
            matrix(x_THD),
            _optional(out),
            _address(pages),
            _address(scales),
            0 if slots is None else slots.page_T.data_ptr(),
            0 if slots is None else slots.slot_T.data_ptr(),
            _address(weight),
            0 if rotary is None else rotary.cos.data_ptr(),
            0 if rotary is None else rotary.sin.data_ptr(),
            0 if rotary is None else rotary.position_T.data_ptr(),
            -1.0 if eps is None else eps,
            0 if pages is None else dtype_code(pages.dtype),
            n_rows,
            n_heads,
            dim,
        )

    def _argmax(
        self, logits: Tensor, ids: Tensor | None, chosen: Tensor | None, block: int
    ) -> Tensor:
        assert logits.dtype == torch.float32
        out_T = torch.empty(logits.shape[0], dtype=torch.int32)
        _core.argmax(
            self._target(logits, ids, chosen, out_T),
            matrix(logits),
            _address(ids),
            _address(chosen),
            block,
            out_T.data_ptr(),
            *logits.shape,
        )
        return out_T

    def _top(
        self, scores: Tensor, count: int, weights: Tensor | None, per_expert: Tensor | None
    ) -> Tensor:
        assert scores.dtype == torch.float32 and 0 < count <= scores.shape[1]
        ids_TA = torch.empty(scores.shape[0], count, dtype=torch.int32)
        _core.top(
            self._target(scores, ids_TA, weights, per_expert),
            matrix(scores),
            ids_TA.data_ptr(),
            _address(weights),
            _address(per_expert),
            count,
            *scores.shape,
        )
        return ids_TA

    def _target(self, *used: object) -> _core.Program | None:
        """The program to record into, which then keeps what the call uses."""
        if self.program is None:
            return None
        self.program.tensors.append(used)
        return self.program.core

    def _prepared(self, weight: PackedLinear, n_rows: int) -> Tensor:
        """Memory for the prepared rows; calls that run at once share one, recorded ones do not."""
        n_bytes = _core.prepared_bytes(weight.core, n_rows)
        if self.program is not None:
            return torch.empty(n_bytes, dtype=torch.uint8)
        if self._prepared_rows.numel() < n_bytes:
            self._prepared_rows = torch.empty(n_bytes, dtype=torch.uint8)
        return self._prepared_rows


def _check(x: Tensor, dtype: torch.dtype) -> None:
    assert x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu"


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _optional(x: Tensor | None) -> _core.Matrix:
    return no_matrix() if x is None else matrix(x)


def _kv_pages(kv: KvPages) -> _core.KvPages:
    k, v = kv.k_PGSD, kv.v_PGSD
    assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape and k.dtype == v.dtype
    assert (kv.k_scales_PGS is not None) == (k.dtype == torch.int8)
    return _core.KvPages(
        k.data_ptr(),
        v.data_ptr(),
        _address(kv.k_scales_PGS),
        _address(kv.v_scales_PGS),
        dtype_code(k.dtype),
        k.shape[1],
        k.shape[3],
    )
