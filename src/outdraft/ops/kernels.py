"""The compiled CPU kernels: the same call runs an operation or records it into a program.

Every operation is row-invariant: a row's bits do not depend on the number of rows, on the other
rows or on the number of threads. They do depend on the instruction set. Not here: what a model
calls (ops/cpu.py), packing weights (ops/packed.py), choosing by scores (ops/choices.py).
Shapes: T rows, K inputs, N outputs, H query heads, G key/value heads, D head dimension, P pages,
S slots in a page, B sequences, E experts, A experts used by a row, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.base import Activation, AttentionRows, KvPages, PageSlots, Rotary
from outdraft.ops.calls import address, check, optional
from outdraft.ops.choices import Choices
from outdraft.ops.packed import PackedLinear, dtype_code, matrix

_ACTIVATIONS: dict[Activation, int] = {"gelu_tanh": 0, "silu": 1, "sigmoid": 2, "relu": 3}


@dataclass(slots=True, kw_only=True)
class Kernels(Choices):
    """Kernel calls that run at once, or are recorded when `program` is set."""

    def linear(
        self, x_TK: Tensor, weight: PackedLinear, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x W^T [T, N] in `dtype`, by default that of x.

        w8 quantises each row of x to int8, w4 each group of a row.
        """
        assert x_TK.shape[1] == weight.k and weight.n_blocks == 1
        y_TN = self.empty((x_TK.shape[0], weight.n), dtype or x_TK.dtype)
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
        groups = self.empty((_core.pair_groups_size(ids_TA.numel(), n_experts),), torch.int32)
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
        y_PN = self.empty((n_pairs, weight.n), dtype or x.dtype)
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
        check(weights_TA, torch.float32)
        y_TK = self.empty((n_rows, x_PK.shape[1]), x_PK.dtype)
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
            check(index, torch.int32)
        assert rows.table_BP.dtype == torch.int32 and rows.table_BP.stride(1) == 1
        out_THD = self.empty(q_THD.shape, q_THD.dtype)
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
        y_TK = self.empty(x_TK.shape, dtype or x_TK.dtype)
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
        y_TK, next_TK = (self.empty(residual_TK.shape, residual_TK.dtype) for _ in range(2))
        self._norm(x_TK, residual_TK, y_TK, next_TK, weight_K, next_weight, eps, scale, False)
        return y_TK, next_TK

    def add(self, x_TK: Tensor, residual_TK: Tensor, scale: float = 1.0) -> Tensor:
        """(residual + x) * scale in the type of the residual."""
        y_TK = self.empty(residual_TK.shape, residual_TK.dtype)
        self._norm(x_TK, residual_TK, y_TK, None, None, None, 0.0, scale, True)
        return y_TK

    def norm_rope(
        self, x_THD: Tensor, weight_D: Tensor | None, rotary: Rotary | None, eps: float | None
    ) -> Tensor:
        """RMS norm of each head (`eps` None: none), then rotation of pairs (i, i + D/2)."""
        out_THD = self.empty(x_THD.shape, x_THD.dtype)
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
        out_TK = self.empty(gate_TK.shape, gate_TK.dtype)
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
        check(token_T, torch.int32)
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
            check(row_T, torch.int32)
        _core.copy_rows(
            self._target(x, row_T, out_TK),
            matrix(x),
            0 if row_T is None else row_T.data_ptr(),
            matrix(out_TK),
            *out_TK.shape,
        )
        return out_TK

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
            optional(residual),
            matrix(out),
            optional(next_out),
            address(weight),
            address(next_weight),
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
            check(rotary.cos, torch.float32)
            check(rotary.sin, torch.float32)
            check(rotary.position_T, torch.int32)
        _core.head_norm(
            self._target(x_THD, out, pages, scales, slots, weight, rotary),
            matrix(x_THD),
            optional(out),
            address(pages),
            address(scales),
            0 if slots is None else slots.page_T.data_ptr(),
            0 if slots is None else slots.slot_T.data_ptr(),
            address(weight),
            0 if rotary is None else rotary.cos.data_ptr(),
            0 if rotary is None else rotary.sin.data_ptr(),
            0 if rotary is None else rotary.position_T.data_ptr(),
            -1.0 if eps is None else eps,
            0 if pages is None else dtype_code(pages.dtype),
            n_rows,
            n_heads,
            dim,
        )


def _kv_pages(kv: KvPages) -> _core.KvPages:
    k, v = kv.k_PGSD, kv.v_PGSD
    assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape and k.dtype == v.dtype
    assert (kv.k_scales_PGS is not None) == (k.dtype == torch.int8)
    return _core.KvPages(
        k.data_ptr(),
        v.data_ptr(),
        address(kv.k_scales_PGS),
        address(kv.v_scales_PGS),
        dtype_code(k.dtype),
        k.shape[1],
        k.shape[3],
    )
