"""Which pages of key/value memory are free and how often each is held. Plain Python, no tensors.

A page is held by every sequence that has it in its table and once more by the prefix cache, if it
is there. Held by the cache alone it is idle: it can be had as soon as it is evicted.
"""

from collections.abc import Iterable

from outdraft.errors import CapacityError


class PagePool:
    """A fixed number of pages, handed out lowest id first so that a sequence's lie side by side."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.holds = [0] * n_pages
        self.cached = bytearray(n_pages)
        self.n_idle = 0
        self._free = list(range(n_pages - 1, -1, -1))
        self._sorted = True

    @property
    def n_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def n_available(self) -> int:
        """Pages that are free or could be evicted from the cache at once."""
        return len(self._free) + self.n_idle

    def allocate(self, n: int) -> list[int]:
        """Take n pages; each is held once.

        Raises:
            CapacityError: fewer are free; none is taken.
        """
        if n > len(self._free):
            raise CapacityError(
                f"{n} more pages of key/value memory are needed and {len(self._free)} are free",
                "lower the context (--ctx-size) or the number of sequences at once",
            )
        if not self._sorted:
            self._free.sort(reverse=True)
            self._sorted = True
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        for page in taken:
            self.holds[page] = 1
        return taken[::-1]

    def hold(self, page: int) -> None:
        """One more sequence has a page."""
        assert self.holds[page] > 0
        self.n_idle -= self._idle(page)
        self.holds[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One sequence fewer has these pages; what nobody holds is free."""
        for page in pages:
            assert self.holds[page] > 0
            self.holds[page] -= 1
            if self.holds[page] == 0:
                self._free.append(page)
                self._sorted = False
            self.n_idle += self._idle(page)

    def put_in_cache(self, page: int) -> None:
        """The cache holds a page that a sequence holds too."""
        assert not self.cached[page]
        self.hold(page)
        self.cached[page] = 1

    def take_from_cache(self, page: int) -> None:
        """The cache gives up a page."""
        assert self.cached[page]
        self.n_idle -= self._idle(page)
        self.cached[page] = 0
        self.release([page])

    def idle(self, page: int) -> bool:
        """True for a page that only the cache holds."""
        return bool(self._idle(page))

    def _idle(self, page: int) -> int:
        return int(self.cached[page] and self.holds[page] == 1)
