"""What every front asks of the engine, in no front's words.

A front makes a `Job` of a request, opens it, and translates its `Delta`s. Opening checks the
limits, renders and tokenises the prompt, finds the client a place, and returns once the engine has
taken the request on; so what can be refused is refused before an answer begins. Not here: HTTP.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from outdraft.errors import OutdraftError
from outdraft.request import FinishReason, Logprobs, SamplingParams
from outdraft.server.engine import Batch, Engine, EngineGone, Mailbox, Stream
from outdraft.server.errors import ApiError, bad_request, from_outdraft, public
from outdraft.server.limits import Limits
from outdraft.server.renderer import Renderer
from outdraft.text.chat import ALLOWED_OPTIONS
from outdraft.text.tokenizer import Tokenizer

LONG_TEXT_CHARS = 20_000
"""Longer texts are tokenised in a thread."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the model's chat template. `options` are variables of it, allow-listed."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True


Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and what is wanted of it; `params.n` completions.

    Attributes:
        client: who asks, for fair shares.
        salt: requests with different salts share no cached prompts.
        drafting: False decodes this request plainly.
        detail: one delta for each verified block, with its number of drafts.
        store: False keeps nothing of it to learn from.
        adapt: makes the final parameters when the prompt's tokens are known.
        left_at: when the client's connection closed (time.monotonic); None while it is open.
    """

    prompt: Prompt
    params: SamplingParams
    client: str
    salt: str = ""
    drafting: bool = True
    detail: bool = False
    store: bool = True
    adapt: Callable[[SamplingParams, tuple[int, ...]], SamplingParams] | None = None
    left_at: Callable[[], float | None] = lambda: None


@dataclass(frozen=True, slots=True)
class Token:
    """One emitted token; its text may be empty, or belong to earlier ones too."""

    id: int
    text: str
    drafted: bool
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a completion cost. `timings` has llama.cpp's names.

    `n_reasoning` of its tokens were reasoning: a front that splits the answer fills it in.
    """

    n_prompt: int
    n_cached: int
    n_completion: int
    n_accepted: int
    n_rejected: int
    timings: dict[str, float]
    n_reasoning: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        """Several completions of one prompt: the prompt counts once."""
        return replace(
            self,
            n_completion=self.n_completion + other.n_completion,
            n_accepted=self.n_accepted + other.n_accepted,
            n_rejected=self.n_rejected + other.n_rejected,
            n_reasoning=self.n_reasoning + other.n_reasoning,
        )


@dataclass(frozen=True, slots=True)
class End:
    """How a completion ended. `error` is there when the reason is `error`."""

    reason: FinishReason
    usage: Usage
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of completion number `index`. The last one of each has an `end`.

    `prompt_logprobs`: only where asked for, and then alone in the first one.
    """

    index: int
    text: str
    tokens: list[Token]
    n_drafts: int | None = None
    end: End | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] = ()


class Running:
    """A job in the engine: iterate over it for lists of deltas, and close it in any case.

    Raises while iterating:
        ApiError: the engine died, or the server stops; nothing more will come.
    """

    def __init__(self, jobs: "Jobs", job: Job, prompt_tokens: tuple[int, ...]) -> None:
        self.job = job
        self.prompt_tokens = prompt_tokens
        self.mailbox = Mailbox()
        self.streams: list[Stream] = []
        self.n_open = job.params.n
        self._jobs = jobs
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        while self.n_open:
            try:
                batches = await self.mailbox.take()
            except EngineGone as error:
                raise ApiError(503, str(error), "engine_gone", retry_after_s=1) from error
            deltas = [d for batch in batches for d in self._deltas(batch)]
            self.n_open -= sum(d.end is not None for d in deltas)
            yield deltas

    async def __aenter__(self) -> "Running":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what has not ended, and give the client's place back."""
        if not self._closed:
            self._closed = True
            for stream in self.streams:
                self._jobs.engine.close(stream, self.job.left_at())
            self._jobs.leave(self)

    def _deltas(self, batch: Batch) -> list[Delta]:
        if batch.prompt is not None:
            found = tuple(_logprobs(row) for row in batch.prompt)
            return [Delta(batch.index, "", [], prompt_logprobs=found)]
        tokens, text, deltas = [], "", []
        n_drafts: int | None = None
        for row in batch.rows:
            text += row[1]
            if row[0] is not None:
                logprobs = _logprobs(row[3]) if len(row) > 3 else None
                tokens.append(Token(row[0], row[1], row[2], logprobs))
            if self.job.detail:
                n_drafts = (n_drafts or 0) + row[4]
                if not row[2]:  # the token that the target added to a block is its last
                    deltas.append(Delta(batch.index, text, tokens, n_drafts))
                    tokens, text, n_drafts = [], "", None
        end = None if batch.end is None else _end(batch.end)
        if tokens or text or end is not None:
            deltas.append(Delta(batch.index, text, tokens, n_drafts, end))
        return deltas


