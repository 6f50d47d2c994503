"""Llama's tool calls written as Python: `[NAME(key=value, …), …]` (Llama 3.2, Llama 4).

Here: their reader, which writes the arguments out as JSON: strings in either quote with their
escapes, numbers, True, False, None, lists and dictionaries; nothing is evaluated. The other form, a
JSON object without a marker or behind `<|python_tag|>`, is a `CallObject`. Not here: where a call
begins (calls.py).
"""

import re

from outdraft.server.tools.gemma4 import escaped
from outdraft.server.tools.json_text import MAX_DEPTH, Progress
from outdraft.server.tools.readers import Arguments, End, Name, Signal, is_name

_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "0": "\0"}
_N_HEX = {"x": 2, "u": 4, "U": 8}
_WORD_CHARS = frozenset("+-._")


class PythonicReader:
    """Reads a list of calls, its first bracket included; see CallReader.

    Args:
        known: names that may be called; any other makes the text an answer.
    """

    def __init__(self, known: frozenset[str]) -> None:
        self._known = known
        self._state = "start"
        self._word: list[str] = []
        self._stack: list[str] = []
        self._quote = ""
        self._escape: str | None = None
        self._after_string = ""

    def push(self, char: str, out: list[Signal]) -> Progress:
        """See CallReader."""
        state = self._state
        if state == "string":
            return self._in_string(char, out)
        if state in ("name", "key", "word"):
            return self._in_word(char, out)
        if char in _SPACE:
            return Progress.MORE
        if state == "start":
            self._state = "name"
            return Progress.MORE if char == "[" else Progress.BAD
        if state == "between calls":
            self._state = "name"
            if char == "]":
                return Progress.DONE
            return Progress.MORE if char == "," else Progress.BAD
        if state == "first key" and char == ")":
            return self._close(char, out)
        if state == "first key":
            self._state = "key"
            return self._in_word(char, out)
        if state == "colon":
            self._state = "value"
            out.append(Arguments(":"))
            return Progress.MORE if char == ":" else Progress.BAD
        if state in ("value", "first value"):
            return self._begin_value(char, out)
        return self._next(char, out)

    def finish(self, out: list[Signal]) -> bool:
        """See CallReader."""
        return self._state == "between calls"

    def _in_word(self, char: str, out: list[Signal]) -> Progress:
        """A function's name, an argument's name, or a number or literal."""
        if char in _SPACE and not self._word:
            return Progress.MORE
        if f"a{char}".isidentifier() or char in _WORD_CHARS or char in _SPACE:
            self._word.append(char)
            return Progress.MORE if len(self._word) <= 400 else Progress.BAD
        word, self._word = "".join(self._word).strip(), []
        if self._state == "name":
            if char != "(" or not is_name(word) or word not in self._known:
                return Progress.BAD
            out += [Name(word), Arguments("{")]
            self._stack, self._state = [")"], "first key"
            return Progress.MORE
        if self._state == "key":
            if char != "=" or not word.isidentifier():
                return Progress.BAD
            out.append(Arguments(f'"{word}":'))
            self._state = "value"
            return Progress.MORE
        text = _WORDS.get(word) or (word if _NUMBER.fullmatch(word) else "")
        if not text:
            return Progress.BAD
        out.append(Arguments(text))
        self._state = "next"
        return self._next(char, out)

    def _begin_value(self, char: str, out: list[Signal]) -> Progress:
        if char in "]}" and self._state == "first value":
            return self._close(char, out)
        is_key = bool(self._stack) and self._stack[-1] == "}" and not self._after_string
        if char in "'\"":
            self._quote, self._state = char, "string"
            self._after_string = ":" if is_key else ""
            out.append(Arguments('"'))
            return Progress.MORE
        if is_key:
            return Progress.BAD  # JSON has strings as keys only
        if char in "[{":
            self._stack.append("]" if char == "[" else "}")
            self._state, self._after_string = "first value", ""
            out.append(Arguments(char))
            return Progress.MORE if len(self._stack) <= MAX_DEPTH else Progress.BAD
        self._state, self._word = "word", []
        return self._in_word(char, out)

    def _in_string(self, char: str, out: list[Signal]) -> Progress:
        if self._escape is not None:
            return self._in_escape(char, out)
        if char == "\\":
            self._escape = ""
        elif char == self._quote:
            out.append(Arguments('"'))
            self._state = "colon" if self._after_string else "next"
        else:
            out.append(Arguments(escaped(char)))
        return Progress.MORE

    def _in_escape(self, char: str, out: list[Signal]) -> Progress:
        """Within a Python escape; one that Python does not know keeps its backslash."""
        escape = self._escape
        assert escape is not None
        if not escape and char in _N_HEX:
            self._escape = char
            return Progress.MORE
        if not escape:
            self._escape = None
            out.append(Arguments(escaped(_ESCAPES.get(char, "\\" + char))))
            return Progress.MORE
        if char not in "0123456789abcdefABCDEF":
            return Progress.BAD
        escape += char
        self._escape = escape
        if len(escape) == 1 + _N_HEX[escape[0]]:
            code = int(escape[1:], 16)
            self._escape = None
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                return Progress.BAD
            out.append(Arguments(escaped(chr(code))))
        return Progress.MORE

    def _next(self, char: str, out: list[Signal]) -> Progress:
        if char in ")]}":
            return self._close(char, out)
        out.append(Arguments(","))
        self._after_string = ""
        self._state = "key" if self._stack[-1] == ")" else "value"
        return Progress.MORE if char == "," else Progress.BAD

    def _close(self, char: str, out: list[Signal]) -> Progress:
        if self._stack.pop() != char:
            return Progress.BAD
        self._after_string = ""
        out.append(Arguments("}" if char == ")" else char))
        self._state = "next"
        if not self._stack:
            out.append(End())
            self._state = "between calls"
        return Progress.MORE
