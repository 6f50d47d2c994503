"""Requests of the shape that coding agents send, with fields that only the makers' servers read."""

import json
from typing import Any

from tests.server.live import Live

SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "command": {"type": "string", "description": "What to run."},
        "timeout": {"type": "number"},
    },
    "required": ["command"],
    "additionalProperties": False,
}


def events_of(text: str) -> list[dict[str, Any]]:
    blocks = [block.split("data: ", 1)[1] for block in text.split("\n\n") if "data: " in block]
    return [json.loads(block) for block in blocks if block != "[DONE]"]


def test_an_agent_of_anthropics_api(live: Live) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    result = [{"type": "text", "text": "a.py"}]
    body = {
        "model": "claude-sonnet-9",
        "max_tokens": 24,
        "stream": True,
        "temperature": 1,
        "system": [{"type": "text", "text": "You are an agent.", **mark}],
        "metadata": {"user_id": "user_1"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": []},
        "output_config": {"effort": "medium"},
        "tools": [
            {"name": "Bash", "description": "Run.", "input_schema": SCHEMA, **mark},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "List the files.", **mark}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "ls will do", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {
                        "type": "tool_use",
                        "id": "toolu_1",
                        "name": "Bash",
                        "input": {"command": "ls"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": result, **mark},
                    {"type": "text", "text": "Go on."},
                ],
            },
        ],
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    response = live.post("/v1/messages?beta=true", body, headers=headers)
    assert response.status_code == 200, response.text
    ignored = response.headers["x-outdraft-ignored"]
    assert "tools.web_search_20250305" in ignored and "context_management" in ignored
    kinds = [event["type"] for event in events_of(response.text)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    counted = live.post(
        "/v1/messages/count_tokens?beta=true",
        {k: v for k, v in body.items() if k not in ("max_tokens", "stream")},
    ).json()["input_tokens"]
    usage = events_of(response.text)[0]["message"]["usage"]
    assert usage["input_tokens"] == counted


def test_an_agent_of_openais_responses(live: Live) -> None:
    function = {"type": "function", "name": "shell", "description": "Run.", "parameters": SCHEMA}
    body = {
        "model": "gpt-9-codex",
        "instructions": "You are an agent.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Be brief."}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "List the files."}],
            },
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "shell",
                "arguments": '{"command": "ls"}',
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "a.py"},
        ],
        "tools": [{**function, "strict": False}, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "x",
        "max_output_tokens": 24,
    }
    response = live.post("/v1/responses", body)
    assert response.status_code == 200, response.text
    assert "tools.web_search" in response.headers["x-outdraft-ignored"]
    kinds = [event["type"] for event in events_of(response.text)]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_strict_tools_are_held_to_their_schema(live: Live) -> None:
    """A model that begins a call itself is bound from there on; text stays free."""
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
    messages = [{"role": "user", "content": "Write a function."}]
    asked = {"messages": messages, "tools": [tool], "max_tokens": 24, "temperature": 0}
    answer = live.post("/v1/chat/completions", asked).json()["choices"][0]
    assert answer["message"].get("tool_calls") or answer["message"]["content"]


def test_a_broken_call_is_content_everywhere(live: Live) -> None:
    """Cut off by max_tokens, a forced call is no call: its text is the answer's content."""
    tool = {"name": "f", "parameters": SCHEMA}
    messages = [{"role": "user", "content": "Write a function."}]
    common = {"messages": messages, "max_tokens": 8, "temperature": 0}
    chat = live.post(
        "/v1/chat/completions",
        {**common, "tools": [{"type": "function", "function": tool}], "tool_choice": "required"},
    ).json()["choices"][0]
    assert chat["finish_reason"] == "length"
    assert "tool_calls" not in chat["message"]
    text = chat["message"]["content"]
    assert text.startswith("<|tool_call>call:f{")
    message = live.post(
        "/v1/messages",
        {
            **common,
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any"},
        },
    ).json()
    assert message["content"] == [{"type": "text", "text": text}]
    asked = {
        "input": messages,
        "max_output_tokens": 8,
        "temperature": 0,
        "tools": [{"type": "function", **tool}],
        "tool_choice": "required",
    }
    (item,) = live.post("/v1/responses", asked).json()["output"]
    assert item["content"][0]["text"] == text
    streamed = events_of(live.post("/v1/responses", {**asked, "stream": True}).text)
    call, item = streamed[-1]["response"]["output"]
    assert (call["type"], call["status"]) == ("function_call", "incomplete")
    assert item["content"][0]["text"] == text
