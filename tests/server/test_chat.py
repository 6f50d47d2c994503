"""`/v1/chat/completions` against a live server on the demo."""

import json
from typing import Any

import httpx
import pytest

from tests.server.live import Live

ASK = {"messages": [{"role": "user", "content": "Write a function that adds."}], "max_tokens": 24}


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of each event; the last one must be [DONE]."""
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    own = [c for e in events for c in e["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content") or "" for c in own)


def test_streamed_and_whole_answers_are_the_same(live: Live) -> None:
    asked = {**ASK, "temperature": 0}
    whole = live.post("/v1/chat/completions", asked).json()
    streamed = live.post(
        "/v1/chat/completions",
        {**asked, "stream": True, "stream_options": {"include_usage": True}},
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = chunks(streamed)
    assert text_of(events) == whole["choices"][0]["message"]["content"] != ""
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    usage = events[-1]["usage"]
    assert events[-1]["choices"] == []
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"] == 24
    assert usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert whole["choices"][0]["finish_reason"] == "length"
    for name in ("prompt_n", "prompt_per_second", "predicted_n", "predicted_per_second"):
        assert name in whole["timings"]
    details = whole["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == whole["timings"]["draft_n_accepted"]


def test_the_same_seed_gives_the_same_n_answers(live: Live) -> None:
    asked = {**ASK, "n": 3, "seed": 11, "temperature": 1.2}
    first = live.post("/v1/chat/completions", asked).json()
    again = live.post("/v1/chat/completions", asked).json()
    texts = [c["message"]["content"] for c in first["choices"]]
    assert [c["index"] for c in first["choices"]] == [0, 1, 2]
    assert texts == [c["message"]["content"] for c in again["choices"]]
    assert len(set(texts)) > 1
    assert first["usage"]["completion_tokens"] > 24


def test_drafting_off_changes_no_token(live: Live) -> None:
    asked = {**ASK, "temperature": 0, "max_tokens": 48}
    drafted = live.post("/v1/chat/completions", asked).json()
    plain = live.post("/v1/chat/completions", {**asked, "outdraft": {"drafting": "off"}}).json()
    assert plain["choices"][0]["message"] == drafted["choices"][0]["message"]
    assert plain["timings"]["draft_n"] == 0


def test_tokens_say_how_they_came_about(live: Live) -> None:
    asked = {**ASK, "temperature": 0, "stream": True, "outdraft": {"tokens": True}}
    events = chunks(live.post("/v1/chat/completions", asked))
    blocks = [e["outdraft"] for e in events if "outdraft" in e]
    tokens = [t for b in blocks for t in b["tokens"]]
    assert len(tokens) == 24
    assert "".join(t["text"] for t in tokens) == text_of(events)
    assert all(0 < t["prob"] <= 1 for t in tokens)
    for block in blocks:  # at most the block's drafts were accepted, and they come first
        drafted = [t["drafted"] for t in block["tokens"]]
        assert sum(drafted) <= block["draft_n"]
        assert drafted == sorted(drafted, reverse=True)


def test_logprobs(live: Live) -> None:
    asked = {**ASK, "temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    answer = live.post("/v1/chat/completions", asked).json()["choices"][0]
    content = answer["logprobs"]["content"]
    assert len(content) == 6
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]  # greedy takes the best
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_stop_strings_and_unknown_fields(live: Live) -> None:
    asked = {**ASK, "temperature": 0, "stop": ["\n"], "frobnicate": 1, "nested\r\nX: y": 2}
    response = live.post("/v1/chat/completions", asked)
    assert "\n" not in response.json()["choices"][0]["message"]["content"]
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    ignored = response.headers["x-outdraft-ignored"]
    assert "frobnicate" in ignored
    assert "x" not in response.headers


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
        {"json_schema": SCHEMA},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_schema_holds(live: Live, extra: dict[str, Any]) -> None:
    asked = {**ASK, "temperature": 0.8, "seed": 5, "max_tokens": 120, **extra}
    answer = live.post("/v1/chat/completions", asked).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    value = json.loads(answer["message"]["content"])
    assert set(value) == {"name", "n"}
    assert type(value["n"]) is int


def test_choices_and_expressions(live: Live) -> None:
    words = ["yes (really)", "no."]
    answer = live.post("/v1/chat/completions", {**ASK, "guided_choice": words}).json()
    assert answer["choices"][0]["message"]["content"] in words
    answer = live.post("/v1/chat/completions", {**ASK, "guided_regex": "[0-9]{3}-[a-f]{2}"}).json()
    text = answer["choices"][0]["message"]["content"]
    assert len(text) == 6
    assert text[3] == "-"


@pytest.mark.parametrize(
    "change,words",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}], "temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"functions": [{"name": "f"}]}, "use tools"),
        ({"chat_template": "{{ x }}"}, "templates come with the model"),
        ({"top_logprobs": 2}, "logprobs: true"),
        ({"logit_bias": {"no": 1}}, "logit_bias"),
        ({"logit_bias": {"999999999": 1}}, "vocabulary"),
        ({"guided_json": {}, "guided_regex": "a"}, "use one"),
        ({"guided_regex": "(("}, "grammar"),
        ({"chat_template_kwargs": {"x": 1}}, "allowed are"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_met_is_refused_with_a_reason(
    live: Live, change: dict[str, Any], words: str
) -> None:
    response = live.post("/v1/chat/completions", {**ASK, **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_another_models_name_is_answered_and_said_to_be_ignored(live: Live) -> None:
    response = live.post("/v1/chat/completions", {**ASK, "model": "gpt-9", "max_tokens": 1})
    assert response.status_code == 200
    assert response.json()["model"] == "demo"
    assert response.headers["x-outdraft-ignored"] == "model"
