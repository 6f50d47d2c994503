"""The gated delta rule over whole sequences, differentiable: in parallel within chunks of tokens.

With S the state, g the decay, u_t = beta_t (v_t - g_t S_{t-1}^T k_t) and G_t the product of the
decays since the chunk began, the rule of `Ops.delta_rule` unrolls to

    S_t = G_t S_0 + sum over j <= t of (G_t / G_j) k_j u_j^T
    u_t = beta_t (v_t - G_t S_0^T k_t - sum over j < t of (G_t / G_j) (k_t . k_j) u_j)

so all u of a chunk solve one unit lower triangular system (the WY form of Yang et al. 2024,
arXiv:2412.06464). Here: that, and the convolution before it. Not here: the rule row by row
(ops/recurrent_reference.py), projections and gates (models/qwen3_5.py).

Shapes: B sequences, S tokens each, C channels, W width of the convolution, H heads, K and V
dimensions of a head, M = B * H, N chunks, L tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def causal_conv(x_BSC: Tensor, weight_WC: Tensor) -> Tensor:
    """silu of a causal convolution of each channel, from zeros on; [B, S, C].

    The last row of the weight is for the newest token.
    """
    padded_BC1S = F.pad(x_BSC, (0, 0, weight_WC.shape[0] - 1, 0)).transpose(1, 2)[:, :, None]
    # Channels last in memory, as the input is, is several times as fast as torch's conv1d.
    weight_C11W = weight_WC.t()[:, None, None].contiguous(memory_format=torch.channels_last)
    mixed_BC1S = F.conv2d(padded_BC1S, weight_C11W, groups=weight_WC.shape[1])
    return F.silu(mixed_BC1S[:, :, 0].transpose(1, 2))


def chunked_delta_rule(
    q_BHSK: Tensor,
    k_BHSK: Tensor,
    v_BHSV: Tensor,
    log_decay_BHS: Tensor,
    beta_BHS: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """Outputs [B, H, S, V] of the rule from states of zeros on.

    Args:
        q_BHSK, k_BHSK: of unit length.
        log_decay_BHS: at most zero.
        beta_BHS: what part of a change is made.
        chunk: tokens that are computed in parallel.
    """
    n_sequences, n_heads, length, k_dim = q_BHSK.shape
    rows = n_sequences * n_heads

    def chunks(x: Tensor) -> Tensor:
        rest = (0,) * (2 * (x.ndim - 3))
        padded = F.pad(x, (*rest, 0, -length % chunk))
        return padded.reshape(rows, -1, chunk, *x.shape[3:])

    q, k, v = chunks(q_BHSK), chunks(k_BHSK), chunks(v_BHSV)
    beta = chunks(beta_BHS)[..., None]
    decayed_MNL = chunks(log_decay_BHS).cumsum(dim=-1)
    kept = decayed_MNL.exp()[..., None]
    between = decayed_MNL[..., :, None] - decayed_MNL[..., None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    ratio = between.masked_fill(later, -torch.inf).exp()
    keys = k @ k.transpose(-1, -2)
    system = (beta * ratio * keys).tril(-1)
    right = torch.cat((beta * v, beta * kept * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, old = solved.split((v.shape[-1], k_dim), dim=-1)
    scores = ratio * (q @ k.transpose(-1, -2))
    carried = (k * (decayed_MNL[..., -1:] - decayed_MNL).exp()[..., None]).transpose(-1, -2)
    out = _over_chunks(q * kept, scores, new, old, carried, kept[:, :, -1:])
    out_BHSV = out.view(n_sequences, n_heads, -1, v.shape[-1])[:, :, :length]
    return out_BHSV.mul(k_dim**-0.5)


def _over_chunks(
    q: Tensor, scores: Tensor, new: Tensor, old: Tensor, carried: Tensor, kept: Tensor
) -> Tensor:
    """Outputs [M, N, L, V], chunk after chunk; the state goes from each to the next."""
    state = new.new_zeros(new.shape[0], q.shape[-1], new.shape[-1])
    out = []
    parts = (x.unbind(dim=1) for x in (q, scores, new, old, carried, kept))
    for q_n, scores_n, new_n, old_n, carried_n, kept_n in zip(*parts, strict=True):
        change = new_n - old_n @ state
        out.append(q_n @ state + scores_n @ change)
        state = kept_n * state + carried_n @ change
    return torch.stack(out, dim=1)
