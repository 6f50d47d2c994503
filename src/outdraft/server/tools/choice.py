"""What a request says about tools, and what follows from it for prompt, sampling and answer.

Here: `ToolUse` (the request's side), `Dialect` (the model's side), and the two together. Not here:
the fields of a front, which make a `ToolUse` of their own names.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outdraft.errors import SamplingError
from outdraft.request import SamplingParams
from outdraft.server.errors import bad_request, from_outdraft
from outdraft.server.jobs import Conversation
from outdraft.server.tools.answer import AnswerSplit
from outdraft.server.tools.formats import (
    FORMATS,
    Tool,
    choose_format,
    choose_reasoning,
    new_call_id,
)
from outdraft.server.tools.grammar import CallGrammar
from outdraft.server.tools.prompt import call_messages, plain_messages, with_description
from outdraft.server.tools.reasoning import ReasoningFormat
from outdraft.text.chat import template_source
from outdraft.text.files import read_json_if_there
from outdraft.text.tokenizer import Tokenizer

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TAIL_TOKENS = 32
_EMPTY = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools of a request.

    Attributes:
        tools: that may be called.
        choice: `auto`, `none`, `required`, or `function` for those that are left in `tools`.
        parallel: several calls in one answer are fine.
    """

    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    parallel: bool = True

    @property
    def offered(self) -> bool:
        """Whether the model may call anything."""
        return bool(self.tools) and self.choice != "none"

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.offered and self.choice in ("required", "function")


def make_tool(given: Mapping[str, Any], schema_key: str, where: str) -> Tool:
    """One function of a request: its name, description, strict, and schema under its key.

    Raises:
        ApiError: it has no proper name, or its parameters are no schema of an object.
    """
    name, parameters = given.get("name"), given.get(schema_key)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_request(
            f"{where} has no proper name: use 1 to 128 letters, digits, _ and -", where
        )
    if parameters is None:
        parameters = _EMPTY
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise bad_request(f"the parameters of {name} are not a schema of an object", where)
    words = given.get("description")
    return Tool(
        name, words if isinstance(words, str) else "", parameters, given.get("strict") is True
    )


