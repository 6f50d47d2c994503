"""The fields that several fronts share, and how they become sampling parameters.

Here: OpenAI's names, and the extra ones that llama.cpp and vLLM have given their users. A field
that is unknown is ignored and named in a header; one that is known and cannot be met is refused.
Not here: the fields of one front alone.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outdraft.errors import SamplingError
from outdraft.request import SamplingParams
from outdraft.server.errors import ApiError, bad_request, from_outdraft
from outdraft.server.guard import Visit

MAX_IGNORED = 32
_BIG = 2**53
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=_BIG)]
Schema = dict[str, Any]


class Loose(BaseModel):
    """An object whose unknown fields are kept apart instead of refused."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


T = TypeVar("T", bound=Loose)


class StreamOptions(Loose):
    """`stream_options`."""

    include_usage: bool | None = None


class Extension(Loose):
    """`outdraft`: what only this server has."""

    tokens: bool = False
    drafting: Literal["auto", "off"] = "auto"


class JsonSchemaFormat(Loose):
    """What `response_format` holds for a schema."""

    name: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Loose):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Schema | None = Field(default=None, alias="schema")


class StructuredOutputs(Loose):
    """vLLM's `structured_outputs`."""

    json_: Schema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Sampling(Loose):
    """How tokens are chosen and when to stop."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_BIG)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_BIG)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_n_sigma: Annotated[float, Field(ge=-1, le=1e6, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=_BIG)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = (
        None
    )
    bad_words: list[str] | None = None
    max_thinking_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Schema | None = None
    regex: str | None = None
    grammar: str | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    store: bool | None = None
    outdraft: Extension | None = None


UNSUPPORTED = {
    "audio": "this server writes text only",
    "best_of": "use n",
    "chat_template": "templates come with the model, not with requests",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "suffix": "this model continues a text and does not fill a gap",
    "web_search_options": "this server does not search",
    "use_beam_search": "there is no beam search",
    "prompt_embeds": "prompts are text or token ids",
}


def parse(kind: type[T], body: Any, visit: Visit) -> T:
    """A body as one of our requests; what it has beyond is noted in the visit.

    Raises:
        ApiError: a field has a wrong type or value, or asks for what cannot be had.
    """
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    for name, reason in UNSUPPORTED.items():
        if name not in kind.model_fields and body.get(name) not in (None, False, [], {}, ""):
            raise bad_request(f"{name} is not supported: {reason}", name, "unsupported")
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise bad_request(f"{where[:80]}: {first['msg']}", where[:80] or None) from None
    ignore(visit, unknown_fields(request))
    return request


def unknown_fields(request: Loose, prefix: str = "") -> list[str]:
    """Names of the fields that nothing reads, nested ones with a dot."""
    names = [prefix + name for name in request.model_extra or ()]
    for name in type(request).model_fields:
        value = getattr(request, name)
        if isinstance(value, Loose):
            names += unknown_fields(value, f"{prefix}{name.rstrip('_')}.")
    return names


def ignore(visit: Visit, names: list[str]) -> None:
    """Note fields that were ignored, for the header; at most so many, in harmless letters."""
    for name in names[: MAX_IGNORED - len(visit.ignored)]:
        visit.ignored.append(re.sub(r"[^\w.\-]", "_", name, flags=re.ASCII)[:64])


def sampling_params(
    request: Sampling,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Sampling parameters of a request.

    Args:
        defaults: for what the request leaves open.

    Raises:
        ApiError: a value is not possible.
    """
    values: dict[str, Any] = dict(defaults)
    for name in _PLAIN:
        if getattr(request, name) is not None:
            values[name] = getattr(request, name)
    if request.repeat_penalty is not None:
        values["repetition_penalty"] = request.repeat_penalty
    values["top_k"] = max(0, values.get("top_k", 0))  # vLLM's -1 is off
    values["top_n_sigma"] = max(0.0, values.get("top_n_sigma", 0.0))
    if request.seed is not None:
        values["seed"] = request.seed % 2**63
    if request.stop is not None:
        values["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    for name in ("stop_token_ids", "bad_words"):
        values[name] = tuple(getattr(request, name) or ())
    values["logit_bias"] = dict(_bias(k, v) for k, v in (request.logit_bias or {}).items())
    values |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    try:
        return SamplingParams(**values, **grammar_option(request))
    except SamplingError as error:
        raise from_outdraft(error) from error


def grammar_option(request: Sampling) -> dict[str, Any]:
    """The one grammar that a request asks for, by any of its names.

    Raises:
        ApiError: it asks for several.
    """
    given: list[tuple[str, dict[str, Any]]] = []
    form = request.response_format
    if form is not None and form.type == "json_object":
        given.append(
            (
                "response_format",
                {"json_object": True} if form.schema_ is None else {"json_schema": form.schema_},
            )
        )
    if form is not None and form.type == "json_schema":
        schema = form.schema_ if form.json_schema is None else form.json_schema.schema_
        if schema is None:
            raise bad_request("response_format has no schema", "response_format")
        given.append(("response_format", {"json_schema": schema}))
    nested = request.structured_outputs or StructuredOutputs()
    for name, option, value in (
        ("guided_json", "json_schema", request.guided_json),
        ("structured_outputs.json", "json_schema", nested.json_),
        ("json_schema", "json_schema", request.json_schema),
        ("guided_regex", "regex", request.guided_regex),
        ("structured_outputs.regex", "regex", nested.regex),
        ("regex", "regex", request.regex),
        ("guided_choice", "regex", _choice(request.guided_choice)),
        ("structured_outputs.choice", "regex", _choice(nested.choice)),
        ("guided_grammar", "grammar", request.guided_grammar),
        ("structured_outputs.grammar", "grammar", nested.grammar),
        ("grammar", "grammar", request.grammar),
    ):
        if value is not None:
            given.append((name, {option: value}))
    if len(given) > 1:
        raise bad_request(f"{given[0][0]} and {given[1][0]} are both given: use one", given[1][0])
    return given[0][1] if given else {}


def _choice(words: list[str] | None) -> str | None:
    if words is None:
        return None
    if not words:
        raise bad_request("a choice needs at least one word", "guided_choice")
    return "|".join(re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", word) for word in words)


def _bias(token: str, value: float) -> tuple[int, float]:
    if not re.fullmatch(r"[0-9]{1,15}", token):
        raise bad_request(f"logit_bias has the token {token[:40]!r}: use ids", "logit_bias")
    return int(token), value


def model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says, and OpenAI's temperature of 1 where it is silent."""
    defaults: dict[str, Any] = {"temperature": 1.0}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "typical_p"):
        value = generation_config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            defaults[name] = value
    if generation_config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except SamplingError:  # a file with impossible values must not fail every request
        return {"temperature": 1.0}
    return defaults


_PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "top_n_sigma",
    "n",
    "ignore_eos",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "repeat_last_n",
    "max_thinking_tokens",
)

__all__ = ["ApiError", "Sampling", "parse", "sampling_params"]
