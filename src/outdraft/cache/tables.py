"""The int32 numbers of a call: which rows, which pages. One tensor, made in a few steps.

Page tables of all sequences stand in it at fixed places, so that its layout depends on the number
of rows alone, and only tables that changed are written again. Not here: who has which page
(books.py), what attends to what (attend.py).

Shapes: T rows, S slots for sequences, P pages of a table.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outdraft.cache.books import PageBooks

Ints = NDArray[np.int32]


class PageTables:
    """The tables of `books` as arrays; a sequence's row is its slot."""

    def __init__(self, books: PageBooks, n_slots: int) -> None:
        """`n_slots`: sequences at a time; it grows where there are more."""
        self.books = books
        self.n_slots = 0
        self._allocate(n_slots)

    def slots(self, sequences: Sequence[str]) -> list[int]:
        """The row of each sequence, after bringing the arrays up to date."""
        slots = self.books.slots
        if self.books.changed:
            for sequence in self.books.changed:
                self._write(sequence)
            self.books.changed.clear()
        return [slots[sequence] for sequence in sequences]

    def pages(self, group: str, slot_T: Ints, page_T: Ints) -> Ints:
        """Ids of the pages with these indices, which count freed ones, of these sequences."""
        table_SP, first_S = self.arrays[group]
        found: Ints = table_SP[slot_T, page_T - first_S[slot_T]]
        return found

    def behind(self, rows: Ints) -> Tensor:
        """Numbers of rows [n, T], then all tables, in one tensor."""
        return torch.from_numpy(np.concatenate((rows.reshape(-1), self.flat)))

    def views(self, numbers: Tensor, n_parts: int) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Of what `behind` made: the rows [n, T]; and table [S, P] and first page [S] by group."""
        at = numbers.shape[0] - self.flat.shape[0]
        rows = numbers[:at].view(n_parts, -1)
        tables = {}
        for name, group in self.books.groups.items():
            end = at + self.n_slots * group.max_pages
            table_SP = numbers[at:end].view(self.n_slots, group.max_pages)
            at = end + self.n_slots
            tables[name] = [table_SP, numbers[end:at]]
        return rows, tables

    def _write(self, sequence: str) -> None:
        slot = self.books.slots.get(sequence)
        if slot is None:  # it has been closed since
            return
        if slot >= self.n_slots:
            self._allocate(2 * slot)
            for other in self.books.slots:
                self._write(other)
            return
        for name, (table_SP, first_S) in self.arrays.items():
            table = self.books.groups[name].tables[sequence]
            table_SP[slot, : len(table.pages)] = table.pages
            first_S[slot] = table.first_page

    def _allocate(self, n_slots: int) -> None:
        self.n_slots = n_slots
        widths = {name: group.max_pages for name, group in self.books.groups.items()}
        self.flat: Ints = np.zeros(n_slots * sum(w + 1 for w in widths.values()), np.int32)
        self.arrays: dict[str, tuple[Ints, Ints]] = {}
        at = 0
        for name, width in widths.items():
            end = at + n_slots * width
            table_SP = self.flat[at:end].reshape(n_slots, width)
            at = end + n_slots
            self.arrays[name] = table_SP, self.flat[end:at]
