"""Mistral's tool calls, both ways.

- `[TOOL_CALLS]NAME[ARGS]{…}` from version 11 of its tokenizers on: a marker for each call, perhaps
  with `[CALL_ID]ID`;
- `[TOOL_CALLS][{"name": …, "arguments": …}, …]` before that.

Here: their reader. Not here: where a call begins (calls.py).
"""

from outdraft.server.tools.json_text import JsonValue, Progress
from outdraft.server.tools.readers import Arguments, CallObject, End, Name, Signal, is_name

_SPACE = " \t\n\r"
ARGS, CALL_ID = "[ARGS]", "[CALL_ID]"
MAX_ID_CHARS = 64


class MistralReader:
    """Reads what stands behind `[TOOL_CALLS]`; see CallReader."""

    def __init__(self) -> None:
        self._state = "start"
        self._word: list[str] = []
        self._tag = ""
        self._element: CallObject | None = None
        self._json: JsonValue | None = None

    def push(self, char: str, out: list[Signal]) -> Progress:
        """See CallReader."""
        if self._element is not None:
            return self._in_element(char, out)
        if self._json is not None:
            return self._in_arguments(char, out)
        if self._state == "tag":
            return self._in_tag(char, out)
        if self._state == "id":
            return self._in_id(char)
        if char in _SPACE:
            return Progress.MORE if self._state != "name" else Progress.BAD
        if self._state == "start":
            self._state = "element" if char == "[" else "name"
            return Progress.MORE if char == "[" else self._in_name(char, out)
        if self._state == "name":
            return self._in_name(char, out)
        if self._state == "element":
            self._element = CallObject()
            return self._element.push(char, out)
        if self._state == "arguments":
            return self._begin_arguments(char, out)
        if char == "]":
            return Progress.DONE
        self._state = "element"
        return Progress.MORE if char == "," else Progress.BAD

    def finish(self, out: list[Signal]) -> bool:
        """See CallReader."""
        return self._state == "next" and self._element is None

    def _in_element(self, char: str, out: list[Signal]) -> Progress:
        assert self._element is not None
        progress = self._element.push(char, out)
        if progress is not Progress.DONE:
            return progress
        self._element, self._state = None, "next"
        return Progress.MORE

    def _in_name(self, char: str, out: list[Signal]) -> Progress:
        if char not in "[{":
            self._word.append(char)
            return Progress.MORE if is_name("".join(self._word[-128:])) else Progress.BAD
        name = "".join(self._word)
        if not is_name(name):
            return Progress.BAD
        out.append(Name(name))
        if char == "{":
            return self._begin_arguments(char, out)
        self._state, self._tag = "tag", char
        return Progress.MORE

    def _in_tag(self, char: str, out: list[Signal]) -> Progress:
        self._tag += char
        if self._tag in (ARGS, CALL_ID):
            self._state = "arguments" if self._tag == ARGS else "id"
            self._word = []
            return Progress.MORE
        fits = ARGS.startswith(self._tag) or CALL_ID.startswith(self._tag)
        return Progress.MORE if fits else Progress.BAD

    def _in_id(self, char: str) -> Progress:
        self._word.append(char)
        if char == "[":
            self._state, self._tag = "tag", char
        fits = char == "[" or (char.isalnum() and len(self._word) <= MAX_ID_CHARS)
        return Progress.MORE if fits else Progress.BAD

    def _begin_arguments(self, char: str, out: list[Signal]) -> Progress:
        if char not in "{n":  # an object, or null for none
            return Progress.BAD
        self._json = JsonValue()
        return self._in_arguments(char, out)

    def _in_arguments(self, char: str, out: list[Signal]) -> Progress:
        value = self._json
        assert value is not None
        n = len(value.out)
        progress = value.push(char)
        if progress is Progress.BAD:
            return progress
        text = "".join(value.out[n:])
        if value.out[0] == "{":
            out.append(Arguments(text))
        is_null = value.out[0] == "n" and len(value.out) == len("null")
        if is_null:
            if value.text != "null":
                return Progress.BAD
            out.append(Arguments("{}"))
        if progress is Progress.DONE or is_null:
            out.append(End())
            return Progress.DONE
        return Progress.MORE
