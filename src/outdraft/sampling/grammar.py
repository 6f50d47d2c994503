"""Grammars: which tokens may follow, by JSON schema, regular expression or Lark grammar.

llguidance does the parsing; here it is bound to a tokenizer, bounded in what it may use, and its
errors become ours. A grammar from a stranger can be built to explode: compiling it has a deadline
(compile_check.py) and every token has fuel, and what exceeds them fails with an error for its own
request. Not here: when the mask is applied (state.py).

Shapes: V vocabulary of the model, which may be padded beyond the tokenizer's.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from outdraft.errors import SamplingError
from outdraft.request import SamplingParams
from outdraft.sampling.compile_check import CompileCheck, refused

KEPT_BYTES = 32 * 2**20
"""Of compiled grammars kept, the most recently used; at least one is."""

LIMITS: dict[str, Any] = {"verbose_errors": False, "max_lexer_states": 50_000}
"""Of llguidance, which sets the fuel itself. A lexer's state takes some hundred bytes."""

JSON_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as Python's `json.dumps` writes it: no text is spaces without end, and what
stands between values is known without the model."""


class GrammarState:
    """A place in a grammar. An error is final."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        eos_ids: list[int],
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._failed = failed

    def fork(self) -> "GrammarState":
        """Another one at the same place; microseconds. (Rolling back over an end is not safe.)"""
        return GrammarState(self._matcher.deep_copy(), self._eos_ids, self._failed)

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
            self._failed()
            raise refused(self._matcher.get_error())


class Grammars:
    """Compiles grammars for one tokenizer; any thread may ask.

    Compiled ones are kept, the most recently used, as long as `KEPT_BYTES` are not exceeded by what
    they are estimated to take.

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
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._check = CompileCheck(tokenizer_json, vocab, self._eos_ids, LIMITS)
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def start(self, params: SamplingParams) -> GrammarState:
        """The beginning of the grammar that a request asks for.

        Raises:
            SamplingError: it is not valid, too large, or takes too long.
        """
        source = _source(params)
        with self._lock:
            matcher = self._compiled.get(source)
            if matcher is not None:
                self._compiled.move_to_end(source)
        if matcher is None:
            self._check.check(source)
            matcher = llguidance.LLMatcher(
                self._tokenizer, source, log_level=0, limits=self._limits
            )
            if matcher.is_error():
                raise refused(matcher.get_error())
            self._keep(source, matcher)
        return GrammarState(matcher.deep_copy(), self._eos_ids, lambda: self._forget(source))

    def _keep(self, source: str, matcher: llguidance.LLMatcher) -> None:
        with self._lock:
            if source not in self._compiled:  # another thread may have been faster
                self._n_bytes += _size(source)
            self._compiled[source] = matcher
            while self._n_bytes > KEPT_BYTES and len(self._compiled) > 1:
                oldest, _ = self._compiled.popitem(last=False)
                self._n_bytes -= _size(oldest)

    def _forget(self, source: str) -> None:
        """What failed in one request is not handed to another: they share lexer and its limits."""
        with self._lock:
            if self._compiled.pop(source, None) is not None:
                self._n_bytes -= _size(source)


def _size(source: str) -> int:
    """About what a compiled grammar takes, its lexer's states included when it was used."""
    return 2**19 + 64 * len(source)


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
        return str(make.grammar_from_json_schema(schema, overrides=JSON_LAYOUT))
    except ValueError as error:
        raise SamplingError(
            f"the JSON schema is not valid: {error}", "give a JSON schema as an object or its text"
        ) from error
