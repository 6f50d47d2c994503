"""`/v1/messages` and `/v1/messages/count_tokens` in Anthropic's words.

Here: the fields of a request, and its messages as templates take them. Not here: the answer
(anthropic_answer.py).
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outdraft.server.anthropic_answer import MessagesAnswer
from outdraft.server.errors import bad_request
from outdraft.server.guard import Visit, visit_of
from outdraft.server.jobs import Conversation
from outdraft.server.schema import (
    Loose,
    ResponseFormat,
    Sampling,
    ignore,
    parse,
    sampling_params,
)
from outdraft.server.service import Service, read_body
from outdraft.server.sse import Awaited, EventStream, json_response
from outdraft.server.tools.choice import ToolUse, choose, make_tool

Blocks = list[dict[str, Any]]


class AnthropicMessage(Loose):
    """One message; its content is text or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class AnthropicTool(Loose):
    """A function that the model may call, or one of Anthropic's own, which have another type."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Loose):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Loose):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=2**53)] | None = None


class OutputConfig(Loose):
    """`output_config`."""

    format: ResponseFormat | None = None


class Counted(Sampling):
    """What makes up a prompt: the body of `/v1/messages/count_tokens`."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | Blocks | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: ResponseFormat | None = None
    metadata: dict[str, Any] | None = None


class MessagesRequest(Counted):
    """The body of `/v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1, le=2**53)]
    stop_sequences: list[str] | None = None


async def messages(request: Request, service: Service) -> Response:
    """Answer a conversation."""
    visit = visit_of(request.scope)
    asked = parse(MessagesRequest, await read_body(request, service.limits), visit)
    service.note_model(asked.model, visit)
    if asked.n not in (None, 1):
        raise bad_request("n is not supported here: an answer is one message", "n")
    if asked.stop_sequences is not None:
        asked.stop = asked.stop_sequences
    if asked.output_format is not None:
        asked.response_format = asked.output_format
    elif asked.output_config is not None and asked.output_config.format is not None:
        asked.response_format = asked.output_config.format
    thinks = asked.thinking is not None and asked.thinking.type != "disabled"
    if thinks and service.dialect.reasoning is None:
        ignore(visit, ["thinking"])
    elif asked.thinking is not None and asked.thinking.type == "enabled":
        asked.max_thinking_tokens = asked.thinking.budget_tokens
    params = sampling_params(asked, service.defaults, max_tokens=asked.max_tokens, logprobs=None)
    use = tool_use(asked, visit)
    prompt = conversation(asked, use, service)
    running = await service.jobs.open(service.job(asked, visit, prompt, params, use))
    answer = MessagesAnswer(request, service, running, use)
    if asked.stream:
        events = answer.events()
        return EventStream(events, running.close, send_s=service.limits.send_s, last=b"")
    return Awaited(answer.whole, running.close)


async def count_tokens(request: Request, service: Service) -> Response:
    """How many tokens a prompt has."""
    visit = visit_of(request.scope)
    asked = parse(Counted, await read_body(request, service.limits), visit)
    service.note_model(asked.model, visit)
    ids = await service.jobs.tokens(conversation(asked, tool_use(asked, visit), service))
    return json_response({"input_tokens": len(ids)})


def tool_use(asked: Counted, visit: Visit) -> ToolUse:
    """Tools and their choice in Anthropic's words.

    Raises:
        ApiError: they are not what they should be.
    """
    tools = []
    for tool in asked.tools or []:
        if tool.type not in (None, "custom"):  # runs on Anthropic's machines
            ignore(visit, [f"tools.{tool.type}"])
            continue
        tools.append(make_tool(tool.model_dump(), "input_schema", "tools"))
    choice = asked.tool_choice
    if choice is None:
        return choose(tools, "auto", None, True, "tool_choice")
    if choice.type == "tool" and choice.name is None:
        raise bad_request("tool_choice names no tool", "tool_choice")
    words = {"any": "required", "tool": "function"}.get(choice.type, choice.type)
    name = choice.name if choice.type == "tool" else None
    return choose(tools, words, name, not choice.disable_parallel_tool_use, "tool_choice")


def conversation(asked: Counted, use: ToolUse, service: Service) -> Conversation:
    """The messages as the template gets them."""
    out: list[dict[str, Any]] = []
    system = text_of(asked.system or "", "system")
    if system:
        out.append({"role": "system", "content": system})
    for message in asked.messages:
        if message.role == "assistant":
            out.append(assistant_message(message.content))
        elif message.role == "system":
            out.append({"role": "system", "content": text_of(message.content, "messages")})
        else:
            out += user_messages(message.content)
    options: dict[str, Any] = {}
    if service.dialect.reasoning is not None:
        thinks = asked.thinking is not None and asked.thinking.type != "disabled"
        options["enable_thinking"] = thinks and not use.forced
    return service.dialect.conversation(use, out, options)


def text_of(content: str | Blocks, where: str) -> str:
    """Text, or blocks of text.

    Raises:
        ApiError: a block is something else.
    """
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        text = block.get("text")
        if block.get("type") != "text" or not isinstance(text, str):
            raise bad_request(f"a block of type {_kind(block)} is not supported: send text", where)
        texts.append(text)
    return "\n".join(texts)


def user_messages(content: str | Blocks) -> list[dict[str, Any]]:
    """A user's message: results of tools are messages of their own."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    out: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in content:
        if block.get("type") == "tool_result":
            number = block.get("tool_use_id")
            if not isinstance(number, str):
                raise bad_request("a tool_result has no tool_use_id", "messages")
            given = block.get("content")
            result = text_of(given if isinstance(given, str | list) else "", "messages")
            if block.get("is_error") is True:
                result = f"Error: {result}"
            out.append({"role": "tool", "tool_call_id": number, "content": result})
        else:
            texts.append(text_of([block], "messages"))
    if texts or not out:
        out.append({"role": "user", "content": "\n".join(texts)})
    return out


def assistant_message(content: str | Blocks) -> dict[str, Any]:
    """An assistant's message: text, calls and thoughts."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts, thoughts, calls = [], [], []
    for block in content:
        kind = block.get("type")
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":
            texts.append(text_of([block], "messages"))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    if any(thoughts):
        message["reasoning_content"] = message["reasoning"] = "\n".join(thoughts)
    return message


def _kind(block: dict[str, Any]) -> str:
    return json.dumps(str(block.get("type"))[:40])
