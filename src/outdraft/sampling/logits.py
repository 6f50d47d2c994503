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
"""What top-p sorts first: a nucleus is rarely larger, and sorting all is 100 times slower."""

CHUNK = 128
"""Scores are first looked at by the largest of so many: most of a vocabulary is never the best."""

FEW = 8192
"""Up to so many scores are looked at one by one."""


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
    probs_RV = torch.zeros_like(scaled_RV)
    for probs_V, scaled_V in zip(probs_RV, scaled_RV, strict=True):
        ids_C, scores_C = _kept(scaled_V, params)
        probs_V[ids_C] = torch.softmax(scores_C, dim=0)
    return probs_RV


def candidates(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """`distribution` of one row without its zeros.

    Returns:
        Ids that the filters leave, ascending, int64 [C] (None: all of them), and their
        probabilities [C], the same bits as in `distribution`.
    """
    scaled_V = _scaled(logits_V[None], params.temperature)[0]
    if not _filters(params):
        return None, torch.softmax(scaled_V, dim=-1)
    ids_C, scores_C = _kept(scaled_V, params)
    return ids_C, torch.softmax(scores_C, dim=0)


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
    return (logits_RV - best_R1).div_(max(temperature, torch.finfo(logits_RV.dtype).tiny))


def _filters(params: SamplingParams) -> bool:
    off = (0, 1, 0, 0, 1)
    mine = (params.top_k, params.top_p, params.min_p, params.top_n_sigma, params.typical_p)
    return mine != off


def _kept(scaled_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Ids that the filters leave, ascending, int64 [C], and their scores, whose maximum is 0."""
    ids_C: Tensor | None = None
    scores_C = scaled_V

    def keep(places: Tensor) -> None:
        nonlocal ids_C, scores_C
        ids_C = places if ids_C is None else ids_C[places]
        scores_C = scores_C[places]

    if params.top_n_sigma > 0:
        sigma = scaled_V[torch.isfinite(scaled_V)].std(correction=0)
        keep(_at_least(scores_C, -params.top_n_sigma * float(sigma)))
    if 0 < params.top_k < scores_C.shape[0]:
        keep(_largest(scores_C, params.top_k))
    if params.typical_p < 1:
        keep(_typical(torch.log_softmax(scores_C, dim=0), params.typical_p))
    if params.top_p < 1:
        keep(_nucleus(scores_C, params.top_p))
    if params.min_p > 0:
        # The exponential of a score is the ratio to the largest probability that is left.
        keep(_at_least(scores_C, float(scores_C.max()) + math.log(params.min_p)))
    if ids_C is None:
        ids_C = torch.arange(scaled_V.shape[0], device=scaled_V.device)
    return ids_C, scores_C


def _typical(log_C: Tensor, mass: float) -> Tensor:
    """Places of the tokens nearest the entropy that make up `mass`, ascending; at least one."""
    p_C = log_C.exp()
    entropy = -torch.where(p_C > 0, p_C * log_C, 0.0).sum()
    order_C = torch.argsort((-log_C - entropy).abs(), stable=True)
    n = int((p_C[order_C].double().cumsum(0) < mass).sum()) + 1
    return order_C[:n].sort().values


def _largest(scores_V: Tensor, n: int) -> Tensor:
    """Places of the n largest scores, ascending; the lowest among equals (1 <= n <= V)."""
    if scores_V.shape[0] <= FEW:
        return _largest_of_all(scores_V, n)
    maxima = _chunk_maxima(scores_V)
    if n < maxima.shape[0]:  # n chunks have a score of at least the n-th largest maximum
        among_C = _at_least(scores_V, float(maxima.topk(n).values[-1]))
        return among_C[_largest_of_all(scores_V[among_C], n)]
    return _largest_of_all(scores_V, n)


def _largest_of_all(scores_V: Tensor, n: int) -> Tensor:
    threshold = scores_V.topk(n).values[-1]
    above = torch.nonzero(scores_V >= threshold).flatten()
    if above.shape[0] == n:
        return above
    equal_C = scores_V[above] == threshold
    n_over = above.shape[0] - n
    return above[~equal_C | (equal_C.cumsum(0) <= int(equal_C.sum()) - n_over)]


def _chunk_maxima(scores_V: Tensor) -> Tensor:
    """The largest score of each whole chunk; what is left behind them counts as one."""
    n = scores_V.shape[0] // CHUNK * CHUNK
    maxima = scores_V[:n].view(-1, CHUNK).amax(dim=-1)
    return maxima if n == scores_V.shape[0] else torch.cat([maxima, scores_V[n:].amax()[None]])


def _at_least(scores_V: Tensor, floor: float) -> Tensor:
    """Places of all scores from `floor` up, ascending."""
    if scores_V.shape[0] <= FEW:
        return torch.nonzero(scores_V >= floor).flatten()
    n = scores_V.shape[0] // CHUNK * CHUNK
    chunks_NC = scores_V[:n].view(-1, CHUNK)
    found = torch.nonzero(chunks_NC.amax(dim=-1) >= floor).flatten()
    row, place = torch.nonzero(chunks_NC[found] >= floor).unbind(-1)
    places = found[row] * CHUNK + place
    rest = torch.nonzero(scores_V[n:] >= floor).flatten() + n
    return torch.cat([places, rest])


def _nucleus(scores_C: Tensor, top_p: float) -> Tensor:
    """Places of the most probable tokens that it takes to reach the mass `top_p`, ascending.

    Sorted are those that may be among them: the first thousand or so, or else those of more than
    (1 - top_p) / C, for all below sum to less than what may be left out.
    """
    n_all = scores_C.shape[0]
    probs_C = torch.softmax(scores_C, dim=0)
    if n_all <= NUCLEUS_GUESS:
        mass = probs_C.sort(descending=True).values.double().cumsum(0)
        return _largest_of_all(scores_C, min(n_all, int((mass < top_p).sum()) + 1))
    floors = [(1 - top_p) / n_all, 0.0]
    if n_all > NUCLEUS_GUESS * CHUNK:
        floors.insert(0, float(_chunk_maxima(probs_C).topk(NUCLEUS_GUESS).values[-1]))
    for floor in floors:
        among = _at_least(probs_C, floor)
        mass = probs_C[among].sort(descending=True).values.double().cumsum(0)
        if mass.shape[0] and mass[-1] >= top_p:
            n = int((mass < top_p).sum()) + 1
            return among[_largest_of_all(scores_C[among], n)]
    return torch.arange(n_all)  # the whole sums to a little less than top_p by rounding


def _check_finite(maxima: Tensor) -> None:
    """A maximum is NaN if anything in its row is; it is -inf if every token is excluded."""
    if not bool(torch.isfinite(maxima).all()):
        raise OutdraftError(
            "the model's logits are not finite", "try --dtype float32, or check the weights"
        )
