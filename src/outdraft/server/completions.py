"""`/v1/completions` in OpenAI's words: one or more prompts, text or token ids.

Here: its own fields, its chunks and its answer. Not here: the fields of sampling (schema.py).
"""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outdraft.server.errors import bad_request
from outdraft.server.guard import visit_of
from outdraft.server.jobs import Delta, Running, Token, Usage
from outdraft.server.schema import Sampling, parse, sampling_params
from outdraft.server.service import (
    Service,
    extension_json,
    finish,
    read_body,
    usage_json,
)
from outdraft.server.sse import DONE, Awaited, EventStream, event

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this route only."""

Ids = list[Annotated[int, Field(ge=0, le=2**31)]]


class CompletionRequest(Sampling):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | Ids | list[Ids]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None


async def completions(request: Request, service: Service) -> Response:
    """Continue texts."""
    visit = visit_of(request.scope)
    asked = parse(CompletionRequest, await read_body(request, service.limits), visit)
    service.note_model(asked.model, visit)
    prompts = prompts_of(asked.prompt)
    service.limits.check_count("prompt", len(prompts), service.limits.prompts)
    params = sampling_params(
        asked,
        service.defaults,
        max_tokens=asked.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.logprobs if asked.echo else None,
    )
    service.limits.check_params(params, len(prompts))
    answer = CompletionAnswer(request, service, asked)
    try:
        for prompt in prompts:
            job = service.job(asked, visit, prompt, params)
            answer.runs.append(await service.jobs.open(job))
    except BaseException:
        answer.close()
        raise
    if asked.stream:
        return EventStream(answer.events(), answer.close, send_s=service.limits.send_s)
    return Awaited(answer.whole, answer.close)


def prompts_of(prompt: Any, name: str = "prompt") -> list[str | tuple[int, ...]]:
    """The prompts of a request; `name` is their field.

    Raises:
        ApiError: there is none.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request(f"{name} is empty", name)
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [p if isinstance(p, str) else tuple(p) for p in prompt]


class CompletionAnswer:
    """One request's answer, streamed or whole. Prompts are answered one after the other."""

    def __init__(self, request: Request, service: Service, asked: CompletionRequest) -> None:
        self.request = request
        self.service = service
        self.asked = asked
        self.runs: list[Running] = []
        self.id = f"cmpl-{visit_of(request.scope).id}"
        self.created = int(time.time())
        self.usage: dict[int, Usage] = {}
        self.offsets: dict[int, int] = {}

    def close(self) -> None:
        """Abort what has not ended."""
        for run in self.runs:
            run.close()

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks."""
        options = self.asked.stream_options
        wants_usage = options is not None and bool(options.include_usage)
        for number, run in enumerate(self.runs):
            told = run.job.params.prompt_logprobs is not None  # then the prompt comes with them
            for index in range(run.job.params.n) if self.asked.echo and not told else ():
                choice = self._choice(number, index, self._prompt_text(run), None)
                yield event({**self._head(), "choices": [choice]})
            async for deltas in run:
                yield b"".join(event(self._chunk(number, run, d)) for d in deltas)
        if wants_usage:
            total = self._total()
            yield event(
                {
                    **self._head(),
                    "choices": [],
                    "usage": usage_json(total),
                    "timings": total.timings,
                }
            )
        yield DONE

    def _chunk(self, number: int, run: Running, delta: Delta) -> dict[str, Any]:
        reason = self._finish(number, run, delta) if delta.end is not None else None
        text, tokens = delta.text, delta.tokens
        if delta.prompt_logprobs:
            text, tokens = self._prompt_text(run), self._prompt_tokens(run, delta)
        choice = self._choice(number, delta.index, text, reason)
        if self.asked.logprobs is not None:
            choice["logprobs"] = self._logprobs(choice["index"], tokens)
        chunk = {**self._head(), "choices": [choice]}
        if run.job.detail:
            chunk["outdraft"] = extension_json(delta.tokens, delta.n_drafts)
        if delta.end is not None:
            chunk["timings"] = delta.end.usage.timings
        return chunk

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = []
        for number, run in enumerate(self.runs):
            n = run.job.params.n
            texts = [self._prompt_text(run) if self.asked.echo else ""] * n
            tokens: list[list[Token]] = [[] for _ in range(n)]
            reasons: list[str | None] = [None] * n
            async for deltas in run:
                for delta in deltas:
                    texts[delta.index] += delta.text
                    tokens[delta.index] += self._prompt_tokens(run, delta) + delta.tokens
                    if delta.end is not None:
                        reasons[delta.index] = self._finish(number, run, delta)
            for index in range(n):
                choice = self._choice(number, index, texts[index], reasons[index])
                if self.asked.logprobs is not None:
                    choice["logprobs"] = self._logprobs(choice["index"], tokens[index])
                if run.job.detail:
                    choice["outdraft"] = extension_json(tokens[index], None)
                choices.append(choice)
        total = self._total()
        return {
            **self._head(),
            "choices": choices,
            "usage": usage_json(total),
            "timings": total.timings,
        }

    def _finish(self, number: int, run: Running, delta: Delta) -> str:
        assert delta.end is not None
        grammar = bool(run.job.params.grammar_options)
        reason = finish(self.service, self.request, delta.end, grammar=grammar)
        before, usage = self.usage.get(number), delta.end.usage
        self.usage[number] = usage if before is None else before + usage
        return reason

    def _total(self) -> Usage:
        """All prompts together; the timings are the last one's."""
        usages = list(self.usage.values())
        return Usage(
            n_prompt=sum(u.n_prompt for u in usages),
            n_cached=sum(u.n_cached for u in usages),
            n_completion=sum(u.n_completion for u in usages),
            n_accepted=sum(u.n_accepted for u in usages),
            n_rejected=sum(u.n_rejected for u in usages),
            timings=usages[-1].timings,
        )

    def _prompt_text(self, run: Running) -> str:
        if isinstance(run.job.prompt, str):
            return run.job.prompt
        return self.service.tokenizer.decode(run.prompt_tokens)

    def _prompt_tokens(self, run: Running, delta: Delta) -> list[Token]:
        """Those of the prompt, from the delta that has their log-probabilities."""
        if not delta.prompt_logprobs:
            return []
        decode = self.service.tokenizer.decode  # no text for special ones
        prompt = zip(run.prompt_tokens, delta.prompt_logprobs, strict=True)
        return [Token(i, decode([i]), False, p) for i, p in prompt]

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.name,
        }

    def _choice(self, number: int, index: int, text: str, reason: str | None) -> dict[str, Any]:
        at = number * self.runs[number].job.params.n + index
        return {"index": at, "text": text, "logprobs": None, "finish_reason": reason}

    def _logprobs(self, choice: int, tokens: list[Token]) -> dict[str, Any]:
        """The older form of log-probabilities, four lists by token."""
        names: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token in tokens:
            at = self.offsets.get(choice, 0)
            self.offsets[choice] = at + len(token.text)
            names.append(self.service.token_text(token.id))
            offsets.append(at)
            if token.logprobs is None:  # the first token of a prompt
                values.append(None)
                tops.append(None)
                continue
            values.append(_finite(token.logprobs.token))
            best = token.logprobs.top[: self.asked.logprobs or 0]
            tops.append({self.service.token_text(i): _finite(value) for i, value in best})
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI says -9999."""
    return max(logprob, -9999.0)
