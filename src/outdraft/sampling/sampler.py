"""Drawing a token: random numbers that belong to a position, and the inverse of a distribution.

Nothing here has a state. A number depends on the request's seed, the token's absolute position,
what it is for and, where drafts are drawn, the position at which the round began, so it cannot
depend on the batch or on preemption. Why that is lossless is in speculate/verify.py. Two requests
with one seed draw the same numbers. Not here: how the distribution is formed (logits.py).

Shapes: V vocabulary.
"""

import enum
import struct
from hashlib import blake2b

import torch
from torch import Tensor

from outdraft.errors import OutdraftError

_COUNTER = struct.Struct("<QQQ")
_ROUND_COUNTER = struct.Struct("<QQQQ")


class Purpose(enum.IntEnum):
    """What a random number decides. Each purpose is a stream of its own.

    ACCEPT and TARGET must be independent: the residual is drawn only when the accept number was
    high, so the same number would reach only the upper end of the residual's cumulative sum.
    DRAFT and ACCEPT must be independent: the accept test has to succeed with probability p/q for
    the very token that the draft number chose.
    """

    DRAFT = 1  # the drafter's token at this position
    ACCEPT = 2  # whether the drafted token at this position stays
    TARGET = 3  # the target's own token at this position: residual, bonus, or plain decoding


def uniform(seed: int, position: int, purpose: Purpose, start: int | None = None) -> float:
    """A number in [0, 1) with 53 random bits, a function of the arguments alone.

    BLAKE2b (RFC 7693) of them as a pseudo-random function: 2 µs, where setting up a
    counter-based generator such as NumPy's Philox takes 25, several times a token.

    Args:
        seed: 0 .. 2^63 - 1.
        position: index of the token in its sequence, the prompt included.
        purpose: what the number decides.
        start: the position at which a round with drawn drafts began, which has numbers of its own;
            None for all others.
    """
    if start is None:
        name = _COUNTER.pack(seed, position, purpose)
    else:
        name = _ROUND_COUNTER.pack(seed, position, purpose, start)
    digest = blake2b(name, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(probs_V: Tensor, u: float) -> int:
    """The token at u of the cumulative distribution; never one of probability 0.

    The sum may be off 1: u is a share of the actual sum, which is taken in fp64.

    Args:
        probs_V: not negative.
        u: in [0, 1).

    Raises:
        OutdraftError: the probabilities hold NaN or infinity, or are all 0.
    """
    assert 0 <= u < 1
    mass_V = probs_V.double().cumsum(0)
    total = float(mass_V[-1])
    if not 0 < total < float("inf"):
        raise OutdraftError(
            f"no token can be drawn: the probabilities sum to {total}",
            "the model's logits are damaged or all excluded: try --dtype float32, or check the "
            "weights and the tokens that are excluded",
        )
    # The first entry beyond u: its mass is greater than its predecessor's, so its own is not 0.
    return int(torch.searchsorted(mass_V, u * total, right=True))
