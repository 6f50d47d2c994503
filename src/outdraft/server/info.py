"""Routes that say something about the server: models, health, properties, tokens, embeddings.

Not here: those that generate text (openai_chat.py, completions.py).
"""

import base64
from array import array
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outdraft import __version__
from outdraft.server.completions import Ids, prompts_of
from outdraft.server.engine import State
from outdraft.server.errors import ApiError, bad_request
from outdraft.server.guard import visit_of
from outdraft.server.schema import Loose, parse
from outdraft.server.service import Service, read_body
from outdraft.server.sse import json_response

POOLINGS = ("mean", "last")


class TokenizeRequest(Loose):
    """The body of `/tokenize`: llama.cpp's `content`, or vLLM's `prompt`."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool = False
    add_special_tokens: bool | None = None
    with_pieces: bool = False
    model: str | None = None


class DetokenizeRequest(Loose):
    """The body of `/detokenize`."""

    tokens: Ids
    model: str | None = None


class EmbeddingRequest(Loose):
    """The body of `/v1/embeddings`."""

    input: str | list[str] | Ids | list[Ids]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None
    user: str | None = None
    pooling: Literal["mean", "last"] = "mean"


def models(service: Service) -> Response:
    """What can be asked for."""
    return json_response({"object": "list", "data": [model_json(service)]})


def model(service: Service, name: str) -> Response:
    """One of them, looked up by its id."""
    if name != service.name:
        raise ApiError(404, "there is no such model here", "model_not_found", "model")
    return json_response(model_json(service))


def model_json(service: Service) -> dict[str, Any]:
    """OpenAI's model object, with what local servers add."""
    info = service.engine.info
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "outdraft",
        "max_model_len": info.get("ctx_size"),
        "meta": {
            "n_vocab": info.get("vocab_size"),
            "n_ctx_train": info.get("ctx_size"),
            "n_embd": info.get("hidden_size"),
            "n_params": info.get("n_params"),
        },
    }


def health(service: Service) -> Response:
    """The truth about the engine: 200 while it answers, 503 and why while it does not."""
    engine = service.engine
    status: str = engine.state.value
    if engine.state is State.READY and engine.stalled:
        status = "stalled"
    ok = status == State.READY
    return json_response(
        {"status": status, "engine_restarts": engine.n_restarts}, 200 if ok else 503
    )


def ready(service: Service) -> Response:
    """Whether a request sent now would be taken on."""
    jobs, engine = service.jobs, service.engine
    reason = None
    if jobs.draining:
        reason = "shutting down"
    elif engine.state is not State.READY:
        reason = engine.state.value
    elif jobs.n_in_flight >= service.limits.in_flight:
        reason = "full"
    return json_response({"ready": reason is None, "reason": reason}, 503 if reason else 200)


def props(service: Service) -> Response:
    """llama.cpp's properties, as far as there are such here."""
    info = service.engine.info
    return json_response(
        {
            "default_generation_settings": {
                "n_ctx": info.get("ctx_size"),
                "params": {**service.defaults, "n_predict": -1},
            },
            "total_slots": info.get("max_sequences"),
            "model_alias": service.name,
            "build_info": f"outdraft {__version__}",
            "modalities": {"vision": False, "audio": False},
            "drafter": info.get("drafter"),
            "draft_n_max": info.get("draft_n_max"),
            "draft_reason": info.get("draft_reason"),
            "compute": info.get("compute"),
            "learning": info.get("learning", False),
        }
    )


def stats(service: Service) -> Response:
    """What the page's gauges show."""
    raw = {k: v for k, v in service.engine.snapshot().items() if k not in ("op", "faults")}
    info = service.engine.info
    return json_response({**raw, "model": service.name, "drafter": info.get("drafter")})


async def tokenize(request: Request, service: Service) -> Response:
    """Text to token ids."""
    visit = visit_of(request.scope)
    asked = parse(TokenizeRequest, await read_body(request, service.limits), visit)
    text = asked.content if asked.content is not None else asked.prompt
    if text is None:
        raise bad_request("content is missing", "content")
    service.limits.check_text(len(text))
    special = asked.add_special if asked.add_special_tokens is None else asked.add_special_tokens
    ids = await service.jobs.encode(text, special=special)
    tokens: list[Any] = list(ids)
    if asked.with_pieces:
        tokens = [{"id": i, "piece": service.token_text(i)} for i in ids]
    limit = service.engine.info.get("ctx_size")
    return json_response({"tokens": tokens, "count": len(ids), "max_model_len": limit})


async def detokenize(request: Request, service: Service) -> Response:
    """Token ids to text."""
    visit = visit_of(request.scope)
    asked = parse(DetokenizeRequest, await read_body(request, service.limits), visit)
    size = service.engine.info.get("vocab_size")
    beyond = next((i for i in asked.tokens if size is not None and i >= size), None)
    if beyond is not None:
        raise bad_request(f"token {beyond} is beyond the vocabulary of {size}", "tokens")
    text = service.tokenizer.decode(asked.tokens, skip_special_tokens=False)
    return json_response({"content": text, "prompt": text})


async def embeddings(request: Request, service: Service) -> Response:
    """Pooled final hidden states, scaled to length 1."""
    visit = visit_of(request.scope)
    asked = parse(EmbeddingRequest, await read_body(request, service.limits), visit)
    service.note_model(asked.model, visit)
    if asked.dimensions not in (None, service.engine.info.get("hidden_size")):
        raise bad_request("dimensions cannot be chosen for this model", "dimensions")
    prompts = prompts_of(asked.input, "input")
    service.limits.check_count("input", len(prompts), service.limits.prompts)
    inputs = [await service.jobs.tokens(p) for p in prompts]
    vectors = await service.jobs.embed(visit.client, inputs, asked.pooling)
    n_tokens = sum(map(len, inputs))
    return json_response(
        {
            "object": "list",
            "model": service.name,
            "data": [
                {"object": "embedding", "index": i, "embedding": _encoded(v, asked.encoding_format)}
                for i, v in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }
    )


def _encoded(vector: list[float], form: str | None) -> list[float] | str:
    if form != "base64":
        return vector
    return base64.b64encode(array("f", vector).tobytes()).decode()
