"""Grammars of forced calls: what they let through is what the parsers read, and fits the schema."""

import json
from typing import Any

import llguidance
import pytest
import tokenizers

from outdraft.errors import SamplingError
from outdraft.server.tools import reasoning
from outdraft.server.tools.answer import AnswerSplit
from outdraft.server.tools.deltas import message_of
from outdraft.server.tools.formats import FORMATS, Tool
from outdraft.server.tools.grammar import CallGrammar
from outdraft.weights.find import DEMO_DIRECTORY

TOKENIZER_JSON = next(DEMO_DIRECTORY.rglob("tokenizer.json")).read_text()
BACKEND = tokenizers.Tokenizer.from_str(TOKENIZER_JSON)
LL = llguidance.LLTokenizer(TOKENIZER_JSON, n_vocab=4096, eos_token=[1, 5])
SPECIAL = {t.content: i for i, t in BACKEND.get_added_tokens_decoder().items() if t.special}

WEATHER = Tool(
    "weather",
    "",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "integer"},
            "at": {"$ref": "#/$defs/place"},
            "tags": {"type": "array", "items": {"type": ["string", "null"]}, "maxItems": 3},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {
            "place": {
                "type": "object",
                "properties": {
                    "lat": {"type": "number"},
                    "inner": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
                },
                "required": ["lat"],
            }
        },
    },
)
NOTHING = Tool("nothing", "", {"type": "object", "properties": {}, "additionalProperties": False})
FREE = Tool("free", "", {"type": "object"})
TOOLS = [WEATHER, NOTHING, FREE]


def token_id(text: str) -> int | None:
    return SPECIAL.get(text)


def accepts(grammar: str, text: str, *, whole: bool = True) -> bool:
    matcher = llguidance.LLMatcher(LL, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), (matcher.get_error(), grammar)
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    for token in ids:
        if matcher.validate_tokens([token]) != 1:
            return False
        matcher.consume_token(token)
        assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.is_accepting()) if whole else True


def grammar(name: str, tools: list[Tool] = TOOLS, *, parallel: bool = True) -> CallGrammar:
    return CallGrammar(name, tools, token_id, parallel=parallel)


