"""Kernel calls of Mamba 2 layers and of routing by sigmoids; see `Ops` (ops/base.py) for what they
compute.

Shapes: T rows, C channels, S states, H heads, N numbers of a state for each of P inputs of a head,
G groups, V width of a group, E experts, A experts used by a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.base import SigmoidRouter
from outdraft.ops.packed import matrix
from outdraft.ops.recurrent import Recurrent, addresses, floats
from outdraft.ops.recurrent_base import StateRows, StateSpace


@dataclass(slots=True, kw_only=True)
class StateSpaceCalls(Recurrent):
    """See the module docstring."""

    def scan(
        self, x_TC: Tensor, dt_TH: Tensor, space: StateSpace, state_SHNP: Tensor, rows: StateRows
    ) -> Tensor:
        """See `Ops.scan`."""
        n_rows = x_TC.shape[0]
        _, n_heads, n_state, dim = state_SHNP.shape
        assert n_heads % space.n_groups == 0 and n_state % 16 == 0 and dim % 16 == 0
        assert x_TC.shape[1] == n_heads * dim + 2 * space.n_groups * n_state
        out_TC = self.empty((n_rows, n_heads * dim), torch.float32)
        _core.scan(
            self._target(x_TC, dt_TH, space, state_SHNP, rows, out_TC),
            matrix(x_TC),
            matrix(dt_TH),
            matrix(out_TC),
            floats(space.decay_H),
            floats(space.bias_H),
            floats(space.skip_H),
            *space.limits,
            floats(state_SHNP),
            *addresses(rows),
            n_rows,
            n_heads,
            space.n_groups,
            n_state,
            dim,
        )
        return out_TC.view(n_rows, n_heads, dim)

    def group_norm(self, x_TGV: Tensor, gate_TGV: Tensor, weight_GV: Tensor, eps: float) -> Tensor:
        """See `Ops.group_norm`."""
        n_rows, n_groups, dim = x_TGV.shape
        assert dim % 16 == 0 and gate_TGV.shape == x_TGV.shape
        assert weight_GV.shape == x_TGV.shape[1:]
        out_TGV = self.empty(x_TGV.shape, x_TGV.dtype)
        _core.group_norm(
            self._target(x_TGV, gate_TGV, weight_GV, out_TGV),
            matrix(x_TGV),
            matrix(gate_TGV),
            matrix(out_TGV),
            floats(weight_GV),
            eps,
            n_rows,
            n_groups,
            dim,
        )
        return out_TGV

    def route_sigmoid(self, scores_TE: Tensor, router: SigmoidRouter) -> tuple[Tensor, Tensor]:
        """See `Ops.route_sigmoid`."""
        n_rows, n_experts = scores_TE.shape
        assert scores_TE.dtype == torch.float32 and n_experts % router.n_groups == 0
        assert router.bias_E.shape == (n_experts,)
        ids_TA = self.empty((n_rows, router.top_k), torch.int32)
        weights_TA = self.empty((n_rows, router.top_k), torch.float32)
        _core.sigmoid_top(
            self._target(scores_TE, router, ids_TA, weights_TA),
            matrix(scores_TE),
            floats(router.bias_E),
            ids_TA.data_ptr(),
            weights_TA.data_ptr(),
            router.scale,
            router.normalise,
            router.top_k,
            router.n_groups,
            router.top_groups,
            n_rows,
            n_experts,
        )
        return ids_TA, weights_TA
