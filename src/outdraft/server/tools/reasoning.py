"""The reasoning block of an answer, taken out of the text while it arrives.

Here: `ReasoningSplit` and the markers of the formats. Not here: tool calls (calls.py).
"""

from dataclasses import dataclass

from outdraft.server.tools.deltas import Content, Delta, Reasoning
from outdraft.server.tools.markers import MarkerFinder


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its reasoning.

    Attributes:
        opening: what begins the block.
        closing: what ends it.
        anywhere: the block may stand behind other text. Only where the markers are tokens that
            cannot be written as text; else the block must come first.
        header: what may follow the opening and belongs to it.
    """

    opening: str
    closing: str
    anywhere: bool
    header: str = ""


GEMMA4 = ReasoningFormat("<|channel>", "<channel|>", anywhere=True, header="thought")
THINK = ReasoningFormat("<think>", "</think>", anywhere=False)
MISTRAL = ReasoningFormat("[THINK]", "[/THINK]", anywhere=True)


class ReasoningSplit:
    """Divides an answer into reasoning and content.

    The markers go, and so do line breaks at both ends of the block and behind it. A marker that
    cannot begin or end a block where it stands is content.

    Args:
        form: the model's markers.
        is_open: the prompt has opened the block already.
    """

    def __init__(self, form: ReasoningFormat, *, is_open: bool = False) -> None:
        self._form = form
        self._opening = MarkerFinder((form.opening,))
        self._closing = MarkerFinder((form.closing,))
        self._inside = is_open
        self._at_start = True  # only spaces so far
        self._header = ""  # what of the header may still come
        self._lead = ""  # spaces in front of all else, which go where a block follows
        self._trim = is_open  # drop line breaks until something else comes
        self._breaks = ""  # held back at what may be the end of the block
        self._n_chars = 0  # of the answer, markers included, as far as it is certain
        self.blocks: list[tuple[int, int | None]] = [(0, None)] if is_open else []
        """Where each begins, behind its opening, and ends, before its closing, in characters."""

    @property
    def inside(self) -> bool:
        """Whether the text so far ends inside the block."""
        return self._inside

    def push(self, text: str) -> list[Delta]:
        """The deltas that became certain."""
        out: list[Delta] = []
        while text:
            finder = self._closing if self._inside else self._opening
            before, marker, text = finder.push(text)
            self._n_chars += len(before)
            if before:
                out.append(self._inner(before) if self._inside else self._outer(before))
            if marker is None:
                break
            begin = self._n_chars
            self._n_chars += len(marker)
            if self._inside:
                self._inside, self._breaks, self._header, self._trim = False, "", "", True
                self.blocks[-1] = (self.blocks[-1][0], begin)
            elif self._form.anywhere or self._at_start:
                self._inside, self._trim, self._lead = True, True, ""
                self._header = self._form.header
                self.blocks.append((self._n_chars, None))
            else:
                out.append(self._outer(marker))
        return [delta for delta in out if delta.text]  # type: ignore[union-attr]

    def finish(self) -> list[Delta]:
        """What was held back, when the text ends."""
        if self._inside:
            dropped = self._dropped_header() if self._header else ""
            self._header = ""
            text = self._inner(dropped + self._closing.flush()).text + self._breaks
            self._breaks = ""
            return [Reasoning(text)] if text else []
        text = self._outer(self._opening.flush()).text
        text, self._lead = self._lead + text, ""
        return [Content(text)] if text else []

    def _inner(self, text: str) -> Reasoning:
        text = self._without_header(text)
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        text, self._breaks = self._breaks + text, ""
        end = len(text.rstrip("\n"))
        self._breaks = text[end:]
        return Reasoning(text[:end])

    def _without_header(self, text: str) -> str:
        """Drops the header; a text that begins otherwise keeps all of its own."""
        while self._header and text:
            if text[0] != self._header[0]:
                dropped = self._dropped_header()
                self._header = ""
                return dropped + text
            self._header, text = self._header[1:], text[1:]
        return text

    def _dropped_header(self) -> str:
        header = self._form.header
        return header[: len(header) - len(self._header)]

    def _outer(self, text: str) -> Content:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        if self._at_start:
            text, self._lead = self._lead + text, ""
            self._at_start = not text.strip()
            if self._at_start:
                text, self._lead = "", text
        return Content(text)
