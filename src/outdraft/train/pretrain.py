"""Pre-training of a target: the next token of text, by cross-entropy.

Shapes: B windows, S tokens each, T = B * S rows, K hidden size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.ops.batched import BatchedOps
from outdraft.train.attention import SequenceAttention
from outdraft.train.losses import cross_entropy
from outdraft.train.tokenizer import BOS_ID
from outdraft.train.weights import compute_in, trainable
from outdraft.train.windows import Windows

_HELDOUT_BATCH = 8


class Pretraining:
    """Next-token prediction on windows of text (an `Objective`)."""

    def __init__(
        self,
        config: Gemma4Config,
        weights: Mapping[str, Tensor],
        windows: Windows,
        batch: int,
        dtype: torch.dtype,
    ) -> None:
        """`weights`: leaves that may want gradients, by canonical name; `dtype`: of products."""
        self.config = config
        self.all_weights = weights
        self.weights = trainable(weights)
        self.windows = windows
        self.batch = batch
        self.dtype = dtype
        self.tokens_per_step = batch * windows.context

    def loss(self, step: int) -> Tensor:
        """See `Objective.loss`; nats per token."""
        return next_token_loss(
            self.config, self.all_weights, self.windows.batch(step, self.batch), self.dtype
        )


def next_token_loss(
    config: Gemma4Config, weights: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Mean cross-entropy of windows int64 [B, S + 1] in nats per token."""
    device = weights["embed_tokens.weight"].device
    ids = ids.to(device)
    with torch.device(device), compute_in(dtype, device):
        model = Gemma4(config, weights, BatchedOps())
        hidden_TK, _ = run_target(model, ids[:, :-1])
        return cross_entropy(hidden_TK, ids[:, 1:].reshape(-1), model.logits)


def run_target(model: Gemma4, ids_BS: Tensor) -> tuple[Tensor, SequenceAttention]:
    """Final hidden states [T, K] of whole sequences, and their keys and values."""
    n_sequences, length = ids_BS.shape
    attention = SequenceAttention(model.config, n_sequences, length)
    positions_T = torch.arange(length).repeat(n_sequences)
    return model.forward(ids_BS.reshape(-1), positions_T, attention), attention


@torch.no_grad()
def heldout_loss(
    config: Gemma4Config, weights: Mapping[str, Tensor], stream_N: Tensor, context: int
) -> float:
    """Mean loss over a token stream in windows without overlap, fp32, nats per token."""
    length = min(context, len(stream_N))
    n_windows = len(stream_N) // length
    text = stream_N[: n_windows * length].view(n_windows, length).long()
    bos = torch.full((n_windows, 1), BOS_ID)
    ids = torch.cat((bos, text), dim=1)
    losses = [
        float(next_token_loss(config, weights, part, torch.float32)) * len(part)
        for part in torch.split(ids, _HELDOUT_BATCH)
    ]
    return sum(losses) / n_windows
