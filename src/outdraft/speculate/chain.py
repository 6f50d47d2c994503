"""Drafting one token after another: what every autoregressive drafter calls.

Shapes: B sequences, K draft length, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from outdraft.sampling.logits import distribution
from outdraft.sampling.sampler import Purpose, sample, uniform
from outdraft.speculate.drafter import Draft, SequenceView, draws


def draft_chain(
    sequences: list[SequenceView],
    k: int,
    step: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    *,
    sample_drafts: bool = True,
) -> Draft:
    """Draft k tokens for every sequence.

    Args:
        sequences: the sequences of the view; draft i of one stands at position n + i.
        k: number of tokens, at least 1.
        step: takes the newest token of every sequence, int32 [B], and returns fp32 scores [B, V]
            of the next, the argmax of each, int32 [B], and what softmax over the scores gives that,
            fp32 [B]. It is called k times in order and may overwrite what it returned.
        sample_drafts: at temperature > 0 and without a seed of the user's, draw from the drafter's
            distribution (accepted more often); otherwise its most probable token, a point mass,
            with which the text of a seed does not depend on what was drafted.
    """
    newest_B = torch.tensor([s.tokens[-1] for s in sequences], dtype=torch.int32)
    probs: list[list[Tensor]] = [[] for _ in sequences]
    tokens: list[Tensor] = []
    sure: list[Tensor] = []
    for i in range(k):
        logits_BV, best_B, sure_B = step(newest_B)
        newest_B, sure_B = (x.to("cpu", copy=True) for x in (best_B, sure_B))
        if sample_drafts:
            for b, sequence in enumerate(sequences):
                if not draws(sequence.params):
                    continue
                scores_V, best = logits_BV[b].cpu(), newest_B[b].clone()
                q_V = distribution(scores_V[None], sequence.params)[0]
                u = uniform(sequence.seed, sequence.n + i, Purpose.DRAFT, sequence.n)
                newest_B[b] = sample(q_V, u)
                probs[b].append(q_V)
                sure_B[b] *= (scores_V[newest_B[b]] - scores_V[best]).exp()
        sure.append(sure_B)
        tokens.append(newest_B)
    return Draft(
        tokens_BK=torch.stack(tokens, dim=1).long(),
        probs=[torch.stack(q) if q else None for q in probs],
        lengths=[k] * len(sequences),
        confidence_BK=torch.stack(sure, dim=1),
    )
