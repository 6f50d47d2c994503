"""The real Anthropic SDK against a live server: what its users call, and what it raises."""

import asyncio
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field

from outdraft.server.responses import item_messages
from tests.server.live import Live, live_server, run
from tests.server.sdk import (
    MESSAGES,
    PROMPT,
    WEATHER,
    anthropic_of,
    async_anthropic_of,
    check_weather,
    openai_of,
    python_says,
)

TOOL: Any = {"name": "weather", "description": "The weather.", "input_schema": WEATHER}
GREEDY = {"temperature": 0}  # which newer versions of the SDK have no argument for
ANY: Any = {"type": "any", "disable_parallel_tool_use": True}


class Point(BaseModel):
    """What the test of structured output asks for."""

    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


def test_messages_say_what_python_says(live: Live) -> None:
    client = anthropic_of(live)
    expected = python_says(temperature=0, max_tokens=40)
    asked: Any = {"model": "demo", "max_tokens": 40, "messages": MESSAGES}
    got = client.messages.create(extra_body=GREEDY, **asked)
    (block,) = got.content
    assert block.type == "text" and block.text == expected.text
    assert got.stop_reason == "max_tokens"
    assert got.usage.output_tokens == 40
    cached = got.usage.cache_read_input_tokens or 0
    assert got.usage.input_tokens + cached == len(expected.prompt_tokens)
    sampled = client.messages.create(extra_body={"temperature": 0.8, "seed": 3}, **asked)
    text = python_says(temperature=0.8, seed=3, max_tokens=40).text
    assert sampled.content[0].text == text  # type: ignore[union-attr]


def test_content_in_blocks_and_a_system_text(live: Live) -> None:
    client = anthropic_of(live)
    asked: Any = {"model": "demo", "max_tokens": 16, "extra_body": GREEDY}
    whole = client.messages.create(system="Be brief.", messages=MESSAGES, **asked)
    blocks = client.messages.create(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        **asked,
    )
    assert blocks.content == whole.content
    counted = client.messages.count_tokens(
        model="demo", system="Be brief.", messages=MESSAGES
    ).input_tokens
    assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    with_tools = client.messages.count_tokens(model="demo", messages=MESSAGES, tools=[TOOL])
    assert with_tools.input_tokens > counted


def test_events_of_a_message(live: Live) -> None:
    expected = python_says(temperature=0, max_tokens=12)
    asked: Any = {"model": "demo", "max_tokens": 12, "messages": MESSAGES, "extra_body": GREEDY}
    events = list(anthropic_of(live).messages.create(stream=True, **asked))
    kinds = [e.type for e in events]
    assert list(dict.fromkeys(kinds)) == [
        "message_start",
        *(["ping"] if "ping" in kinds else []),  # which the SDK may keep to itself
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    deltas = [e.delta.text for e in events if e.type == "content_block_delta"]  # type: ignore[union-attr]
    assert "".join(deltas) == expected.text
    with anthropic_of(live).messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected.text
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 12


def test_stop_sequences(live: Live) -> None:
    text = python_says(temperature=0, max_tokens=40).text
    stop = text.strip().split()[1]
    asked: Any = {"model": "demo", "max_tokens": 40, "messages": MESSAGES, "extra_body": GREEDY}
    got = anthropic_of(live).messages.create(stop_sequences=["never said", stop], **asked)
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", stop)
    assert got.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]


