"""JSON read character by character: where a value ends, and whether it is one so far.

Here: `JsonValue`, which checks against RFC 8259 with a stack of its own, so that no text can
exhaust Python's. Not here: what a value means (readers.py).
"""

import enum
import re

MAX_DEPTH = 128
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LITERALS = ("true", "false", "null")
_SCALAR_CHARS = frozenset("+-.0123456789eEtrufalsn")
_SPACE = frozenset(" \t\n\r")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")


class Progress(enum.Enum):
    """What a character did to what is being read."""

    MORE = "more"  # it belongs to it
    DONE = "done"  # it was the last of it
    BEFORE = "before"  # it ended before this character
    BAD = "bad"  # it cannot be one any more


class _Want(enum.Enum):
    VALUE = "value"
    FIRST_VALUE = "value or ]"
    FIRST_KEY = "key or }"
    KEY = "key"
    COLON = "colon"
    NEXT = "comma or end"
    STRING = "within a string"
    ESCAPE = "behind a backslash"
    HEX = "within \\uXXXX"
    SCALAR = "within a number or literal"


class JsonValue:
    """One JSON value. `push` characters until it is done; `out` is its text so far.

    Control characters within strings, which JSON forbids and models write, come out escaped, and so
    does the text always parse when the value is done.
    """

    def __init__(self) -> None:
        self.out: list[str] = []
        self._want = _Want.VALUE
        self._stack: list[str] = []
        self._in_key = False
        self._scalar = ""
        self._n_hex = 0

    @property
    def text(self) -> str:
        """The value's text so far."""
        return "".join(self.out)

    def push(self, char: str) -> Progress:
        """Read one character; nothing after anything but MORE."""
        want = self._want
        if want is _Want.STRING:
            return self._string(char)
        if want is _Want.ESCAPE:
            return self._escape(char)
        if want is _Want.HEX:
            self._n_hex -= 1
            if self._n_hex == 0:
                self._want = _Want.STRING
            return self._keep(char, good=char in _HEX)
        if want is _Want.SCALAR:
            if char in _SCALAR_CHARS:
                self._scalar += char
                return self._keep(char)
            if not (self._scalar in _LITERALS or _NUMBER.fullmatch(self._scalar)):
                return Progress.BAD
            if not self._stack:
                return Progress.BEFORE
            self._want = _Want.NEXT
        return self._between(char)

    def _between(self, char: str) -> Progress:
        """Outside strings and scalars."""
        want = self._want
        if char in _SPACE:
            return self._keep(char)
        if want in (_Want.VALUE, _Want.FIRST_VALUE):
            if char == "]" and want is _Want.FIRST_VALUE:
                return self._close(char)
            return self._begin(char)
        if want in (_Want.KEY, _Want.FIRST_KEY):
            if char == "}" and want is _Want.FIRST_KEY:
                return self._close(char)
            self._in_key, self._want = True, _Want.STRING
            return self._keep(char, good=char == '"')
        if want is _Want.COLON:
            self._want = _Want.VALUE
            return self._keep(char, good=char == ":")
        if char == ",":
            self._want = _Want.KEY if self._stack[-1] == "}" else _Want.VALUE
            return self._keep(char)
        return self._close(char)

    def _begin(self, char: str) -> Progress:
        if char in "{[":
            self._stack.append("}" if char == "{" else "]")
            self._want = _Want.FIRST_KEY if char == "{" else _Want.FIRST_VALUE
            return self._keep(char, good=len(self._stack) <= MAX_DEPTH)
        if char == '"':
            self._in_key, self._want = False, _Want.STRING
            return self._keep(char)
        self._scalar, self._want = char, _Want.SCALAR
        return self._keep(char, good=char in _SCALAR_CHARS)

    def _close(self, char: str) -> Progress:
        if char != self._stack[-1]:
            return Progress.BAD
        self._stack.pop()
        self._want = _Want.NEXT
        self.out.append(char)
        return Progress.MORE if self._stack else Progress.DONE

    def _string(self, char: str) -> Progress:
        if char == "\\":
            self._want = _Want.ESCAPE
        elif char == '"':
            self.out.append(char)
            self._want = _Want.COLON if self._in_key else _Want.NEXT
            return Progress.MORE if self._stack else Progress.DONE
        elif char < " ":
            char = f"\\u{ord(char):04x}"
        return self._keep(char)

    def _escape(self, char: str) -> Progress:
        self._want, self._n_hex = (_Want.HEX, 4) if char == "u" else (_Want.STRING, 0)
        return self._keep(char, good=char == "u" or char in _ESCAPES)

    def _keep(self, char: str, *, good: bool = True) -> Progress:
        if good:
            self.out.append(char)
        return Progress.MORE if good else Progress.BAD
