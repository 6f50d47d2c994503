"""`/v1/chat/completions` in OpenAI's words.

Here: its own fields, its chunks and its answer. Not here: the fields of sampling (schema.py).
"""

import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outdraft.server.answer import AnswerReader, Part
from outdraft.server.errors import bad_request
from outdraft.server.guard import Visit, visit_of
from outdraft.server.jobs import Conversation, Delta, Running, Token, Usage
from outdraft.server.schema import Loose, Sampling, parse, sampling_params
from outdraft.server.service import (
    Service,
    extension_json,
    finish,
    read_body,
    usage_json,
)
from outdraft.server.sse import DONE, Awaited, EventStream, event
from outdraft.server.tools.choice import ToolUse, choose, make_tool


class Message(Loose):
    """One message; what a template may want to see beside these fields is passed on."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]] | None = None


class Tool(Loose):
    """A function that the model may call."""

    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(Sampling):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


async def chat(request: Request, service: Service) -> Response:
    """Answer a conversation."""
    visit = visit_of(request.scope)
    asked = parse(ChatRequest, await read_body(request, service.limits), visit)
    service.note_model(asked.model, visit)
    if asked.top_logprobs and not asked.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    params = sampling_params(
        asked,
        service.defaults,
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )
    use = tool_use(asked)
    prompt = conversation(asked, use, service)
    running = await service.jobs.open(service.job(asked, visit, prompt, params, use))
    answer = ChatAnswer(request, service, asked, running, use)
    if asked.stream:
        return EventStream(answer.events(), running.close, send_s=service.limits.send_s)
    return Awaited(answer.whole, running.close)


def tool_use(asked: ChatRequest) -> ToolUse:
    """Tools and their choice in OpenAI's words.

    Raises:
        ApiError: they are not what they should be.
    """
    tools = [make_tool(tool.function, "parameters", "tools") for tool in asked.tools or []]
    choice = "auto" if asked.tool_choice is None else asked.tool_choice
    name = None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or not isinstance(name, str):
            raise bad_request("tool_choice is not a function with a name", "tool_choice")
        choice = "function"
    elif choice not in ("auto", "none", "required"):
        raise bad_request("tool_choice is auto, none, required or a function", "tool_choice")
    return choose(tools, choice, name, asked.parallel_tool_calls, "tool_choice")


def conversation(asked: ChatRequest, use: ToolUse, service: Service) -> Conversation:
    """The messages as the template gets them."""
    messages = [m.model_dump(exclude_unset=True) for m in asked.messages]
    for message in messages:
        message["content"] = plain_content(message.get("content"))
    options = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        options.setdefault("reasoning_effort", asked.reasoning_effort)
    if use.forced and service.dialect.reasoning is not None:
        options.setdefault("enable_thinking", False)  # the grammar leaves no room for it
    return service.dialect.conversation(use, messages, options)


def plain_content(content: Any) -> str:
    """Content as text: most templates know no other.

    Raises:
        ApiError: a part of it is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.get("text")
        if part.get("type") not in ("text", "input_text") or not isinstance(text, str):
            kind = str(part.get("type"))[:40]
            raise bad_request(f"content of type {kind!r} is not supported: send text", "messages")
        texts.append(text)
    return "".join(texts)


