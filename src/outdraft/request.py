"""What is asked of the engine and what comes back: sampling parameters, requests, events.

Here: plain dataclasses without tensors. Not here: how a sequence is scheduled (engine/) or how a
distribution is formed from the parameters (sampling/).
"""

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from outdraft.errors import SamplingError

MAX_COMPLETIONS = 128
MAX_LOGPROBS = 100
MAX_STOPS = 64
MAX_BIASES = 4096
MAX_BAD_WORDS = 1024
MAX_GRAMMAR_CHARS = 256 * 1024


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in OpenAI's words (plus `abort`)."""

    STOP = "stop"  # an end-of-sequence token, a stop id or a stop string
    LENGTH = "length"  # max_tokens or the model's context is used up
    ABORT = "abort"  # the caller gave up
    ERROR = "error"  # this request failed; others go on


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    `temperature == 0` is greedy. How the values act, and in which order, is said in
    sampling/state.py (what changes with the text) and sampling/logits.py (the filters).

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that make up this mass; 1 keeps all.
        min_p: keep tokens of at least this share of the best one's probability; 0 keeps all.
        top_n_sigma: keep tokens within n standard deviations of the best logit; 0 keeps all.
        typical_p: keep the tokens of this mass whose surprise is nearest the entropy; 1 keeps all.
        presence_penalty: taken from the logit of every token of the output (OpenAI), -2 .. 2.
        frequency_penalty: taken as often as the token was in the output (OpenAI), -2 .. 2.
        repetition_penalty: divides positive and multiplies negative logits of the tokens of prompt
            and output (Keskar et al. 2019); 1 is off.
        repeat_last_n: the three penalties look at so many last tokens; -1 is all, 0 none.
        logit_bias: added to logits by token id; -inf excludes one.
        bad_words: texts or token sequences that must not be written.
        min_tokens: before so many, no token ends the request (stop strings still do).
        seed: of the random numbers; None draws a fresh one for the request.
        n: completions of the one prompt; see `split`.
        max_tokens: None means up to the context.
        stop: texts that end the request and are not part of its text.
        stop_token_ids: tokens that end it.
        ignore_eos: go on after the end of sequence.
        logprobs: report log-probabilities: of each emitted token and of so many best ones. They
            are the model's own, before any of the values above.
        prompt_logprobs: the same for the tokens of the prompt.
        json_schema: the text is JSON of this schema, a mapping or JSON text. It is on one line, as
            `json.dumps` writes it, so that no answer is cut inside of spaces.
        json_object: the text is a JSON object, laid out alike.
        regex: the text matches this regular expression as a whole.
        grammar: the text follows this Lark grammar.
        show_token_ids: special tokens that stand in the text as the vocabulary spells them; others
            have no text.
        max_thinking_tokens: the reasoning block is closed after so many tokens; None never.

    Raises:
        SamplingError: a value is outside its range, or two exclude each other.
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
    top_n_sigma: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repeat_last_n: int = -1
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    max_thinking_tokens: int | None = None
    show_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bias = self.logit_bias
        pairs = tuple(sorted(bias.items())) if isinstance(bias, Mapping) else tuple(bias)
        object.__setattr__(self, "logit_bias", pairs)
        words = tuple(w if isinstance(w, str) else tuple(w) for w in self.bad_words)
        object.__setattr__(self, "bad_words", words)
        if isinstance(self.json_schema, Mapping):
            object.__setattr__(self, "json_schema", _as_json(self.json_schema))
        for name, low, high, hint in _RANGES:
            value = getattr(self, name)
            # `not` of the comparison refuses NaN as well
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise SamplingError(f"{name} is {value}", hint)
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise SamplingError(f"{name} is {value!r}", "use a whole number")
        if not self.top_p > 0:
            raise SamplingError(f"top_p is {self.top_p}", "use a number above 0 and at most 1")
        self._check_lists()
        self._check_combinations()

    def _check_lists(self) -> None:
        for name, most in _LENGTHS:
            if len(getattr(self, name)) > most:
                raise SamplingError(f"{name} has more than {most} entries", "use fewer")
        if any(not s for s in self.stop):
            raise SamplingError("a stop string is empty", "leave it out, or give it characters")
        if any(not w for w in self.bad_words):
            raise SamplingError("a bad word is empty", "leave it out, or give it characters")
        for token, value in self.bias_pairs:
            if type(token) is not int or token < 0:
                raise SamplingError(f"logit_bias has the token {token!r}", "use ids from 0 on")
            if value != -math.inf and not -100 <= value <= 100:
                raise SamplingError(
                    f"logit_bias of {token} is {value}", "use -100 to 100, or -inf to exclude it"
                )

    def _check_combinations(self) -> None:
        given = self.grammar_options
        if len(given) > 1:
            raise SamplingError(f"{given[0]} and {given[1]} are both given", "use one of them")
        if given and self.ignore_eos:
            raise SamplingError(
                f"{given[0]} and ignore_eos are both given", "a grammar has an end: use one of them"
            )
        for name in given:
            value = getattr(self, name)
            if isinstance(value, str) and len(value) > MAX_GRAMMAR_CHARS:
                raise SamplingError(
                    f"{name} has {len(value)} characters", f"use at most {MAX_GRAMMAR_CHARS}"
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}",
                "use a min_tokens of at most max_tokens",
            )

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0

    @property
    def grammar_options(self) -> list[str]:
        """Names of the options that ask for a grammar; at most one."""
        given = [n for n in ("json_schema", "regex", "grammar") if getattr(self, n) is not None]
        return [*given, "json_object"] if self.json_object else given

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs, which is what it is after construction."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens before them through a penalty."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return self.repeat_last_n != 0 and penalties != (0, 0, 1)

    def split(self, seed: int) -> list["SamplingParams"]:
        """The n requests of one completion each; the first has `seed`, the others derived ones."""
        seeds = [seed] + [derived_seed(seed, i) for i in range(1, self.n)]
        return [replace(self, n=1, seed=s) for s in seeds]


