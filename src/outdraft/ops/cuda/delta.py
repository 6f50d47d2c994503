"""Launching what layers with a gated delta rule need beside products; kernels in recurrent.py.

Shapes: as in ops/recurrent_base.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from outdraft.ops.base import SigmoidRouter
from outdraft.ops.cuda import recurrent
from outdraft.ops.recurrent_base import DeltaGates, StateRows, StateSpace

VALUES = 32  # of a head in a program
CHANNELS = 256


class DeltaOps:
    """What `CudaOps` has of `RecurrentOps`."""

    __slots__ = ()

    device: torch.device

    @property
    def _launch(self) -> dict[str, Any]:
        raise NotImplementedError

    def _row_bounds(self, n_rows: int) -> dict[str, int]:
        """The most rows that a kernel looks at, and how many an interpreted one runs over."""
        most = triton.next_power_of_2(max(16, n_rows + 1))
        return {"MOST": most, "ROWS": n_rows if self.device.type == "cpu" else 0}

    def gate_rows(self, x_TK: Tensor, gate_T1: Tensor) -> Tensor:
        """See `Ops.gate_rows`."""
        x_TK = x_TK.contiguous()
        (t, k), out = x_TK.shape, torch.empty_like(x_TK)
        recurrent.gate_rows_kernel[(t, triton.cdiv(k, 1024))](
            x_TK, gate_T1.contiguous(), out, k, BLOCK=1024, **self._launch
        )
        return out

    def short_conv(
        self,
        x_TC: Tensor,
        weight_WC: Tensor,
        state_SWC: Tensor,
        rows: StateRows,
        bias_C: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.short_conv`; widths of 4."""
        (t, c), width = x_TC.shape, weight_WC.shape[0]
        assert width == 4 and x_TC.stride(1) == 1 and state_SWC.is_contiguous()
        out = torch.empty(t, c, device=self.device)
        recurrent.conv_kernel[(t, triton.cdiv(c, CHANNELS))](
            x_TC, weight_WC, weight_WC if bias_C is None else bias_C, state_SWC, rows.sequence_T,
            rows.read_T, rows.write_T, out, t, x_TC.stride(0), c, W=4, BIAS=bias_C is not None,
            BLOCK=CHANNELS, **self._row_bounds(t), **self._launch,
        )  # fmt: skip
        return out

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
        """See `Ops.delta_rule`; dimensions that are powers of two."""
        (_, h, k, v), t = state_SHKV.shape, qkv_TC.shape[0]
        assert state_SHKV.is_contiguous() and qkv_TC.dtype == torch.float32
        out, values = torch.empty(t, h, v, device=self.device), min(VALUES, v)
        recurrent.delta_kernel[(t, h, v // values)](
            qkv_TC, a_TH, b_TH, gates.decay_H, gates.bias_H, state_SHKV, rows.sequence_T,
            rows.read_T, rows.write_T, out, t, qkv_TC.stride(0), a_TH.stride(0), b_TH.stride(0),
            h, n_k_heads, k**-0.5, K=k, V=v, BV=values, **self._row_bounds(t), **self._launch,
        )  # fmt: skip
        return out

    def gated_norm(self, x_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
        """See `Ops.gated_norm`; bf16, which linears read."""
        (t, h, v), x_THV = x_THV.shape, x_THV.contiguous()
        gate_TX = gate_THV.reshape(t, h * v)
        out = torch.empty(t, h, v, device=self.device, dtype=torch.bfloat16)
        recurrent.gated_norm_kernel[(t, h)](
            x_THV, gate_TX, weight_V, out, gate_TX.stride(0), h, eps, V=v, **self._launch
        )
        return out


class NoStateSpace:
    """Mamba 2 layers and routing by sigmoids: models that need them are refused before."""

    __slots__ = ()

    def scan(
        self, x_TC: Tensor, dt_TH: Tensor, space: StateSpace, state_SHNP: Tensor, rows: StateRows
    ) -> Tensor:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def group_norm(self, x_TGV: Tensor, gate_TGV: Tensor, weight_GV: Tensor, eps: float) -> Tensor:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def route_sigmoid(self, scores_TE: Tensor, router: SigmoidRouter) -> tuple[Tensor, Tensor]:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError
