"""Recurrent layers, and routing by sigmoids, in plain PyTorch: the specification of these `Ops`.

Row after row with operations of one shape: PyTorch's elementwise loops and sums have other low bits
in other shapes. Shapes: as in ops/recurrent.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import SigmoidRouter
from outdraft.ops.recurrent_base import DeltaGates, StateRows, StateSpace


def short_conv(
    x_TC: Tensor,
    weight_WC: Tensor,
    state_SWC: Tensor,
    rows: StateRows,
    bias_C: Tensor | None = None,
) -> Tensor:
    """See `Ops.short_conv`."""
    wide = torch.promote_types(x_TC.dtype, torch.float32)
    out, window = [], state_SWC.new_zeros(0)
    for t, (begins, read, write) in enumerate(_each(rows)):
        if begins:
            window = state_SWC[read] if read >= 0 else torch.zeros_like(state_SWC[0])
        window = torch.cat((window.to(wide), x_TC[t : t + 1].to(wide)))
        mixed_C = (window * weight_WC).sum(dim=0)
        out.append(F.silu(mixed_C if bias_C is None else mixed_C + bias_C))
        window = window[1:]
        if write >= 0:
            state_SWC[write] = window
    return torch.stack(out)


def delta_rule(
    qkv_TC: Tensor,
    a_TH: Tensor,
    b_TH: Tensor,
    gates: DeltaGates,
    state_SHKV: Tensor,
    rows: StateRows,
    n_k_heads: int,
) -> Tensor:
    """See `Ops.delta_rule`."""
    _, n_heads, k_dim, v_dim = state_SHKV.shape
    wide = torch.promote_types(qkv_TC.dtype, torch.float32)
    keys = n_k_heads * k_dim
    group = n_heads // n_k_heads
    out, state = [], torch.zeros_like(state_SHKV[0])
    for t, (begins, read, write) in enumerate(_each(rows)):
        if begins:
            state = state_SHKV[read] if read >= 0 else torch.zeros_like(state_SHKV[0])
        row_C = qkv_TC[t].to(wide)
        q, k, v = row_C[:keys], row_C[keys : 2 * keys], row_C[2 * keys :]
        q_HK1 = _unit(q.view(n_k_heads, k_dim)).repeat_interleave(group, dim=0)[..., None]
        k_HK1 = _unit(k.view(n_k_heads, k_dim)).repeat_interleave(group, dim=0)[..., None]
        kept_H = torch.exp(gates.decay_H * F.softplus(a_TH[t].to(wide) + gates.bias_H))
        beta_H = torch.sigmoid(b_TH[t].to(wide))
        state = state * kept_H[:, None, None]
        change_HV = (v.view(n_heads, v_dim) - (state * k_HK1).sum(dim=1)) * beta_H[:, None]
        state = state + k_HK1 * change_HV[:, None, :]
        out.append((state * (q_HK1 * k_dim**-0.5)).sum(dim=1))
        if write >= 0:
            state_SHKV[write] = state
    return torch.stack(out)


def gated_norm(x_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """See `Ops.gated_norm`."""
    wide = torch.promote_types(x_THV.dtype, torch.float32)
    out = []
    for x_HV, gate_HV in zip(x_THV.to(wide), gate_THV.to(wide), strict=True):
        normed = x_HV * torch.rsqrt(x_HV.square().mean(dim=-1, keepdim=True) + eps) * weight_V
        out.append(normed * F.silu(gate_HV))
    return torch.stack(out).to(x_THV.dtype)


def scan(
    x_TC: Tensor, dt_TH: Tensor, space: StateSpace, state_SHNP: Tensor, rows: StateRows
) -> Tensor:
    """See `Ops.scan`."""
    _, n_heads, n_state, dim = state_SHNP.shape
    wide = torch.promote_types(x_TC.dtype, torch.float32)
    inputs, group = n_heads * dim, n_heads // space.n_groups
    out, state = [], torch.zeros_like(state_SHNP[0])
    for t, (begins, read, write) in enumerate(_each(rows)):
        if begins:
            state = state_SHNP[read] if read >= 0 else torch.zeros_like(state_SHNP[0])
        x_HP = x_TC[t, :inputs].to(wide).view(n_heads, dim)
        pair = x_TC[t, inputs:].to(wide).view(2, space.n_groups, n_state, 1)
        b_HN1, c_HN1 = pair.repeat_interleave(group, dim=1)
        step_H = F.softplus(dt_TH[t].to(wide) + space.bias_H).clamp(*space.limits)
        state = state * torch.exp(step_H * space.decay_H)[:, None, None]
        state = state + b_HN1 * (x_HP * step_H[:, None])[:, None, :]
        out.append((state * c_HN1).sum(dim=1) + space.skip_H[:, None] * x_HP)
        if write >= 0:
            state_SHNP[write] = state
    return torch.stack(out)


def group_norm(x_TGV: Tensor, gate_TGV: Tensor, weight_GV: Tensor, eps: float) -> Tensor:
    """See `Ops.group_norm`."""
    wide = torch.promote_types(x_TGV.dtype, torch.float32)
    out = []
    for x_GV, gate_GV in zip(x_TGV.to(wide), gate_TGV.to(wide), strict=True):
        open_GV = x_GV * F.silu(gate_GV)
        scale_G1 = torch.rsqrt(open_GV.square().mean(dim=-1, keepdim=True) + eps)
        out.append(open_GV * scale_G1 * weight_GV)
    return torch.stack(out).to(x_TGV.dtype)


def route_sigmoid(scores_TE: Tensor, router: SigmoidRouter) -> tuple[Tensor, Tensor]:
    """See `Ops.route_sigmoid`."""
    ids, weights = [], []
    for scores_E in scores_TE:
        open_E = torch.sigmoid(scores_E)
        choice_E = open_E + router.bias_E
        if router.n_groups > 1:
            choice_GE = choice_E.view(router.n_groups, -1)
            best_G = choice_GE.topk(2, dim=-1).values.sum(dim=-1)
            order_G = best_G.sort(descending=True, stable=True).indices
            hidden_GE = torch.full_like(choice_GE, float("-inf"))
            kept_G = order_G[: router.top_groups]
            hidden_GE[kept_G] = choice_GE[kept_G]
            choice_E = hidden_GE.flatten()
        ids_A = choice_E.sort(descending=True, stable=True).indices[: router.top_k]
        weights_A = open_E[ids_A]
        if router.normalise:
            weights_A = weights_A / (weights_A.sum() + 1e-20)
        ids.append(ids_A.int())
        weights.append(weights_A * router.scale)
    return torch.stack(ids), torch.stack(weights)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def _each(rows: StateRows) -> list[tuple[bool, int, int]]:
    """Of each row: whether a sequence begins with it, the state it reads, the one it writes."""
    names = rows.sequence_T.tolist()
    begins = [t == 0 or name != names[t - 1] for t, name in enumerate(names)]
    return list(zip(begins, rows.read_T.tolist(), rows.write_T.tolist(), strict=True))


class RecurrentReference:
    """The functions above as methods of `ReferenceOps`."""

    __slots__ = ()

    def short_conv(
        self,
        x_TC: Tensor,
        weight_WC: Tensor,
        state_SWC: Tensor,
        rows: StateRows,
        bias_C: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.short_conv`."""
        return short_conv(x_TC, weight_WC, state_SWC, rows, bias_C)

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
        return delta_rule(qkv_TC, a_TH, b_TH, gates, state_SHKV, rows, n_k_heads)

    def gated_norm(self, x_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
        """See `Ops.gated_norm`."""
        return gated_norm(x_THV, gate_THV, weight_V, eps)

    def scan(
        self, x_TC: Tensor, dt_TH: Tensor, space: StateSpace, state_SHNP: Tensor, rows: StateRows
    ) -> Tensor:
        """See `Ops.scan`."""
        return scan(x_TC, dt_TH, space, state_SHNP, rows)

    def group_norm(self, x_TGV: Tensor, gate_TGV: Tensor, weight_GV: Tensor, eps: float) -> Tensor:
        """See `Ops.group_norm`."""
        return group_norm(x_TGV, gate_TGV, weight_GV, eps)

    def route_sigmoid(self, scores_TE: Tensor, router: SigmoidRouter) -> tuple[Tensor, Tensor]:
        """See `Ops.route_sigmoid`."""
        return route_sigmoid(scores_TE, router)
