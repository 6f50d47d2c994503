"""Grammars that hold an answer to a format's call syntax and a tool's schema.

Here: the Lark text for llguidance, with the format's markers as single tokens where the vocabulary
has them. Most formats write arguments as JSON, for which llguidance reads the schema; Gemma's own
syntax is in gemma4_grammar.py. Not here: when a call is forced (choice.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outdraft.errors import SamplingError
from outdraft.server.tools.formats import Tool
from outdraft.server.tools.gemma4_grammar import GemmaRules
from outdraft.server.tools.mistral import ARGS
from outdraft.server.tools.qwen import is_text
from outdraft.server.tools.reasoning import ReasoningFormat

MAX_CALLS = 16
"""Most calls of a forced answer: a model that never stops would go on for ever."""

_DEFINITIONS = ("$defs", "definitions")

TokenId = Callable[[str], int | None]
"""The id of a special token by its text; None where it is plain text or unknown."""


def quoted(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


class CallGrammar:
    """Builds the grammar of one request.

    Args:
        name: of the format.
        tools: that may be called.
        token_id: tells which markers are single tokens.
        parallel: several calls may follow one another.
    """

    def __init__(
        self, name: str, tools: Sequence[Tool], token_id: TokenId, *, parallel: bool
    ) -> None:
        self._tools = tools
        self._token_id = token_id
        self._most = MAX_CALLS if parallel else 1
        self._rules: dict[str, str] = {}
        self._name = name
        self._gemma = GemmaRules(self._rules, token_id)

    def required(self, thinking: ReasoningFormat | None = None) -> str:
        """The answer is calls and nothing else, behind reasoning that the prompt has opened."""
        return self._text(f"{self._thinking(thinking)}calls")

    def or_json(self, schema: Any, thinking: ReasoningFormat | None = None) -> str:
        """The answer is calls, or JSON of a schema.

        Raises:
            SamplingError: a call begins as JSON does, and the two cannot be told apart.
        """
        before = self._thinking(thinking)
        if self._name == "llama":
            self._rules["calls"] = self._either(schema)
            return self._text(f"{before}calls")
        self._rules["answer"] = _json(schema)
        return self._text(f"{before}(calls | answer)")

    def only_json(self, schema: Any, thinking: ReasoningFormat | None) -> str:
        """The answer is JSON of a schema, and no call."""
        self._rules["calls"] = _json(schema)
        return self._text(f"{self._thinking(thinking)}calls")

    def _either(self, schema: Any) -> str:
        """Where a call is a JSON object without a marker, it is one of several schemas."""
        choices = [schema]
        if "$ref" in json.dumps([schema, *(dict(t.parameters) for t in self._tools)]):
            raise SamplingError(
                "schemas with $ref cannot be given for tools and the answer together",
                "write the schemas out, or leave one of the two away",
            )
        for tool in self._tools:
            call = {
                "name": {"const": tool.name},
                "parameters": {"type": "object", **tool.parameters},
            }
            closed = {"required": list(call), "additionalProperties": False}
            choices.append({"type": "object", "properties": call, **closed})
        return _json({"anyOf": choices})

    def or_text(self, thinking: ReasoningFormat | None = None) -> str:
        """The answer is free text, and calls where the model begins one."""
        before = self._thinking(thinking)
        if self._name in ("llama", "llama-pythonic"):
            bare = "{" if self._name == "llama" else "\\["
            self._rules["PLAIN"] = f"/[^{bare} \\n](?s:.*)/"
            return self._text(f"{before}(calls | PLAIN)")
        opening = self._opening()
        self._rules["TEXT"] = "/(?s:.*)/"
        if self._token_id(opening) is not None:
            return self._text(f"{before}TEXT calls?")
        # the marker is plain text: the first one ends what is free
        self._rules["lead[lazy]"] = f"/(?s:.*){_regex(opening)}/"
        self._rules["led"] = self._calls(led=True)
        return self._text(f"{before}(TEXT | lead led)")

    def _text(self, start: str) -> str:
        if "calls" not in self._rules:
            self._rules["calls"] = self._calls()
        rules = {"start": start, **self._rules}
        return "".join(f"{name}: {body}\n" for name, body in rules.items())

    def _thinking(self, form: ReasoningFormat | None) -> str:
        if form is None:
            return ""
        token = self._token_id(form.closing)
        if token is not None:
            self._rules["thought"] = f"/(?s:.*)/ <[{token}]> SPACE"
        else:
            self._rules[f"thought_text[suffix={quoted(form.closing)}]"] = "/(?s:.*)/"
            self._rules["thought"] = "thought_text SPACE"
        self._rules["SPACE"] = "/\\n{0,2}/"
        return "thought "

    def _marker(self, text: str) -> str:
        token = self._token_id(text)
        return quoted(text) if token is None else f"<[{token}]>"

    def _opening(self) -> str:
        return {"gemma4": "<|tool_call>", "mistral": "[TOOL_CALLS]"}.get(self._name, "<tool_call>")

    def _calls(self, *, led: bool = False) -> str:
        """One or more calls; `led` when the first marker has been read already."""
        make = {
            "gemma4": self._gemma4,
            "qwen": self._qwen,
            "hermes": self._hermes,
            "mistral": self._mistral,
            "llama": self._llama,
            "llama-pythonic": self._pythonic,
        }[self._name]
        one, between = make()
        self._rules["one"] = one
        if self._name == "mistral" and self._token_id(ARGS) is None:
            more = f' ("," one){{0,{self._most - 1}}}' if self._most > 1 else ""
            return f'{"" if led else self._marker("[TOOL_CALLS]")} "[" one{more} "]"'
        if self._name in ("llama", "llama-pythonic"):
            more = f" ({quoted(between)} one){{0,{self._most - 1}}}" if self._most > 1 else ""
            return f"one{more}" if self._name == "llama" else f'"[" one{more} "]"'
        opening = self._marker(self._opening())
        gap = f"{quoted(between)} " if between else ""
        more = f" ({gap}{opening} one){{0,{self._most - 1}}}" if self._most > 1 else ""
        return f"{'' if led else opening} one{more}"

    def _each(self, make: Callable[[int, Tool], str]) -> str:
        for i, tool in enumerate(self._tools):
            self._rules[f"tool_{i}"] = make(i, tool)
        return "(" + " | ".join(f"tool_{i}" for i in range(len(self._tools))) + ")"

    def _gemma4(self) -> tuple[str, str]:
        def one(i: int, tool: Tool) -> str:
            return f"{quoted(tool.name)} {self._gemma.arguments(tool.parameters)}"

        return f'"call:" {self._each(one)} {self._marker("<tool_call|>")}', ""

    def _object(self, key: str) -> str:
        def one(i: int, tool: Tool) -> str:
            head = f'{{"name": "{tool.name}", "{key}": '
            return f'{quoted(head)} {self._arguments(i, tool)} "}}"'

        return self._each(one)

    def _hermes(self) -> tuple[str, str]:
        return f'"\\n" {self._object("arguments")} "\\n" {self._marker("</tool_call>")}', "\n"

    def _llama(self) -> tuple[str, str]:
        return self._object("parameters"), "; "

    def _mistral(self) -> tuple[str, str]:
        args = self._token_id(ARGS)
        if args is None:
            return self._object("arguments"), ""

        def one(i: int, tool: Tool) -> str:
            return f"{quoted(tool.name)} <[{args}]> {self._arguments(i, tool)}"

        return self._each(one), ""

    def _qwen(self) -> tuple[str, str]:
        def one(i: int, tool: Tool) -> str:
            parts = [quoted(f"\n<function={tool.name}>\n")]
            for j, (key, schema, needed) in enumerate(properties_of(tool.parameters)):
                rule = f"parameter_{i}_{j}"
                value = self._value(rule, _with_definitions(schema, tool.parameters))
                self._rules[rule] = f"{quoted(f'<parameter={key}>' + chr(10))} {value}"
                parts.append(rule if needed else f"{rule}?")
            return " ".join([*parts, quoted("</function>\n")])

        return f"{self._each(one)} {self._marker('</tool_call>')}", "\n"

    def _value(self, rule: str, schema: Any) -> str:
        """A value in tags with the closing tag behind it."""
        end = "\n</parameter>\n"
        if not is_text(schema):
            self._rules[f"{rule}_json"] = _json(schema)
            return f"{rule}_json {quoted(end)}"
        words = schema.get("enum") if isinstance(schema, Mapping) else None
        if isinstance(words, list) and words:
            return "(" + " | ".join(quoted(str(w) + end) for w in words) + ")"
        most = schema.get("maxLength") if isinstance(schema, Mapping) else None
        bound = f"{{0,{most}}}" if type(most) is int and most >= 0 else "*"
        self._rules[f"{rule}_text[suffix={quoted(end)}]"] = f"/(?s:.{bound})/"
        return f"{rule}_text"

    def _pythonic(self) -> tuple[str, str]:
        def one(i: int, tool: Tool) -> str:
            given = properties_of(tool.parameters)
            for j, (key, schema, _) in enumerate(given):
                own = _with_definitions(schema, tool.parameters)
                self._rules[f"value_{i}_{j}"] = _json(own)
                self._rules[f"keyword_{i}_{j}"] = f"{quoted(key + '=')} value_{i}_{j}"
            names = [(f"keyword_{i}_{j}", needed) for j, (_, _, needed) in enumerate(given)]
            inner = separated(self._rules, f"keywords_{i}", names, '", "')
            return f'{quoted(tool.name + "(")} {inner} ")"'

        return self._each(one), ", "

    def _arguments(self, i: int, tool: Tool) -> str:
        self._rules[f"arguments_{i}"] = _json({"type": "object", **tool.parameters})
        return f"arguments_{i}"


def properties_of(schema: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """Name, schema and whether it is required, of each property of an object's schema."""
    properties = schema.get("properties")
    required = schema.get("required")
    needed = set(required) if isinstance(required, list) else set()
    if not isinstance(properties, Mapping):
        return []
    return [(str(key), value, key in needed) for key, value in properties.items()]


