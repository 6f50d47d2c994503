"""How the tokens of a chat become parts of an answer: content, reasoning, tool calls.

Here: the parts, what a reader is, and the one that takes everything for content. A front pushes
the tokens of every delta through a reader and translates the parts. Not here: the formats of model
families.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from outdraft.server.jobs import Token

Kind = Literal["content", "reasoning", "tool"]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer.

    For a tool call `index` tells calls apart; `id` and `name` come with its first piece, and `text`
    is a piece of the arguments' JSON.
    """

    kind: Kind
    text: str
    index: int = 0
    id: str | None = None
    name: str | None = None


class AnswerReader(Protocol):
    """Splits one completion. It never fails: what it cannot read is content."""

    def push(self, tokens: Sequence[Token], text: str) -> list[Part]:
        """The parts that became certain. `text` is that of the tokens, as it may be shown."""
        ...

    def finish(self) -> list[Part]:
        """What was held back, at the end of the completion."""
        ...


class PlainReader:
    """Everything is content."""

    def push(self, tokens: Sequence[Token], text: str) -> list[Part]:
        """See AnswerReader."""
        return [Part("content", text)] if text else []

    def finish(self) -> list[Part]:
        """See AnswerReader."""
        return []
