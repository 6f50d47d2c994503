"""Whether one drafter is better than another on the same prompts, outside the noise.

Here: tokens per pass with its error over prompts, and the paired comparison. Not here: decoding
(select.py).

Shapes: P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.speculate.stats import DraftStats

SURE = 2.0
"""A difference counts when it is more than so many of its standard errors above zero."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens per pass over all prompts, and its standard error over prompts."""

    tokens_per_pass: float
    standard_error: float


def tokens_per_pass(parts: Sequence[DraftStats]) -> Measured:
    """One drafter's."""
    emitted_P, passes_P = _counts(parts)
    return Measured(float(emitted_P.sum() / passes_P.sum()), _error(_influence(parts)))


def difference(new: Sequence[DraftStats], old: Sequence[DraftStats]) -> Measured:
    """New minus old on the same prompts in the same order.

    The error is that of a difference of two ratios of sums, linearised, with prompts as the units:
    what a hard prompt does to both cancels.
    """
    assert len(new) == len(old)
    change = tokens_per_pass(new).tokens_per_pass - tokens_per_pass(old).tokens_per_pass
    return Measured(change, _error(_influence(new) - _influence(old)))


def is_better(change: Measured) -> bool:
    """Whether a `difference` is above zero outside the noise."""
    return change.tokens_per_pass > SURE * change.standard_error


def in_words(measured: Measured) -> str:
    """For people."""
    return f"{measured.tokens_per_pass:.2f} ± {measured.standard_error:.2f}"


def summed(parts: Sequence[DraftStats]) -> DraftStats:
    """Of all prompts."""
    total = DraftStats()
    for part in parts:
        total.merge(part)
    return total


def _counts(parts: Sequence[DraftStats]) -> tuple[Tensor, Tensor]:
    emitted = torch.tensor([part.n_emitted for part in parts], dtype=torch.float64)
    passes = torch.tensor([part.n_passes for part in parts], dtype=torch.float64)
    return emitted, passes.clamp_min(1e-9)


def _influence(parts: Sequence[DraftStats]) -> Tensor:
    emitted_P, passes_P = _counts(parts)
    ratio = emitted_P.sum() / passes_P.sum()
    return (emitted_P - ratio * passes_P) / passes_P.sum()


def _error(influence_P: Tensor) -> float:
    n = len(influence_P)
    return float((influence_P.square().sum() * n / max(1, n - 1)).sqrt())