def separated(
    rules: dict[str, str], name: str, parts: Sequence[tuple[str, bool]], comma: str
) -> str:
    """Parts in order, the optional ones perhaps, a comma between any two; the name of its rule.

    Two rules for each part: one with something before it, one without.
    """
    rules[f"{name}_{len(parts)}_a"] = rules[f"{name}_{len(parts)}_b"] = '""'
    for at in range(len(parts) - 1, -1, -1):
        rule, needed = parts[at]
        for kind, before in (("a", ""), ("b", f"{comma} ")):
            skip = "" if needed else f" | {name}_{at + 1}_{kind}"
            rules[f"{name}_{at}_{kind}"] = f"{before}{rule} {name}_{at + 1}_b{skip}"
    return f"{name}_0_a"


def _with_definitions(schema: Any, root: Mapping[str, Any]) -> Any:
    """A part of a schema with what its references may point to."""
    if not isinstance(schema, Mapping):
        return schema
    return {**{key: root[key] for key in _DEFINITIONS if key in root}, **schema}


def _json(schema: Any) -> str:
    """JSON of a schema, a space at most between its parts."""
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": {"whitespace_pattern": " ?"}}
    return f"%json {json.dumps(schema)}"


def _regex(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\.+*?()|[]{}^$/" else c for c in text)
