"""What a drafter is tuned on: prompts from a user's files, and those held out.

Here: four formats, bad rows by file and line, the split. Not here: what the target writes after the
prompts (tune.py).

- any other file: text, cut into parts at line ends;
- .jsonl, one object a line, and .json, a list of such objects: `{"text": …}`, `{"prompt": …}`,
  `{"messages": […]}`, ShareGPT's `{"conversations": […]}`, or `{"tokens": […]}`.

A conversation is a prompt up to its last answer; a text gives a prompt from a place in it.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from outdraft.errors import OutdraftError, TrainingError

PART_CHARS = 4000
MAX_TOKEN_CHARS = 32  # a text is not read further than a prompt of such tokens reaches
MAX_BAD_SHARE = 0.1
MAX_SHOWN = 3
HELDOUT_SHARE = 5  # at most one row in so many
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user"}

Prompt = tuple[int, ...]


class Encoder(Protocol):
    """What is needed of a loaded model (`LLM` is one)."""

    def encode(self, prompt: str | Sequence[int], /) -> Prompt:
        """Token ids of a text, `<bos>` first."""
        ...

    def render_chat(self, messages: list[dict[str, Any]]) -> Prompt:
        """Token ids of a conversation, ready for the answer."""
        ...


@dataclass(frozen=True, slots=True)
class TuningData:
    """Prompts to learn from and held out, without duplicates; `bad` names rows passed over."""

    train: list[Prompt]
    heldout: list[Prompt]
    bad: list[str]


class BadRow(Exception):
    """A row that cannot be used, and why."""


def read_prompts(
    paths: Iterable[Path], model: Encoder, vocab_size: int, n_tokens: int
) -> tuple[list[Prompt], list[str]]:
    """Different prompts of at most `n_tokens` tokens in the order of the files, and bad rows.

    Raises:
        TrainingError: a file cannot be read, more than a tenth of the rows are bad, or no row is
            good.
    """
    prompts: dict[Prompt, None] = {}
    bad: list[str] = []
    n_rows = 0
    for path in paths:
        for place, row in _rows(path):
            n_rows += 1
            try:
                prompts[_prompt(row, model, vocab_size, n_tokens)] = None
            except (BadRow, OutdraftError) as error:
                message = error.message if isinstance(error, OutdraftError) else str(error)
                bad.append(f"{place}: {message}")
    if len(bad) > MAX_BAD_SHARE * n_rows or not prompts:
        shown = "; ".join(bad[:MAX_SHOWN]) or "there are no rows"
        raise TrainingError(
            f"{len(bad)} of {n_rows} rows cannot be used: {shown}",
            "rows are text, messages, conversations or tokens; see docs/tuning.md",
        )
    return list(prompts), bad


def read_passages(
    paths: Iterable[Path],
    model: Encoder,
    vocab_size: int,
    n_tokens: tuple[int, int],
    heldout: Collection[Prompt],
) -> list[Prompt]:
    """Prompts with the text that follows them in the data, of rows that are not held out.

    Conversations are left out: their answers are somebody else's.

    Args:
        n_tokens: of a prompt, and of a passage at most.
    """
    short, long = n_tokens
    passages: dict[Prompt, None] = {}
    for path in paths:
        for _, row in _rows(path):
            if not isinstance(row, dict) or "messages" in row or "conversations" in row:
                continue
            try:
                prompt = _prompt(row, model, vocab_size, short)
                passage = _prompt(row, model, vocab_size, long)
            except (BadRow, OutdraftError):  # told when prompts were read
                continue
            if prompt not in heldout:
                passages[passage] = None
    return list(passages)


def split_by_hash(prompts: Sequence[Prompt], n_heldout: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and those held out: the ones whose digests are lowest.

    Which side a prompt is on depends on its tokens alone, but for the number held out.
    """
    ordered = by_hash(prompts)
    n = min(n_heldout, len(ordered) // HELDOUT_SHARE)
    return ordered[n:], ordered[:n]


def by_hash(prompts: Iterable[Prompt]) -> list[Prompt]:
    """In the order of their digests."""
    return sorted(prompts, key=_digest)


def _digest(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Places (`file:line`) and rows; a row that is not JSON is handed on as the error."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}", "give UTF-8 files") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)
    elif path.suffix == ".json":
        rows = _parse(text)
        if not isinstance(rows, list):
            raise TrainingError(f"{path} is not a JSON list", "give a list of rows, or JSONL")
        for number, row in enumerate(rows, start=1):
            yield f"{path}:row {number}", row
    else:
        for number, part in _parts(text):
            yield f"{path}:{number}", {"text": part}


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """Parts of about `PART_CHARS` characters in whole lines, with the first line's number."""
    first, size = 1, 0
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        lines.append(line)
        size += len(line)
        if size >= PART_CHARS:
            yield first, "".join(lines)
            first, size, lines = number + 1, 0, []
    if (lines and size > PART_CHARS // 4) or first == 1:
        yield first, "".join(lines)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        return error


def _prompt(row: Any, model: Encoder, vocab_size: int, n_tokens: int) -> Prompt:
    if isinstance(row, ValueError):
        raise BadRow(f"not JSON: {row}")
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    if "messages" in row:
        prompt = model.render_chat(_before_answer(row["messages"], "role", "content"))
    elif "conversations" in row:
        prompt = model.render_chat(_before_answer(row["conversations"], "from", "value"))
    elif "tokens" in row:
        return _checked_tokens(row["tokens"], vocab_size)[:n_tokens]
    elif isinstance(row.get("prompt"), str) and row["prompt"]:
        prompt = model.encode(row["prompt"])
    elif isinstance(row.get("text"), str) and row["text"].strip():
        return model.encode(_from_a_line(row["text"])[: MAX_TOKEN_CHARS * n_tokens])[:n_tokens]
    else:
        raise BadRow("it has no messages, conversations, tokens, prompt or text")
    if len(prompt) > n_tokens:  # cutting a conversation would make another one
        raise BadRow(f"its prompt has {len(prompt)} tokens, more than {n_tokens}")
    return prompt


def _from_a_line(text: str) -> str:
    """The text from a line in its first half on, at a place that its hash decides."""
    share = int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 2**17
    start = text.find("\n", int(share * len(text))) + 1
    return text[start:] if text[start:].strip() else text


def _before_answer(turns: Any, role: str, content: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise BadRow("its conversation is not a list of turns")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get(content), str):
            raise BadRow(f"a turn has no {role!r} and {content!r}")
        name = str(turn.get(role))
        messages.append({"role": _ROLES.get(name, name), "content": turn[content]})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise BadRow("its conversation has no question")
    return messages


def _checked_tokens(tokens: Any, vocab_size: int) -> Prompt:
    if not isinstance(tokens, list) or len(tokens) < 2:
        raise BadRow("its tokens are not a list of at least two ids")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadRow(f"the token {token!r} is not an id from 0 to {vocab_size - 1}")
    return tuple(tokens)
