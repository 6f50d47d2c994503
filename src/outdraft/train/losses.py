"""Training losses over a vocabulary, computed in chunks of rows.

Where rows make more than one chunk, a chunk's fp32 scores live only while its loss is computed,
once forward and once backward, so that scores of all rows at once are never in memory. Not here:
which rows and targets (the objectives).

Shapes: T rows, K hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 8192
STEP_DECAY = 0.8
"""Weight of a draft step relative to the one before it (0.6 to 0.8 are published, EAGLE-3: 0.8)."""

DRAFT_LOSSES = ("kl", "lk", "nla", "ce")

IGNORED = -100
"""A target whose row adds nothing to a cross-entropy."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [T, K] -> fp32 scores [T, V]."""


def cross_entropy(hidden_TK: Tensor, targets_T: Tensor, head: Head) -> Tensor:
    """Mean over rows of -log q(target), q = softmax(head(hidden)), in nats.

    Rows whose target is `IGNORED` count as zero.
    """

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden), targets, reduction="sum", ignore_index=IGNORED)

    return _mean_of_chunks(chunk, hidden_TK, targets_T)


def kl_divergence(hidden_TK: Tensor, probs_TV: Tensor, entropy_T: Tensor, head: Head) -> Tensor:
    """Mean over rows of KL(p || q), q = softmax(head(hidden)), in nats.

    p and its entropy are given, so that they are computed once for all steps of a round.
    """

    def chunk(hidden: Tensor, probs: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden), probs.float(), reduction="sum")

    return _mean_of_chunks(chunk, hidden_TK, probs_TV) - entropy_T.mean()


def draft_loss(kind: str, hidden_TK: Tensor, probs_TV: Tensor, head: Head) -> Tensor:
    """Mean over rows of a loss of the draft distribution q against the target's p, in nats.

    With a = sum of min(p, q), the acceptance probability of rejection sampling: `kl` KL(p || q);
    `ce` -log q(argmax p); `nla` -log a; `lk` w KL + (1 - w)(1 - a), w = exp(-3 a) held constant.
    """

    def chunk(hidden: Tensor, probs: Tensor) -> Tensor:
        log_q = F.log_softmax(head(hidden), dim=-1)
        p = probs.float()
        if kind == "ce":
            return F.nll_loss(log_q, p.argmax(dim=-1), reduction="sum")
        kl_T = (torch.xlogy(p, p) - p * log_q).sum(dim=-1)
        if kind == "kl":
            return kl_T.sum()
        accepted_T = torch.minimum(p, log_q.exp()).sum(dim=-1)
        if kind == "nla":
            return -accepted_T.clamp_min(1e-9).log().sum()
        assert kind == "lk"
        weight_T = torch.exp(-3 * accepted_T.detach())
        return (weight_T * kl_T + (1 - weight_T) * (1 - accepted_T)).sum()

    return _mean_of_chunks(chunk, hidden_TK, probs_TV)


def generalised_jsd(hidden_TK: Tensor, probs_TV: Tensor, head: Head, beta: float) -> Tensor:
    """Mean over rows of the generalised Jensen-Shannon divergence of p and q, in nats.

    With m = beta p + (1 - beta) q it is beta KL(p || m) + (1 - beta) KL(q || m), divided by
    beta (1 - beta); 0 and 1 are its limits KL(p || q) and KL(q || p). Source: Agarwal et al., arXiv
    2306.13649; the division keeps gradients of all beta alike in size.
    """

    def chunk(hidden: Tensor, probs: Tensor) -> Tensor:
        log_q = F.log_softmax(head(hidden), dim=-1)
        q, p = log_q.exp(), probs.float()
        log_p = p.clamp_min(1e-30).log()
        if beta in (0.0, 1.0):
            return ((p if beta == 0 else q) * (log_p - log_q)).sum() * (1 if beta == 0 else -1)
        log_m = (beta * p + (1 - beta) * q).clamp_min(1e-30).log()
        both = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        return both.sum() / (beta * (1 - beta))

    return _mean_of_chunks(chunk, hidden_TK, probs_TV)


def probs_and_entropy(logits_TV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """softmax(logits) in `dtype`, [T, V], and its entropy in nats, [T]."""
    log_p = F.log_softmax(logits_TV, dim=-1)
    p = log_p.exp()
    return p.to(dtype), -(p * log_p).sum(dim=-1)


def step_weights(n_steps: int, decay: float = STEP_DECAY) -> list[float]:
    """Weights decay^k of the steps of a round, scaled to sum to one."""
    raw = [decay**k for k in range(n_steps)]
    return [weight / sum(raw) for weight in raw]


def _mean_of_chunks(
    chunk: Callable[[Tensor, Tensor], Tensor], hidden_TK: Tensor, targets: Tensor
) -> Tensor:
    n_rows = hidden_TK.shape[0]
    if n_rows <= CHUNK_ROWS:
        return chunk(hidden_TK, targets) / n_rows
    total = hidden_TK.new_zeros((), dtype=torch.float32)
    for start in range(0, n_rows, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        total = total + checkpoint(
            chunk, hidden_TK[rows], targets[rows], use_reentrant=False, preserve_rng_state=False
        )
    return total / n_rows
