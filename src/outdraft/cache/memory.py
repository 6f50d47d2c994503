"""The memory of one model for many sequences: keys and values of all its layers.

A sequence's rows are written at its positions, then counted by `advance` and taken back by
`rollback`; what lies above the length is never seen and is overwritten. Layers of one kind share a
page table. Pages behind the window of sliding layers are freed. Not here: who runs when (engine/).

Shapes: T rows, H query heads, G key/value heads, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outdraft.cache.kv import LayerPages
from outdraft.cache.pages import PagePool
from outdraft.ops.base import PAGE_SLOTS, Ops, PagedRows


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

    def __init__(self, window: int | None, n_pages: int) -> None:
        self.window = window
        self.pool = PagePool(n_pages)
        self.layers: dict[int, LayerPages] = {}
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
                n_pages = max_sequences * (-(-reach // PAGE_SLOTS) + 1)
                self.groups[layer.group] = _Group(layer.window, n_pages)
            group = self.groups[layer.group]
            if layer.source == index:
                group.layers[index] = LayerPages.empty(
                    group.pool.n_pages, layer.n_kv_heads, layer.head_dim, dtype
                )

    @property
    def n_bytes(self) -> int:
        """Bytes of all pages."""
        stores = [store for group in self.groups.values() for store in group.layers.values()]
        return sum(2 * store.k_PGSD.numel() * store.k_PGSD.element_size() for store in stores)

    def bytes_per_token(self, group: str) -> int:
        """Bytes that one more position costs in the layers of a group."""
        return sum(
            2 * store.k_PGSD[0, :, 0].numel() * store.k_PGSD.element_size()
            for store in self.groups[group].layers.values()
        )

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
                    store.clear(new)
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

    def visible(self, group: str, sequence: str, lo: list[int], hi: list[int]) -> PagedRows:
        """Rows that see key positions `lo[t] .. hi[t]`, with the pages that hold them."""
        table = self.groups[group].tables[sequence]
        first = min(lo) // PAGE_SLOTS
        last = max(hi) // PAGE_SLOTS
        pages = table.pages[first - table.first_page : last + 1 - table.first_page]
        return PagedRows(pages, first, lo, hi)

    def bind(self, spans: Sequence[Span], ops: Ops) -> "BoundMemory":
        """Attention for one call of the model over these rows; `reserve` comes first."""
        return BoundMemory(self, spans, ops)


class BoundMemory:
    """Writes the rows of one call into the memory and lets them attend, causally (an `Attend`).

    A row at position p sees keys `max(0, p - window + 1) .. p` of its own sequence.
    """

    def __init__(self, memory: Memory, spans: Sequence[Span], ops: Ops) -> None:
        self.memory = memory
        self.ops = ops
        self.spans = spans
        self.n_rows = sum(span.n_rows for span in spans)
        self.writes = {name: self._write_index(name) for name in memory.groups}
        self.reads = {name: self._read_rows(name) for name in memory.groups}

    def __call__(
        self, layer: int, q_THD: Tensor, k_TGD: Tensor | None, v_TGD: Tensor | None, /
    ) -> Tensor:
        """See `Attend`. Rows beyond the spans (padding) are not stored and get zeros."""
        spec = self.memory.layers[layer]
        store = self.memory.groups[spec.group].layers[spec.source]
        if k_TGD is not None and v_TGD is not None:
            pages_T, slots_T = self.writes[spec.group]
            store.write(pages_T, slots_T, k_TGD[: self.n_rows], v_TGD[: self.n_rows])
        parts = [
            self.ops.attention(
                q_THD[span.start : span.start + span.n_rows], store.k_PGSD, store.v_PGSD, rows, 1.0
            )
            for span, rows in zip(self.spans, self.reads[spec.group], strict=True)
        ]
        padding = q_THD.shape[0] - self.n_rows
        if padding:
            parts.append(q_THD.new_zeros(padding, *q_THD.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _positions(self, span: Span) -> range:
        length = self.memory.lengths[span.sequence]
        return range(length, length + span.n_rows)

    def _write_index(self, group: str) -> tuple[Tensor, Tensor]:
        pages, slots = [], []
        for span in self.spans:
            table = self.memory.groups[group].tables[span.sequence]
            for position in self._positions(span):
                pages.append(table.pages[position // PAGE_SLOTS - table.first_page])
                slots.append(position % PAGE_SLOTS)
        return torch.tensor(pages), torch.tensor(slots)

    def _read_rows(self, group: str) -> list[PagedRows]:
        window = self.memory.groups[group].window
        rows = []
        for span in self.spans:
            hi = list(self._positions(span))
            lo = [0 if window is None else max(0, p - window + 1) for p in hi]
            rows.append(self.memory.visible(group, span.sequence, lo, hi))
        return rows
