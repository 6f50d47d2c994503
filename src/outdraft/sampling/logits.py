"""From logits to what is sampled: temperature, the filters, and the argmax of greedy.

Pure functions of one row at a time: a row's result never depends on which other rows are in the
call. Rows are not filtered together because verification needs them one after another anyway, up to
the first rejection (speculate/verify.py). Not here: what depends on the text so far (state.py),
random numbers and drawing a token (sampler.py).

Shapes: R rows, V vocabulary, C tokens that are left of it.
"""

import math

import torch
from torch import Tensor

from outdraft.errors import OutdraftError
from outdraft.request import Logprobs, SamplingParams

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

    The order is temperature, top-n-sigma, top-k, typical-p, top-p, min-p. Temperature comes first,
    as in transformers and vLLM, so that the filters cut the distribution that is sampled, not
    another one; llama.cpp has it last. Top-k is cheap and comes before the filters by mass, which
    is a share of what top-k left. Min-p may come last because it looks at ratios to the largest
    probability, which renormalising does not change. The drafter and the target are filtered by the
    same function; the rules of verification hold for any two distributions.

    Top-k and top-p keep a number of tokens from the most probable down, typical-p (Meister et al.
    2022) from the one whose surprise is nearest the entropy; among equals the lowest id stays.
    Top-n-sigma (Tang et al. 2024) keeps logits of at least the best less n standard deviations of
    all finite ones. Rows sum to 1 within rounding.

    Args:
        logits_RV: fp32 or fp64; -inf excludes a token.
        params: not greedy; that is `greedy`, which is no distribution.

    Raises:
        OutdraftError: a row has NaN, or its largest value is not finite.
    """
    assert not params.greedy
    scaled_RV = _scaled(logits_RV, params.temperature)
    if not _filters(params):
        return torch.softmax(scaled_RV, dim=-1)
    return torch.stack([_filtered(scaled_V, params) for scaled_V in scaled_RV])


def candidates(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """`distribution` of one row without its zeros.

    Returns:
        Ids that the filters leave, ascending, int64 [C] (None: all of them), and their
        probabilities [C], the same bits as in `distribution`.
    """
    scaled_V = _scaled(logits_V[None], params.temperature)[0]
    if not _filters(params):
        return None, torch.softmax(scaled_V, dim=-1)
    ids_C = _kept_ids(scaled_V, params)
    return ids_C, torch.softmax(scaled_V[ids_C], dim=0)


def logprobs(logits_V: Tensor, token: int, n_top: int) -> Logprobs:
    """Log-probabilities of one row, of the logits as they are; the lowest id among equals first."""
    log_V = torch.log_softmax(logits_V.float(), dim=-1)
    own = log_V[token]
    rank = 1 + int((log_V > own).sum())
    if n_top == 0:
        return Logprobs(float(own), rank)
    ids = _largest(log_V, min(n_top, log_V.shape[0])).tolist()
    values = log_V[ids].tolist()
    top = sorted(zip(ids, values, strict=True), key=lambda pair: -pair[1])
    return Logprobs(float(own), rank, tuple(top))


def _scaled(logits_RV: Tensor, temperature: float) -> Tensor:
    """Scores with their maximum at 0."""
    best_R1 = logits_RV.amax(dim=-1, keepdim=True)
    _check_finite(best_R1)
    # Below the smallest normal number the quotient would be 0 / 0 at the maximum.
    return (logits_RV - best_R1) / max(temperature, torch.finfo(logits_RV.dtype).tiny)


def _filters(params: SamplingParams) -> bool:
    off = (0, 1, 0, 0, 1)
    mine = (params.top_k, params.top_p, params.min_p, params.top_n_sigma, params.typical_p)
    return mine != off


def _filtered(scaled_V: Tensor, params: SamplingParams) -> Tensor:
    ids_C = _kept_ids(scaled_V, params)
    probs_V = torch.zeros_like(scaled_V)
    probs_V[ids_C] = torch.softmax(scaled_V[ids_C], dim=0)
    return probs_V


def _kept_ids(scaled_V: Tensor, params: SamplingParams) -> Tensor:
    """Ids that the filters leave, ascending, int64 [C]. Scores have their maximum at 0."""
    ids_C = torch.arange(scaled_V.shape[0], device=scaled_V.device)
    if params.top_n_sigma > 0:
        sigma = scaled_V[torch.isfinite(scaled_V)].std(correction=0)
        ids_C = torch.nonzero(scaled_V >= -params.top_n_sigma * sigma).flatten()
    if 0 < params.top_k < ids_C.shape[0]:
        ids_C = ids_C[_largest(scaled_V[ids_C], params.top_k)]
    if params.typical_p < 1:
        ids_C = ids_C[_typical(torch.log_softmax(scaled_V[ids_C], dim=0), params.typical_p)]
    if params.top_p < 1:
        n = _nucleus_size(torch.softmax(scaled_V[ids_C], dim=0), params.top_p)
        ids_C = ids_C[_largest(scaled_V[ids_C], n)]
    if params.min_p > 0:
        # The exponential of a score is the ratio to the largest probability that is left.
        scores_C = scaled_V[ids_C]
        ids_C = ids_C[scores_C - scores_C.max() >= math.log(params.min_p)]
    return ids_C


def _typical(log_C: Tensor, mass: float) -> Tensor:
    """Places of the tokens nearest the entropy that make up `mass`, ascending; at least one."""
    p_C = log_C.exp()
    entropy = -torch.where(p_C > 0, p_C * log_C, 0.0).sum()
    order_C = torch.argsort((-log_C - entropy).abs(), stable=True)
    n = int((p_C[order_C].double().cumsum(0) < mass).sum()) + 1
    return order_C[:n].sort().values


def _largest(scores_V: Tensor, n: int) -> Tensor:
    """Places of the n largest scores, ascending; the lowest among equals (1 <= n <= V)."""
    threshold = scores_V.topk(n).values[-1]
    above = torch.nonzero(scores_V >= threshold).flatten()
    if above.shape[0] == n:
        return above
    equal_C = scores_V[above] == threshold
    n_over = above.shape[0] - n
    return above[~equal_C | (equal_C.cumsum(0) <= int(equal_C.sum()) - n_over)]


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
