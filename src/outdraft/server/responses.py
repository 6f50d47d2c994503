"""`/v1/responses` in OpenAI's words.

Here: the fields of a request, and its items as messages that templates take. Nothing is kept
between requests: a conversation is sent as a whole. Not here: the answer (responses_answer.py).
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outdraft.server.errors import bad_request
from outdraft.server.guard import Visit, visit_of
from outdraft.server.jobs import Conversation
from outdraft.server.responses_answer import ResponsesAnswer
from outdraft.server.schema import Loose, ResponseFormat, Sampling, ignore, parse, sampling_params
from outdraft.server.service import Service, read_body
from outdraft.server.sse import Awaited, EventStream
from outdraft.server.tools.choice import ToolUse, choose, make_tool

Items = list[dict[str, Any]]
STATEFUL = {
    "previous_response_id": "nothing is kept here: send the whole conversation as input",
    "conversation": "nothing is kept here: send the whole conversation as input",
    "background": "answers are not kept: stream, or wait for the answer",
    "prompt": "there are no stored prompts: use instructions and input",
    "top_logprobs": "use /v1/chat/completions for log-probabilities",
    "max_tool_calls": "use parallel_tool_calls",
}
TEXT_KINDS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


class Reasoning(Loose):
    """`reasoning`."""

    effort: str | None = None
    summary: str | None = None


class TextFormat(ResponseFormat):
    """`text.format`: the schema stands in it, not below it."""

    name: str | None = None
    strict: bool | None = None
    description: str | None = None


class Text(Loose):
    """`text`."""

    format: TextFormat | None = None


class ResponsesRequest(Sampling):
    """The body of `/v1/responses`."""

    input: str | Items
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    user: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None


async def responses(request: Request, service: Service) -> Response:
    """Answer a conversation."""
    visit = visit_of(request.scope)
    asked = parse(ResponsesRequest, await read_body(request, service.limits), visit)
    service.note_model(asked.model, visit)
    for name, reason in STATEFUL.items():
        if getattr(asked, name):
            raise bad_request(f"{name} is not supported: {reason}", name, "unsupported")
    if asked.n not in (None, 1):
        raise bad_request("n is not supported here: an answer is one response", "n")
    if asked.store:
        ignore(visit, ["store"])
    if asked.truncation == "auto":
        ignore(visit, ["truncation"])
    if asked.text is not None and asked.text.format is not None:
        asked.response_format = asked.text.format
    params = sampling_params(
        asked,
        service.defaults,
        max_tokens=asked.max_output_tokens or asked.max_tokens,
        logprobs=None,
    )
    use = tool_use(asked, visit)
    prompt = conversation(asked, use, service)
    running = await service.jobs.open(service.job(asked, visit, prompt, params, use))
    answer = ResponsesAnswer(request, service, running, use, said(asked, params.temperature))
    if asked.stream:
        events = answer.events()
        return EventStream(events, running.close, send_s=service.limits.send_s, last=b"")
    return Awaited(answer.whole, running.close)


def said(asked: ResponsesRequest, temperature: float) -> dict[str, Any]:
    """What of the request is repeated in the response."""
    form = asked.text.format if asked.text is not None else None
    reasoning = asked.reasoning
    return {
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "store": False,
        "temperature": temperature,
        "text": {
            "format": {"type": "text"}
            if form is None
            else form.model_dump(by_alias=True, exclude_none=True)
        },
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_p": asked.top_p,
        "truncation": "disabled",
        "user": asked.user,
    }


def tool_use(asked: ResponsesRequest, visit: Visit) -> ToolUse:
    """Tools and their choice in the words of this API.

    Raises:
        ApiError: they are not what they should be.
    """
    tools = []
    for tool in asked.tools or []:
        if tool.get("type") != "function":  # runs on OpenAI's machines, or has no schema
            ignore(visit, [f"tools.{tool.get('type')}"])
            continue
        tools.append(make_tool(tool, "parameters", "tools"))
    choice = "auto" if asked.tool_choice is None else asked.tool_choice
    name = None
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            allowed = choice.get("tools")
            names = [t.get("name") for t in allowed or [] if isinstance(t, dict)]
            tools = [tool for tool in tools if tool.name in names]
            choice = str(choice.get("mode", "auto"))
        else:
            name = choice.get("name")
            if choice.get("type") != "function" or not isinstance(name, str):
                raise bad_request("tool_choice is not a function with a name", "tool_choice")
            choice = "function"
    if choice not in ("auto", "none", "required", "function"):
        raise bad_request("tool_choice is auto, none, required or a function", "tool_choice")
    return choose(tools, choice, name, asked.parallel_tool_calls, "tool_choice")


def conversation(asked: ResponsesRequest, use: ToolUse, service: Service) -> Conversation:
    """The items as the template gets them."""
    messages: list[dict[str, Any]] = []
    if asked.instructions:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        messages.append({"role": "user", "content": asked.input})
    else:
        messages += item_messages(asked.input)
    options: dict[str, Any] = {}
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        options["reasoning_effort"] = asked.reasoning.effort
        if service.dialect.reasoning is not None:
            thinks = asked.reasoning.effort not in ("none", "minimal")
            options["enable_thinking"] = thinks and not use.forced
    return service.dialect.conversation(use, one_system(messages), options)


def one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leading system messages as one: most templates take a single one, and first."""
    n = 0
    while n < len(messages) and messages[n]["role"] in ("system", "developer"):
        n += 1
    if n < 2:
        return messages
    joined = "\n\n".join(m["content"] for m in messages[:n] if m["content"])
    return [{"role": "system", "content": joined}, *messages[n:]]


def item_messages(items: Items) -> list[dict[str, Any]]:
    """Items as messages: calls, and thoughts before them, join the assistant's message.

    Raises:
        ApiError: an item is of a kind that is not known, or lacks something.
    """
    out: list[dict[str, Any]] = []
    thought = ""
    for item in items:
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought = _thought(item)
            continue
        if kind == "function_call_output":
            number = item.get("call_id")
            if not isinstance(number, str):
                raise bad_request("a function_call_output has no call_id", "input")
            content = item_text(item.get("output"))
            out.append({"role": "tool", "tool_call_id": number, "content": content})
            continue
        if kind == "function_call":
            message = _assistants(out)
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif kind == "message":
            role = item.get("role")
            if not isinstance(role, str) or not 0 < len(role) <= 64:
                raise bad_request("a message has no role", "input")
            message = {"role": role, "content": item_text(item.get("content"))}
            out.append(message)
        else:
            raise bad_request(f"an item of type {str(kind)[:40]!r} is not supported", "input")
        if thought and message["role"] == "assistant":
            message["reasoning"] = message["reasoning_content"] = thought
        thought = ""
    if not out:
        raise bad_request("input is empty", "input")
    return out


def _assistants(out: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that a call belongs to: the last one, or a new one."""
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _thought(item: dict[str, Any]) -> str:
    parts = [p for name in ("content", "summary") for p in item.get(name) or []]
    return "\n".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))


def item_text(content: Any) -> str:
    """Content as text.

    Raises:
        ApiError: a part of it is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        text = (part.get("text") or part.get("refusal")) if isinstance(part, dict) else None
        if kind not in TEXT_KINDS or not isinstance(text, str | None):
            raise bad_request(f"content of type {str(kind)[:40]!r} is not supported", "input")
        texts.append(text or "")
    return "".join(texts)
