"""Conversations as token rows with marks on what a model is to say.

Here: messages with tools through the chat template, masks on the assistant's turns and calls, rows
of files, batches of padded texts. Not here: what is learned from them (distilling.py).

A row of a file is `{"messages": […], "tools": […]}` or ShareGPT's `{"conversations": […]}`, one
JSON object a line. Messages are OpenAI's: `content`, `tool_calls` of assistants, `tool` results.

Shapes: R texts, B texts of a batch, S tokens each.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.errors import OutdraftError, TrainingError
from outdraft.text.chat import ChatTemplate
from outdraft.text.tokenizer import Tokenizer

MAX_BAD_SHARE = 0.1
MAX_SHOWN = 3
_MEGABATCH = 16  # batches that are sorted by length together
_SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant"}


@dataclass(frozen=True, slots=True)
class Trace:
    """One conversation: token ids, and True for those that are the model's to say."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]

    @property
    def n_given(self) -> int:
        """Tokens before the last answer: the prompt of it."""
        last = len(self.mask) - 1
        while last >= 0 and not self.mask[last]:
            last -= 1
        while last >= 0 and self.mask[last]:
            last -= 1
        return last + 1


@dataclass(frozen=True, slots=True)
class Conversation:
    """A checked row: messages with arguments as objects, and the tools that were offered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None

    @property
    def has_answer(self) -> bool:
        """Whether it ends with the assistant's turn."""
        return bool(self.messages[-1]["role"] == "assistant")

    def question(self) -> "Conversation":
        """Without its last answer."""
        return Conversation(self.messages[:-1], self.tools) if self.has_answer else self

    @property
    def digest(self) -> str:
        """Of the question alone: two answers to one question are on one side of a split."""
        asked = self.question()
        return hashlib.sha256(json.dumps([asked.messages, asked.tools]).encode()).hexdigest()


