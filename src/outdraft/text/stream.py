"""Text while tokens arrive: whole characters only, and nothing of a stop string.

Here: `IncrementalDetokenizer` (ids to text) and `StopStrings` (text to text). Not here: stop tokens
(the engine compares ids) and what is done with a match.
"""

from collections.abc import Callable, Sequence

from outdraft.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not UTF-8
# An unfinished character has at most 3 bytes, so at most 3 tokens; one more is context for decoders
# that treat the first token of a text differently (they drop its leading space).
_WINDOW_TOKENS = 4
_WINDOW_MAX_TOKENS = 12


class IncrementalDetokenizer:
    """Turns generated ids into text piece by piece.

    All pieces together are what `decode(prompt + output)` has beyond `decode(prompt)`. Bytes that
    are no character come out as U+FFFD as soon as nothing can complete them, at the latest in
    `flush`. If the prompt itself ends within a character, that character belongs to the output.

    Each push decodes a few tokens only. A run of byte tokens (`<0xE2>`) is held until it ends,
    because SentencePiece decoders judge the run as a whole: one bad byte spoils all of it.

    Args:
        prompt_ids: what comes before.
        shown: special tokens that have a text here, their spelling. They end what is before them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._pending: list[int] = []  # a run of byte tokens that may go on
        window: list[int] = []
        for token_id in reversed(prompt_ids):
            if not tokenizer.has_text(token_id):
                continue
            if tokenizer.is_byte(token_id) and not window:
                self._pending.insert(0, token_id)
                continue
            window.insert(0, token_id)
            if len(window) == _WINDOW_TOKENS:
                break
        self._window = window
        self._n_shown = self._shown_of_prompt()

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often the token's own, sometimes none."""
        if not self._tokenizer.has_text(token_id):
            if token_id not in self._shown:
                return ""
            text = self.flush()
            self._end_run()
            return text + (self._tokenizer.id_to_token(token_id) or "")
        self._pending.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        return self._take(_without_unfinished)

    def flush(self) -> str:
        """The rest, when no more tokens will come."""
        return self._take(str)

    def _take(self, certain: Callable[[str], str]) -> str:
        """What is new in the certain part of the text; the window then moves to the end."""
        ids = self._window + self._pending
        text = certain(self._tokenizer.decode(ids))
        new = text[self._n_shown :]
        self._window, self._n_shown = ids, len(text)
        if len(ids) > _WINDOW_MAX_TOKENS:  # one more decoding, now and then
            self._window = ids[-_WINDOW_TOKENS:]
            self._n_shown = len(certain(self._tokenizer.decode(self._window)))
        self._pending = []
        return new

    def _end_run(self) -> None:
        """Let no run of byte tokens go on: its text is out, and more bytes would change it."""
        if not any(self._tokenizer.is_byte(token) for token in self._window):
            return
        window = [token for token in self._window if not self._tokenizer.is_byte(token)]
        # any token does: the context only says that what follows is not the first of the text
        self._window = window or self._tokenizer.encode("a", add_special_tokens=False)
        self._n_shown = len(self._tokenizer.decode(self._window))

    def _shown_of_prompt(self) -> int:
        """Length of the window's text that belongs to the prompt."""
        text = self._tokenizer.decode(self._window + self._pending)
        if self._pending and text.endswith(REPLACEMENT):
            text = self._tokenizer.decode(self._window)
        return len(_without_unfinished(text))


class StopStrings:
    """Cuts a stream of text at the first stop string that becomes complete.

    Where several become complete with the same character, the longest is taken. How the text is
    divided into pushes makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string is never empty"
        self._stops = tuple(stops)
        self._held = ""  # a possible beginning of a stop string

    def push(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string that ended the text, if one did.

        The stop string itself and what follows it are dropped; push nothing after a match.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        end, stop = min(
            ((found + len(stop), stop) for stop in self._stops if (found := text.find(stop)) >= 0),
            key=lambda match: (match[0], -len(match[1])),
            default=(0, None),
        )
        if stop is not None:
            self._held = ""
            return text[: end - len(stop)], stop
        n_held = self._beginning_of_stop(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], None

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _without_unfinished(text: str) -> str:
    """Decoders put a single U+FFFD for the beginning of a character at the end of a text."""
    return text.removesuffix(REPLACEMENT)
