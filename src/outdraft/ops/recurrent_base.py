"""The operations of recurrent layers: the part of the interface `Ops` (base.py) that is theirs.

Shapes: T rows, C channels and W width of the convolution, S states, H heads, K and V dimensions of
a head (delta rule), N numbers of a state for each of P inputs of a head (Mamba 2), G groups of V.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StateRows:
    """Where recurrent states come from and go to; all int32.

    Rows of a sequence lie together, in order. The first of them continues from state `read_T[t]`
    (-1: zeros), each other from the row before it; the state after row t is put into
    `write_T[t]` unless that is -1. No row reads what another row of the call writes.
    """

    sequence_T: Tensor
    read_T: Tensor
    write_T: Tensor


@dataclass(frozen=True, slots=True)
class DeltaGates:
    """Of a gated delta rule's heads, fp32 [H]: -exp(A_log), and dt_bias."""

    decay_H: Tensor
    bias_H: Tensor


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Weights of a gated delta rule's recurrence: convolution fp32 [W, C], gates, key heads."""

    conv_WC: Tensor
    gates: DeltaGates
    n_k_heads: int


@dataclass(frozen=True, slots=True)
class StateSpace:
    """Weights of a Mamba 2 layer's recurrence; all fp32.

    Convolution [W, C] and its bias [C] or None; `decay_H` is -exp(A_log); time steps are kept
    within `limits`. The C channels are H heads of P inputs, then `n_groups` of N numbers that lead
    into the state, then as many that lead out of it.
    """

    conv_WC: Tensor
    conv_bias_C: Tensor | None
    decay_H: Tensor
    bias_H: Tensor
    skip_H: Tensor
    n_groups: int
    limits: tuple[float, float]


class RecurrentOps(Protocol):
    """See the module docstring. Row-invariant, as all of `Ops`."""

    def short_conv(
        self,
        x_TC: Tensor,
        weight_WC: Tensor,
        state_SWC: Tensor,
        rows: StateRows,
        bias_C: Tensor | None = None,
    ) -> Tensor:
        """silu of a causal convolution over rows, each channel by itself; fp32 [T, C].

        Args:
            x_TC: inputs.
            weight_WC: fp32; the last row is for the newest input.
            state_SWC: fp32 [S, W - 1, C], the inputs before, oldest first.
            rows: where they are.
            bias_C: fp32, added before silu.
        """
        ...

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
        """The gated delta rule (Yang et al. 2024, arXiv:2412.06464), row by row; fp32 [T, H, V].

        With q and k of unit length, g = exp(decay * softplus(a + bias)) and beta = sigmoid(b): the
        state S [K, V] becomes g S + k (beta (v - g k S)), and the output is q S / sqrt(K).

        Args:
            qkv_TC: n_k_heads queries, as many keys, H values, one head after another.
            state_SHKV: fp32.
        """
        ...

    def gated_norm(self, x_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
        """RMS norm over each head times the fp32 weight times silu(gate); [T, H, V]."""
        ...

    def scan(
        self, x_TC: Tensor, dt_TH: Tensor, space: StateSpace, state_SHNP: Tensor, rows: StateRows
    ) -> Tensor:
        """The recurrence of Mamba 2 (Dao, Gu 2024, arXiv:2405.21060), row by row; fp32 [T, H, P].

        With d = softplus(dt + bias) within the limits, the state S [N, P] of a head becomes
        exp(d decay) S + b (d x), and the output is c S + skip x.

        Args:
            x_TC: behind the convolution, channels as in `StateSpace`.
            state_SHNP: fp32.
        """
        ...

    def group_norm(self, x_TGV: Tensor, gate_TGV: Tensor, weight_GV: Tensor, eps: float) -> Tensor:
        """RMS norm over each group of x silu(gate), times the fp32 weight; [T, G, V]."""
        ...
