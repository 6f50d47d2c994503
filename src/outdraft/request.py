"""What is asked of the engine and what comes back: sampling parameters, requests, events.

Here: plain dataclasses without tensors. Not here: how a sequence is scheduled (engine/) or how a
distribution is formed from the parameters (sampling/).
"""

import enum
import math
from dataclasses import dataclass, field

from outdraft.errors import SamplingError


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in OpenAI's words (plus `abort`)."""

    STOP = "stop"  # an end-of-sequence token, a stop id or a stop string
    LENGTH = "length"  # max_tokens or the model's context is used up
    ABORT = "abort"  # the caller gave up
    ERROR = "error"  # this request failed; others go on


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    `temperature == 0` is greedy. `top_k == 0`, `top_p == 1` and `min_p == 0` switch a filter off.
    `seed` None draws a fresh one for the request. `max_tokens` None means up to the context.

    Raises:
        SamplingError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingError(
                f"temperature is {self.temperature}", "use 0 for greedy, or a positive number"
            )
        if self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k}", "use 0 to switch it off, or at least 1")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p}", "use a number above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p is {self.min_p}", "use a number from 0 to 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise SamplingError(f"max_tokens is {self.max_tokens}", "use at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise SamplingError(f"seed is {self.seed}", "use a whole number from 0 to 2^63 - 1")
        if any(not s for s in self.stop):
            raise SamplingError("a stop string is empty", "leave it out, or give it characters")

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it. `prompt_tokens` are ids, `<bos>` included.

    Requests with different `cache_salt` never share cached keys and values: give each tenant its
    own, and none can learn from the time to the first token what another has asked.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One emitted token, in order.

    `text` is what became printable with it: it may be empty (half a character, or a possible
    beginning of a stop string) and belongs to earlier tokens too. `drafted` is true for a draft
    that the target accepted. The last event of a request has a `finish_reason`; its token is None
    when the request ended without a further token (abort, error).
    """

    request_id: str
    token: int | None
    text: str
    drafted: bool
    finish_reason: FinishReason | None = None
    error: str | None = None