Q = '<|"|>'
GOOD = {
    "gemma4": [
        f"<|tool_call>call:weather{{city:{Q}Köln {{,\n{Q},days:3}}<tool_call|>",
        f"<|tool_call>call:weather{{city:{Q}{Q},unit:{Q}C{Q},days:-12,at:{{lat:1.5,inner:"
        f"{{lat:2,inner:null}}}},tags:[{Q}a{Q},null]}}<tool_call|>",
        "<|tool_call>call:nothing{}<tool_call|>",
        "<|tool_call>call:nothing{}<tool_call|><|tool_call>call:free{}<tool_call|>",
        f"<|tool_call>call:free{{a:{{b:[1,{Q}x{Q}]}},c:true}}<tool_call|>",
    ],
    "hermes": [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>',
        '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "free", "arguments": {"a": [1]}}\n</tool_call>',
    ],
    "qwen": [
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=unit>\nF\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        '<parameter=tags>\n["a", null]\n</parameter>\n</function>\n</tool_call>',
        "<tool_call>\n<function=nothing>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=nothing>\n</function>\n</tool_call>",
    ],
    "mistral": [
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "days": 3}},'
        '{"name": "nothing", "arguments": {}}]',
    ],
    "llama": [
        '{"name": "weather", "parameters": {"city": "Rome", "days": 3}}',
        '{"name": "nothing", "parameters": {}}; {"name": "nothing", "parameters": {}}',
    ],
    "llama-pythonic": [
        '[weather(city="Rome", days=3, at={"lat": 1}), nothing()]',
    ],
}
SEVERAL = {name: texts[3 if name == "gemma4" else -1] for name, texts in GOOD.items()}
BAD = {
    "gemma4": [
        f"<|tool_call>call:weather{{city:{Q}Rome{Q}}}<tool_call|>",
        f"<|tool_call>call:weather{{city:{Q}Rome{Q},unit:{Q}K{Q}",
        "<|tool_call>call:other{}",
        "<|tool_call>call:nothing{a:",
        f"<|tool_call>call:weather{{city:{Q}thirteen chars",
        "text",
    ],
    "hermes": [
        '<tool_call>\n{"name": "other"',
        "text",
        '<tool_call>\n{"name": "weather", "arguments": {}',
    ],
    "qwen": ["<tool_call>\n<function=weather>\n</function>", "text"],
    "mistral": ['[TOOL_CALLS][{"name": "other"', "text"],
    "llama": ['{"name": "other"', "text"],
    "llama-pythonic": ["[other(", "[weather()", "text"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_grammar_is_what_the_parser_reads(name: str) -> None:
    forced = grammar(name).required()
    for text in GOOD[name]:
        assert accepts(forced, text), text
        split = AnswerSplit(None, FORMATS[name](TOOLS), lambda: "id")
        message = message_of([*split.push(text), *split.finish()])
        assert message.content == ""
        assert message.calls
        for call in message.calls:
            assert isinstance(json.loads(call.arguments), dict)
    for text in BAD[name]:
        assert not accepts(forced, text), text


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_only(name: str) -> None:
    several = SEVERAL[name]
    assert accepts(grammar(name).required(), several)
    assert not accepts(grammar(name, parallel=False).required(), several)


@pytest.mark.parametrize("name", FORMATS)
def test_text_or_calls(name: str) -> None:
    free = grammar(name).or_text()
    assert accepts(free, "Just an answer < with things.")
    for text in GOOD[name]:
        assert accepts(free, text), text
    if "llama" not in name:
        assert accepts(free, "First. " + GOOD[name][0])
        assert not accepts(free, "First. " + BAD[name][0])
    assert not accepts(free, BAD[name][0])


@pytest.mark.parametrize("name", FORMATS)
def test_a_schema_or_calls(name: str) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    if name == "llama":  # without a marker, references have no common root
        with pytest.raises(SamplingError, match="ref"):
            grammar(name).or_json(schema)
        either = grammar(name, [NOTHING]).or_json(schema)
        assert accepts(either, '{"name": "nothing", "parameters": {}}')
    else:
        either = grammar(name).or_json(schema)
        assert accepts(either, GOOD[name][0])
    assert accepts(either, '{"x": 1}')
    assert not accepts(either, "text")


def test_behind_reasoning_that_the_prompt_opened() -> None:
    forced = grammar("gemma4").required(reasoning.GEMMA4)
    assert accepts(forced, "Hm, {}.<channel|>" + GOOD["gemma4"][0])
    assert not accepts(forced, "Hm.<channel|>text")
    forced = grammar("hermes").required(reasoning.THINK)
    assert accepts(forced, "Hm.\n</think>\n\n" + GOOD["hermes"][0])
    assert not accepts(forced, "Hm.\n</think>\n\ntext")


def values(schema: dict[str, Any]) -> str:
    tool = Tool("f", "", {"type": "object", "properties": {"a": schema}, "required": ["a"]})
    return grammar("gemma4", [tool]).required()


@pytest.mark.parametrize(
    "schema,good,bad",
    [
        ({"const": {"x": ["y", 1]}}, f"{{x:[{Q}y{Q},1]}}", "{x:["),
        ({"type": "string", "pattern": "^[a-z/]+$"}, f"{Q}ab/c{Q}", f"{Q}A"),
        ({"type": "string", "pattern": "b"}, f"{Q}abc{Q}", f"{Q}a{Q}"),
        ({"type": "string", "minLength": 2}, f"{Q}ab{Q}", f"{Q}a{Q}"),
        ({"type": "integer", "minimum": 5, "maximum": 7}, "6", "8"),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, "[true,false]", "[true]"),
        ({"type": "array", "maxItems": 0}, "[]", "[1"),
        ({"allOf": [{"type": "object", "properties": {"x": {"type": "null"}}}]}, "{x:null}", "{y"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "{k:1,l:2}", "{k:t"),
        ({}, f"[{{a:{Q}{Q}}},1.5,null]", "]"),
        ({"enum": [1, None, "1"]}, f"{Q}1{Q}", "2"),
    ],
    ids=lambda value: next(iter(value), "any") if isinstance(value, dict) else "",
)
def test_schemas_in_gemmas_syntax(schema: dict[str, Any], good: str, bad: str) -> None:
    forced = values(schema)
    start = "<|tool_call>call:f{a:"
    assert accepts(forced, f"{start}{good}}}<tool_call|>")
    assert not accepts(forced, f"{start}{bad}}}<tool_call|>")


@pytest.mark.parametrize(
    "schema,words",
    [
        ({"$ref": "http://example.org/x"}, "not local"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"type": "object", "properties": {"a:b": {}}}, "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        values(schema)
