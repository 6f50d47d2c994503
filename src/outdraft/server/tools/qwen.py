"""Qwen's tool calls in tags (Qwen3-Coder, Qwen3-Next, Qwen3.5):

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Here: their reader, which writes the arguments out as JSON. A value is text, without the line break
at either end; the schema of the tool says whether it stands for a number, a list and so on. Qwen's
other models write JSON between the same outer tags (`CallObject`). Not here: where a call begins
(calls.py).
"""

from collections.abc import Mapping
from typing import Any

from outdraft.server.tools.gemma4 import escaped
from outdraft.server.tools.json_text import JsonValue, Progress
from outdraft.server.tools.readers import Arguments, End, Name, Signal, is_name

_SPACE = " \t\n\r"
_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END_PARAMETER, _END_FUNCTION = "</parameter>", "</function>"
MAX_KEY_CHARS = 256


class QwenReader:
    """Reads one call from behind `<tool_call>`; see CallReader.

    Args:
        schemas: the parameters' schema of each tool by its name.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._properties: Mapping[str, Any] = {}
        self._state = "head"
        self._tag = ""  # what has come of a tag
        self._word: list[str] = []
        self._keys: set[str] = set()
        self._is_text = True
        self._at_start = True  # the line break before a value may come
        self._break = ""  # a line break that may be the one behind a value

    def push(self, char: str, out: list[Signal]) -> Progress:
        """See CallReader."""
        if self._state == "value":
            return self._in_value(char, out)
        if self._state in ("name", "key"):
            return self._in_word(char, out)
        if char in _SPACE and not self._tag:
            return Progress.MORE
        return self._in_tag(char, out)

    def finish(self, out: list[Signal]) -> bool:
        """See CallReader."""
        return False

    def _in_tag(self, char: str, out: list[Signal]) -> Progress:
        self._tag += char
        tags = (_FUNCTION,) if self._state == "head" else (_PARAMETER, _END_FUNCTION)
        if not any(t.startswith(self._tag) for t in tags):
            return Progress.BAD
        if self._tag not in tags:
            return Progress.MORE
        tag, self._tag, self._word = self._tag, "", []
        if tag == _END_FUNCTION:
            out += [Arguments("}" if self._keys else "{}"), End()]
            return Progress.DONE
        self._state = "name" if tag == _FUNCTION else "key"
        return Progress.MORE

    def _in_word(self, char: str, out: list[Signal]) -> Progress:
        if char != ">":
            self._word.append(char)
            fits = char not in "<\n" and len(self._word) <= MAX_KEY_CHARS
            return Progress.MORE if fits else Progress.BAD
        word = "".join(self._word).strip()
        if self._state == "name":
            if not is_name(word):
                return Progress.BAD
            out.append(Name(word))
            properties = self._schemas.get(word, {}).get("properties")
            self._properties = properties if isinstance(properties, Mapping) else {}
            self._state = "between"
            return Progress.MORE
        if not word or word in self._keys:
            return Progress.BAD
        self._begin_value(word, out)
        return Progress.MORE

    def _begin_value(self, key: str, out: list[Signal]) -> None:
        self._is_text = is_text(self._properties.get(key))
        first = "," if self._keys else "{"
        out.append(Arguments(f'{first}"{escaped(key)}":' + '"' * self._is_text))
        self._keys.add(key)
        self._state, self._word, self._at_start, self._break = "value", [], True, ""

    def _in_value(self, char: str, out: list[Signal]) -> Progress:
        """Up to the closing tag, of which no end is a beginning."""
        if self._at_start:
            self._at_start = False
            if char == "\n":
                return Progress.MORE
        if char == _END_PARAMETER[len(self._tag)]:
            self._tag += char
            if self._tag == _END_PARAMETER:
                self._end_value(out)
            return Progress.MORE
        text, self._tag = self._break + self._tag, ""
        self._break = ""
        if char == "\n":
            self._break = char
        elif char == "<":
            self._tag = char
        else:
            text += char
        self._take(text, out)
        return Progress.MORE

    def _take(self, text: str, out: list[Signal]) -> None:
        if not text:
            return
        if self._is_text:
            out.append(Arguments(escaped(text)))
        else:
            self._word.append(text)

    def _end_value(self, out: list[Signal]) -> None:
        self._tag, self._break, self._state = "", "", "between"
        if self._is_text:
            out.append(Arguments('"'))
            return
        text = "".join(self._word).strip()
        out.append(Arguments(as_json(text)))


def is_text(schema: Any) -> bool:
    """Whether a value is a string whatever it looks like: its schema says so, or nothing."""
    if not isinstance(schema, Mapping):
        return True
    kind = schema.get("type")
    if kind is None:
        values = schema.get("enum")
        if isinstance(values, list):
            return all(isinstance(v, str) for v in values)
        return not any(k in schema for k in ("anyOf", "oneOf", "allOf", "$ref", "const"))
    return bool(kind == "string")


def as_json(text: str) -> str:
    """The JSON that a text is, or else the JSON string of it."""
    for candidate in (text, {"True": "true", "False": "false", "None": "null"}.get(text, "")):
        value = JsonValue()
        progress = Progress.MORE
        for char in candidate:
            if progress is not Progress.MORE:
                break
            progress = value.push(char)
        else:
            if progress is Progress.DONE or (candidate and value.push(" ") is Progress.BEFORE):
                return value.text
    return f'"{escaped(text)}"'
