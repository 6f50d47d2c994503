"""Pieces that several models share: what a target is, attention as a callback, rotary tables.

Shapes: T rows, H query heads, G key/value heads, D head dimension.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from outdraft.errors import ModelError
from outdraft.ops.base import Activation, Fuses, Heads, Ops, Weight
from outdraft.ops.recurrent_base import DeltaNet, StateSpace


class Attend(Protocol):
    """Attention as a model sees it: somebody else owns the keys, values and visibility.

    The caller of `forward` provides it: the engine binds it to paged memory, the trainer to whole
    sequences.
    """

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """Store k and v (None: the layer reads another layer's) and attend; [T, H, D]."""
        ...


@runtime_checkable
class Recurs(Protocol):
    """What an `Attend` over memory with recurrent layers can do beside."""

    def recur(self, layer: int, x_TC: Tensor, a_TH: Tensor, b_TH: Tensor, net: DeltaNet) -> Tensor:
        """Convolution and gated delta rule from the layer's states on, fp32 [T, H, V]."""
        ...


@runtime_checkable
class Scans(Protocol):
    """As `Recurs`, for layers of Mamba 2."""

    def scan(self, layer: int, x_TC: Tensor, dt_TH: Tensor, space: StateSpace) -> Tensor:
        """Convolution and Mamba 2 recurrence from the layer's states on, fp32 [T, H, P]."""
        ...


class TargetConfig(Protocol):
    """What the engine reads of any family's config."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence the model was made for."""
        ...

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Head dimensions that its layers have."""
        ...

    @property
    def dtype(self) -> str:
        """Type of the checkpoint's weights."""
        ...


class TargetModel(Protocol):
    """A model that generates: tokens to hidden states, hidden states to scores."""

    @property
    def ops(self) -> Ops:
        """What it computes with."""
        ...

    def embed(self, token_T: Tensor) -> Tensor:
        """Input embeddings [T, K]."""
        ...

    def forward(self, token_T: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, K]."""
        ...

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """fp32 logits [R, V] of final hidden states."""
        ...


def positive(config: Mapping[str, Any], key: str) -> int:
    """A field that is a positive whole number.

    Raises:
        ModelError: it is missing or is something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {key} is {value!r}", "it has to be a positive whole number")
    return value


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is when wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_frequencies(head_dim: int, theta: float, partial_rotary_factor: float) -> Tensor:
    """Angle per position of each of the D/2 pairs, fp32 [D/2]; pairs beyond the part stay still.

    "Proportional" RoPE of Gemma 4: the exponents run over the whole head dimension, and only the
    first `partial * D / 2` pairs turn (transformers `modeling_rope_utils.py`).
    """
    turning = int(partial_rotary_factor * head_dim // 2)
    exponent = torch.arange(0, 2 * turning, 2, dtype=torch.float32) / head_dim
    still = torch.zeros(head_dim // 2 - turning)
    return torch.cat((1.0 / theta**exponent, still))


def rotary_table(
    n_positions: int, inverse_D2: Tensor, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin for pairs (i, i + D/2) at positions 0 .. n - 1, each fp32 [n, D/2]."""
    angles = torch.arange(n_positions)[:, None].float() * inverse_D2[None, :]
    return angles.cos().to(device), angles.sin().to(device)


def gated_linear(
    ops: Ops, x_TK: Tensor, gate_up: Weight, inner: int, activation: Activation = "gelu_tanh"
) -> Tensor:
    """The first `inner` outputs of a linear gate the others; [T, inner]."""
    if isinstance(ops, Fuses):
        return ops.gated_linear(x_TK, gate_up, None, activation)
    both = ops.linear(x_TK, gate_up)
    return ops.gated(both[:, :inner], both[:, inner:], activation)