class BadRow(Exception):
    """A row that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A model's template and tokenizer."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def load(cls, path: Path) -> "Writer":
        """Of a model directory.

        Raises:
            ModelError: a file is missing or damaged.
            TrainingError: it has no chat template.
        """
        template = ChatTemplate.load(path)
        if template is None:
            raise TrainingError(
                f"{path} has no chat template",
                "add a chat_template.jinja; without one a conversation has no form",
            )
        return cls(Tokenizer.load(path), template)

    def prompt(self, row: Conversation) -> tuple[int, ...]:
        """Token ids up to where the answer begins."""
        return tuple(self._ids(self._text(row.question().messages, row.tools, True)))

    def trace(self, row: Conversation) -> Trace:
        """The whole conversation, cut at its turns as it is when it is served.

        Raises:
            BadRow: the template writes an answer differently from the prompt it gave for it, or
                nothing is the assistant's.
        """
        ids: list[int] = []
        mask: list[bool] = []
        done = ""
        for i, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            prompt = self._text(row.messages[:i], row.tools, True)
            whole = self._text(row.messages[: i + 1], row.tools, False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise BadRow("the chat template does not go on from its own prompt")
            for text, own in ((prompt[len(done) :], False), (whole[len(prompt) :], True)):
                new = self._ids(text)
                ids += new
                mask += [own] * len(new)
            done = whole
        if not any(mask):
            raise BadRow("nothing in it is the assistant's")
        return Trace(tuple(ids), tuple(mask))

    def _text(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, more: bool
    ) -> str:
        return self.template.render(messages, tools=tools, add_generation_prompt=more)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def read_conversations(paths: Iterable[Path]) -> tuple[list[Conversation], list[str]]:
    """Different conversations in the order of the files, and bad rows by file and line.

    Raises:
        TrainingError: a file cannot be read, more than a tenth of the rows are bad, or none is
            good.
    """
    found: dict[str, Conversation] = {}
    bad: list[str] = []
    n_rows = 0
    for path in paths:
        for number, line in _lines(path):
            n_rows += 1
            try:
                row = parse_row(line)
                found.setdefault(json.dumps([row.messages, row.tools]), row)
            except BadRow as error:
                bad.append(f"{path}:{number}: {error}")
    if len(bad) > MAX_BAD_SHARE * n_rows or not found:
        shown = "; ".join(bad[:MAX_SHOWN]) or "there are no rows"
        raise TrainingError(
            f"{len(bad)} of {n_rows} rows cannot be used: {shown}",
            "rows are JSON objects with messages, and tools where they are called; see "
            "docs/distilling.md",
        )
    return list(found.values()), bad


def parse_row(line: str) -> Conversation:
    """One line of a file.

    Raises:
        BadRow: says what is wrong with it.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadRow(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    if "messages" in row:
        turns = row["messages"]
    elif isinstance(row.get("conversations"), list):
        turns = [_from_sharegpt(turn) for turn in row["conversations"]]
    else:
        raise BadRow("it has no messages or conversations")
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_tool, tools))):
        raise BadRow("its tools are not a list of functions with names")
    if not isinstance(turns, list) or not turns:
        raise BadRow("its messages are not a list of turns")
    return Conversation([_message(turn) for turn in turns], tools or None)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}", "give UTF-8 files") from error
    return ((n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip())


def _from_sharegpt(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    name = str(turn.get("from"))
    return {"role": _SHAREGPT.get(name, name), "content": turn.get("value")}


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise BadRow("a turn has no role")
    content, calls = turn.get("content"), turn.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRow("a turn has no text and no calls")
    message = {key: turn[key] for key in ("role", "name", "tool_call_id") if key in turn}
    message["content"] = content or ""
    if calls:
        if not isinstance(calls, list):
            raise BadRow("tool_calls is not a list")
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Any) -> dict[str, Any]:
    """With its arguments as an object, which is what templates write out."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("a call has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise BadRow("the arguments of a call are not JSON") from error
    if not isinstance(arguments, dict):
        raise BadRow("the arguments of a call are not a JSON object")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def traces_of(
    rows: Iterable[Conversation], writer: Writer, max_tokens: int
) -> tuple[list[Trace], list[str]]:
    """The rows that have an answer and fit, and why others do not."""
    traces, bad = [], []
    for row in rows:
        try:
            trace = writer.trace(row)
            if len(trace.ids) > max_tokens:
                raise BadRow(f"it has {len(trace.ids)} tokens, more than {max_tokens}")
            traces.append(trace)
        except (BadRow, OutdraftError) as error:
            message = error.message if isinstance(error, OutdraftError) else str(error)
            bad.append(f"{row.messages[0]['content'][:40]!r}: {message}")
    return traces, bad


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded texts: ids int64 [B, S], and bool [B, S], True for tokens to learn."""

    ids_BS: Tensor
    mask_BS: Tensor

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> "Batch":
        """Padded to the longest with id 0, which is not learned."""
        width = max(len(trace.ids) for trace in traces)
        ids = torch.zeros(len(traces), width, dtype=torch.int64)
        mask = torch.zeros(len(traces), width, dtype=torch.bool)
        for row, trace in enumerate(traces):
            ids[row, : len(trace.ids)] = torch.tensor(trace.ids)
            mask[row, : len(trace.mask)] = torch.tensor(trace.mask)
        return cls(ids, mask)


def batch_of_step(traces: Sequence[Trace], step: int, size: int, seed: int) -> Batch:
    """The texts of a step, a function of the seed and the step alone.

    Every epoch has its own order; texts of like lengths come together, so that little is padding.
    """
    size = min(size, len(traces))
    n_batches = len(traces) // size
    epoch, place = divmod(step, n_batches)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(traces), generator=generator).tolist()
    first = place // _MEGABATCH * _MEGABATCH
    n_here = min(_MEGABATCH, n_batches - first)
    together = order[first * size : (first + n_here) * size]
    together.sort(key=lambda index: (len(traces[index].ids), index))
    shuffled = torch.randperm(n_here, generator=generator).tolist()
    at = shuffled[place - first] * size
    return Batch.of([traces[index] for index in together[at : at + size]])