class Jobs:
    """Opens jobs, within the limits and fairly."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, renderer: Renderer, limits: Limits
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.limits = limits
        self.draining = False
        self.running: set[Running] = set()
        self._clients: Counter[str] = Counter()
        self._salt_secret = secrets.token_bytes(16)

    @property
    def n_in_flight(self) -> int:
        """Completions that clients wait for."""
        return self._clients.total()

    async def open(self, job: Job) -> Running:
        """Send a job to the engine.

        Raises:
            ApiError: it is refused: 400 for what it asks, 429 or 503 for when.
        """
        self.limits.check_params(job.params)
        self._check_open()
        n = job.params.n
        if n > self.limits.per_client:
            raise bad_request(f"n is {n}, more than a client may have in flight", "n")
        running = Running(self, job, ())
        self._take_place(job.client, n)
        self.running.add(running)
        try:
            running.prompt_tokens = await self.tokens(job.prompt)
            if job.adapt is not None:
                params = job.adapt(job.params, running.prompt_tokens)
                running.job = replace(job, params=params)
            await self._submit(running)
        except EngineGone as error:
            running.close()
            raise ApiError(503, str(error), "engine_gone", retry_after_s=1) from error
        except BaseException:
            running.close()
            raise
        return running

    async def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            ApiError: it is too long, empty, or the template refuses it.
        """
        if isinstance(prompt, tuple):
            self._check_length(prompt)
            return prompt
        if isinstance(prompt, Conversation):
            self.limits.check_messages(prompt.messages, prompt.tools)
            prompt = await self.render(prompt)
        if not prompt:
            raise bad_request("the prompt is empty", "prompt")
        self.limits.check_text(len(prompt))
        ids = tuple(await self.encode(prompt))
        self._check_length(ids)
        return ids

    async def render(self, conversation: Conversation) -> str:
        """The text of a conversation.

        Raises:
            ApiError: an option is not allowed, or the template refuses the messages.
        """
        unknown = sorted(set(conversation.options) - ALLOWED_OPTIONS)
        if unknown:
            raise bad_request(
                f"unknown chat template option {unknown[0]!r}; allowed are "
                f"{', '.join(sorted(ALLOWED_OPTIONS))}",
                "chat_template_kwargs",
            )
        return await self.renderer.render(
            conversation.messages,
            tools=conversation.tools,
            options=conversation.options,
            add_generation_prompt=conversation.add_generation_prompt,
        )

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ApiError: it is not Unicode.
        """
        try:
            if len(text) < LONG_TEXT_CHARS:
                return self.tokenizer.encode(text, add_special_tokens=special)
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=special)
        except OutdraftError as error:
            raise from_outdraft(error) from error

    def cut(self, reason: str) -> None:
        """End everything that runs, with an error that every client gets."""
        for running in self.running:
            running.mailbox.put(EngineGone(reason))
        self.engine.drop_answers(EngineGone(reason))

    async def embed(
        self, client: str, inputs: list[tuple[int, ...]], pooling: str
    ) -> list[list[float]]:
        """Vectors of texts. It has a place among what is in flight, like a completion.

        Raises:
            ApiError: it is refused (429, 503), or the engine died.
        """
        self._check_open()
        self._take_place(client, 1)
        try:
            return await self.engine.embed(inputs, pooling)
        except EngineGone as error:
            raise ApiError(503, str(error), "engine_gone", retry_after_s=1) from error
        finally:
            self._give_place(client, 1)

    def leave(self, running: Running) -> None:
        """A job is over."""
        if running in self.running:
            self.running.discard(running)
            self._give_place(running.job.client, running.job.params.n)

    def _check_open(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is shutting down", "shutting_down", retry_after_s=10)
        self.engine.require_ready()

    def _take_place(self, client: str, n: int) -> None:
        busy = self.limits.too_busy(self.n_in_flight, self._clients.get(client, 0), n)
        if busy is not None:
            raise busy
        self._clients[client] += n

    def _give_place(self, client: str, n: int) -> None:
        self._clients[client] -= n
        if self._clients[client] <= 0:
            del self._clients[client]

    async def _submit(self, running: Running) -> None:
        job = running.job
        seed = secrets.randbits(62) if job.params.seed is None else job.params.seed
        split = [job.params] if job.params.n == 1 else job.params.split(seed)
        salt = blake2b(job.salt.encode(), key=self._salt_secret, digest_size=16).hexdigest()
        for index, params in enumerate(split):
            stream = self.engine.submit(
                running.prompt_tokens,
                params,
                running.mailbox,
                index=index,
                salt=salt,
                draft_n_max=None if job.drafting else 0,
                detail=job.detail,
                store=job.store,
            )
            running.streams.append(stream)
        for stream in running.streams:
            await stream.accepted

    def _check_length(self, ids: tuple[int, ...]) -> None:
        ctx_size = self.engine.info.get("ctx_size", 0)
        if not ids:
            raise bad_request("the prompt is empty", "prompt")
        if ctx_size and len(ids) >= ctx_size:
            raise bad_request(
                f"the prompt has {len(ids)} tokens and the context holds {ctx_size}",
                code="context_length_exceeded",
            )


def _logprobs(row: list[Any] | None) -> Logprobs | None:
    if row is None:
        return None
    return Logprobs(row[0], row[1], tuple((token, value) for token, value in row[2]))


def _end(end: dict[str, Any]) -> End:
    timings = end["timings"]
    n_drafted, n_accepted = timings["draft_n"], timings["draft_n_accepted"]
    usage = Usage(
        n_prompt=end["n_prompt"],
        n_cached=end["n_cached"],
        n_completion=timings["predicted_n"],
        n_accepted=n_accepted,
        n_rejected=n_drafted - n_accepted,
        timings=timings,
    )
    error = None if end["error"] is None else public(end["error"])
    return End(FinishReason(end["reason"]), usage, error)
