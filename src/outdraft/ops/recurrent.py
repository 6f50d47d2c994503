"""Kernel calls of recurrent layers; see `Ops` (ops/base.py) for what they compute.

Shapes: T rows, C channels, W width of the convolution, S states, G key heads, H value heads, K key
and V value dimension of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.calls import Calls, check
from outdraft.ops.packed import matrix
from outdraft.ops.recurrent_base import DeltaGates, StateRows


@dataclass(slots=True, kw_only=True)
class Recurrent(Calls):
    """See the module docstring."""

    def short_conv(
        self,
        x_TC: Tensor,
        weight_WC: Tensor,
        state_SWC: Tensor,
        rows: StateRows,
        bias_C: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.short_conv`."""
        n_rows, channels = x_TC.shape
        width = weight_WC.shape[0]
        assert channels % 16 == 0 and width <= 8 and state_SWC.shape[1:] == (width - 1, channels)
        out_TC = self.empty(x_TC.shape, torch.float32)
        _core.short_conv(
            self._target(x_TC, weight_WC, bias_C, state_SWC, rows, out_TC),
            matrix(x_TC),
            matrix(out_TC),
            floats(weight_WC),
            0 if bias_C is None else floats(bias_C),
            floats(state_SWC),
            *addresses(rows),
            n_rows,
            channels,
            width,
        )
        return out_TC

    def delta_rule(
        self,
        qkv_TC: Tensor,
        a_TH: Tensor,
        b_TH: Tensor,
        gates: DeltaGates,
        state_SHKV: Tensor,
        rows: StateRows,
        n_k_heads: int,
    ) -> Tensor:
        """See `Ops.delta_rule`."""
        n_rows = qkv_TC.shape[0]
        _, n_v_heads, k_dim, v_dim = state_SHKV.shape
        assert n_v_heads % n_k_heads == 0 and k_dim % 16 == 0 and v_dim % 16 == 0
        assert qkv_TC.shape[1] == 2 * n_k_heads * k_dim + n_v_heads * v_dim
        out_TC = self.empty((n_rows, n_v_heads * v_dim), torch.float32)
        _core.delta_rule(
            self._target(qkv_TC, a_TH, b_TH, gates, state_SHKV, rows, out_TC),
            matrix(qkv_TC),
            matrix(a_TH),
            matrix(b_TH),
            matrix(out_TC),
            floats(gates.decay_H),
            floats(gates.bias_H),
            floats(state_SHKV),
            *addresses(rows),
            n_rows,
            n_k_heads,
            n_v_heads,
            k_dim,
            v_dim,
        )
        return out_TC.view(n_rows, n_v_heads, v_dim)

    def gated_norm(self, x_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
        """See `Ops.gated_norm`."""
        n_rows, n_heads, dim = x_THV.shape
        assert dim % 16 == 0 and gate_THV.shape == x_THV.shape
        out_THV = self.empty(x_THV.shape, x_THV.dtype)
        _core.gated_norm(
            self._target(x_THV, gate_THV, weight_V, out_THV),
            matrix(x_THV),
            matrix(gate_THV),
            matrix(out_THV),
            floats(weight_V),
            eps,
            n_rows,
            n_heads,
            dim,
        )
        return out_THV


def floats(x: Tensor) -> int:
    """Address of contiguous fp32 numbers."""
    check(x, torch.float32)
    return x.data_ptr()


def addresses(rows: StateRows) -> tuple[int, int, int]:
    """Of sequences, states read and states written."""
    for index in (rows.sequence_T, rows.read_T, rows.write_T):
        check(index, torch.int32)
    return rows.sequence_T.data_ptr(), rows.read_T.data_ptr(), rows.write_T.data_ptr()
