"""The memory of one model for many sequences: keys and values of all its layers.

A sequence's rows are written at its positions, then counted by `advance` and taken back by
`rollback`; what lies above the length is never seen and is overwritten. Layers of one kind share a
page table. Pages behind the window of sliding layers are freed. Not here: who runs when (engine/).

Not here either: attention over it (attend.py). Shapes: T rows, B sequences, P pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from outdraft.cache.kv import clear_pages, empty_pages, n_bytes
from outdraft.cache.numbers import Numbers
from outdraft.cache.pages import PagePool
from outdraft.ops.base import PAGE_SLOTS, KvPages


@dataclass(frozen=True, slots=True)
class KVLayer:
    """What one layer asks of the memory.

    Layers of a `group` have the same window and share page tables. `source` is the layer whose
    keys and values it reads: its own index, or that of an earlier layer of the group.
    """

    group: str
    n_kv_heads: int
    head_dim: int
    window: int | None
    source: int


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start .. start + n_rows - 1` of a call belong to one sequence, in position order."""

    sequence: str
    start: int
    n_rows: int


@dataclass(slots=True)
class _Table:
    """A sequence's pages in one group; `first_page` counts those already freed in front."""

    first_page: int = 0
    pages: list[int] = field(default_factory=list)


class _Group:
    """Layers that share page tables."""

    def __init__(self, window: int | None, max_pages: int, max_sequences: int) -> None:
        self.window = window
        self.max_pages = max_pages  # of one sequence
        self.pool = PagePool(max_pages * max_sequences)
        self.layers: dict[int, KvPages] = {}
        self.tables: dict[str, _Table] = {}


class Memory:
    """Paged keys and values of all layers, for up to `max_sequences` sequences."""

    def __init__(
        self,
        layers: Sequence[KVLayer],
        *,
        max_sequences: int,
        max_tokens: int,
        max_rows: int,
        dtype: torch.dtype,
    ) -> None:
        """Plan for the worst case, so that a sequence that was opened can always go on.

        Args:
            layers: one entry a model layer.
            max_tokens: longest sequence, rows of a step included.
            max_rows: most rows one sequence brings in one step.
            dtype: of keys and values.
        """
        self.layers = list(layers)
        self.lengths: dict[str, int] = {}
        self.groups: dict[str, _Group] = {}
        for index, layer in enumerate(self.layers):
            if layer.group not in self.groups:
                reach = max_tokens
                if layer.window is not None:
                    reach = min(reach, layer.window + max_rows + PAGE_SLOTS)
                n_pages = -(-reach // PAGE_SLOTS) + 1
                self.groups[layer.group] = _Group(layer.window, n_pages, max_sequences)
            group = self.groups[layer.group]
            if layer.source == index:
                group.layers[index] = empty_pages(
                    group.pool.n_pages, layer.n_kv_heads, layer.head_dim, dtype
                )

    @property
    def n_bytes(self) -> int:
        """Bytes of all pages."""
        stores = [store for group in self.groups.values() for store in group.layers.values()]
        return sum(n_bytes(store) for store in stores)

    def bytes_per_token(self, group: str) -> int:
        """Bytes that one more position costs in the layers of a group."""
        pages = self.groups[group].pool.n_pages
        total = sum(n_bytes(store) for store in self.groups[group].layers.values())
        return total // (pages * PAGE_SLOTS)

    def open(self, sequence: str) -> None:
        """Begin an empty sequence."""
        assert sequence not in self.lengths
        self.lengths[sequence] = 0
        for group in self.groups.values():
            group.tables[sequence] = _Table()

    def close(self, sequence: str) -> None:
        """Forget a sequence and free its pages."""
        del self.lengths[sequence]
        for group in self.groups.values():
            group.pool.release(group.tables.pop(sequence).pages)

    def reserve(self, sequence: str, n_rows: int) -> None:
        """Make room for the next n rows.

        Raises:
            CapacityError: no page is free; nothing has changed for other sequences.
        """
        n_pages = -(-(self.lengths[sequence] + n_rows) // PAGE_SLOTS)
        for group in self.groups.values():
            table = group.tables[sequence]
            missing = n_pages - table.first_page - len(table.pages)
            if missing > 0:
                new = group.pool.allocate(missing)
                for store in group.layers.values():
                    clear_pages(store, new)
                table.pages += new

    def advance(self, sequence: str, n_rows: int) -> None:
        """n rows were written behind the length."""
        self.lengths[sequence] += n_rows

    def rollback(self, sequence: str, n_rows: int) -> None:
        """Forget the last n rows. They are not erased: the next rows overwrite them."""
        assert 0 <= n_rows <= self.lengths[sequence]
        self.lengths[sequence] -= n_rows

    def trim(self, sequence: str) -> None:
        """Free pages that no later row sees. The length must be final: rollback comes first."""
        for group in self.groups.values():
            if group.window is None:
                continue
            table = group.tables[sequence]
            oldest = max(0, self.lengths[sequence] - group.window)  # an assistant sees this one
            n_freed = oldest // PAGE_SLOTS - table.first_page
            if n_freed > 0:
                group.pool.release(table.pages[:n_freed])
                del table.pages[:n_freed]
                table.first_page += n_freed

    def add_slots(self, numbers: Numbers, group: str, spans: Sequence[Span]) -> None:
        """Where the next rows of these sequences go (`reserve` comes first): page, slot [T]."""
        pages, slots = [], []
        for span in spans:
            table = self.groups[group].tables[span.sequence]
            for position in self.positions(span):
                pages.append(table.pages[position // PAGE_SLOTS - table.first_page])
                slots.append(position % PAGE_SLOTS)
        numbers.add(pages)
        numbers.add(slots)

    def add_causal_rows(self, numbers: Numbers, group: str, spans: Sequence[Span]) -> None:
        """A row at position p sees keys `max(0, p - window + 1) .. p` of its own sequence."""
        window = self.groups[group].window
        lo, hi = [], []
        for span in spans:
            for p in self.positions(span):
                hi.append(p)
                lo.append(0 if window is None else max(0, p - window + 1))
        self.add_rows(numbers, group, spans, lo, hi)

    def add_rows(
        self, numbers: Numbers, group: str, spans: Sequence[Span], lo: list[int], hi: list[int]
    ) -> None:
        """The five tensors of `AttentionRows`; rows see key positions `lo[t] .. hi[t]`.

        Page tables are as wide as any sequence's can get, so that calls with as many rows and
        sequences have the same layout.
        """
        tables = [self.groups[group].tables[span.sequence] for span in spans]
        width = self.groups[group].max_pages
        padded = [page for t in tables for page in t.pages + [0] * (width - len(t.pages))]
        numbers.add(padded, len(spans), width)
        numbers.add([table.first_page for table in tables])
        numbers.add([b for b, span in enumerate(spans) for _ in range(span.n_rows)])
        numbers.add(lo)
        numbers.add(hi)

    def positions(self, span: Span) -> range:
        """Where the next rows of a sequence stand."""
        length = self.lengths[span.sequence]
        return range(length, length + span.n_rows)
