"""Tool calls and reasoning out of text: every format, every cut, and text that is none."""

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outdraft.errors import ModelError
from outdraft.server.tools import reasoning
from outdraft.server.tools.answer import AnswerSplit
from outdraft.server.tools.deltas import (
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Delta,
    Message,
    Reasoning,
    merged,
    message_of,
)
from outdraft.server.tools.formats import (
    FORMATS,
    Tool,
    choose_format,
    choose_reasoning,
    new_call_id,
)

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "tags": {"type": "array"},
        "at": {"type": "object"},
    },
}
TOOLS = [Tool("weather", "", PARAMETERS), Tool("f", "", {"type": "object", "properties": {}})]
REASONING = {
    "gemma4": reasoning.GEMMA4,
    "mistral": reasoning.MISTRAL,
}


def split_of(name: str, *, is_open: bool = False) -> AnswerSplit:
    ids = itertools.count()
    form = FORMATS[name](TOOLS)
    think = REASONING.get(name, reasoning.THINK)
    return AnswerSplit(think, form, lambda: f"id{next(ids)}", reasoning_open=is_open)


def read(name: str, pieces: Iterable[str], *, is_open: bool = False) -> list[Delta]:
    split = split_of(name, is_open=is_open)
    return merged([*(d for p in pieces for d in split.push(p)), *split.finish()])


def calls_of(name: str, text: str) -> tuple[list[tuple[str, object]], str, str]:
    message = message_of(read(name, [text]))
    calls = [(c.name, json.loads(c.arguments)) for c in message.calls]
    return calls, message.content, message.reasoning


ARGUMENTS = {"city": 'Köln "am\nRhein" \\ {[,:]}', "days": 3, "tags": ["a", 1.5, None, True]}
ARGUMENTS["at"] = {"x": {"y": []}, "z": -1e-3}
QUOTED = '<|"|>'
GEMMA = (
    'weather{city:<|"|>Köln "am\nRhein" \\ {[,:]}<|"|>,days:3,'
    'tags:[<|"|>a<|"|>,1.5,None,true],at:{x:{y:[]},z:-1e-3}}'
)
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n"
    + str(ARGUMENTS["city"])
    + "\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=tags>\n"
    '["a", 1.5, null, true]\n</parameter>\n<parameter=at>\n{"x": {"y": []}, "z": -0.001}\n'
    "</parameter>\n</function>\n</tool_call>"
)
JSON = json.dumps(ARGUMENTS)
PYTHONIC = "weather(city=%r, days=3, tags=['a', 1.5, None, True], at={'x': {'y': []}, 'z': -0.001})"
TWO = [("weather", ARGUMENTS), ("f", {})]
WHOLE = {
    "gemma4": f"Hm.\n<|tool_call>call:{GEMMA}<tool_call|><|tool_call>call:f{{}}<tool_call|>",
    "qwen": f"Hm.\n\n{XML}\n<tool_call>\n<function=f>\n</function>\n</tool_call>\n",
    "hermes": 'Hm.\n<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>\n'
    '<tool_call>{"arguments":{},"name":"f"}</tool_call>'.replace("%s", JSON),
    "mistral": f"Hm.[TOOL_CALLS]weather[ARGS]{JSON}[TOOL_CALLS]f[CALL_ID]abc123456[ARGS]{{}}",
    "llama": 'Hm.<|python_tag|>{"name": "weather", "parameters": %s}; '
    '{"type": "function", "name": "f", "parameters": {}}'.replace("%s", JSON),
    "llama-pythonic": "Hm.<|python_start|>["
    + PYTHONIC % ARGUMENTS["city"]
    + ", f()]<|python_end|>",
}
OTHER_WAYS = [
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": %s, "id": "x"}, {"name": "f"}]'),
    ("mistral", "[TOOL_CALLS]weather%s[TOOL_CALLS]f[ARGS]null"),
    ("llama", ' {"name": "weather", "parameters": %s}\n{"name":"f","arguments":null}'),
    ("hermes", '<tool_call>{"name":"weather","arguments":%s}<tool_call>{"name": "f"}'),
]


