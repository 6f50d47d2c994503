"""An answer's text into reasoning, content and tool calls, while it arrives.

Here: `AnswerSplit`, both stages behind one another. Not here: the stages (reasoning.py, calls.py).
"""

from collections.abc import Callable

from outdraft.server.tools.calls import CallFormat, CallSplit
from outdraft.server.tools.deltas import Content, Delta, merged
from outdraft.server.tools.reasoning import ReasoningFormat, ReasoningSplit


class AnswerSplit:
    """Splits the text of one answer. Without reasoning and calls all of it is content, verbatim.

    Args:
        reasoning: how the model marks its reasoning; None if it does not.
        calls: how it writes calls; None where no tools were given.
        new_id: makes the id of the next call.
        reasoning_open: the prompt has opened the reasoning block.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None,
        calls: CallFormat | None,
        new_id: Callable[[], str],
        *,
        reasoning_open: bool = False,
    ) -> None:
        self._reasoning = ReasoningSplit(reasoning, is_open=reasoning_open) if reasoning else None
        self._calls = CallSplit(calls, new_id) if calls else None

    @property
    def n_calls(self) -> int:
        """Whole calls so far."""
        return self._calls.n_calls if self._calls else 0

    @property
    def reasoning_blocks(self) -> list[tuple[int, int | None]]:
        """Where reasoning begins and ends in the text, without its markers; None: not yet."""
        return self._reasoning.blocks if self._reasoning else []

    def push(self, text: str) -> list[Delta]:
        """The deltas that became certain, neighbours of a kind joined."""
        first: list[Delta] = self._reasoning.push(text) if self._reasoning else [Content(text)]
        return merged(self._second(first))

    def finish(self) -> list[Delta]:
        """What was held back, when the text ends."""
        out = self._second(self._reasoning.finish() if self._reasoning else [])
        return merged([*out, *(self._calls.finish() if self._calls else [])])

    def _second(self, deltas: list[Delta]) -> list[Delta]:
        if self._calls is None:
            return deltas
        out: list[Delta] = []
        for delta in deltas:
            out += self._calls.push(delta.text) if isinstance(delta, Content) else [delta]
        return out
