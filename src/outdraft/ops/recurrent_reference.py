"""Recurrent layers in plain PyTorch: the specification of `Ops.short_conv` and its companions.

Row after row with operations of one shape: PyTorch's elementwise loops and sums have other low bits
in other shapes. Shapes: as in ops/recurrent.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import DeltaGates, StateRows


def short_conv(x_TC: Tensor, weight_WC: Tensor, state_SWC: Tensor, rows: StateRows) -> Tensor:
    """See `Ops.short_conv`."""
    wide = torch.promote_types(x_TC.dtype, torch.float32)
    out, window = [], state_SWC.new_zeros(0)
    for t, (begins, read, write) in enumerate(_each(rows)):
        if begins:
            window = state_SWC[read] if read >= 0 else torch.zeros_like(state_SWC[0])
        window = torch.cat((window.to(wide), x_TC[t : t + 1].to(wide)))
        out.append(F.silu((window * weight_WC).sum(dim=0)))
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


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def _each(rows: StateRows) -> list[tuple[bool, int, int]]:
    """Of each row: whether a sequence begins with it, the state it reads, the one it writes."""
    names = rows.sequence_T.tolist()
    begins = [t == 0 or name != names[t - 1] for t, name in enumerate(names)]
    return list(zip(begins, rows.read_T.tolist(), rows.write_T.tolist(), strict=True))
