"""Attention over whole sequences for training: the `Attend` callbacks of target and assistant.

Here: visibility of keys and the reshaping between flat rows and sequences. Not here: attention over
paged memory (ops/, cache/). Scores are not scaled: Gemma 4 norms queries and keys instead.

Shapes: B sequences, S tokens each, T = B * S flat rows, H query heads, G key/value heads, D head
dimension, Q queries and N keys of one sequence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.models.gemma4_config import Gemma4Config, LayerKind
from outdraft.ops.base import Heads
from outdraft.ops.batched import BatchedOps

OPS = BatchedOps()


@dataclass(frozen=True, slots=True)
class KeysValues:
    """One layer's keys (after norm and RoPE) and values (after norm), [B, G, S, D]."""

    k_BGSD: Tensor
    v_BGSD: Tensor

    def detach(self) -> "KeysValues":
        """The same without a gradient."""
        return KeysValues(self.k_BGSD.detach(), self.v_BGSD.detach())


def visible_keys(n_queries: int, n_keys: int, window: int | None) -> Tensor:
    """True where query i may see key j: bool [Q, N].

    j <= i, and in sliding layers only the last `window` of these. It is the target's own mask (its
    row i sees itself) and the assistant's (anchor i stands at position i + 1 and sees keys to i).
    """
    query = torch.arange(n_queries)[:, None]
    key = torch.arange(n_keys)[None, :]
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


class SequenceAttention:
    """The target's `Attend` over B sequences of equal length.

    After a forward pass, `keys_values` holds those of every layer that owns them.
    """

    def __init__(self, config: Gemma4Config, n_sequences: int, length: int) -> None:
        self.config = config
        self.n_sequences = n_sequences
        self.keys_values: dict[int, KeysValues] = {}
        self.masks = kind_masks(config, length)

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`."""
        if k is not None and v is not None:
            self.keys_values[layer] = KeysValues(
                split_sequences(k.value(OPS), self.n_sequences),
                split_sequences(v.value(OPS), self.n_sequences),
            )
        source = self.keys_values[self.config.kv_source(layer)]
        return attend(q.value(OPS), source, self.masks[self.config.layer_types[layer]])


class FrozenAttention:
    """The assistant's `Attend`: A anchors a sequence over the target's frozen keys and values.

    Anchors are the first A positions of every sequence; anchor t sees keys 0 .. t, in sliding
    layers the last `window` of them.
    """

    def __init__(
        self, config: Gemma4Config, keys_values: dict[LayerKind, KeysValues], n_anchors: int
    ) -> None:
        """`config`: the assistant's own layers; `keys_values`: the target's last, by kind."""
        self.config = config
        # No anchor sees a key beyond the last anchor.
        self.keys_values = {
            kind: KeysValues(kv.k_BGSD[:, :, :n_anchors], kv.v_BGSD[:, :, :n_anchors]).detach()
            for kind, kv in keys_values.items()
        }
        self.masks = kind_masks(config, n_anchors)

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`."""
        assert k is None and v is None
        kind = self.config.layer_types[layer]
        return attend(q.value(OPS), self.keys_values[kind], self.masks[kind])


def kind_masks(config: Gemma4Config, length: int) -> dict[LayerKind, Tensor]:
    """What each kind of layer sees in a sequence of this length: bool [S, S]."""
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {
        kind: visible_keys(length, length, windows[kind])
        for kind in dict.fromkeys(config.layer_types)
    }


def attend(q_THD: Tensor, keys_values: KeysValues, visible_QN: Tensor | None) -> Tensor:
    """Softmax attention of each sequence's queries over its own keys, flat rows [T, H, D].

    `visible_QN` None lets every query see every key.
    """
    q_BHQD = split_sequences(q_THD, keys_values.k_BGSD.shape[0])
    group = q_BHQD.shape[1] // keys_values.k_BGSD.shape[1]
    out_BHQD = F.scaled_dot_product_attention(
        q_BHQD,
        keys_values.k_BGSD.repeat_interleave(group, dim=1),
        keys_values.v_BGSD.repeat_interleave(group, dim=1),
        attn_mask=visible_QN,
        scale=1.0,
    )
    return out_BHQD.transpose(1, 2).reshape(q_THD.shape)


def split_sequences(x_THD: Tensor, n_sequences: int) -> Tensor:
    """Flat rows [B * S, H, D] as [B, H, S, D]."""
    n_rows, n_heads, dim = x_THD.shape
    return x_THD.view(n_sequences, n_rows // n_sequences, n_heads, dim).transpose(1, 2)
