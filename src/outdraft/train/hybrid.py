"""Qwen 3.5 in training: its attention and its recurrence over whole sequences, its first weights.

Here: the `Attend` and `Recurs` callbacks of the model and of its head. Not here: the model
(models/qwen3_5.py), the losses (mtp.py).

Shapes: B sequences, S tokens each, T = B * S flat rows, H heads, C channels, K and V dimensions of
a head, D dimension of an attention head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.models.qwen3_5_config import DeltaShape
from outdraft.ops.base import Heads
from outdraft.ops.batched import BatchedOps
from outdraft.ops.recurrent_base import DeltaNet
from outdraft.train.attention import split_sequences
from outdraft.train.delta import causal_conv, chunked_delta_rule
from outdraft.weights.load import ExpectedTensor

_OPS = BatchedOps()
_MOST_DECAY = 16.0
_STEPS = (1e-3, 0.1)


@dataclass(frozen=True, slots=True)
class SequenceLayers:
    """`Attend` and `Recurs` over B sequences of equal length, each from its beginning."""

    n_sequences: int
    delta: DeltaShape

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`. Queries are scaled already."""
        assert k is not None and v is not None
        q_THD = q.value(_OPS)
        q_BHSD, keys, values = (
            split_sequences(x, self.n_sequences) for x in (q_THD, k.value(_OPS), v.value(_OPS))
        )
        group = q_BHSD.shape[1] // keys.shape[1]
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD,
            keys.repeat_interleave(group, dim=1),
            values.repeat_interleave(group, dim=1),
            is_causal=True,
            scale=1.0,
        )
        return out_BHSD.transpose(1, 2).flatten(0, 1)

    def recur(self, layer: int, x_TC: Tensor, a_TH: Tensor, b_TH: Tensor, net: DeltaNet) -> Tensor:
        """See `Recurs`; in fp32 or wider whatever products are computed in."""
        with torch.autocast(x_TC.device.type, enabled=False):
            return self._recur(x_TC, a_TH, b_TH, net)

    def _recur(self, x_TC: Tensor, a_TH: Tensor, b_TH: Tensor, net: DeltaNet) -> Tensor:
        wide = torch.promote_types(x_TC.dtype, torch.float32)
        shape, n_rows = self.delta, x_TC.shape[0]
        x_BSC = x_TC.to(wide).view(self.n_sequences, -1, shape.channels)
        mixed_TC = causal_conv(x_BSC, net.conv_WC).reshape(n_rows, -1)
        keys = shape.n_k_heads * shape.k_dim
        sizes = [keys, keys, shape.n_v_heads * shape.v_dim]
        q, k, v = torch.split(mixed_TC, sizes, dim=1)
        group = shape.n_v_heads // shape.n_k_heads
        q_BHSK, k_BHSK = (
            split_sequences(unit(x.view(n_rows, -1, shape.k_dim)), self.n_sequences)
            .repeat_interleave(group, dim=1)
            for x in (q, k)
        )  # fmt: skip
        log_decay_TH = net.gates.decay_H * F.softplus(a_TH.to(wide) + net.gates.bias_H)
        out_BHSV = chunked_delta_rule(
            q_BHSK,
            k_BHSK,
            split_sequences(v.reshape(n_rows, -1, shape.v_dim), self.n_sequences),
            self._by_head(log_decay_TH),
            self._by_head(torch.sigmoid(b_TH.to(wide))),
        )
        return out_BHSV.transpose(1, 2).reshape(n_rows, -1, shape.v_dim)

    def _by_head(self, x_TH: Tensor) -> Tensor:
        return x_TH.view(self.n_sequences, -1, x_TH.shape[1]).transpose(1, 2)


def unit(x_THK: Tensor) -> Tensor:
    """Each head's vector at length one, as `Ops.delta_rule` does."""
    return x_THK * torch.rsqrt(x_THK.square().sum(dim=-1, keepdim=True) + 1e-6)


def fresh_hybrid(expected: Mapping[str, ExpectedTensor], seed: int) -> dict[str, Tensor]:
    """Initial fp32 weights by canonical name, of the model or of its head.

    Matrices have a standard deviation of 1 / sqrt(inputs), the embedding 0.02; norms that apply
    1 + w are zero. Decays are spread as in Mamba 2 (Dao and Gu 2024, arXiv:2405.21060): A uniform
    to 16, step sizes log-uniform from 0.001 to 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _fresh(name, tensor.shape, generator) for name, tensor in expected.items()}


def _fresh(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("A_log"):
        return (_MOST_DECAY * (1 - torch.rand(shape, generator=generator))).log()
    if name.endswith("dt_bias"):
        low, high = (math.log(step) for step in _STEPS)
        step = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
        return step + (-torch.expm1(-step)).log()  # softplus gives the step back
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("linear_attn.norm.weight") else torch.zeros(shape)
    spread = 0.02 if name == "embed_tokens.weight" else shape[-1] ** -0.5
    return spread * torch.randn(shape, generator=generator)
