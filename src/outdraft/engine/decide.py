"""From a sequence's scores to what is emitted: which drafts stay and the token behind them.

Here: a request's parameters meet the rules of verification. Not here: the rules (speculate/), how
distributions are formed (sampling/), what happens to memory afterwards (runner.py).

Shapes: K drafts, R = K + 1 rows with logits, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.engine.sequence import Sequence
from outdraft.sampling.logits import distribution
from outdraft.sampling.sampler import Purpose, uniform
from outdraft.speculate.verify import Verdict, verify_greedy, verify_sampled


@dataclass(slots=True)
class Block:
    """The drafts of one sequence in one step: ids, and the distributions they were drawn from."""

    tokens: list[int]
    probs_KV: Tensor | None = None


NO_DRAFTS = Block([])


def decide(sequence: Sequence, block: Block, logits_RV: Tensor, best_R: Tensor) -> Verdict:
    """Verify a block.

    Args:
        sequence: as it was when the block was drafted.
        block: its drafts.
        logits_RV: fp32, of the newest committed token and of every draft.
        best_R: int32, the lowest id of the largest logit of each row.
    """
    params, drafts = sequence.request.params, torch.tensor(block.tokens, dtype=torch.int64)
    if params.greedy:
        return verify_greedy(drafts, best_R)
    n = len(sequence.tokens)
    positions = range(n, n + len(block.tokens) + 1)
    accept_K = [uniform(sequence.seed, p, Purpose.ACCEPT) for p in positions[:-1]]
    final_R = [uniform(sequence.seed, p, Purpose.TARGET) for p in positions]
    p_RV = distribution(logits_RV, params)
    return verify_sampled(drafts, block.probs_KV, p_RV, accept_K, final_R)
