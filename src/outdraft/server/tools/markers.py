"""Finding fixed markers in text that arrives in pieces.

Here: `MarkerFinder`. Not here: what a marker means (reasoning.py, calls.py).
"""


class MarkerFinder:
    """Divides a text at the first of some markers, however the text is cut into pieces.

    Args:
        markers: what to look for; none of them begins with another.
    """

    def __init__(self, markers: tuple[str, ...]) -> None:
        assert all(markers)
        assert not any(a != b and a.startswith(b) for a in markers for b in markers)
        self._markers = markers
        self._longest = max((len(m) for m in markers), default=0)
        self._held = ""  # a possible beginning of a marker

    def push(self, text: str) -> tuple[str, str | None, str]:
        """What stands before the first marker, the marker, and what follows it.

        Without a marker the last two are None and ""; a possible beginning of one is held back.
        """
        text = self._held + text
        self._held = ""
        found = [(at, m) for m in self._markers if (at := text.find(m)) >= 0]
        if found:
            at, marker = min(found)
            return text[:at], marker, text[at + len(marker) :]
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(m.startswith(tail) for m in self._markers):
                self._held = tail
                return text[:-length], None, ""
        return text, None, ""

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held