@pytest.mark.parametrize("choice", [ANY, {"type": "tool", "name": "weather"}], ids=["any", "tool"])
def test_tools_and_their_results(live: Live, choice: Any) -> None:
    client = anthropic_of(live)
    asked: Any = {"model": "demo", "max_tokens": 100, "tools": [TOOL], "extra_body": GREEDY}
    got = client.messages.create(messages=MESSAGES, tool_choice=choice, **asked)
    (call,) = got.content
    assert call.type == "tool_use" and got.stop_reason == "tool_use"
    check_weather(call.input)  # type: ignore[arg-type]
    with client.messages.stream(messages=MESSAGES, tool_choice=choice, **asked) as stream:
        kinds = [e.type for e in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert final.content[0].input == call.input  # type: ignore[union-attr]
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees"}
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": [b.to_dict() for b in got.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    again = client.messages.create(messages=history, **{**asked, "max_tokens": 8})
    assert again.content and again.stop_reason in ("max_tokens", "end_turn")


def test_parse_with_pydantic(live: Live) -> None:
    got = anthropic_of(live).messages.parse(
        model="demo", max_tokens=64, messages=MESSAGES, output_format=Point
    )
    assert isinstance(got.parsed_output, Point)


def test_from_asyncio(live: Live) -> None:
    expected = python_says(temperature=0, max_tokens=16).text

    async def ask() -> list[str]:
        async with async_anthropic_of(live) as client:
            asked: Any = {"model": "demo", "max_tokens": 16, "messages": MESSAGES}

            async def one() -> str:
                async with client.messages.stream(extra_body=GREEDY, **asked) as stream:
                    return "".join([text async for text in stream.text_stream])

            return await asyncio.gather(*(one() for _ in range(4)))

    assert run(ask()) == [expected] * 4


def test_models(live: Live) -> None:
    assert [m.id for m in anthropic_of(live).models.list()] == ["demo"]


@pytest.mark.parametrize(
    "change,words",
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not supported"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tool_choice": {"type": "any"}}, "there is none"),
        ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "proper name"),
        ({"messages": []}, "messages"),
    ],
    ids=str,
)
def test_bad_requests(live: Live, change: Any, words: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        anthropic_of(live).messages.create(
            **{"model": "demo", "max_tokens": 8, "messages": MESSAGES, **change}
        )
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_wrong_keys(keyed: Live) -> None:
    good = anthropic_of(keyed)
    assert good.messages.count_tokens(model="demo", messages=MESSAGES).input_tokens > 0
    with pytest.raises(anthropic.AuthenticationError):
        anthropic_of(keyed, api_key="wrong").messages.count_tokens(model="demo", messages=MESSAGES)
    with pytest.raises(anthropic.APIStatusError) as caught:
        good.messages.create(
            model="demo", max_tokens=1, messages=[{"role": "user", "content": "x" * (9 << 20)}]
        )
    assert caught.value.status_code == 413


def test_busy_servers_and_unfair_clients() -> None:
    """429 for a client with its share in use, 503 when all is, as the SDKs' own exceptions."""
    options = ("--max-in-flight", "2", "--client-share", "0.5")
    body: Any = {"prompt": "def", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with live_server(*options, "--api-key", "one", "--api-key", "two") as live:

        def hold(key: str) -> Any:
            headers = {"Authorization": f"Bearer {key}"}
            return live.client().stream("POST", "/v1/completions", json=body, headers=headers)

        asked: Any = {"model": "demo", "max_tokens": 4, "messages": MESSAGES}
        with hold("one"):
            with pytest.raises(anthropic.RateLimitError) as limited:
                anthropic_of(live, api_key="one").messages.create(**asked)
            with pytest.raises(openai.RateLimitError) as also:
                openai_of(live, api_key="one").chat.completions.create(**asked)
            assert limited.value.response.headers["retry-after"] == "1"
            assert also.value.response.headers["retry-after"] == "1"
            with hold("two"):
                with pytest.raises(anthropic.APIStatusError) as full:
                    anthropic_of(live, api_key="two").messages.create(**asked)
                with pytest.raises(openai.InternalServerError) as full_too:
                    openai_of(live, api_key="two").responses.create(model="demo", input="x")
        assert full.value.status_code == full_too.value.status_code == 503
        error: Any = full.value.body
        assert error["error"]["type"] == "overloaded_error"


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        call,
        {**call, "call_id": "d"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ]
    user, assistant, result = item_messages(items)
    assert user == {"role": "user", "content": "a"}
    assert [c["id"] for c in assistant["tool_calls"]] == ["c", "d"]
    assert assistant["reasoning_content"] == "hm"
    assert result == {"role": "tool", "tool_call_id": "c", "content": "1"}
