"""Gemma 4's argument syntax as grammar rules, from a JSON schema.

Here: what of JSON Schema says which values there are: type, properties, required, items, enum,
const, anyOf and oneOf, allOf, local $ref, lengths, patterns, bounds of numbers. Other keywords let
more through than the schema would. Not here: the marker around a call (grammar.py).
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from outdraft.errors import SamplingError
from outdraft.server.tools.gemma4 import QUOTE

MAX_RULES = 4000
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_KEY = re.compile(r"[^{}\[\]\":,<>\s][^{}\[\]\":,<>\n]*")
_ATOMS = {"boolean": '("true" | "false")', "null": '"null"'}


class GemmaRules:
    """Adds the rules of schemas to a grammar.

    Args:
        rules: of the grammar, by name.
        token_id: the id of a special token, or None.
    """

    def __init__(self, rules: dict[str, str], token_id: Callable[[str], int | None]) -> None:
        self._rules = rules
        token = token_id(QUOTE)
        self._quote = json.dumps(QUOTE) if token is None else f"<[{token}]>"
        self._char = "." if token is not None else "[^<]"
        self._root: Mapping[str, Any] = {}
        self._refs: dict[str, str] = {}
        self._n = 0

    def arguments(self, schema: Mapping[str, Any]) -> str:
        """The rule of a call's arguments, braces included."""
        self._root, self._refs = schema, {}
        return self._object(schema)

    def _value(self, schema: Any) -> str:
        if not isinstance(schema, Mapping) or not schema:
            return self._anything()
        if "$ref" in schema:
            return self._ref(schema["$ref"])
        if "const" in schema:
            return self._literal(schema["const"])
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return self._one_of([self._literal(value) for value in schema["enum"]])
        for name in ("anyOf", "oneOf"):
            if isinstance(schema.get(name), list) and schema[name]:
                return self._one_of([self._value(inner) for inner in schema[name]])
        if isinstance(schema.get("allOf"), list) and schema["allOf"]:
            return self._value(_merged(schema))
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kinds, list):
            return self._one_of([self._value({**schema, "type": kind}) for kind in kinds])
        if kinds == "object":
            return self._object(schema)
        if kinds == "array":
            return self._array(schema)
        if kinds == "string":
            return self._string(schema)
        if kinds in ("integer", "number"):
            return self._number(schema, kinds)
        return _ATOMS.get(str(kinds)) or self._anything()

    def _rule(self, body: str) -> str:
        self._n += 1
        if self._n > MAX_RULES:
            raise SamplingError("the tools' schemas are too large", "make them simpler")
        name = f"g_{self._n}"
        self._rules[name] = body
        return name

    def _one_of(self, choices: list[str]) -> str:
        return "(" + " | ".join(dict.fromkeys(choices)) + ")"

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            if schema.get("additionalProperties") is False:
                return '"{}"'
            return self._any_object(schema.get("additionalProperties"))
        required = schema.get("required")
        needed = set(required) if isinstance(required, list) else set()
        first = rest = self._rule('"}"')
        for key, inner in reversed(list(properties.items())):
            if not _KEY.fullmatch(str(key)):
                raise SamplingError(
                    f"the parameter {str(key)[:40]!r} cannot be written in this model's format",
                    "use letters, digits and underscores",
                )
            pair = self._rule(f"{json.dumps(key + ':', ensure_ascii=False)} {self._value(inner)}")
            skip_first = "" if key in needed else f" | {first}"
            skip_rest = "" if key in needed else f" | {rest}"
            first, rest = (
                self._rule(f"{pair} {rest}{skip_first}"),
                self._rule(f'"," {pair} {rest}{skip_rest}'),
            )
        return f'"{{" {first}'

    def _any_object(self, values: Any) -> str:
        pair = self._rule(f'/[A-Za-z_][A-Za-z0-9_]{{0,63}}/ ":" {self._value(values)}')
        return self._rule(f'"{{" ({pair} ("," {pair})*)? "}}"')

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self._rule(self._value(schema.get("items")))
        low, high = _count(schema, "minItems", 0), _count(schema, "maxItems", None)
        if high == 0:
            return '"[]"'
        assert low is not None
        most = "" if high is None else str(max(high, low, 1) - 1)
        some = f'{item} ("," {item}){{{max(low - 1, 0)},{most}}}'
        return f'"[" {some} "]"' if low else f'"[" ({some})? "]"'

    def _string(self, schema: Mapping[str, Any]) -> str:
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            return f"{self._quote} /{_regex(pattern)}/ {self._quote}"
        low, high = _count(schema, "minLength", 0), _count(schema, "maxLength", None)
        most = "" if high is None else str(high)
        text = f"/(?s:{self._char}{{{low},{most}}})/"
        return self._rule(f"{self._quote} {text} {self._quote}")

    def _number(self, schema: Mapping[str, Any], kind: str) -> str:
        bounds = {name: schema[name] for name in _BOUNDS if name in schema}
        if bounds:
            return self._rule(f"%json {json.dumps({'type': kind, **bounds})}")
        fraction = "" if kind == "integer" else "(\\.[0-9]{1,15})?"
        return f"/-?(0|[1-9][0-9]{{0,15}}){fraction}/"

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            inner = json.dumps(value, ensure_ascii=False) if value else ""
            return f"{self._quote} {inner} {self._quote}"
        if isinstance(value, Mapping):
            pairs = [f"{json.dumps(f'{k}:')} {self._literal(v)}" for k, v in value.items()]
            return ' "," '.join(pairs).join(('"{" ', ' "}"'))
        if isinstance(value, list):
            return ' "," '.join(self._literal(v) for v in value).join(('"[" ', ' "]"'))
        return json.dumps(json.dumps(value))

    def _ref(self, ref: Any) -> str:
        """A local reference; its rule exists before its body, so that it may refer to itself."""
        if ref in self._refs:
            return self._refs[ref]
        target: Any = self._root
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise SamplingError("a $ref of a tool's schema is not local", "use #/$defs/NAME")
        for part in ref[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        if target is None:
            raise SamplingError(f"{ref[:80]} of a tool's schema does not exist", "define it")
        rule = self._rule("")
        self._refs[ref] = rule
        self._rules[rule] = self._value(target)
        return rule

    def _anything(self) -> str:
        if "g_any" not in self._rules:
            self._rules["g_any"] = ""
            text, number = self._string({}), self._number({}, "number")
            self._rules["g_any"] = (
                f'{text} | {number} | "true" | "false" | "null"'
                ' | "[" (g_any ("," g_any)*)? "]" | "{" (g_pair ("," g_pair)*)? "}"'
            )
            self._rules["g_pair"] = '/[A-Za-z_][A-Za-z0-9_]{0,63}/ ":" g_any'
        return "g_any"


def _regex(pattern: str) -> str:
    """A schema's pattern, which matches anywhere unless anchored, as Lark's, which matches all."""
    before = after = "(?s:.*)"
    if pattern.startswith("^"):
        pattern, before = pattern[1:], ""
    if pattern.endswith("$") and not pattern.endswith("\\$"):
        pattern, after = pattern[:-1], ""
    pattern = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", pattern).replace("\n", "\\n")
    return f"{before}({pattern}){after}"


def _count(schema: Mapping[str, Any], name: str, default: int | None) -> int | None:
    value = schema.get(name)
    return value if type(value) is int and 0 <= value <= 100_000 else default


def _merged(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The members of allOf in one: properties and required together, else the last says."""
    out = {key: value for key, value in schema.items() if key != "allOf"}
    for inner in schema["allOf"]:
        if not isinstance(inner, Mapping):
            continue
        for key, value in inner.items():
            if key == "properties" and isinstance(out.get(key), Mapping):
                out[key] = {**out[key], **value}
            elif key == "required" and isinstance(out.get(key), list):
                out[key] = [*out[key], *value]
            else:
                out[key] = value
    return out
