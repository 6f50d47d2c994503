"""How much one request, and one client, may ask for. Checked before anything is allocated.

One `Limits` for every front: `check_shape` sees a body as parsed JSON, `check_job` what a front
made of it. Sampling values have their own ranges (request.py). Not here: limits of connections
(protocol.py), how many requests are in flight (jobs.py).
"""

from dataclasses import dataclass
from typing import Any

from outdraft.request import SamplingParams
from outdraft.server.errors import ApiError, bad_request


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server. Sizes in bytes or characters, times in seconds.

    Attributes:
        body_bytes: a request's body.
        header_bytes: its request line and headers together.
        depth: nesting of its JSON.
        values: numbers, texts, lists and objects in its JSON, all together.
        messages: of a conversation.
        tools: functions offered to the model.
        prompts: of a completion, or inputs of an embedding.
        completions: n, and prompts times n.
        max_tokens: of one answer; the context bounds it anyway.
        prompt_chars: text of a prompt before it is made tokens.
        stops: stop strings and stop tokens, each.
        top_logprobs: best tokens told for each position.
        grammar_chars: a schema, expression or grammar.
        images: of a conversation.
        header_s: time to send the headers.
        body_s: time to send the body.
        send_s: how long a client may leave its stream unread before it is cut off.
        prepare_s: time to render a template. (Grammars: sampling/compile_check.py.)
        connections: open at once.
        in_flight: requests taken on at once, those that wait included.
        client_share: of `in_flight`, how much one client may have.
    """

    body_bytes: int = 8 * 1024 * 1024
    header_bytes: int = 32 * 1024
    depth: int = 48
    values: int = 400_000
    messages: int = 4096
    tools: int = 256
    prompts: int = 64
    completions: int = 64
    max_tokens: int = 1_000_000
    prompt_chars: int = 4 * 1024 * 1024
    stops: int = 16
    top_logprobs: int = 20
    grammar_chars: int = 64 * 1024
    images: int = 16
    header_s: float = 10.0
    body_s: float = 30.0
    send_s: float = 30.0
    prepare_s: float = 5.0
    connections: int = 1024
    in_flight: int = 128
    client_share: float = 0.75

    @property
    def per_client(self) -> int:
        """Requests that one client may have in flight."""
        return max(1, int(self.in_flight * self.client_share))

    def check_shape(self, body: Any) -> None:
        """Depth and number of the values of a parsed body.

        Raises:
            ApiError: one of them is above its limit.
        """
        level, depth, n = [body], 0, 0
        while level:
            n += len(level)
            if n > self.values:
                raise bad_request(f"the body has more than {self.values} values")
            if depth > self.depth:
                raise bad_request(f"the body is nested deeper than {self.depth} levels")
            below: list[Any] = []
            for value in level:
                if isinstance(value, dict):
                    below.extend(value.values())
                elif isinstance(value, list):
                    below.extend(value)
            level, depth = below, depth + 1

    def check_count(self, name: str, n: int, most: int) -> None:
        """Raises ApiError when there are more of something than may be."""
        if n > most:
            raise bad_request(f"{name} has {n} entries, the limit is {most}", name)

    def check_messages(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
        """A conversation before it is rendered.

        Raises:
            ApiError: it is too long.
        """
        self.check_count("messages", len(messages), self.messages)
        self.check_count("tools", len(tools or ()), self.tools)
        n_chars = n_images = 0
        for message in messages:
            content = message.get("content")
            if isinstance(content, str):
                n_chars += len(content)
            elif isinstance(content, list):
                n_images += sum(
                    isinstance(p, dict) and "image" in str(p.get("type")) for p in content
                )
                n_chars += sum(
                    len(p["text"])
                    for p in content
                    if isinstance(p, dict) and isinstance(p.get("text"), str)
                )
        self.check_text(n_chars)
        if n_images > self.images:
            raise bad_request(
                f"there are {n_images} images, the limit is {self.images}", "messages"
            )

    def check_text(self, n_chars: int) -> None:
        """Raises ApiError when a prompt has more characters than are made tokens."""
        if n_chars > self.prompt_chars:
            raise bad_request(
                f"the prompt has {n_chars} characters, the limit is {self.prompt_chars}"
            )

    def check_params(self, params: SamplingParams, n_prompts: int = 1) -> None:
        """What a request asks of the engine for each of its prompts.

        Raises:
            ApiError: more than may be.
        """
        if n_prompts * params.n > self.completions:
            raise bad_request(
                f"{n_prompts} prompts with n {params.n}: the limit is {self.completions} together",
                "n",
            )
        for name, value, most in (
            ("max_tokens", params.max_tokens or 0, self.max_tokens),
            ("stop", len(params.stop), self.stops),
            ("stop_token_ids", len(params.stop_token_ids), self.stops),
            ("top_logprobs", params.logprobs or 0, self.top_logprobs),
            ("prompt_logprobs", params.prompt_logprobs or 0, self.top_logprobs),
        ):
            if value > most:
                raise bad_request(f"{name} is {value}, the limit is {most}", name)
        for name in params.grammar_options:
            text = getattr(params, name)
            if isinstance(text, str) and len(text) > self.grammar_chars:
                raise bad_request(
                    f"{name} has {len(text)} characters, the limit is {self.grammar_chars}", name
                )

    def too_busy(self, n_in_flight: int, n_of_client: int, n_more: int) -> ApiError | None:
        """Why a client's requests cannot be taken on now, or None if they can."""
        if n_in_flight + n_more > self.in_flight:
            return ApiError(503, "the server is full: try again", "queue_full", retry_after_s=1)
        if n_of_client + n_more > self.per_client:
            return ApiError(
                429,
                f"one client may have {self.per_client} requests in flight: try again",
                "too_many_requests",
                retry_after_s=1,
            )
        return None
