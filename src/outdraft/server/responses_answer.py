"""An answer as a response of OpenAI's newer API: whole, and as the events of a stream.

Here: items, events and their order, usage. Not here: the request (responses.py).

Each item goes through: added, its parts' deltas, done. A stream is the same items that the whole
answer has; the two are made by the same code.
"""

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from outdraft.request import FinishReason
from outdraft.server.answer import AnswerReader, Part, parts_of
from outdraft.server.errors import ApiError, public
from outdraft.server.guard import visit_of
from outdraft.server.jobs import End, Running, Usage
from outdraft.server.service import Service, finish
from outdraft.server.sse import event
from outdraft.server.tools.choice import ToolUse

Event = dict[str, Any]


class ResponsesAnswer:
    """One request's answer, streamed or whole. `said` is what it repeats of the request."""

    def __init__(
        self,
        request: Request,
        service: Service,
        running: Running,
        use: ToolUse,
        said: dict[str, Any],
    ) -> None:
        self.request = request
        self.service = service
        self.running = running
        self.reader = AnswerReader(service.dialect.reader(use, running.prompt_tokens))
        self.said = said
        self.visit_id = visit_of(request.scope).id
        self.created = int(time.time())
        self.output: list[dict[str, Any]] = []  # whole items
        self.item: dict[str, Any] | None = None  # the one that is being written
        self.text: list[str] = []  # of its part
        self.call = -1
        self.n_items = 0
        self.n_events = 0

    async def events(self) -> AsyncIterator[bytes]:
        """The events, from response.created to response.completed or what came instead."""
        started = self._response("in_progress")
        yield self._send({"type": "response.created", "response": started})
        yield self._send({"type": "response.in_progress", "response": started})
        try:
            async for parts, delta in parts_of(self.running, self.reader):
                found = [e for part in parts for e in self._part(part)]
                if delta.end is not None:
                    found += self._done()
                    found.append(self._last(delta.end))
                yield b"".join(self._send(e) for e in found)
        except ApiError as error:
            failed = self._response("failed")
            failed["error"] = {"code": "server_error", "message": public(error.message)}
            yield self._send({"type": "response.failed", "response": failed})

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        response: dict[str, Any] = {}
        async for parts, delta in parts_of(self.running, self.reader):
            for part in parts:
                self._part(part)
            if delta.end is not None:
                self._done()
                response = self._last(delta.end)["response"]
        return response

    def _send(self, data: Event) -> bytes:
        data = {**data, "sequence_number": self.n_events}
        self.n_events += 1
        return event(data, data["type"])

    def _part(self, part: Part) -> list[Event]:
        """Events of a part: it goes on with the open item, or ends it and begins its own."""
        if part.kind == "broken":
            return self._done(broken=True)
        kind = {"content": "message", "reasoning": "reasoning", "tool": "function_call"}[part.kind]
        found = []
        own = self.item is not None and self.item["type"] == kind
        if not own or (kind == "function_call" and part.index != self.call):
            found = [*self._done(), *self._begin(kind, part)]
        if part.text:
            self.text.append(part.text)
            found.append(self._delta(kind, part.text))
        return found

    def _begin(self, kind: str, part: Part) -> list[Event]:
        number = f"{self.visit_id}_{self.n_items}"
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"id": f"msg_{number}", "role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"id": f"rs_{number}", "summary": [], "content": []}
        else:
            item |= {"id": f"fc_{number}", "call_id": part.id, "name": part.name, "arguments": ""}
        self.item, self.text, self.call = item, [], part.index
        found = [self._item_event("response.output_item.added", item)]
        if kind != "function_call":
            found.append(self._part_event("response.content_part.added", ""))
        return found

    def _delta(self, kind: str, text: str) -> Event:
        if kind == "function_call":
            return self._of_item("response.function_call_arguments.delta", delta=text)
        if kind == "reasoning":
            return self._of_item("response.reasoning_text.delta", content_index=0, delta=text)
        where = {"content_index": 0, "logprobs": []}
        return self._of_item("response.output_text.delta", **where, delta=text)

    def _done(self, *, broken: bool = False) -> list[Event]:
        """Events that end the open item.

        A broken call is left out of a whole answer; in a stream, where it has been seen, it stays
        as an incomplete one.
        """
        item = self.item
        if item is None:
            return []
        text = "".join(self.text)
        found = []
        if item["type"] == "function_call":
            item = {**item, "arguments": text}
            kind = "response.function_call_arguments.done"
            found.append(self._of_item(kind, arguments=text, name=item["name"]))
        else:
            item = {**item, "content": [self._content(text)]}
            where: dict[str, Any] = {"content_index": 0, "text": text}
            if item["type"] == "reasoning":
                found.append(self._of_item("response.reasoning_text.done", **where))
            else:
                found.append(self._of_item("response.output_text.done", **where, logprobs=[]))
            found.append(self._part_event("response.content_part.done", text))
        item = {**item, "status": "incomplete" if broken else "completed"}
        found.append(self._item_event("response.output_item.done", item))
        if not broken or self.n_events:
            self.output.append(item)
        self.item = None
        self.n_items += 1
        return found

    def _content(self, text: str) -> dict[str, Any]:
        assert self.item is not None
        if self.item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _of_item(self, kind: str, **fields: Any) -> Event:
        assert self.item is not None
        return {"type": kind, "item_id": self.item["id"], "output_index": self.n_items, **fields}

    def _part_event(self, kind: str, text: str) -> Event:
        return self._of_item(kind, content_index=0, part=self._content(text))

    def _item_event(self, kind: str, item: dict[str, Any]) -> Event:
        return {"type": kind, "output_index": self.n_items, "item": item}

    def _last(self, end: End) -> Event:
        grammar = bool(self.running.job.params.grammar_options)
        finish(self.service, self.request, end, grammar=grammar)
        cut = end.reason is FinishReason.LENGTH
        status = "incomplete" if cut else "completed"
        response = self._response(status)
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["usage"] = self._usage(end.usage)
        response["timings"] = end.usage.timings
        return {"type": f"response.{status}", "response": response}

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": f"resp_{self.visit_id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self.service.name,
            "output": list(self.output),
            "usage": None,
            **self.said,
        }

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return {
            "input_tokens": usage.n_prompt,
            "input_tokens_details": {"cached_tokens": usage.n_cached, "cache_write_tokens": 0},
            "output_tokens": usage.n_completion,
            "output_tokens_details": {
                "reasoning_tokens": self.reader.n_reasoning,
                "accepted_prediction_tokens": usage.n_accepted,
                "rejected_prediction_tokens": usage.n_rejected,
            },
            "total_tokens": usage.n_prompt + usage.n_completion,
        }
