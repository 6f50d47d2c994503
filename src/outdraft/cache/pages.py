"""Which pages of key/value memory are free and which belong to whom. Plain Python, no tensors."""

from collections.abc import Iterable

from outdraft.errors import CapacityError


class PagePool:
    """A fixed number of pages, handed out lowest id first so that a sequence's lie side by side."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._sorted = True

    @property
    def n_free(self) -> int:
        """Pages not in use."""
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Take n pages.

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
        return taken[::-1]

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back."""
        for page in pages:
            assert 0 <= page < self.n_pages
            self._free.append(page)
        self._sorted = False
