"""Tools and calls on their way into a prompt, in the shape that chat templates are written for.

Here: assistant messages with calls, results of tools, and a description of tools for templates that
know none. Not here: the rendering.
"""

import json
from collections.abc import Sequence
from typing import Any

from outdraft.server.errors import bad_request
from outdraft.server.tools.formats import Tool
from outdraft.server.tools.gemma4 import QUOTE

EXAMPLES = {
    "gemma4": f"<|tool_call>call:NAME{{key:{QUOTE}text{QUOTE},other:1}}<tool_call|>",
    "qwen": "<tool_call>\n<function=NAME>\n<parameter=KEY>\nvalue\n</parameter>\n</function>\n"
    "</tool_call>",
    "hermes": '<tool_call>\n{"name": "NAME", "arguments": {"key": "value"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "NAME", "arguments": {"key": "value"}}]',
    "llama": '{"name": "NAME", "parameters": {"key": "value"}}',
    "llama-pythonic": '[NAME(key="value")]',
}


def call_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with calls and results as templates expect them.

    Arguments become objects, for templates write them out themselves; a result gets the name of the
    function that was called.

    Raises:
        ApiError: a call is not a function with a name and arguments that are a JSON object.
    """
    names: dict[str, str] = {}
    out = []
    for given in messages:
        message = dict(given)
        if message.get("role") == "developer":  # OpenAI's newer word for it
            message["role"] = "system"
        calls = message.pop("tool_calls", None)
        if calls:
            if not isinstance(calls, list):
                raise bad_request("tool_calls is not a list", "messages")
            message["tool_calls"] = [_call(call, names) for call in calls]
        if message.get("role") == "tool" and "name" not in message:
            name = names.get(str(message.get("tool_call_id")))
            if name is not None:
                message["name"] = name
        out.append(message)
    return out


def _call(call: Any, names: dict[str, str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise bad_request("a tool call has no function with a name", "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise bad_request(f"the arguments of {name[:80]} are not JSON", "messages") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise bad_request(f"the arguments of {name[:80]} are not a JSON object", "messages")
    number = call.get("id")
    if isinstance(number, str):
        names[number] = name
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a template that knows no tools: calls are JSON in the text, results a user's."""
    out = []
    for given in messages:
        message = dict(given)
        calls = message.pop("tool_calls", None)
        if calls:
            texts = [json.dumps(c["function"], ensure_ascii=False) for c in calls]
            message["content"] = "\n".join(filter(None, [message.get("content"), *texts]))
        if message.get("role") == "tool":
            head = f"Result of {message['name']}:" if message.get("name") else "Result:"
            message = {"role": "user", "content": f"{head}\n{message.get('content') or ''}"}
        out.append(message)
    return out


def with_description(
    messages: Sequence[dict[str, Any]], tools: Sequence[Tool], form: str
) -> list[dict[str, Any]]:
    """Messages in whose system message the tools are described."""
    listed = "\n".join(json.dumps(t.as_function()["function"], ensure_ascii=False) for t in tools)
    text = f"You may call these functions:\n{listed}\nTo call one, answer:\n{EXAMPLES[form]}"
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer"):
        joined = f"{first.get('content') or ''}\n\n{text}".lstrip()
        return [{**first, "content": joined}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