def choose(
    tools: Sequence[Tool], choice: str, name: str | None, parallel: bool | None, where: str
) -> ToolUse:
    """The tools with a choice: `auto`, `none`, `required`, or a name.

    Raises:
        ApiError: names are double, the chosen tool is not there, or none is.
    """
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("two tools have the same name", "tools")
    if choice == "none" or (not tools and choice == "auto"):
        return ToolUse(tuple(tools), "none")
    if not tools:
        raise bad_request(f"{where} asks for a tool and there is none", where)
    if name is not None:
        if name not in names:
            raise bad_request(f"{where} names {name[:80]!r}, which is not among the tools", where)
        return ToolUse(tuple(t for t in tools if t.name == name), "function", parallel=False)
    return ToolUse(tuple(tools), choice, parallel is not False)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a model writes calls and reasoning, and which of its tokens spell that.

    Attributes:
        format: a name of `FORMATS`.
        reasoning: None for a model that does not mark any.
        knows_tools: the template renders tools; else they are described in the system's message.
        tokenizer: the model's.
    """

    format: str
    reasoning: ReasoningFormat | None
    knows_tools: bool
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer, override: str | None = None) -> "Dialect":
        """For the model in a directory.

        Raises:
            ModelError: `override` is no format.
        """
        template = template_source(path) or ""
        config = read_json_if_there(path / "config.json")
        model_type = config.get("model_type")
        name = choose_format(template, model_type if isinstance(model_type, str) else "", override)

        def has_token(text: str) -> bool:
            return tokenizer.token_to_id(text) is not None

        reasoning = choose_reasoning(template, has_token)
        return cls(name, reasoning, "tools" in template, tokenizer)

    def special_id(self, text: str) -> int | None:
        """The id of a marker that is a single token without text; None for others."""
        token = self.tokenizer.token_to_id(text)
        return None if token is None or self.tokenizer.has_text(token) else token

    def marker_ids(self, use: ToolUse) -> tuple[int, ...]:
        """Tokens that must stand in the text for it to be read."""
        markers: tuple[str, ...] = ()
        if self.reasoning is not None:
            markers += (self.reasoning.opening, self.reasoning.closing)
        if use.offered:
            markers += FORMATS[self.format](use.tools).special
        ids = (self.special_id(marker) for marker in markers)
        return tuple(token for token in ids if token is not None)

    def reasons(self, prompt_tokens: Sequence[int]) -> bool:
        """Whether a prompt ends with the beginning of a reasoning block."""
        form = self.reasoning
        if form is None:
            return False
        tail = self.tokenizer.decode(prompt_tokens[-_TAIL_TOKENS:], skip_special_tokens=False)
        _, opening, rest = tail.rpartition(form.opening)
        return bool(opening) and rest.strip() in ("", form.header)

    def params(
        self, use: ToolUse, params: SamplingParams, prompt_tokens: tuple[int, ...]
    ) -> SamplingParams:
        """The parameters with shown markers and, where calls are forced or strict, a grammar.

        Raises:
            ApiError: the tools cannot be had together with the grammar that is asked for.
        """
        params = replace(params, show_token_ids=self.marker_ids(use))
        strict = use.offered and any(tool.strict for tool in use.tools)
        given = params.grammar_options
        # with a budget for thinking the engine keeps grammars out of the block itself
        opened = params.max_thinking_tokens is None and self.reasons(prompt_tokens)
        thinking = self.reasoning if opened else None
        bound = use.forced or strict or not use.parallel or bool(given)
        if (not use.offered or not bound) and not (thinking and given):
            return params
        if given and given[0] not in ("json_schema", "json_object"):
            if not use.offered:
                return params
            raise bad_request(f"{given[0]} and tools cannot be given together", "tools")
        try:
            grammar = self._grammar(use, params, thinking)
            return replace(params, json_schema=None, json_object=False, grammar=grammar)
        except SamplingError as error:
            raise from_outdraft(error, "tools") from error

    def _grammar(
        self, use: ToolUse, params: SamplingParams, thinking: ReasoningFormat | None
    ) -> str:
        make = CallGrammar(self.format, use.tools, self.special_id, parallel=use.parallel)
        if use.forced:
            return make.required(thinking)
        if params.json_schema is None and not params.json_object:
            return make.or_text(thinking)
        schema = {"type": "object"} if params.json_object else _loads(str(params.json_schema))
        if not use.offered:
            return make.only_json(schema, thinking)
        return make.or_json(schema, thinking)

    def conversation(
        self, use: ToolUse, messages: Sequence[dict[str, Any]], options: dict[str, Any]
    ) -> Conversation:
        """Messages in OpenAI's shape, with the tools, as the model's template takes them.

        Raises:
            ApiError: a call in the messages is none.
        """
        shaped = call_messages(messages)
        offered = use.tools if use.offered else ()
        if self.knows_tools:
            return Conversation(shaped, [t.as_function() for t in offered] or None, options)
        shaped = plain_messages(shaped)
        if offered:
            shaped = with_description(shaped, offered, self.format)
        return Conversation(shaped, None, options)

    def reader(self, use: ToolUse, prompt_tokens: Sequence[int]) -> AnswerSplit:
        """Splits one answer."""
        return AnswerSplit(
            self.reasoning,
            FORMATS[self.format](use.tools) if use.offered else None,
            lambda: new_call_id(self.format),
            reasoning_open=self.reasons(prompt_tokens),
        )


def _loads(schema: str) -> Any:
    try:
        return json.loads(schema)
    except ValueError:
        raise SamplingError("the JSON schema is not JSON", "send an object") from None
