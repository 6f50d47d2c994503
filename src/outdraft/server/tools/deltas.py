"""What an answer is made of while it arrives: reasoning, content, and tool calls in pieces.

Here: the deltas and how they are joined. Not here: who makes them (answer.py, calls.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the reasoning block."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; `index` counts those that began, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the call's arguments; all pieces together are the text of a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is whole."""

    index: int


@dataclass(frozen=True, slots=True)
class CallBroken:
    """The call that began is none: forget it. Its whole text follows as content."""

    index: int


Delta = Reasoning | Content | CallStart | CallArguments | CallEnd | CallBroken


@dataclass(slots=True)
class ToolCall:
    """A whole call; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Message:
    """An answer put together: what its deltas say in all."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas with neighbours of one kind joined and empty ones left out."""
    out: list[Delta] = []
    for delta in deltas:
        last = out[-1] if out else None
        if isinstance(delta, Reasoning | Content | CallArguments) and not delta.text:
            continue
        if isinstance(delta, Reasoning) and isinstance(last, Reasoning):
            out[-1] = Reasoning(last.text + delta.text)
        elif isinstance(delta, Content) and isinstance(last, Content):
            out[-1] = Content(last.text + delta.text)
        elif isinstance(delta, CallArguments) and isinstance(last, CallArguments):
            out[-1] = CallArguments(delta.index, last.text + delta.text)
        else:
            out.append(delta)
    return out


def message_of(deltas: Iterable[Delta]) -> Message:
    """Put an answer together; broken calls are left out, their text is in the content."""
    message = Message()
    reasoning, content = [], []
    calls: dict[int, tuple[CallStart, list[str]]] = {}
    for delta in deltas:
        if isinstance(delta, Reasoning):
            reasoning.append(delta.text)
        elif isinstance(delta, Content):
            content.append(delta.text)
        elif isinstance(delta, CallStart):
            calls[delta.index] = delta, []
        elif isinstance(delta, CallArguments):
            calls[delta.index][1].append(delta.text)
        elif isinstance(delta, CallBroken):
            del calls[delta.index]
    message.reasoning, message.content = "".join(reasoning), "".join(content)
    message.calls = [ToolCall(s.id, s.name, "".join(parts)) for s, parts in calls.values()]
    return message
