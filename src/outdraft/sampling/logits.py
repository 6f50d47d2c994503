"""From logits to what is sampled: temperature, top-k, top-p, min-p, and the argmax of greedy.

Pure functions of one row at a time: a row's result never depends on which other rows are in the
call. Not here: random numbers and drawing a token (sampler.py).

Shapes: R rows, V vocabulary, C tokens that are left of it.
"""

import math

import torch
from torch import Tensor

from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams

NUCLEUS_GUESS = 1024
"""What top-p sorts first: a nucleus is rarely larger, and sorting all is 20 times slower."""


def greedy(logits_RV: Tensor) -> Tensor:
    """The most probable token of every row, int64 [R]; the lowest id among equals.

    Raises:
        OutdraftError: a row has NaN, or its largest value is not finite.
    """
    ids_R = torch.argmax(logits_RV, dim=-1)  # documented to return the first maximum, or a NaN
    _check_finite(logits_RV.gather(-1, ids_R[:, None]))
    return ids_R


def distribution(logits_RV: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities that tokens are drawn from, [R, V] in the dtype of the logits.

    The order is that of transformers: temperature, top-k, top-p, min-p. Temperature comes first so
    that the filters cut the distribution that is sampled, not another one. Top-k is cheap and comes
    before top-p, whose mass is a share of what top-k left. Min-p may come last because it looks at
    ratios to the largest probability, which renormalising does not change. The drafter and the
    target are filtered by the same function; the rules of verification hold for any two
    distributions.

    Both top-k and top-p keep a number of tokens from the most probable down; among equals the
    lowest id stays. Rows sum to 1 within rounding.

    Args:
        logits_RV: fp32 or fp64; -inf excludes a token.
        params: not greedy; that is `greedy`, which is no distribution.

    Raises:
        OutdraftError: a row has NaN, or its largest value is not finite.
    """
    assert not params.greedy
    best_R1 = logits_RV.amax(dim=-1, keepdim=True)
    _check_finite(best_R1)
    # Below the smallest normal number the quotient would be 0 / 0 at the maximum.
    temperature = max(params.temperature, torch.finfo(logits_RV.dtype).tiny)
    scaled_RV = (logits_RV - best_R1) / temperature
    if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        return torch.softmax(scaled_RV, dim=-1)
    return torch.stack([_filtered(scaled_V, params) for scaled_V in scaled_RV])


def _filtered(scaled_V: Tensor, params: SamplingParams) -> Tensor:
    ids_C = _kept_ids(scaled_V, params)
    probs_V = torch.zeros_like(scaled_V)
    probs_V[ids_C] = torch.softmax(scaled_V[ids_C], dim=0)
    return probs_V


def _kept_ids(scaled_V: Tensor, params: SamplingParams) -> Tensor:
    """Ids that the filters leave, ascending, int64 [C]. Scores have their maximum at 0."""
    ids_C = torch.arange(scaled_V.shape[0], device=scaled_V.device)
    if 0 < params.top_k < ids_C.shape[0]:
        ids_C = _largest(scaled_V, params.top_k)
    if params.top_p < 1:
        n = _nucleus_size(torch.softmax(scaled_V[ids_C], dim=0), params.top_p)
        ids_C = ids_C[_largest(scaled_V[ids_C], n)]
    if params.min_p > 0:
        # The exponential of a score is the ratio to the largest probability.
        ids_C = ids_C[scaled_V[ids_C] >= math.log(params.min_p)]
    return ids_C


def _largest(scores_V: Tensor, n: int) -> Tensor:
    """Places of the n largest scores, ascending; the lowest among equals (1 <= n <= V)."""
    threshold = scores_V.topk(n).values[-1]
    above = torch.nonzero(scores_V > threshold).flatten()
    equal = torch.nonzero(scores_V == threshold).flatten()
    return torch.cat([above, equal[: n - above.shape[0]]]).sort().values


def _nucleus_size(probs_C: Tensor, top_p: float) -> int:
    """How many tokens, the most probable first, it takes to reach the mass `top_p`; at least 1."""
    n_all = probs_C.shape[0]
    for width in (min(NUCLEUS_GUESS, n_all), n_all):
        mass = probs_C.topk(width).values.double().cumsum(0)
        if mass[-1] >= top_p:
            return int((mass < top_p).sum()) + 1
    return n_all  # the whole sums to a little less than top_p by rounding


def _check_finite(maxima: Tensor) -> None:
    """A maximum is NaN if anything in its row is; it is -inf if every token is excluded."""
    if not bool(torch.isfinite(maxima).all()):
        raise OutdraftError(
            "the model's logits are not finite", "try --dtype float32, or check the weights"
        )
