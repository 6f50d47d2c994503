"""The real OpenAI SDK against a live server: what its users call, and what it raises."""

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.live import Live, run
from tests.server.sdk import (
    MESSAGES,
    PROMPT,
    WEATHER,
    async_openai_of,
    check_weather,
    demo,
    openai_of,
    python_says,
)

TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
FLAT: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": False}


BAD_CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "[1"}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


class Point(BaseModel):
    """What the parse tests ask for."""

    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


def test_models(live: Live) -> None:
    client = openai_of(live)
    assert [m.id for m in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_chat_says_what_python_says(live: Live) -> None:
    client = openai_of(live)
    for own in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7, "top_p": 0.95}):
        params: Any = {"max_tokens": 40, **own}
        expected = python_says(**params)
        got = client.chat.completions.create(model="demo", messages=MESSAGES, **params)
        assert got.choices[0].message.content == expected.text
        assert got.choices[0].finish_reason == expected.finish_reason
        usage = got.usage
        assert usage is not None and usage.completion_tokens == len(expected.tokens)
        assert usage.prompt_tokens == len(expected.prompt_tokens)
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.accepted_prediction_tokens is not None


def test_chat_in_a_stream(live: Live) -> None:
    params: Any = {"temperature": 0, "max_tokens": 40}
    stream = openai_of(live).chat.completions.create(
        model="demo",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        **params,
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == python_says(**params).text
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 40
    assert chunks[-2].choices[0].finish_reason == "length"


def test_many_at_once_from_asyncio(live: Live) -> None:
    expected = python_says(temperature=0, max_tokens=24).text

    async def ask() -> list[str]:
        async with async_openai_of(live) as client:

            async def one(stream: bool) -> str:
                params: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 24}
                if not stream:
                    whole = await client.chat.completions.create(temperature=0, **params)
                    return whole.choices[0].message.content or ""
                events = await client.chat.completions.create(temperature=0, stream=True, **params)
                deltas = [e.choices[0].delta async for e in events if e.choices]
                return "".join(d.content or "" for d in deltas)

            return await asyncio.gather(*(one(i % 2 == 0) for i in range(6)))

    assert run(ask()) == [expected] * 6


def test_completions_and_embeddings(live: Live) -> None:
    client = openai_of(live)
    got = client.completions.create(model="demo", prompt="def f(", max_tokens=16, temperature=0)
    from outdraft.request import SamplingParams

    expected = demo().generate("def f(", SamplingParams(max_tokens=16))
    assert got.choices[0].text == expected.text
    vectors = client.embeddings.create(model="demo", input=["one", "two"]).data
    assert len(vectors) == 2
    assert abs(sum(x * x for x in vectors[0].embedding) - 1) < 1e-3


def test_parse_with_pydantic(live: Live) -> None:
    client = openai_of(live)
    chat = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Point, max_tokens=64, seed=1
    )
    assert isinstance(chat.choices[0].message.parsed, Point)
    response = client.responses.parse(
        model="demo", input=PROMPT, text_format=Point, max_output_tokens=64
    )
    assert isinstance(response.output_parsed, Point)


@pytest.mark.parametrize("seed", range(3))
def test_forced_tools(live: Live, seed: int) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    for chosen in ("required", choice):
        got = openai_of(live).chat.completions.create(
            model="demo",
            messages=MESSAGES,
            tools=[TOOL],
            tool_choice=chosen,
            parallel_tool_calls=False,
            seed=seed,
            temperature=1.0,
            max_tokens=100,
        )
        (choice_,) = got.choices
        assert choice_.finish_reason == "tool_calls"
        (call,) = choice_.message.tool_calls or []
        assert call.type == "function" and call.function.name == "weather"
        check_weather(json.loads(call.function.arguments))


