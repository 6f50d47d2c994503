"""A request's tools and a model's dialect together: prompt, shown markers, grammar, reasoning."""

import json
from pathlib import Path
from typing import Any

import pytest

from outdraft.request import SamplingParams
from outdraft.server.errors import ApiError
from outdraft.server.tools.choice import Dialect, ToolUse, choose, make_tool
from outdraft.server.tools.formats import Tool
from outdraft.server.tools.prompt import call_messages
from outdraft.text.tokenizer import Tokenizer
from outdraft.weights.find import DEMO_DIRECTORY

DEMO = next(DEMO_DIRECTORY.rglob("tokenizer.json")).parent
TOOL = Tool("f", "Does f.", {"type": "object", "properties": {"a": {"type": "integer"}}})
STRICT = Tool("f", "", TOOL.parameters, strict=True)
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Call f."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
]


@pytest.fixture
def knowing(tmp_path: Path) -> Dialect:
    """The demo's vocabulary under a template that renders tools and reasons."""
    (tmp_path / "config.json").write_text('{"model_type": "gemma4_text"}')
    (tmp_path / "chat_template.jinja").write_text("{{ tools }}<|tool_call>call: <|channel>")
    return Dialect.load(tmp_path, Tokenizer.load(DEMO))


@pytest.fixture
def plain() -> Dialect:
    """The demo as it is: its template knows no tools."""
    return Dialect.load(DEMO, Tokenizer.load(DEMO))


def ids(dialect: Dialect, text: str) -> tuple[int, ...]:
    return tuple(dialect.tokenizer.encode(text))


def test_a_template_that_knows_tools_gets_objects(knowing: Dialect) -> None:
    conversation = knowing.conversation(ToolUse((TOOL,)), HISTORY, {"enable_thinking": True})
    assert conversation.tools == [TOOL.as_function()]
    system, _, assistant, result = conversation.messages
    assert system["role"] == "system"
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "2", "name": "f"}
    assert HISTORY[2]["tool_calls"] == [CALL], "what was given stays as it is"
    none = knowing.conversation(ToolUse((TOOL,), "none"), HISTORY, {})
    assert none.tools is None


def test_a_template_that_knows_none_gets_text(plain: Dialect) -> None:
    conversation = plain.conversation(ToolUse((TOOL,)), HISTORY, {})
    assert conversation.tools is None
    system, _, assistant, result = conversation.messages
    assert "Be brief." in system["content"] and '"name": "f"' in system["content"]
    assert "<|tool_call>call:" in system["content"]
    assert json.loads(assistant["content"]) == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "user", "content": "Result of f:\n2"}
    first = plain.conversation(ToolUse((TOOL,)), HISTORY[1:2], {}).messages[0]
    assert first["role"] == "system"


def test_markers_are_shown_where_they_are_read(knowing: Dialect) -> None:
    params = SamplingParams()
    names = [knowing.tokenizer.id_to_token(t) for t in knowing.marker_ids(ToolUse((TOOL,)))]
    assert names == ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>']
    shown = knowing.params(ToolUse(), params, ids(knowing, "x")).show_token_ids
    assert [knowing.tokenizer.id_to_token(t) for t in shown] == ["<|channel>", "<channel|>"]


def test_when_a_grammar_is_needed(knowing: Dialect) -> None:
    prompt = ids(knowing, "x")

    def grammar(use: ToolUse, **given: Any) -> str | None:
        return knowing.params(use, SamplingParams(**given), prompt).grammar

    assert grammar(ToolUse((TOOL,))) is None
    assert grammar(ToolUse((STRICT,), "none")) is None
    assert "TEXT calls?" in str(grammar(ToolUse((STRICT,))))
    assert "TEXT calls?" in str(grammar(ToolUse((TOOL,), parallel=False)))
    assert str(grammar(ToolUse((TOOL,), "required"))).startswith("start: calls")
    assert "calls | answer" in str(grammar(ToolUse((TOOL,)), json_schema={"type": "object"}))
    assert "calls | answer" in str(grammar(ToolUse((TOOL,)), json_object=True))
    with pytest.raises(ApiError):
        grammar(ToolUse((TOOL,)), regex="a+")


def test_a_prompt_that_opens_the_reasoning_block(knowing: Dialect) -> None:
    for text, opened in (
        ("<|turn>model\n<|channel>thought\n", True),
        ("<|turn>model\n<|channel>", True),
        ("<|channel>thought\n<channel|>", False),
        ("<|turn>model\n", False),
        ("<|channel>thought\nOne.", False),
    ):
        assert knowing.reasons(ids(knowing, text)) is opened, text
    prompt = ids(knowing, "<|channel>thought\n")
    forced = knowing.params(ToolUse((TOOL,), "required"), SamplingParams(), prompt).grammar
    assert str(forced).startswith("start: thought calls")
    schema = SamplingParams(json_schema={"type": "integer"})
    behind = knowing.params(ToolUse(), schema, prompt)
    assert str(behind.grammar).startswith("start: thought calls")
    assert behind.json_schema is None
    budget = SamplingParams(json_schema={"type": "integer"}, max_thinking_tokens=9)
    assert knowing.params(ToolUse(), budget, prompt).grammar is None


@pytest.mark.parametrize(
    "choice,name,words",
    [("required", None, "none"), ("function", "g", "not among"), ("auto", None, "same name")],
)
def test_choices_that_cannot_be(choice: str, name: str | None, words: str) -> None:
    tools = {"required": [], "function": [TOOL], "auto": [TOOL, TOOL]}[choice]
    with pytest.raises(ApiError) as caught:
        choose(tools, choice, name, None, "tool_choice")
    assert words in caught.value.message


def test_a_named_function_leaves_the_others_out() -> None:
    other = make_tool({"name": "g"}, "parameters", "tools")
    use = choose([TOOL, other], "function", "g", None, "tool_choice")
    assert use.tools == (other,) and use.forced and not use.parallel


@pytest.mark.parametrize(
    "call",
    [
        "f",
        {"function": {"arguments": "{}"}},
        {"function": {"name": "f", "arguments": "[]"}},
        {"function": {"name": "f", "arguments": "[" * 100_000}},
        {"function": {"name": "f", "arguments": 3}},
    ],
    ids=lambda call: str(call)[:40],
)
def test_calls_in_messages_that_are_none(call: Any) -> None:
    with pytest.raises(ApiError):
        call_messages([{"role": "assistant", "tool_calls": [call]}])