@pytest.mark.parametrize("name", FORMATS)
def test_two_calls_behind_text(name: str) -> None:
    assert calls_of(name, WHOLE[name]) == (TWO, "Hm.", "")


@pytest.mark.parametrize("name,text", OTHER_WAYS)
def test_other_spellings(name: str, text: str) -> None:
    assert calls_of(name, text % JSON) == (TWO, "", "")


def test_arguments_as_a_string_and_raw_line_breaks() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"city\\": 1}"}</tool_call>'
    assert calls_of("hermes", text)[0] == [("f", {"city": 1})]
    text = '<tool_call>{"name": "f", "arguments": {"a": "x\ny\t"}}</tool_call>'
    assert calls_of("hermes", text)[0] == [("f", {"a": "x\ny\t"})]


def test_courtesies_of_gemma() -> None:
    text = '<|tool_call>call:f{"a" : "x\\n", b: London , <|"|>c d<|"|>:None, e:10:30}<tool_call|>'
    assert calls_of("gemma4", text)[0] == [
        ("f", {"a": "x\n", "b": "London", "c d": None, "e": "10:30"})
    ]


def test_values_in_tags_are_what_the_schema_says() -> None:
    text = (
        "<tool_call><function=weather><parameter=city>\n\n 12 </par\n\n</parameter>"
        "<parameter=days>twelve</parameter><parameter=other>\n7\n</parameter>"
        "</function></tool_call>"
    )
    calls, content, _ = calls_of("qwen", text)
    assert calls == [("weather", {"city": "\n 12 </par\n", "days": "twelve", "other": "7"})]
    assert content == ""


def test_python_strings() -> None:
    text = r"""[f(a='it\'s \x41\u00e9\n\q', b={"k": [1, {}]}, c=-0.5)]"""
    expected = {"a": "it's Aé\n\\q", "b": {"k": [1, {}]}, "c": -0.5}
    assert calls_of("llama-pythonic", text)[0] == [("f", expected)]


THOUGHTS = {
    "gemma4": "<|channel>thought\nA\n\nB\n<channel|>",
    "mistral": "[THINK]A\n\nB[/THINK]",
    "qwen": "\n<think>\nA\n\nB\n</think>\n\n",
    "hermes": "<think>A\n\nB</think>",
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning_goes_before(name: str) -> None:
    assert calls_of(name, THOUGHTS[name] + WHOLE[name]) == (TWO, "Hm.", "A\n\nB")
    assert calls_of(name, THOUGHTS[name] + " Plain.\n") == ([], " Plain.\n", "A\n\nB")


def test_reasoning_that_the_prompt_opened_or_nothing_closed() -> None:
    deltas = read("qwen", ["\nA\n", "B\n</think>\n\nC"], is_open=True)
    assert deltas == [Reasoning("A\nB"), Content("C")]
    assert read("qwen", ["<think>A\n"]) == [Reasoning("A\n")]
    assert read("gemma4", ["<|channel>tho"]) == [Reasoning("tho")]
    assert read("gemma4", ["<|channel>other\nA<channel|>B"]) == [
        Reasoning("other\nA"),
        Content("B"),
    ]


def test_tags_within_an_answer_are_text() -> None:
    text = "Qwen writes <think> and </think>."
    assert read("qwen", [text]) == [Content(text)]


BROKEN = [
    ("gemma4", "a <|tool_call>call:f{x:} b"),
    ("gemma4", "<|tool_call>call:f{x:1"),
    ("gemma4", "<|tool_call>call:f{x:1]}<tool_call|>"),
    ("gemma4", "<|tool_call> cal f{}"),
    ("gemma4", '<|tool_call>call:f{x:<|"|>never ended'),
    ("gemma4", "<|tool_call>call:f{x:" + "[" * 1000),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "name": "g"}'),
    ("hermes", '<tool_call>{"name": "f'),
    ("hermes", '<tool_call>{"name": "bad name"}'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "x": 01}'),
    ("hermes", '<tool_call>{"name": "f", "x": ' + "[" * 1000),
    ("hermes", "Use `<tool_call>` for that."),
    ("qwen", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function>\n</tool_call>"),
    ("qwen", "<tool_call><function=f><parameter=a>1</parameter><parameter=a>"),
    ("mistral", "[TOOL_CALLS]no name[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]f[ARG]{}"),
    ("mistral", "[TOOL_CALLS]f[ARGS]nul"),
    ("mistral", "[TOOL_CALLS]f[ARGS]nil"),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}'),
    ("llama", '{"city": "Rome", "name": "f"}'),
    ("llama", '{"name": "unknown", "parameters": {}}'),
    ("llama", "<|python_tag|>import os"),
    ("llama", ' Hi {"name": "f", "parameters": {}}'),
    ("llama-pythonic", "[1, 2, 3]"),
    ("llama-pythonic", "[f(a=__import__('os'))]"),
    ("llama-pythonic", "[f(a={1: 2})]"),
    ("llama-pythonic", "[unknown()]"),
    ("llama-pythonic", r"[f(a='\ud800')]"),
]


