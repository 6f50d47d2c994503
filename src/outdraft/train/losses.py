"""Training losses over a vocabulary, computed in chunks of rows.

A chunk's fp32 scores live only while its loss is computed, once forward and once backward, so that
scores of all rows at once are never in memory. Not here: which rows and targets (the objectives).

Shapes: T rows, K hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 2048
STEP_DECAY = 0.8
"""Weight of a draft step relative to the one before it (0.6 to 0.8 are published, EAGLE-3: 0.8)."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [T, K] -> fp32 scores [T, V]."""


def cross_entropy(hidden_TK: Tensor, targets_T: Tensor, head: Head) -> Tensor:
    """Mean over rows of -log q(target), q = softmax(head(hidden)), in nats."""

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden), targets, reduction="sum")

    return _mean_of_chunks(chunk, hidden_TK, targets_T)


def kl_divergence(hidden_TK: Tensor, target_logits_TV: Tensor, head: Head) -> Tensor:
    """Mean over rows of KL(p || q), p = softmax(target logits), q = softmax(head(hidden)), nats.

    No gradient reaches the target's logits.
    """

    def chunk(hidden: Tensor, target_logits: Tensor) -> Tensor:
        log_p = F.log_softmax(target_logits.float(), dim=-1)
        log_q = F.log_softmax(head(hidden), dim=-1)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    return _mean_of_chunks(chunk, hidden_TK, target_logits_TV.detach())


def step_weights(n_steps: int, decay: float = STEP_DECAY) -> list[float]:
    """Weights decay^k of the steps of a round, scaled to sum to one."""
    raw = [decay**k for k in range(n_steps)]
    return [weight / sum(raw) for weight in raw]


def _mean_of_chunks(
    chunk: Callable[[Tensor, Tensor], Tensor], hidden_TK: Tensor, targets: Tensor
) -> Tensor:
    n_rows = hidden_TK.shape[0]
    total = hidden_TK.new_zeros((), dtype=torch.float32)
    for start in range(0, n_rows, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        total = total + checkpoint(
            chunk, hidden_TK[rows], targets[rows], use_reentrant=False, preserve_rng_state=False
        )
    return total / n_rows
