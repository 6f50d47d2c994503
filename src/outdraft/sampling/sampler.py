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

CHUNK = 512
MANY = 16384
"""From so many probabilities on, sums of chunks come first."""

BELOW_ONE = 1 - 2.0**-53
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

    The sum may be off 1: u is a share of the actual sum, which is taken in fp64. Of a large
    vocabulary only the sums of chunks are added up, and the tokens of the chunk that u falls into;
    a chunk's own sum has the rounding of its type.

    Args:
        probs_V: not negative.
        u: in [0, 1).

    Raises:
        OutdraftError: the probabilities hold NaN or infinity, or are all 0.
    """
    assert 0 <= u < 1
    n = probs_V.shape[0] // CHUNK * CHUNK
    if n < MANY:
        return _place(probs_V, u)
    sums = torch.cat([probs_V[:n].view(-1, CHUNK).sum(-1), probs_V[n:].sum()[None]]).double()
    mass = sums.cumsum(0)
    chunk = _place_in(mass, u)
    before = float(mass[chunk - 1]) if chunk else 0.0
    within = (u * float(mass[-1]) - before) / float(sums[chunk])
    first = chunk * CHUNK
    return first + _place(probs_V[first : first + CHUNK], min(max(within, 0.0), BELOW_ONE))


def _place(probs_V: Tensor, u: float) -> int:
    return _place_in(probs_V.double().cumsum(0), u)


def _place_in(mass_V: Tensor, u: float) -> int:
    """The first entry beyond u of a cumulative sum; its own mass is then not 0."""
    total = float(mass_V[-1])
    if not 0 < total < float("inf"):
        raise OutdraftError(
            f"no token can be drawn: the probabilities sum to {total}",
            "the model's logits are damaged or all excluded: try --dtype float32, or check the "
            "weights and the tokens that are excluded",
        )
    return int(torch.searchsorted(mass_V, u * total, right=True))
