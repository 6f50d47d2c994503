"""Text that the target writes itself, for the assistant to learn from.

A drafter is used on what its target says, not on what people wrote. Here: a plain batched sampler
over sequences of equal length. Not here: the engine, which is exact but does few sequences at once.

Shapes: B sequences, S tokens, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.ops.base import Heads
from outdraft.ops.batched import BatchedOps
from outdraft.train.attention import OPS, KeysValues, attend
from outdraft.train.weights import compute_in

TEMPERATURES = (0.0, 0.0, 0.4, 0.7, 1.0)
"""Of the sequences in turn; greedy text twice, being what a drafter is asked for most."""

PROMPT_SHARE = 4
"""Given tokens are at most one part in this many of a sequence."""


@dataclass(slots=True)
class Rollouts:
    """Writes windows: int64 [B, S + 1] that begin like the given ones and go on as the target does.

    Row b of the batch has temperature `TEMPERATURES[b % 5]`; the number of given tokens is drawn
    for each row. The result depends on the weights, the windows and the seed alone.
    """

    config: Gemma4Config
    weights: Mapping[str, Tensor]
    dtype: torch.dtype

    @torch.no_grad()
    def write(self, windows_BS: Tensor, seed: int, check: Callable[[], None]) -> Tensor:
        """`check` is called before every token, and may raise to stop."""
        device = self.weights["embed_tokens.weight"].device
        generator = torch.Generator(device).manual_seed(seed)
        n_sequences, length = windows_BS.shape
        most_given = max(2, length // PROMPT_SHARE)
        given_B = torch.randint(1, most_given, (n_sequences,), generator=generator, device=device)
        ids_BS = windows_BS.to(device, copy=True)
        with torch.device(device), compute_in(self.dtype, device):
            model = Gemma4(self.config, self.weights, BatchedOps())
            attention = CachedAttention(self.config, n_sequences, length)
            for at in range(length - 1):
                check()
                attention.position = at
                positions_B = torch.full((n_sequences,), at)
                hidden_BK = model.forward(ids_BS[:, at], positions_B, attention)
                written_B = choose(model.logits(hidden_BK), generator)
                ids_BS[:, at + 1] = torch.where(at + 1 <= given_B, ids_BS[:, at + 1], written_B)
        return ids_BS.cpu()


class CachedAttention:
    """`Attend` for one new token of every sequence, all at `position`, over the tokens before."""

    def __init__(self, config: Gemma4Config, n_sequences: int, length: int) -> None:
        self.config = config
        self.n_sequences = n_sequences
        self.length = length
        self.position = 0
        self.keys_values: dict[int, KeysValues] = {}

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`."""
        if k is not None and v is not None:
            self._store(layer, k.value(OPS), v.value(OPS))
        cache = self.keys_values[self.config.kv_source(layer)]
        sliding = self.config.layer_types[layer] == "sliding_attention"
        first = max(0, self.position + 1 - self.config.sliding_window) if sliding else 0
        seen = slice(first, self.position + 1)
        keys_values = KeysValues(cache.k_BGSD[:, :, seen], cache.v_BGSD[:, :, seen])
        return attend(q.value(OPS), keys_values, None)

    def _store(self, layer: int, k_BGD: Tensor, v_BGD: Tensor) -> None:
        if layer not in self.keys_values:
            shape = (self.n_sequences, k_BGD.shape[1], self.length, k_BGD.shape[2])
            self.keys_values[layer] = KeysValues(k_BGD.new_empty(shape), v_BGD.new_empty(shape))
        cache = self.keys_values[layer]
        cache.k_BGSD[:, :, self.position] = k_BGD
        cache.v_BGSD[:, :, self.position] = v_BGD


def choose(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """The next token of every row at its temperature: int64 [B]."""
    n_rows = logits_BV.shape[0]
    heat_B = torch.tensor([TEMPERATURES[b % len(TEMPERATURES)] for b in range(n_rows)])
    probs_BV = torch.softmax(logits_BV / heat_B.clamp(min=0.01)[:, None], dim=-1)
    drawn_B = torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
    return torch.where(heat_B == 0, logits_BV.argmax(dim=-1), drawn_B)