def test_tools_in_a_stream_and_back(live: Live) -> None:
    client = openai_of(live)
    asked: Any = {
        "model": "demo",
        "tools": [TOOL],
        "temperature": 0,
        "max_tokens": 100,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = client.chat.completions.create(messages=MESSAGES, **asked)
    with client.chat.completions.stream(messages=MESSAGES, **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    message = final.choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.arguments == whole.choices[0].message.tool_calls[0].function.arguments  # type: ignore[union-attr,index]
    history: Any = [
        *MESSAGES,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"},
    ]
    again = client.chat.completions.create(
        model="demo", messages=history, tools=[TOOL], max_tokens=8, temperature=0
    )
    assert again.choices[0].message.content
    bigger = again.usage.prompt_tokens  # type: ignore[union-attr]
    assert bigger > whole.usage.prompt_tokens  # type: ignore[union-attr]


def test_a_schema_or_a_call(live: Live) -> None:
    """With both, an answer that is not a call is of the schema."""
    schema = Point.model_json_schema()
    got = openai_of(live).chat.completions.create(
        model="demo",
        messages=MESSAGES,
        tools=[TOOL],
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
        max_tokens=100,
        temperature=0,
    )
    message = got.choices[0].message
    if message.tool_calls:
        check_weather(json.loads(message.tool_calls[0].function.arguments))  # type: ignore[union-attr]
    else:
        Point.model_validate_json(message.content or "")


def test_no_tool_when_none_is_wanted(live: Live) -> None:
    asked: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    plain = openai_of(live).chat.completions.create(**asked)
    none = openai_of(live).chat.completions.create(**asked, tools=[TOOL], tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content


def test_responses(live: Live) -> None:
    client = openai_of(live)
    expected = python_says(temperature=0, max_tokens=40)
    asked: Any = {"model": "demo", "temperature": 0, "max_output_tokens": 40}
    whole = client.responses.create(input=PROMPT, **asked)
    assert whole.output_text == expected.text
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.usage is not None and whole.usage.output_tokens == 40
    details = whole.usage.output_tokens_details.model_dump()
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] >= 0
    items = client.responses.create(
        input=[{"role": "user", "content": [{"type": "input_text", "text": PROMPT}]}], **asked
    )
    assert items.output_text == expected.text
    sampled = client.responses.create(
        model="demo", input=PROMPT, max_output_tokens=30, extra_body={"seed": 5}, temperature=0.8
    )
    assert sampled.output_text == python_says(temperature=0.8, max_tokens=30, seed=5).text


def test_events_of_a_response(live: Live) -> None:
    expected = python_says(temperature=0, max_tokens=12).text
    stream = openai_of(live).responses.create(
        model="demo", input=PROMPT, temperature=0, max_output_tokens=12, stream=True
    )
    events = list(stream)
    kinds = [e.type for e in events]
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == expected


def test_tools_of_a_response(live: Live) -> None:
    client = openai_of(live)
    asked: Any = {
        "model": "demo",
        "tools": [FLAT],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_output_tokens": 100,
    }
    whole = client.responses.create(input=PROMPT, **asked)
    (item,) = whole.output
    assert item.type == "function_call" and whole.status == "completed"
    check_weather(json.loads(item.arguments))
    with client.responses.stream(input=PROMPT, **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert kinds.index("response.function_call_arguments.done") < kinds.index("response.completed")
    assert final.output[0].arguments == item.arguments  # type: ignore[union-attr]
    again = client.responses.create(
        model="demo",
        input=[
            {"role": "user", "content": PROMPT},
            item.to_dict(),  # type: ignore[list-item]
            {"type": "function_call_output", "call_id": item.call_id, "output": "18 degrees"},
        ],
        max_output_tokens=8,
    )
    assert again.output_text


@pytest.mark.parametrize(
    "change,words",
    [
        ({"previous_response_id": "resp_1"}, "nothing is kept"),
        ({"background": True}, "not kept"),
        ({"input": []}, "input is empty"),
        ({"input": [{"type": "web_search_call"}]}, "not supported"),
        ({"tool_choice": "required"}, "there is none"),
        ({"tools": [FLAT, FLAT]}, "same name"),
        ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "x"}}, "not among"),
    ],
)
def test_what_a_response_cannot_be(live: Live, change: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        openai_of(live).responses.create(**{"model": "demo", "input": PROMPT, **change})


@pytest.mark.parametrize(
    "change,words",
    [
        ({"tools": [tool(name="a b")]}, "proper name"),
        ({"tools": [tool(name="a", parameters={"type": "array"})]}, "schema of an object"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, "not JSON"),
        ({"temperature": -1}, "temperature"),
    ],
    ids=str,
)
def test_bad_requests(live: Live, change: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        openai_of(live).chat.completions.create(**{"model": "demo", "messages": MESSAGES, **change})


def test_wrong_keys_and_large_bodies(keyed: Live) -> None:
    good = openai_of(keyed)
    assert [m.id for m in good.models.list()] == ["demo"]
    with pytest.raises(openai.AuthenticationError):
        openai_of(keyed, api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as caught:
        good.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "x" * (9 << 20)}]
        )
    assert caught.value.status_code == 413
