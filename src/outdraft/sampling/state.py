"""What a request's options make of the logits at one position, given the tokens before it.

Here: penalties, bias, bad words, min_tokens, grammar and thinking budget, as a state that advances
token by token. Inside a block of drafts it is advanced along the drafts and then put back
(`mark`, `rewind`), so row i is processed with drafts 0 .. i - 1 in the text, as plain decoding
would; only kept tokens advance it for good. Not here: temperature and filters (logits.py), grammars
themselves (grammar.py).

The order is: repetition, frequency and presence penalty, bias, bad words, min_tokens, grammar. A
reasoning block whose budget is used up is closed before anything else.

- Repetition penalty (Keskar et al. 2019, CTRL, eq. 1): tokens of prompt and output; positive logits
  are divided, others multiplied, as in transformers, vLLM and llama.cpp.
- Frequency and presence penalty (OpenAI's API reference): logit - count * frequency - (count > 0) *
  presence, over the output only, as in vLLM; llama.cpp counts the prompt as well.
- `repeat_last_n` (llama.cpp): only the last n tokens of the sequence count, for all three.
- Bad words (transformers, vLLM): the last token of a sequence is excluded where the others precede.
- The thinking budget counts the tokens between the markers. A prompt may have opened the block.
  When the budget is used up, the closing marker is the only possible token, and a further block
  cannot be opened. A grammar rests while the block is open.

Shapes: V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.errors import SamplingError
from outdraft.request import SamplingParams
from outdraft.sampling.grammar import GrammarState


@dataclass(frozen=True, slots=True)
class ThinkingMarkers:
    """Tokens that open and close a reasoning block."""

    open_id: int
    close_id: int


@dataclass(slots=True)
class Thinking:
    """The reasoning block of one request: whether it is open, and tokens spent in all."""

    markers: ThinkingMarkers
    budget: int
    is_open: bool
    n_used: int = 0

    def push(self, token: int) -> None:
        """A token was written."""
        if token == self.markers.open_id:
            self.is_open = True
        elif token == self.markers.close_id:
            self.is_open = False
        elif self.is_open:
            self.n_used += 1

    @property
    def spent(self) -> bool:
        """No token is left to think with."""
        return self.n_used >= self.budget


class SamplerState:
    """The tokens so far, as far as they matter to the next position's logits."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_tokens: tuple[int, ...],
        *,
        end_ids: frozenset[int],
        bad_words: tuple[tuple[int, ...], ...] = (),
        grammar: GrammarState | None = None,
        markers: ThinkingMarkers | None = None,
    ) -> None:
        self.params = params
        self.n_prompt = len(prompt_tokens)
        self.tokens = list(prompt_tokens)
        self.bad_words = bad_words
        self.grammar = grammar
        self.thinking = None
        if markers is not None and params.max_thinking_tokens is not None:
            is_open = opened(prompt_tokens, markers)
            self.thinking = Thinking(markers, params.max_thinking_tokens, is_open)
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64)
        self._bias_ids = torch.tensor([t for t, _ in params.bias_pairs], dtype=torch.int64)
        self._bias = torch.tensor([b for _, b in params.bias_pairs])
        self._counts: dict[int, int] = {}
        self._output_counts: dict[int, int] = {}
        window = params.repeat_last_n
        self._window = math.inf if window < 0 else window
        for at in range(max(0, self.n_prompt - window) if window >= 0 else 0, self.n_prompt):
            self._count(at, 1)
        self._mark: tuple[int, GrammarState | None, tuple[bool, int]] | None = None

    @property
    def n_output(self) -> int:
        """Tokens written so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def _grammar_now(self) -> GrammarState | None:
        """The grammar, unless a reasoning block is open."""
        resting = self.thinking is not None and self.thinking.is_open
        return None if resting else self.grammar

    def push(self, token: int) -> None:
        """The next token is this one."""
        grammar = self._grammar_now
        self.tokens.append(token)
        n = len(self.tokens)
        self._count(n - 1, 1)
        if n > self._window:
            self._count(n - 1 - int(self._window), -1)
        if self.thinking is not None:
            self.thinking.push(token)
        if grammar is not None:
            grammar.push(token)

    def mark(self) -> None:
        """Remember this place; what is pushed from here on is on trial."""
        assert self._mark is None
        grammar = None if self.grammar is None else self.grammar.fork()
        thinking = (False, 0) if self.thinking is None else self._thought(self.thinking)
        self._mark = (len(self.tokens), grammar, thinking)

    def rewind(self) -> None:
        """Back to the mark."""
        assert self._mark is not None
        n, self.grammar, (is_open, n_used) = self._mark
        self._mark = None
        while len(self.tokens) > n:
            length = len(self.tokens)
            if length > self._window:
                self._count(length - 1 - int(self._window), 1)
            self._count(length - 1, -1)
            self.tokens.pop()
        if self.thinking is not None:
            self.thinking.is_open, self.thinking.n_used = is_open, n_used

    def forced(self) -> int | None:
        """The only token that can follow, where that is known without logits."""
        thinking = self.thinking
        if thinking is not None and thinking.is_open:
            return thinking.markers.close_id if thinking.spent else None
        return None if self.grammar is None else self.grammar.end_id()

    def process(self, logits_V: Tensor) -> Tensor:
        """The logits with all options but temperature and filters, a new tensor [V].

        Raises:
            SamplingError: no token is left, or the grammar used up its fuel.
        """
        row_V = logits_V.clone()
        if self.params.penalised:
            self._penalise(row_V)
        if len(self._bias):
            row_V[self._bias_ids] += self._bias.to(row_V)
        for word in self.bad_words:
            if len(word) == 1 or tuple(self.tokens[1 - len(word) :]) == word[:-1]:
                row_V[word[-1]] = -math.inf
        if self.n_output < self.params.min_tokens:
            row_V[self._end_ids] = -math.inf
        thinking = self.thinking
        if thinking is not None and thinking.spent and not thinking.is_open:
            row_V[thinking.markers.open_id] = -math.inf
        grammar = self._grammar_now
        if grammar is not None:
            row_V.masked_fill_(~grammar.allowed(row_V.shape[0]), -math.inf)
        if bool(row_V.max() == -math.inf):
            raise SamplingError(
                "no token is left to choose from",
                "the grammar, bad_words, logit_bias and min_tokens exclude all of them together",
            )
        return row_V

    def forced_tokens(self) -> list[int]:
        """Tokens that the grammar lets follow whatever the model says; mostly none."""
        if self.grammar is None or self.thinking is not None:
            return []
        return self.grammar.forced_tokens()

    def n_allowed(self, tokens: list[int]) -> int:
        """How many of these tokens, from the front, the options do not exclude for certain."""
        grammar = self._grammar_now
        if self.thinking is not None or grammar is None:
            return len(tokens)  # not known cheaply; verification rejects what cannot be
        return grammar.n_allowed(tokens)

    def _penalise(self, row_V: Tensor) -> None:
        params = self.params
        if params.repetition_penalty != 1 and self._counts:
            ids = torch.tensor(list(self._counts))
            old = row_V[ids]
            factor = params.repetition_penalty
            row_V[ids] = torch.where(old > 0, old / factor, old * factor)
        if self._output_counts and (params.frequency_penalty, params.presence_penalty) != (0, 0):
            ids = torch.tensor(list(self._output_counts))
            counts = torch.tensor(list(self._output_counts.values()), dtype=row_V.dtype)
            row_V[ids] -= counts * params.frequency_penalty + params.presence_penalty

    def _count(self, at: int, change: int) -> None:
        for counts in (self._counts, self._output_counts)[: 1 + (at >= self.n_prompt)]:
            token = self.tokens[at]
            counts[token] = counts.get(token, 0) + change
            if counts[token] == 0:
                del counts[token]

    @staticmethod
    def _thought(thinking: Thinking) -> tuple[bool, int]:
        return thinking.is_open, thinking.n_used


def opened(tokens: tuple[int, ...], markers: ThinkingMarkers) -> bool:
    """Whether a text ends inside a reasoning block."""
    last = next((t for t in reversed(tokens) if t in (markers.open_id, markers.close_id)), None)
    return last == markers.open_id


def needs_state(params: SamplingParams) -> bool:
    """Whether anything but temperature and filters is asked for."""
    return bool(
        params.penalised
        or params.logit_bias
        or params.bad_words
        or params.min_tokens
        or params.grammar_options
        or params.max_thinking_tokens is not None
    )
