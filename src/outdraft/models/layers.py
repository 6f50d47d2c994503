"""Pieces that several models share: attention as a callback, rotary tables.

Shapes: T rows, H query heads, G key/value heads, D head dimension.
"""

from typing import Protocol

import torch
from torch import Tensor

from outdraft.ops.base import Heads


class Attend(Protocol):
    """Attention as a model sees it: somebody else owns the keys, values and visibility.

    The caller of `forward` provides it: the engine binds it to paged memory, the trainer to whole
    sequences.
    """

    def __call__(self, layer: int, q_THD: Tensor, k: Heads | None, v: Heads | None, /) -> Tensor:
        """Store k and v (None: the layer reads another layer's) and attend; [T, H, D]."""
        ...


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
