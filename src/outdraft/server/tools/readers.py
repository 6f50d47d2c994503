"""What a format's reader of tool calls is: characters in, signals out.

Here: the interface, names, and the JSON object that several formats write a call as
(`{"name": …, "arguments": {…}}`). Not here: the formats (gemma4.py, qwen.py, formats.py) and where
in an answer a call begins (calls.py).
"""

import json
import re
from dataclasses import dataclass
from typing import Protocol

from outdraft.server.tools.json_text import JsonValue, Progress

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Name:
    """A call begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text of its arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """The call is whole; another may follow in the same reader."""


Signal = Name | Arguments | End


class CallReader(Protocol):
    """Reads what follows the marker of a call. It holds nothing back that it could signal.

    `push` takes a character until it returns something else than MORE: DONE when the calls are
    over, BEFORE when they were over before this character, BAD when this is no call after all.
    """

    def push(self, char: str, out: list[Signal]) -> Progress:
        """Read a character, append what it says to `out`."""
        ...

    def finish(self, out: list[Signal]) -> bool:
        """The text ends here; True if the reader is between calls and lacks nothing."""
        ...


def is_name(text: str) -> bool:
    """Whether a function may be called so."""
    return _NAME.fullmatch(text) is not None


NAME_KEYS = frozenset({"name"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
OTHER_KEYS = frozenset({"id", "type", "function"})


class CallObject:
    """A call as one JSON object, with "name" and "arguments" (or "parameters") in any order.

    Args:
        picky: give up at the first key that calls do not have. For models that write a call
            without a marker, where any other JSON object is an answer.
        known: names that may be called; None allows all.
    """

    def __init__(self, *, picky: bool = False, known: frozenset[str] | None = None) -> None:
        self._picky = picky
        self._known = known
        self._state = "start"
        self._value: JsonValue | None = None
        self._key = ""
        self._seen: set[str] = set()
        self._named = False
        self._pending: list[str] = []  # arguments that came before the name
        self._streams = False

    def push(self, char: str, out: list[Signal]) -> Progress:
        """See CallReader."""
        if self._value is not None:
            return self._in_value(char, out)
        if char in _SPACE:
            return Progress.MORE
        state = self._state
        if state == "start":
            self._state = "first key"
            return Progress.MORE if char == "{" else Progress.BAD
        if state in ("first key", "key"):
            if char != '"':
                return Progress.BAD
            self._begin_value(char)
            return Progress.MORE
        if state == "colon":
            self._state = "value"
            return Progress.MORE if char == ":" else Progress.BAD
        if state == "value":
            if self._begin_value(char) is Progress.BAD:
                return Progress.BAD
            self._streams = char == "{" and self._key in ARGUMENT_KEYS
            return self._stream(char, out)
        if char == ",":
            self._state = "key"
            return Progress.MORE
        return self._close(out) if char == "}" else Progress.BAD

    def finish(self, out: list[Signal]) -> bool:
        """See CallReader."""
        return False

    def _begin_value(self, char: str) -> Progress:
        self._value = JsonValue()
        return self._value.push(char)

    def _in_value(self, char: str, out: list[Signal]) -> Progress:
        value = self._value
        assert value is not None
        n_before = len(value.out)
        progress = value.push(char)
        if progress is Progress.BAD:
            return progress
        if self._streams:
            self._stream("".join(value.out[n_before:]), out)
        if progress is Progress.MORE:
            return progress
        self._value, self._streams = None, False
        if self._state in ("first key", "key"):
            return self._take_key(value.text)
        self._state = "next"
        if not self._take_value(value.text, out):
            return Progress.BAD
        return self.push(char, out) if progress is Progress.BEFORE else Progress.MORE

    def _stream(self, text: str, out: list[Signal]) -> Progress:
        if self._streams and self._named:
            out.append(Arguments(text))
        elif self._streams:
            self._pending.append(text)
        return Progress.MORE

    def _take_key(self, text: str) -> Progress:
        self._key = decoded(text)
        twice = self._key in self._seen
        self._seen.add(self._key)
        if self._key in ARGUMENT_KEYS:
            self._seen |= ARGUMENT_KEYS
        foreign = self._picky and self._key not in NAME_KEYS | ARGUMENT_KEYS | OTHER_KEYS
        self._state = "colon"
        return Progress.BAD if twice or foreign else Progress.MORE

    def _take_value(self, text: str, out: list[Signal]) -> bool:
        """What a key's whole value means; False if it cannot be."""
        if self._key in NAME_KEYS:
            name = decoded(text)
            if not is_name(name) or (self._known is not None and name not in self._known):
                return False
            self._named = True
            out.append(Name(name))
            if self._pending:
                out.append(Arguments("".join(self._pending)))
        elif self._key in ARGUMENT_KEYS and not text.startswith("{"):
            whole = arguments_of(text)
            if whole is None:
                return False
            if self._named:
                out.append(Arguments(whole))
            else:
                self._pending = [whole]
        return True

    def _close(self, out: list[Signal]) -> Progress:
        if not self._named:
            return Progress.BAD
        if not self._seen & ARGUMENT_KEYS:
            out.append(Arguments("{}"))
        out.append(End())
        return Progress.DONE


def decoded(text: str) -> str:
    """The string that a JSON string stands for; "" for other values."""
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def arguments_of(text: str) -> str | None:
    """Arguments that are not written as an object: an object as a string, or null; else None."""
    if text == "null":
        return "{}"
    inner = decoded(text).strip()
    value = JsonValue()
    progress = Progress.BAD if not inner.startswith("{") else Progress.MORE
    for at, char in enumerate(inner):
        if progress is not Progress.MORE:
            return None
        progress = value.push(char)
        if progress is Progress.DONE and at + 1 == len(inner):
            return value.text
    return None
