"""One request in progress, and the one place where tokens are added to it.

A block that was verified, a stop string inside it, `max_tokens` and the end of the context are all
the same event: keep the first n of these tokens. `Sequence.keep` is it. No tensors here.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outdraft.errors import PromptError
from outdraft.request import FinishReason, Logprobs, Request, TokenEvent
from outdraft.speculate.stats import DraftStats, StepTimes
from outdraft.text.stream import IncrementalDetokenizer, StopStrings

if TYPE_CHECKING:
    from outdraft.sampling.state import SamplerState


@dataclass(slots=True)
class Sequence:
    """A request's state. `tokens` is prompt and output; `n_computed` of them are in memory.

    `limit` is the number of tokens at which it ends: max_tokens or the context. `seed` is the
    request's own or a drawn one. `end_ids` are the tokens that end it. `sampler` is there if its
    options depend on the text so far. `arrival` orders it among all requests; `served` is the last
    step that computed some of its prompt. `n_cached` prompt tokens came from the prefix cache,
    `n_failed_drafts` times its drafter failed.
    """

    request: Request
    seed: int
    limit: int
    end_ids: frozenset[int]
    detokenizer: IncrementalDetokenizer
    stop_strings: StopStrings
    tokens: list[int] = field(default_factory=list)
    n_computed: int = 0
    arrival: int = 0
    served: int = 0
    n_cached: int = 0
    n_preempted: int = 0
    n_failed_drafts: int = 0
    error: str | None = None
    finish_reason: FinishReason | None = None
    stats: DraftStats = field(default_factory=DraftStats)
    times: StepTimes = field(default_factory=StepTimes)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sampler: "SamplerState | None" = None
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def output(self) -> list[int]:
        """Tokens emitted so far."""
        return self.tokens[len(self.request.prompt_tokens) :]

    @property
    def n_pending(self) -> int:
        """Committed tokens that have not been through the target; 1 while decoding."""
        return len(self.tokens) - self.n_computed

    @property
    def resumed(self) -> bool:
        """True while tokens that were emitted already are computed again."""
        return self.n_pending > 1 and len(self.tokens) > len(self.request.prompt_tokens)

    @property
    def decoding(self) -> bool:
        """True when the next row is the newest emitted token's, and drafts may follow it.

        Never the last token of a prompt, however little of it is left: then a request's blocks,
        and with them its random numbers, do not depend on chunks and cache hits.
        """
        return self.n_pending == 1 and len(self.tokens) > len(self.request.prompt_tokens)

    @property
    def n_prefill(self) -> int:
        """Rows to compute before or with the next emitted token, when not decoding.

        A resumed sequence stops short of its newest token: that one comes with drafts behind it,
        as it would have if the sequence had never been interrupted.
        """
        return self.n_pending - 1 if self.resumed else self.n_pending

    @property
    def draft_room(self) -> int:
        """Most drafts that can be of use: the target adds one token of its own to them."""
        return self.limit - len(self.tokens) - 1

    @property
    def n_forced(self) -> int:
        """Tokens that a grammar lets follow whatever the model says: drafts for nothing."""
        return 0 if self.sampler is None else len(self.sampler.forced_tokens())

    def keep(
        self, tokens: list[int], n_drafted: int, logprobs: list[Logprobs] | None = None
    ) -> list[TokenEvent]:
        """Add verified tokens until the first that ends the sequence.

        Args:
            tokens: what verification let through, in order, at least one.
            n_drafted: how many of them, from the front, were drafts.
            logprobs: the target's, of each token, where asked for.

        Returns:
            One event for each token kept; the rest of the block is dropped.
        """
        events = []
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            text = self._advance(token)
            own = None if logprobs is None else logprobs[i]
            if own is not None:
                self.logprobs.append(own)
            reason = self.finish_reason
            events.append(TokenEvent(self.id, token, text, i < n_drafted, reason, logprobs=own))
            if self.finish_reason is not None:
                break
            if self.sampler is not None:
                self.sampler.push(token)
        return events

    def abort(self, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """End without a further token; text held back so far comes out."""
        try:
            text = self._flush()
        except Exception:  # what the request failed of may be its text
            text = ""
        self.finish_reason, self.error = reason, error
        return TokenEvent(self.id, None, text, False, reason, error)

    def _advance(self, token: int) -> str:
        """The text that `token` sets free; sets `finish_reason` if it is the last."""
        if token in self.end_ids:
            self.finish_reason = FinishReason.STOP
            return self._flush()
        text, stop = self.stop_strings.push(self.detokenizer.push(token))
        if stop is not None:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.limit:
            text += self._flush()
            self.finish_reason = self.finish_reason or FinishReason.LENGTH
        return text

    def _flush(self) -> str:
        """What was held back: half a character as U+FFFD, a beginning of a stop string as it is."""
        text, stop = self.stop_strings.push(self.detokenizer.flush())
        if stop is not None:
            self.finish_reason = FinishReason.STOP
            return text
        return text + self.stop_strings.flush()


def check_prompt(tokens: tuple[int, ...], vocab_size: int, ctx_size: int) -> None:
    """Refuse a prompt that cannot be run.

    Raises:
        PromptError: it is empty, has an id outside the vocabulary, or leaves no room in the
            context for a single token.
    """
    if not tokens:
        raise PromptError("the prompt is empty", "give at least one token")
    bad = next((t for t in tokens if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise PromptError(
            f"token id {bad} is outside the vocabulary of {vocab_size}",
            "use ids of this model's tokenizer",
        )
    if len(tokens) >= ctx_size:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens and the context holds {ctx_size}",
            "shorten the prompt, or raise --ctx-size if the model allows",
        )