class ChatAnswer:
    """One request's answer, streamed or whole."""

    def __init__(
        self,
        request: Request,
        service: Service,
        asked: ChatRequest,
        running: Running,
        use: ToolUse,
    ) -> None:
        self.request = request
        self.service = service
        self.asked = asked
        self.running = running
        self.readers = [
            AnswerReader(service.dialect.reader(use, running.prompt_tokens))
            for _ in range(running.job.params.n)
        ]
        visit: Visit = visit_of(request.scope)
        self.id = f"chatcmpl-{visit.id}"
        self.created = int(time.time())
        self.usage: Usage | None = None
        self.detail = running.job.detail

    @property
    def _wants_usage(self) -> bool:
        options = self.asked.stream_options
        return options is not None and bool(options.include_usage)

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks."""
        for index in range(self.running.job.params.n):
            yield event(self._chunk(index, {"role": "assistant", "content": ""}))
        async for deltas in self.running:
            yield b"".join(data for delta in deltas for data in self._delta_events(delta))
        if self._wants_usage and self.usage is not None:
            timings = self.usage.timings
            last = {**self._head(), "choices": [], "usage": usage_json(self.usage)}
            yield event({**last, "timings": timings})
        yield DONE

    def _delta_events(self, delta: Delta) -> list[bytes]:
        parts = self.readers[delta.index].read(delta)
        reason = None if delta.end is None else self._finish(delta)
        shown = [part for part in parts if part.kind != "broken"]
        chunks = [self._chunk(delta.index, part_json(part)) for part in shown]
        if not chunks and (delta.tokens or reason is None):
            chunks = [self._chunk(delta.index, {"content": ""})] if self._has_details(delta) else []
        if chunks:
            if self.asked.logprobs:
                chunks[0]["choices"][0]["logprobs"] = self.logprobs_json(delta.tokens)
            if self.detail:
                chunks[0]["outdraft"] = extension_json(delta.tokens, delta.n_drafts)
        if delta.end is not None:
            last = self._chunk(delta.index, {}, reason)
            last["timings"] = delta.end.usage.timings
            chunks.append(last)
        return [event(chunk) for chunk in chunks]

    def _has_details(self, delta: Delta) -> bool:
        return bool(delta.tokens) and (self.detail or bool(self.asked.logprobs))

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        n = self.running.job.params.n
        parts: list[list[Part]] = [[] for _ in range(n)]
        tokens: list[list[Token]] = [[] for _ in range(n)]
        reasons = [""] * n
        async for deltas in self.running:
            for delta in deltas:
                parts[delta.index] += self.readers[delta.index].read(delta)
                tokens[delta.index] += delta.tokens
                if delta.end is not None:
                    reasons[delta.index] = self._finish(delta)
        choices = []
        for index in range(n):
            choice: dict[str, Any] = {
                "index": index,
                "message": message_json(parts[index]),
                "logprobs": self.logprobs_json(tokens[index]) if self.asked.logprobs else None,
                "finish_reason": reasons[index],
            }
            if self.detail:
                choice["outdraft"] = extension_json(tokens[index], None)
            choices.append(choice)
        assert self.usage is not None
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": usage_json(self.usage),
            "timings": self.usage.timings,
        }

    def _finish(self, delta: Delta) -> str:
        assert delta.end is not None
        grammar = bool(self.running.job.params.grammar_options)
        reason = finish(self.service, self.request, delta.end, grammar=grammar)
        reader = self.readers[delta.index]
        usage = replace(delta.end.usage, n_reasoning=reader.n_reasoning)
        self.usage = usage if self.usage is None else self.usage + usage
        called = reader.n_calls > 0
        return "tool_calls" if called and reason == "stop" else reason

    def _head(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "system_fingerprint": None,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head(), "choices": [choice]}
        if self._wants_usage:
            chunk["usage"] = None
        return chunk

    def logprobs_json(self, tokens: list[Token]) -> dict[str, Any]:
        """OpenAI's `logprobs` of a choice."""
        content = []
        for token in tokens:
            if token.logprobs is None:
                continue
            own = self._one(token.id, token.logprobs.token)
            top = token.logprobs.top[: self.asked.top_logprobs or 0]
            content.append({**own, "top_logprobs": [self._one(*pair) for pair in top]})
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.service.token_text(token)
        # -9999 is what OpenAI says for a token without probability; JSON has no infinity
        value = logprob if math.isfinite(logprob) else -9999.0
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}


def part_json(part: Part) -> dict[str, Any]:
    """A part as a chunk's `delta`."""
    if part.kind == "content":
        return {"content": part.text}
    if part.kind == "reasoning":  # the name differs by client
        return {"reasoning": part.text, "reasoning_content": part.text}
    call: dict[str, Any] = {"index": part.index, "function": {"arguments": part.text}}
    if part.id is not None:
        call = {"index": part.index, "id": part.id, "type": "function"}
        call["function"] = {"name": part.name, "arguments": part.text}
    return {"tool_calls": [call]}


def message_json(parts: list[Part]) -> dict[str, Any]:
    """All parts of a completion as a message."""
    content = "".join(p.text for p in parts if p.kind == "content")
    reasoning = "".join(p.text for p in parts if p.kind == "reasoning")
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if part.kind == "broken":
            calls.pop(part.index, None)
        if part.kind != "tool":
            continue
        call = calls.setdefault(
            part.index, {"id": part.id, "type": "function", "function": {"arguments": ""}}
        )
        if part.name is not None:
            call["function"]["name"] = part.name
        call["function"]["arguments"] += part.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        message["tool_calls"] = [calls[i] for i in sorted(calls)]
        message["content"] = content or None
    return message