@pytest.mark.parametrize("name,text", BROKEN)
def test_what_is_no_call_is_text(name: str, text: str) -> None:
    message = message_of(read(name, [text]))
    assert message == Message(content=text)
    assert message == message_of(read(name, text))


def test_depth_is_bounded() -> None:
    for depth, n_calls in ((100, 1), (200, 0)):
        value = "[" * depth + "]" * depth
        text = f'<tool_call>{{"name": "f", "arguments": {{"a": {value}}}}}</tool_call>'
        message = message_of(read("hermes", [text]))
        assert len(message.calls) == n_calls
        assert message.content == ("" if n_calls else text)


def test_a_whole_call_does_not_come_back_with_the_broken_one_behind_it() -> None:
    message = message_of(read("mistral", ['[TOOL_CALLS][{"name": "f"}, {"name": 1}]']))
    assert [c.name for c in message.calls] == ["f"]
    assert message.content == ', {"name": 1}]'


def test_a_broken_call_does_not_hide_the_next() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": <tool_call>{"name": "f"}</tool_call> end'
    deltas = read("hermes", [text])
    assert CallBroken(0) in deltas
    message = message_of(deltas)
    assert message.content == '<tool_call>{"name": "f", "arguments": {"a": end'
    assert [c.name for c in message.calls] == ["f"]


def test_arguments_go_out_before_the_call_is_whole() -> None:
    split = split_of("gemma4")
    split.push("<|tool_call>call:weather{")
    (delta,) = split.push('city:<|"|>Pa')
    assert getattr(delta, "text", "") == '"city":"Pa'


