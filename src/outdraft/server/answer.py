"""How the text of a chat becomes parts of an answer: content, reasoning, tool calls.

Here: the parts, and the reader that makes them. A front pushes the text of every delta through a
reader and translates the parts. Not here: the formats of model families (tools/).
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from outdraft.server.jobs import Delta as RawDelta
from outdraft.server.jobs import Running
from outdraft.server.tools.answer import AnswerSplit
from outdraft.server.tools.deltas import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Delta,
    Reasoning,
)

Kind = Literal["content", "reasoning", "tool", "broken"]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer.

    For a tool call `index` tells calls apart; `id` and `name` come with its first piece, and `text`
    is a piece of the arguments' JSON. `broken` takes a call back whose arguments turned out to be
    none: its text follows as content.
    """

    kind: Kind
    text: str
    index: int = 0
    id: str | None = None
    name: str | None = None


class AnswerReader:
    """Splits one completion. It never fails: what it cannot read is content."""

    def __init__(self, split: AnswerSplit) -> None:
        self._split = split
        self._ends: list[int] = []  # of each token's text, in characters
        self._n_chars = 0

    @property
    def n_calls(self) -> int:
        """Whole calls so far."""
        return self._split.n_calls

    @property
    def n_reasoning(self) -> int:
        """Tokens so far whose text lies in a reasoning block; its markers do not count.

        A token without text (part of a character) counts where the next text is.
        """
        n, begin, at, blocks = 0, 0, 0, self._split.reasoning_blocks
        ends = [self._n_chars if last is None else last for _, last in blocks]
        for end in self._ends:
            while at < len(blocks) and ends[at] <= begin:
                at += 1
            n += at < len(blocks) and max(end, begin + 1) > blocks[at][0]
            begin = end
        return n

    def read(self, delta: RawDelta) -> list[Part]:
        """The parts that became certain, with the last delta all that was held back."""
        end = self._n_chars
        for token in delta.tokens:
            end += len(token.text)
            self._ends.append(end)
        self._n_chars += len(delta.text)
        found = _parts(self._split.push(delta.text))
        return found if delta.end is None else found + _parts(self._split.finish())


def _parts(deltas: Sequence[Delta]) -> list[Part]:
    parts = []
    for delta in deltas:
        if isinstance(delta, Content):
            parts.append(Part("content", delta.text))
        elif isinstance(delta, Reasoning):
            parts.append(Part("reasoning", delta.text))
        elif isinstance(delta, CallStart):
            parts.append(Part("tool", "", delta.index, delta.id, delta.name))
        elif isinstance(delta, CallArguments):
            parts.append(Part("tool", delta.text, delta.index))
        elif isinstance(delta, CallBroken):
            parts.append(Part("broken", "", delta.index))
    return parts


async def parts_of(
    running: Running, reader: AnswerReader
) -> AsyncIterator[tuple[list[Part], RawDelta]]:
    """The parts of a job with one completion, and the delta that they came with."""
    async for deltas in running:
        for delta in deltas:
            yield reader.read(delta), delta
