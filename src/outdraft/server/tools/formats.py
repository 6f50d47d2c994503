"""Which format a model writes tool calls and reasoning in.

Here: the registry of formats, the choice by the model's template and family. Not here: the readers.
A further format is a line in `FORMATS` and, if it is of a new kind, a reader.
"""

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outdraft.errors import ModelError
from outdraft.server.tools import reasoning
from outdraft.server.tools.calls import CallFormat
from outdraft.server.tools.gemma4 import QUOTE, Gemma4Reader
from outdraft.server.tools.llama import PythonicReader
from outdraft.server.tools.mistral import ARGS, CALL_ID, MistralReader
from outdraft.server.tools.qwen import QwenReader
from outdraft.server.tools.readers import CallObject


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False

    def as_function(self) -> dict[str, Any]:
        """What chat templates are given."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters)
        return {"type": "function", "function": function}


def _gemma4(tools: Sequence[Tool]) -> CallFormat:
    return CallFormat(
        "gemma4",
        ("<|tool_call>",),
        Gemma4Reader,
        closing="<tool_call|>",
        special=("<|tool_call>", "<tool_call|>", QUOTE),
    )


def _hermes(tools: Sequence[Tool]) -> CallFormat:
    return CallFormat(
        "hermes",
        ("<tool_call>",),
        CallObject,
        closing="</tool_call>",
        special=("<tool_call>", "</tool_call>"),
    )


def _qwen(tools: Sequence[Tool]) -> CallFormat:
    schemas = {tool.name: tool.parameters for tool in tools}
    return CallFormat(
        "qwen",
        ("<tool_call>",),
        lambda: QwenReader(schemas),
        closing="</tool_call>",
        special=("<tool_call>", "</tool_call>"),
    )


def _mistral(tools: Sequence[Tool]) -> CallFormat:
    return CallFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        MistralReader,
        special=("[TOOL_CALLS]", ARGS, CALL_ID),
    )


def _llama(tools: Sequence[Tool]) -> CallFormat:
    known = frozenset(tool.name for tool in tools)
    return CallFormat(
        "llama",
        ("<|python_tag|>",),
        lambda: CallObject(picky=True, known=known),
        closing=";",
        bare="{",
        special=("<|python_tag|>",),
    )


def _pythonic(tools: Sequence[Tool]) -> CallFormat:
    known = frozenset(tool.name for tool in tools)
    return CallFormat(
        "llama-pythonic",
        ("<|python_start|>",),
        lambda: PythonicReader(known),
        closing="<|python_end|>",
        bare="[",
        special=("<|python_start|>", "<|python_end|>"),
    )


FORMATS: Mapping[str, Callable[[Sequence[Tool]], CallFormat]] = {
    "gemma4": _gemma4,
    "qwen": _qwen,
    "hermes": _hermes,
    "mistral": _mistral,
    "llama": _llama,
    "llama-pythonic": _pythonic,
}

_BY_TEMPLATE = (  # what a template prints before a call, the most telling first
    ("<|tool_call>", "gemma4"),
    ("[TOOL_CALLS]", "mistral"),
    ("<function=", "qwen"),
    ("<tool_call>", "hermes"),
    ("<|python_start|>", "llama-pythonic"),
    ("<|python_tag|>", "llama"),
    ('"parameters":', "llama"),
)
_BY_FAMILY = (
    ("gemma4", "gemma4"),
    ("gemma", "gemma4"),
    ("qwen3_5", "qwen"),
    ("qwen3_next", "qwen"),
    ("qwen", "hermes"),
    ("mistral", "mistral"),
    ("ministral", "mistral"),
    ("llama4", "llama-pythonic"),
    ("llama", "llama"),
)
_REASONING_BY_TEMPLATE = (
    ("<|channel>", reasoning.GEMMA4),
    ("[THINK]", reasoning.MISTRAL),
    ("<think>", reasoning.THINK),
)


def choose_format(template: str, model_type: str, override: str | None = None) -> str:
    """The name of the format that a model calls tools in.

    Args:
        template: source of the chat template, "" for none.
        model_type: as in config.json.
        override: a name of `FORMATS` that wins.

    Raises:
        ModelError: there is no such format.
    """
    if override is not None and override not in FORMATS:
        raise ModelError(f"unknown tool format {override!r}", f"known are {', '.join(FORMATS)}")
    if override is not None:
        return override
    by_template = (name for marker, name in _BY_TEMPLATE if marker in template)
    by_family = (name for start, name in _BY_FAMILY if model_type.startswith(start))
    return next(by_template, None) or next(by_family, "hermes")


def choose_reasoning(
    template: str, has_token: Callable[[str], bool]
) -> reasoning.ReasoningFormat | None:
    """How a model marks its reasoning, by its template or vocabulary; None if it does not."""
    for marker, form in _REASONING_BY_TEMPLATE:
        if marker in template:
            return form
    for _, form in _REASONING_BY_TEMPLATE:
        if has_token(form.opening) and has_token(form.closing):
            return form
    return None


def new_call_id(format_name: str) -> str:
    """A fresh id of a call. Mistral's templates insist on nine letters and digits."""
    if format_name == "mistral":
        letters = string.ascii_letters + string.digits
        return "".join(secrets.choice(letters) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