PIECES = {
    "gemma4": ["<|tool_call>", "<tool_call|>", "call:f{", QUOTED, "a:", "<|channel>", "<channel|>"],
    "qwen": [
        "<tool_call>",
        "</tool_call>",
        "<function=f>",
        "</function>",
        "<parameter=a>",
        "</parameter>",
        "<think>",
        "</think>",
        "\n",
    ],
    "hermes": [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f"',
        '"arguments": {',
        '"a": "\\',
        "<think>",
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[ARGS]",
        "[",
        "f",
        "[CALL_ID]",
        '{"name": "f"',
        "[THINK]",
        "[/THINK]",
    ],
    "llama": ["<|python_tag|>", '{"name": "f"', '"parameters": {}', ";", "{"],
    "llama-pythonic": ["[f(", "a=", "'", '"', ")", "{", "\\", "<|python_start|>", "<|python_end|>"],
}
COMMON = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    " ",
    "\n",
    "1",
    "tru",
    "true",
    "é€😀",
    "thought",
    "x",
    "<",
]


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, str, list[int]]:
    """A format, a text near its syntax, and where to cut the text's bytes."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    whole = WHOLE[name]
    part = st.one_of(
        st.sampled_from([*PIECES[name], *COMMON]),
        st.text(max_size=4),
        st.integers(0, len(whole)).map(lambda at: whole[at:]),
        st.integers(0, len(whole)).map(lambda at: whole[:at]),
    )
    text = "".join(draw(st.lists(part, max_size=12)))
    n = len(text.encode("utf-8", "surrogatepass"))
    return name, text, draw(st.lists(st.integers(0, n), max_size=8))


def pieces_of(text: str, cuts: list[int]) -> Iterator[str]:
    """The text as it arrives when its bytes are cut there."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    data = text.encode("utf-8", "surrogatepass")
    edges = [0, *sorted(cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        yield decoder.decode(data[start:end])


@settings(max_examples=400, deadline=None)
@given(texts())
def test_cuts_make_no_difference_and_nothing_raises(case: tuple[str, str, list[int]]) -> None:
    name, text, cuts = case
    deltas = read(name, [text])
    assert deltas == read(name, pieces_of(text, cuts))
    assert deltas == read(name, text)
    calls: dict[int, str] = {}
    for delta in deltas:  # calls begin and end in order
        if isinstance(delta, CallStart):
            before = deltas[: deltas.index(delta)]
            assert delta.index == sum(isinstance(d, CallEnd | CallBroken) for d in before)
            calls[delta.index] = "open"
        elif isinstance(delta, CallEnd | CallBroken):
            assert calls.pop(delta.index) == "open"
    assert not calls
    message = message_of(deltas)
    for call in message.calls:
        assert isinstance(json.loads(call.arguments), dict)


@settings(max_examples=200, deadline=None)
@given(texts())
def test_nothing_is_lost(case: tuple[str, str, list[int]]) -> None:
    """Without a call and reasoning, the content is the text to the letter."""
    name, text, _ = case
    form = FORMATS[name](TOOLS)
    split = AnswerSplit(None, form, lambda: "id")
    message = message_of([*split.push(text), *split.finish()])
    if not message.calls:
        assert message.content == text


@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_of_two_calls(name: str) -> None:
    text = THOUGHTS.get(name, "") + WHOLE[name]
    whole = read(name, [text])
    for at in range(len(text.encode()) + 1):
        assert read(name, pieces_of(text, [at])) == whole


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(
            lambda k: k.isidentifier()
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(st.from_regex("[a-z]{1,3}", fullmatch=True), inner, max_size=2)
            ),
            max_leaves=5,
        ),
        max_size=3,
    )
)
def test_what_a_template_writes_is_read_back(arguments: dict[str, object]) -> None:
    """Gemma's arguments as its template writes them, and the JSON of the others."""
    if QUOTED in json.dumps(arguments).replace('\\"', '"'):
        return
    text = f"<|tool_call>call:f{as_gemma(arguments)}<tool_call|>"
    assert calls_of("gemma4", text)[0] == [("f", arguments)]
    text = json.dumps({"name": "f", "arguments": arguments})
    assert calls_of("hermes", f"<tool_call>\n{text}\n</tool_call>")[0] == [("f", arguments)]
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    assert calls_of("llama-pythonic", f"[f({keywords})]")[0] == [("f", arguments)]


def as_gemma(value: object) -> str:
    if isinstance(value, str):
        return QUOTED + value + QUOTED
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{as_gemma(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(as_gemma(v) for v in value) + "]"
    return json.dumps(value) if value is not None else "None"


@pytest.mark.parametrize(
    "template,model_type,expected",
    [
        ("{{ '<|tool_call>call:' }}", "x", "gemma4"),
        ("<tool_call>\n<function=", "qwen3", "qwen"),
        ('<tool_call>\n{"name"', "qwen2", "hermes"),
        ("[TOOL_CALLS]", "x", "mistral"),
        ('<|python_tag|>{"name"', "x", "llama"),
        ("", "gemma4_text", "gemma4"),
        ("", "qwen3_moe", "hermes"),
        ("", "unheard_of", "hermes"),
    ],
)
def test_formats_are_chosen(template: str, model_type: str, expected: str) -> None:
    assert choose_format(template, model_type) == expected
    assert choose_format(template, model_type, "llama") == "llama"


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ModelError, match="unknown tool format"):
        choose_format("", "", "gemma5")


def test_reasoning_is_chosen() -> None:
    assert choose_reasoning("… <think> …", lambda t: False) is reasoning.THINK
    assert choose_reasoning("", lambda t: t in ("<|channel>", "<channel|>")) is reasoning.GEMMA4
    assert choose_reasoning("", lambda t: False) is None


def test_ids() -> None:
    assert len({new_call_id("gemma4") for _ in range(100)}) == 100
    assert len(new_call_id("mistral")) == 9 and new_call_id("mistral").isalnum()
