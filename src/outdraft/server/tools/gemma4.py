"""Gemma 4's tool calls: `<|tool_call>call:NAME{key:value,…}<tool_call|>`.

Here: their reader, which writes the arguments out as JSON. Keys are bare, strings stand between
`<|"|>` without escapes, objects and lists nest, all else is a bare word (numbers, true, false; None
is null). As a courtesy JSON strings are read too, and a bare word that is nothing else is a string.
Not here: where a call begins (calls.py).
"""

import json
import re

from outdraft.server.tools.json_text import MAX_DEPTH, JsonValue, Progress
from outdraft.server.tools.readers import Arguments, End, Name, Signal, is_name

QUOTE = '<|"|>'
_CALL = "call:"
_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "None": "null"} | {
    "True": "true",
    "False": "false",
}
_ENDS = ",}]"
_NOT_BARE = frozenset('{}[]":,')


class Gemma4Reader:
    """Reads one call from behind `<|tool_call>`; see CallReader."""

    def __init__(self) -> None:
        self._state = "call"
        self._word: list[str] = []
        self._stack: list[str] = []
        self._json: JsonValue | None = None
        self._n_quote = 0  # characters of a quote that have come
        self._is_key = False

    def push(self, char: str, out: list[Signal]) -> Progress:
        """See CallReader."""
        state = self._state
        if state == "string":
            return self._in_string(char, out)
        if state == "json":
            return self._in_json(char, out)
        if state == "quote":
            return self._in_quote(char, out)
        if state == "word":
            return self._in_word(char, out)
        if state in ("call", "name"):
            return self._in_head(char, out)
        if char in _SPACE:
            return Progress.MORE
        if state in ("first key", "key"):
            return self._begin_key(char, out)
        if state == "colon":
            out.append(Arguments(":"))
            self._state = "value"
            return Progress.MORE if char == ":" else Progress.BAD
        if state in ("value", "first value"):
            return self._begin_value(char, out)
        return self._next(char, out)

    def finish(self, out: list[Signal]) -> bool:
        """See CallReader."""
        return False

    def _in_head(self, char: str, out: list[Signal]) -> Progress:
        if self._state == "call":
            n = len(self._word)
            if char in _SPACE and n == 0:
                return Progress.MORE
            self._word.append(char)
            if n + 1 == len(_CALL):
                self._state, self._word = "name", []
            return Progress.MORE if char == _CALL[n] else Progress.BAD
        if char != "{":
            self._word.append(char)
            return Progress.MORE if is_name("".join(self._word[-128:])) else Progress.BAD
        name = "".join(self._word)
        if not is_name(name):
            return Progress.BAD
        out += [Name(name), Arguments("{")]
        self._stack, self._state = ["}"], "first key"
        return Progress.MORE

    def _begin_key(self, char: str, out: list[Signal]) -> Progress:
        if char == "}" and self._state == "first key":
            return self._close(char, out)
        self._is_key = True
        return self._begin_text(char, out)

    def _begin_value(self, char: str, out: list[Signal]) -> Progress:
        if char == "]" and self._state == "first value":
            return self._close(char, out)
        self._is_key = False
        if char not in "{[":
            return self._begin_text(char, out)
        out.append(Arguments(char))
        self._stack.append("}" if char == "{" else "]")
        self._state = "first key" if char == "{" else "first value"
        return Progress.MORE if len(self._stack) <= MAX_DEPTH else Progress.BAD

    def _begin_text(self, char: str, out: list[Signal]) -> Progress:
        """A quoted string, a JSON string or a bare word begins."""
        if char == '"':
            self._json, self._state = JsonValue(), "json"
            return self._in_json(char, out)
        if char == QUOTE[0]:
            self._state, self._n_quote = "quote", 1
            return Progress.MORE
        self._state, self._word = "word", [char]
        return Progress.BAD if char in _NOT_BARE else Progress.MORE

    def _in_quote(self, char: str, out: list[Signal]) -> Progress:
        if char != QUOTE[self._n_quote]:
            return Progress.BAD
        self._n_quote += 1
        if self._n_quote == len(QUOTE):
            self._state, self._n_quote = "string", 0
            out.append(Arguments('"'))
        return Progress.MORE

    def _in_string(self, char: str, out: list[Signal]) -> Progress:
        """Up to the next quote, of which no end is a beginning."""
        if char == QUOTE[self._n_quote]:
            self._n_quote += 1
            if self._n_quote == len(QUOTE):
                out.append(Arguments('"'))
                self._state = "colon" if self._is_key else "next"
            return Progress.MORE
        text, self._n_quote = QUOTE[: self._n_quote], 0
        if char == QUOTE[0]:
            self._n_quote = 1
        else:
            text += char
        out.append(Arguments(escaped(text)))
        return Progress.MORE

    def _in_json(self, char: str, out: list[Signal]) -> Progress:
        value = self._json
        assert value is not None
        n = len(value.out)
        progress = value.push(char)
        if progress is Progress.BAD:
            return progress
        out.append(Arguments("".join(value.out[n:])))
        if progress is Progress.DONE:
            self._state = "colon" if self._is_key else "next"
        return Progress.MORE

    def _in_word(self, char: str, out: list[Signal]) -> Progress:
        if char in (":" if self._is_key else _ENDS):
            word = "".join(self._word).strip()
            if self._is_key:
                out.append(Arguments(f'"{escaped(word)}":'))
                self._state = "value"
                return Progress.MORE
            out.append(Arguments(bare_value(word)))
            return self._next(char, out)
        if char in '{}[]"' or (self._is_key and char == ","):
            return Progress.BAD
        self._word.append(char)
        return Progress.MORE

    def _next(self, char: str, out: list[Signal]) -> Progress:
        if char in "}]":
            return self._close(char, out)
        out.append(Arguments(","))
        self._state = "key" if self._stack[-1] == "}" else "value"
        return Progress.MORE if char == "," else Progress.BAD

    def _close(self, char: str, out: list[Signal]) -> Progress:
        if self._stack.pop() != char:
            return Progress.BAD
        out.append(Arguments(char))
        self._state = "next"
        if self._stack:
            return Progress.MORE
        out.append(End())
        return Progress.DONE


def escaped(text: str) -> str:
    """The inside of the JSON string of a text."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def bare_value(word: str) -> str:
    """The JSON of a bare word."""
    if word in _WORDS:
        return _WORDS[word]
    return word if _NUMBER.fullmatch(word) else f'"{escaped(word)}"'
