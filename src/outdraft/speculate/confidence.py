"""Which drafts of a round are verified, by what the drafter itself says of them. No tensors.

A drafter's confidence is a probability of its own, not that a draft is kept; how often drafts of a
confidence were kept is counted. Drafts that are not worth their rows in the pass are left out. Not
here: how deep a round is (length.py), costs (costs.py).

A draft that was drawn must not be left out for what it is (speculate/verify.py): this is for drafts
that are the drafter's most probable tokens.

Shapes: B sequences, K draft length, M drafts in all.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

N_PARTS = 8  # of the confidences, each counted by itself
DECAY = 0.998
FADE = 0.995  # a draft of this confidence was left out
WEIGHT = 4.0  # of what is believed at first, in drafts
LEAST = 0.5  # which is no less: too high is corrected by trying, too low never
MIDDLES = (np.arange(N_PARTS) + 0.5) / N_PARTS
FIRST = np.maximum(LEAST, MIDDLES)


class Confidence:
    """Drafts by confidence: how many were looked at, how many were kept."""

    def __init__(self) -> None:
        self.tried = np.zeros(N_PARTS)
        self.kept = np.zeros(N_PARTS)
        self._chance = FIRST

    def reached(self, confidence_BK: NDArray[np.float32], lengths: Sequence[int]) -> Floats:
        """Of each draft that it and all before it are kept [B, K]; -1 behind a sequence's length.

        Between the middles of two parts on a line.
        """
        chances = np.interp(confidence_BK, MIDDLES, self._chance)
        reached_BK: Floats = np.multiply.accumulate(chances, axis=1)
        n_most = reached_BK.shape[1]
        for i, n in enumerate(lengths):
            if n < n_most:
                reached_BK[i, n:] = -1.0
        return reached_BK

    def chances(self, confidence_K: Sequence[float]) -> list[float]:
        """Of each draft that it is kept if those before it are."""
        chances: list[float] = np.interp(confidence_K, MIDDLES, self._chance).tolist()
        return chances

    def observe(self, confidence_K: Sequence[float], n_verified: int, n_accepted: int) -> None:
        """A block of which the first drafts were verified and the others left out."""
        for j, confidence in enumerate(confidence_K[: min(n_verified, n_accepted) + 1]):
            part = min(N_PARTS - 1, int(confidence * N_PARTS))
            if j < n_verified:
                self.tried[part] = DECAY * self.tried[part] + 1
                self.kept[part] = DECAY * self.kept[part] + (j < n_accepted)
            else:
                self.tried[part] *= FADE
                self.kept[part] *= FADE
        self._chance = (self.kept + WEIGHT * FIRST) / (self.tried + WEIGHT)


def worth_verifying(reached_BK: Floats, cost_M: Floats) -> tuple[list[int], float, float]:
    """Of each sequence how many of its drafts to verify, so that most is gained.

    Args:
        reached_BK: of each draft that it and those before it are kept, -1 where there is none.
        cost_M: tokens that could be had in the time of one, two, ... more rows; infinite for sizes
            that are not chosen.

    Returns:
        How many; the tokens expected of those drafts, and of all.
    """
    n_most = reached_BK.shape[1]
    flat = reached_BK.ravel()
    order = np.argsort(-flat, kind="stable")[: cost_M.shape[0]]  # keeps each sequence's own order
    total_M = np.cumsum(flat[order])
    worth_M = total_M - cost_M
    m = int(worth_M.argmax())
    if not worth_M[m] > 0.0:
        return [0] * reached_BK.shape[0], 0.0, float(total_M[-1])
    counts = np.bincount(order[: m + 1] // n_most, minlength=reached_BK.shape[0])
    return counts.tolist(), float(total_M[m]), float(total_M[-1])
