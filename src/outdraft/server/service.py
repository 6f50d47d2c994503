"""What every route has at hand, and the few steps that all fronts share.

Here: the served model and its parts, reading a body, usage and timings in OpenAI's words. Not here:
routes (app.py), what the fields of a front mean (its own file).
"""

import json
import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request

from outdraft.request import FinishReason, SamplingParams
from outdraft.server.engine import Engine
from outdraft.server.errors import ApiError, bad_request
from outdraft.server.guard import Visit, visit_of
from outdraft.server.jobs import End, Job, Jobs, Prompt, Token, Usage
from outdraft.server.limits import Limits
from outdraft.server.metrics import Metrics
from outdraft.server.renderer import Renderer
from outdraft.server.schema import Sampling, ignore, model_defaults
from outdraft.server.tools.choice import Dialect, ToolUse
from outdraft.text.files import read_json_if_there
from outdraft.text.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"


@dataclass(slots=True)
class Service:
    """One served model."""

    name: str
    path: Path
    engine: Engine
    tokenizer: Tokenizer
    jobs: Jobs
    limits: Limits
    metrics: Metrics
    defaults: dict[str, Any]
    dialect: Dialect
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def make(
        cls,
        name: str,
        path: Path,
        engine: Engine,
        limits: Limits,
        tool_format: str | None = None,
    ) -> "Service":
        """The parts for the model in `path`; `tool_format` is how it calls tools, None to find out.

        Raises:
            ModelError: its tokenizer cannot be read, or there is no such format.
        """
        tokenizer = Tokenizer.load(path)
        jobs = Jobs(engine, tokenizer, Renderer(path, limits.prepare_s), limits)
        defaults = model_defaults(read_json_if_there(path / GENERATION_CONFIG))
        metrics = Metrics(engine, jobs, name)
        dialect = Dialect.load(path, tokenizer, tool_format)
        return cls(name, path, engine, tokenizer, jobs, limits, metrics, defaults, dialect)

    def note_model(self, asked: str | None, visit: Visit) -> None:
        """Another model's name is answered by the one that there is, and said to be ignored."""
        if asked is not None and asked != self.name:
            ignore(visit, ["model"])

    def job(
        self,
        request: Sampling,
        visit: Visit,
        prompt: Prompt,
        params: SamplingParams,
        use: ToolUse | None = None,
    ) -> Job:
        """A job with what is common to all fronts: client, salt, and the extension's switches.

        With `use` the answer is a chat's: its markers are shown, and calls held to their grammar.
        """
        own = request.outdraft
        detail = own is not None and own.tokens
        if detail and params.logprobs is None:
            params = replace(params, logprobs=0)  # a token's probability
        return Job(
            prompt,
            params,
            client=visit.client,
            salt=json.dumps([visit.client, request.cache_salt or ""]),
            drafting=own is None or own.drafting == "auto",
            detail=detail,
            store=request.store is not False,
            adapt=None if use is None else partial(self.dialect.params, use),
            left_at=lambda: visit.left_at,
        )

    def token_text(self, token: int) -> str:
        """A token's spelling, special ones included."""
        return self.tokenizer.decode([token], skip_special_tokens=False)


async def read_body(request: Request, limits: Limits) -> Any:
    """The JSON of a request.

    Raises:
        ApiError: it is too large or too deep, or is not JSON.
    """
    raw = await request.body()
    if not raw:
        raise bad_request("the body is empty: send a JSON object")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at {error.pos}") from None
    limits.check_shape(value)
    return value


def finish(service: Service, request: Request, end: End, *, grammar: bool) -> str:
    """OpenAI's finish reason; notes the end of a completion in metrics and log.

    Raises:
        ApiError: the completion failed.
    """
    visit = visit_of(request.scope)
    service.metrics.ended(visit, end)
    note_usage(visit, end.usage)
    visit.notes["finish"] = end.reason.value
    if end.reason is FinishReason.ERROR:
        status = 400 if grammar else 500
        raise ApiError(status, end.error or "the request failed", "generation_failed")
    return "stop" if end.reason is FinishReason.ABORT else end.reason.value


def note_usage(visit: Visit, usage: Usage) -> None:
    """Numbers of a completion into the log line."""
    notes = visit.notes
    notes["prompt_n"], notes["cached_n"] = usage.n_prompt, usage.n_cached
    notes["predicted_n"] = notes.get("predicted_n", 0) + usage.n_completion
    notes["draft_n"] = notes.get("draft_n", 0) + usage.n_accepted + usage.n_rejected
    notes["draft_n_accepted"] = notes.get("draft_n_accepted", 0) + usage.n_accepted


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.n_prompt,
        "completion_tokens": usage.n_completion,
        "total_tokens": usage.n_prompt + usage.n_completion,
        "prompt_tokens_details": {"cached_tokens": usage.n_cached},
        "completion_tokens_details": {
            "reasoning_tokens": usage.n_reasoning,
            "accepted_prediction_tokens": usage.n_accepted,
            "rejected_prediction_tokens": usage.n_rejected,
        },
    }


def extension_json(tokens: list[Token], n_drafts: int | None) -> dict[str, Any]:
    """The `outdraft` part of a chunk: each token with how it came about."""
    return {
        "tokens": [
            {
                "id": t.id,
                "text": t.text,
                "drafted": t.drafted,
                "prob": None if t.logprobs is None else math.exp(t.logprobs.token),
            }
            for t in tokens
        ],
        "draft_n": n_drafts or 0,
    }
