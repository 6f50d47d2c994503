"""Tool calls taken out of an answer while it arrives.

Here: `CallSplit`, which finds where calls begin and end and turns what is none back into text. Not
here: how a format writes a call (the readers).

A call's arguments go out as they come. Should the text then turn out to be no call, a `CallBroken`
takes the call back and all of its text follows as content: nothing is lost. A text is read the same
however it is cut into pieces.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from outdraft.server.tools.deltas import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Delta,
)
from outdraft.server.tools.json_text import Progress
from outdraft.server.tools.markers import MarkerFinder
from outdraft.server.tools.readers import Arguments, CallReader, Name, Signal

_SPACE = frozenset(" \t\n\r")


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes tool calls.

    Attributes:
        name: of the format, as in the option that chooses it.
        openings: markers that begin a call.
        reader: makes the reader of what follows a marker.
        closing: what may follow a call and belongs to it; "" is nothing.
        bare: a character that begins a call without a marker, at the very beginning of the answer
            or behind another call; "" is none.
        special: texts that are single tokens of the vocabulary and would else not be in the text.
    """

    name: str
    openings: tuple[str, ...]
    reader: Callable[[], CallReader]
    closing: str = ""
    bare: str = ""
    special: tuple[str, ...] = ()


class CallSplit:
    """Divides an answer, its reasoning removed, into content and calls.

    Spaces in front of a call and behind it belong to neither and go. A call whose closing marker is
    missing is a call all the same.

    Args:
        form: how the model writes calls.
        new_id: makes the id of the next call.
    """

    def __init__(self, form: CallFormat, new_id: Callable[[], str]) -> None:
        self._form = form
        self._new_id = new_id
        self._finder = MarkerFinder(form.openings)
        self._reader: CallReader | None = None
        self._raw: list[str] = []  # text of the call that is being read
        self._spaces = ""  # before what comes next
        self._closing = ""  # what has come of the closing marker
        self._behind_call = False  # reading spaces and the closing marker
        self._bare_next = bool(form.bare)  # a bare call may begin here
        self._is_open = False
        self._n_calls = 0
        self._index = 0  # of the next call; a broken one has used its number

    @property
    def n_calls(self) -> int:
        """Whole calls so far."""
        return self._n_calls

    def push(self, text: str) -> list[Delta]:
        """The deltas that became certain."""
        out: list[Delta] = []
        while text:
            text = self._read(text, out) if self._reader is not None else self._scan(text, out)
        return out

    def finish(self) -> list[Delta]:
        """What was held back, when the text ends."""
        out: list[Delta] = []
        if self._reader is not None:
            signals: list[Signal] = []
            whole = self._reader.finish(signals)
            self._signal(signals, out)
            if not whole:
                self._give_back(out)
        if self._behind_call:
            out.append(Content("" if self._closing == self._form.closing else self._closing))
        else:
            out.append(Content(self._spaces + self._finder.flush()))
        self._reader, self._closing, self._spaces = None, "", ""
        return [d for d in out if not isinstance(d, Content) or d.text]

    def _scan(self, text: str, out: list[Delta]) -> str:
        """Outside calls; returns what is left to read."""
        if self._behind_call:
            return self._skip(text)
        if self._bare_next and (rest := self._bare(text)) is not None:
            return rest
        before, marker, rest = self._finder.push(text)
        self._plain(before, out)
        if marker is not None:
            self._begin(marker)
        return rest

    def _skip(self, text: str) -> str:
        """Behind a call: spaces and the closing marker go."""
        closing = self._form.closing
        for at, char in enumerate(text):
            n = len(self._closing)
            if n < len(closing) and char == closing[n]:
                self._closing += char
            elif char in _SPACE and n in (0, len(closing)):
                self._spaces += char
            else:
                # no marker after all: what has come of one is read again as plain text
                back = self._closing if n < len(closing) else ""
                self._behind_call, self._closing = False, ""
                return back + text[at:]
        return ""

    def _bare(self, text: str) -> str | None:
        """Where a call may begin without a marker; None when it does not."""
        for at, char in enumerate(text):
            if char == self._form.bare:
                self._begin("")
                return text[at:]
            if char not in _SPACE:
                self._bare_next = False
                return None if at == 0 else text[at:]
            self._spaces += char
        return ""

    def _plain(self, text: str, out: list[Delta]) -> None:
        """Content, but for the spaces at its end, which may stand before a call."""
        if not text:
            return
        text = self._spaces + text
        end = len(text.rstrip(" \t\n\r"))
        self._spaces = text[end:]
        if end:
            self._bare_next = False
            out.append(Content(text[:end]))

    def _begin(self, marker: str) -> None:
        self._reader = self._form.reader()
        self._raw = [self._spaces, marker]
        self._spaces = ""
        self._bare_next = False

    def _read(self, text: str, out: list[Delta]) -> str:
        """Within a call; returns what is left to read."""
        reader = self._reader
        assert reader is not None
        signals: list[Signal] = []
        for at, char in enumerate(text):
            n_signals = len(signals)
            progress = reader.push(char, signals)
            if progress is Progress.BAD:
                self._signal(signals[:n_signals], out)
                self._give_back(out)
                return text[at:]  # the character may begin a call itself
            if progress is not Progress.BEFORE:
                self._raw.append(char)
            self._drop_raw(signals[n_signals:])
            if progress is not Progress.MORE:
                self._signal(signals, out)
                self._reader, self._behind_call = None, True
                self._bare_next = bool(self._form.bare)
                return text[at + 1 :] if progress is Progress.DONE else text[at:]
        self._signal(signals, out)
        return ""

    def _drop_raw(self, signals: list[Signal]) -> None:
        """The text of whole calls is not needed any more."""
        if any(not isinstance(s, Name | Arguments) for s in signals):
            self._raw = []

    def _signal(self, signals: list[Signal], out: list[Delta]) -> None:
        for signal in signals:
            if isinstance(signal, Name):
                out.append(CallStart(self._index, self._new_id(), signal.name))
                self._is_open = True
            elif isinstance(signal, Arguments):
                out.append(CallArguments(self._index, signal.text))
            else:
                out.append(CallEnd(self._index))
                self._index += 1
                self._is_open = False
                self._n_calls += 1

    def _give_back(self, out: list[Delta]) -> None:
        """It was no call: its text is content."""
        if self._is_open:
            out.append(CallBroken(self._index))
            self._index += 1
            self._is_open = False
        self._reader = None
        text, self._raw = "".join(self._raw), []
        self._plain(text, out)
        self._bare_next = False


def whole(form: CallFormat, text: str, new_id: Callable[[], str]) -> Iterator[Delta]:
    """The deltas of a whole text."""
    split = CallSplit(form, new_id)
    yield from split.push(text)
    yield from split.finish()
