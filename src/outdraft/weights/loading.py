"""What is seen of a load from outside: how far it is, and remarks about it afterwards."""

from collections.abc import Callable
from dataclasses import dataclass, field

Progress = Callable[[str, int, int], None]
"""(what is going on, bytes done, bytes in all)"""


@dataclass(slots=True)
class Loading:
    """Handed to whoever loads.

    Attributes:
        on_progress: told after every piece of work; None: nobody watches.
        notes: sentences for the user about what went otherwise than expected.
    """

    on_progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    _what: str = ""
    _done: int = 0
    _total: int = 0

    def begin(self, what: str, n_bytes: int) -> None:
        """A piece of work over that many bytes starts."""
        self._what, self._done, self._total = what, 0, n_bytes
        self.advance(0)

    def advance(self, n_bytes: int) -> None:
        """So many more bytes are done; some may be read twice, so the sum is cut off."""
        self._done = min(self._done + n_bytes, self._total)
        if self.on_progress is not None:
            self.on_progress(self._what, self._done, self._total)
