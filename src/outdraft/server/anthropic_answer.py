"""An answer as Anthropic's message: whole, and as the events of a stream.

Here: blocks, events, stop reasons, usage. Not here: the request (anthropic_messages.py).
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from outdraft.request import FinishReason
from outdraft.server.answer import AnswerReader, Part, parts_of
from outdraft.server.guard import visit_of
from outdraft.server.jobs import End, Running, Usage
from outdraft.server.service import Service, finish
from outdraft.server.sse import event
from outdraft.server.tools.choice import ToolUse

_STOP_TOKENS = 64


class MessagesAnswer:
    """One request's answer, streamed or whole."""

    def __init__(self, request: Request, service: Service, running: Running, use: ToolUse) -> None:
        self.request = request
        self.service = service
        self.running = running
        self.reader = AnswerReader(service.dialect.reader(use, running.prompt_tokens))
        self.id = f"msg_{visit_of(request.scope).id}"
        self.last_tokens: list[int] = []
        self.block: dict[str, Any] | None = None
        self.n_blocks = 0
        self.call = -1  # which call the open block is

    async def events(self) -> AsyncIterator[bytes]:
        """The events, from message_start to message_stop."""
        start = {**self._head(), "stop_reason": None, "stop_sequence": None}
        n_prompt = len(self.running.prompt_tokens)
        start["usage"] = _usage_json(n_prompt, 0, 0)
        yield _event("message_start", message=start)
        yield _event("ping")
        async for parts, delta in parts_of(self.running, self.reader):
            self._note(delta.tokens)
            out = [data for part in parts for data in self._part_events(part)]
            if delta.end is not None:
                out += self._close()
                reason, stop = self._finish(delta.end)
                usage = _usage_of(delta.end.usage)
                last = {"stop_reason": reason, "stop_sequence": stop}
                extra = {"timings": delta.end.usage.timings}
                out.append(_event("message_delta", delta=last, usage=usage, **extra))
                out.append(_event("message_stop"))
            if out:
                yield b"".join(out)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        blocks: list[dict[str, Any]] = []
        calls: dict[int, dict[str, Any]] = {}
        message: dict[str, Any] = {}
        async for parts, delta in parts_of(self.running, self.reader):
            self._note(delta.tokens)
            for part in parts:
                _collect(part, blocks, calls)
            if delta.end is not None:
                reason, stop = self._finish(delta.end)
                message = {"stop_reason": reason, "stop_sequence": stop}
                message["usage"] = _usage_of(delta.end.usage)
                message["timings"] = delta.end.usage.timings
        for block in calls.values():
            block["input"] = json.loads(block["input"])
        return {**self._head(), "content": [b for b in blocks if b], **message}

    def _head(self) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant"}
        return {**head, "model": self.service.name, "content": []}

    def _part_events(self, part: Part) -> list[bytes]:
        """Events of a part: it goes on with the open block, or ends it and begins its own."""
        if part.kind == "broken":
            return self._close()
        kind = {"content": "text", "reasoning": "thinking", "tool": "tool_use"}[part.kind]
        out = []
        open_kind = self.block["type"] if self.block else None
        if open_kind != kind or (kind == "tool_use" and part.index != self.call):
            if part.kind == "content" and not part.text:
                return []
            out += self._close()
            self.block, self.call = _new_block(part), part.index
            out.append(_event("content_block_start", index=self.n_blocks, content_block=self.block))
        if part.text:
            delta = {
                "text": {"type": "text_delta", "text": part.text},
                "thinking": {"type": "thinking_delta", "thinking": part.text},
                "tool_use": {"type": "input_json_delta", "partial_json": part.text},
            }[kind]
            out.append(_event("content_block_delta", index=self.n_blocks, delta=delta))
        return out

    def _close(self) -> list[bytes]:
        if self.block is None:
            return []
        out = []
        if self.block["type"] == "thinking":  # clients wait for one before they send it back
            signature = {"type": "signature_delta", "signature": "none"}
            out.append(_event("content_block_delta", index=self.n_blocks, delta=signature))
        out.append(_event("content_block_stop", index=self.n_blocks))
        self.block = None
        self.n_blocks += 1
        return out

    def _note(self, tokens: list[Any]) -> None:
        self.last_tokens = [*self.last_tokens, *(t.id for t in tokens)][-_STOP_TOKENS:]

    def _finish(self, end: End) -> tuple[str, str | None]:
        """Anthropic's stop reason, and the stop sequence that was met."""
        params = self.running.job.params
        finish(self.service, self.request, end, grammar=bool(params.grammar_options))
        if end.reason is FinishReason.LENGTH:
            return "max_tokens", None
        stop = self._stop_met() if end.reason is FinishReason.STOP else None
        if stop is not None:
            return "stop_sequence", stop
        return ("tool_use" if self.reader.n_calls else "end_turn"), None

    def _stop_met(self) -> str | None:
        """The stop string that ended the text: its last character came with the last token."""
        stops = self.running.job.params.stop
        tokenizer = self.service.tokenizer
        if not stops or not self.last_tokens or self.last_tokens[-1] in tokenizer.eos_ids:
            return None
        tail = tokenizer.decode(self.last_tokens)
        found = [(at + len(s), -len(s), s) for s in stops if (at := tail.find(s)) >= 0]
        return min(found)[2] if found else stops[0]


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _new_block(part: Part) -> dict[str, Any]:
    if part.kind == "content":
        return {"type": "text", "text": ""}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}


def _collect(part: Part, blocks: list[dict[str, Any]], calls: dict[int, dict[str, Any]]) -> None:
    """Add a part to the blocks of a whole answer."""
    if part.kind == "broken":
        calls.pop(part.index).clear()  # the empty block is left out
        return
    if part.kind == "tool":
        if part.index not in calls:
            calls[part.index] = {**_new_block(part), "input": ""}
            blocks.append(calls[part.index])
        calls[part.index]["input"] += part.text
        return
    field = "text" if part.kind == "content" else "thinking"
    if not blocks or blocks[-1].get("type") != field:
        blocks.append(_new_block(part))
    blocks[-1][field] += part.text
    if field == "thinking":
        blocks[-1]["signature"] = "none"


def _usage_of(usage: Usage) -> dict[str, Any]:
    return _usage_json(usage.n_prompt, usage.n_cached, usage.n_completion)


def _usage_json(n_prompt: int, n_cached: int, n_output: int) -> dict[str, Any]:
    return {
        "input_tokens": n_prompt - n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_cached,
        "output_tokens": n_output,
    }