def derived_seed(seed: int, index: int) -> int:
    """The seed of completion number `index` of a request, 62 bits of BLAKE2b (RFC 7693)."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _as_json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise SamplingError(f"json_schema is not JSON: {error}", "use plain JSON values") from error


_OFF_OR_MORE = "use 0 to switch it off, or at least 1"
_ZERO_TO_ONE = "use a number from 0 to 1"
_PENALTY = "use a number from -2 to 2; 0 is off"
_MANY = 2.0**53
_RANGES = (
    ("temperature", 0, 1e30, "use 0 for greedy, or a positive number"),
    ("top_k", 0, _MANY, _OFF_OR_MORE),
    ("top_p", 0, 1, "use a number above 0 and at most 1"),
    ("min_p", 0, 1, _ZERO_TO_ONE),
    ("top_n_sigma", 0, 1e30, "use 0 to switch it off, or a positive number"),
    ("typical_p", 1e-9, 1, "use a number above 0 and at most 1"),
    ("presence_penalty", -2, 2, _PENALTY),
    ("frequency_penalty", -2, 2, _PENALTY),
    ("repetition_penalty", 1e-3, 1e3, "use a number above 0 such as 1.1; 1 is off"),
    ("repeat_last_n", -1, _MANY, "use -1 for all tokens, 0 for none, or a number of tokens"),
    ("max_tokens", 1, _MANY, "use at least 1"),
    ("min_tokens", 0, _MANY, "use 0 or more"),
    ("n", 1, MAX_COMPLETIONS, f"use 1 to {MAX_COMPLETIONS}"),
    ("logprobs", 0, MAX_LOGPROBS, f"use 0 to {MAX_LOGPROBS}"),
    ("prompt_logprobs", 0, MAX_LOGPROBS, f"use 0 to {MAX_LOGPROBS}"),
    ("max_thinking_tokens", 0, _MANY, "use 0 or more"),
    ("seed", 0, 2**63 - 1, "use a whole number from 0 to 2^63 - 1"),
)
_WHOLE = (
    "top_k",
    "repeat_last_n",
    "max_tokens",
    "min_tokens",
    "n",
    "logprobs",
    "prompt_logprobs",
    "max_thinking_tokens",
    "seed",
)
_LENGTHS = (
    ("stop", MAX_STOPS),
    ("stop_token_ids", MAX_STOPS),
    ("show_token_ids", MAX_STOPS),
    ("logit_bias", MAX_BIASES),
    ("bad_words", MAX_BAD_WORDS),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it. `prompt_tokens` are ids, `<bos>` included.

    Requests with different `cache_salt` never share cached keys and values: give each tenant its
    own, and none can learn from the time to the first token what another has asked.
    `draft_n_max` caps the drafts of a step for this request; None leaves the engine's choice.
    With `store` False nothing of it is kept to learn from.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""
    draft_n_max: int | None = None
    store: bool = True


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log-probabilities of one position under the model itself, before any option.

    `token` is the emitted one's, `rank` its place from 1 on, `top` the best ids with theirs.
    """

    token: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One emitted token, in order.

    `text` is what became printable with it: it may be empty (half a character, or a possible
    beginning of a stop string) and belongs to earlier tokens too. `drafted` is true for a draft
    that the target accepted. The last event of a request has a `finish_reason`; its token is None
    when the request ended without a further token (abort, error). `logprobs` only where asked.
    """

    request_id: str
    token: int | None
    text: str
    drafted: bool
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: Logprobs | None = None
