"""Grammars: which tokens may follow, by JSON schema, regular expression or Lark grammar.

llguidance does the parsing; here it is bound to a tokenizer, bounded in what it may use, and its
errors become ours. A grammar from a stranger can be built to explode: compiling it and every token
have fuel, and what exceeds it fails with an error for its own request. Not here: when the mask is
applied (state.py).

Shapes: V vocabulary of the model, which may be padded beyond the tokenizer's.
"""

from collections import OrderedDict

import llguidance
import numpy as np
import torch
from torch import Tensor

from outdraft.errors import SamplingError
from outdraft.request import SamplingParams

MAX_COMPILED = 32
"""Grammars kept compiled, the most recently used."""

JSON_WHITESPACE = r"( |\n[ \t]{0,20})?"
"""A space, or a new line and its indentation: bounded, so that no text is spaces without end."""


class GrammarState:
    """A place in a grammar. An error is final."""

    def __init__(self, matcher: llguidance.LLMatcher, eos_ids: list[int]) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids

    def fork(self) -> "GrammarState":
        """Another one at the same place; microseconds. (Rolling back over an end is not safe.)"""
        return GrammarState(self._matcher.deep_copy(), self._eos_ids)

    def push(self, token: int) -> None:
        """Go on by a token; one that is not allowed ends in an error."""
        if token in self._eos_ids or self._matcher.is_stopped():
            return  # the text is over
        self._matcher.consume_token(token)
        self._check()

    def allowed(self, vocab: int) -> Tensor:
        """Which tokens may follow, bool [V].

        Raises:
            SamplingError: the grammar used up its fuel.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little")[:vocab].astype(bool)
        return torch.from_numpy(np.pad(mask, (0, vocab - len(mask))))

    def end_id(self) -> int | None:
        """The end of sequence, once the grammar allows nothing else."""
        if not self._matcher.is_stopped():
            return None
        self._check()
        return self._eos_ids[0]

    def n_allowed(self, tokens: list[int]) -> int:
        """How many of these tokens, from the front, the grammar allows."""
        if self._matcher.is_stopped():
            return 0
        n: int = self._matcher.validate_tokens(tokens)
        return n

    def forced_tokens(self) -> list[int]:
        """Tokens that follow whatever the model says; they can be drafted for nothing."""
        return list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _error(self._matcher)


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer_json: the text of tokenizer.json.
        vocab: ids that the model scores.
        eos_ids: tokens that end a text, at least one.
    """

    def __init__(self, tokenizer_json: str, vocab: int, eos_ids: list[int]) -> None:
        assert eos_ids
        self._eos_ids = sorted(eos_ids)
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer_json, n_vocab=vocab, eos_token=self._eos_ids
        )
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def start(self, params: SamplingParams) -> GrammarState:
        """The beginning of the grammar that a request asks for.

        Raises:
            SamplingError: it is not valid, or too large.
        """
        source = _source(params)
        matcher = self._compiled.get(source)
        if matcher is None:
            matcher = llguidance.LLMatcher(
                self._tokenizer, source, log_level=0, limits=self._limits
            )
            if matcher.is_error():
                raise _error(matcher)
            self._compiled[source] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(source)
        return GrammarState(matcher.deep_copy(), self._eos_ids)


def _source(params: SamplingParams) -> str:
    """The grammar in llguidance's own form."""
    make = llguidance.LLMatcher
    if params.regex is not None:
        return str(make.grammar_from_regex(params.regex))
    if params.grammar is not None:
        return str(make.grammar_from_lark(params.grammar))
    schema = '{"type": "object"}' if params.json_object else params.json_schema
    assert isinstance(schema, str)
    try:
        return str(
            make.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_WHITESPACE})
        )
    except ValueError as error:
        raise SamplingError(
            f"the JSON schema is not valid: {error}", "give a JSON schema as an object or its text"
        ) from error


def _error(matcher: llguidance.LLMatcher) -> SamplingError:
    text = matcher.get_error().replace("<non-verbose/>", "").strip()[:500]
    return SamplingError(
        f"the grammar cannot be followed: {text}", "check it, or make it simpler and smaller"
    )
