"""The memory of one model for many sequences: keys, values and recurrent states of its layers.

A sequence's rows are written at its positions, then counted by `advance` and taken back by
`rollback`; what lies above the length is never seen and is overwritten. Layers of one kind share a
page table. Pages behind the window of sliding layers are freed. Not here: who runs when (engine/).

Not here either: attention over it (attend.py). Shapes: T rows, B sequences, P pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outdraft.cache.books import GroupBooks, PageBooks
from outdraft.cache.kv import clear_pages, empty_pages, n_bytes
from outdraft.cache.pages import PagePool
from outdraft.cache.recurrent import RecurrentLayer, RecurrentMemory
from outdraft.cache.states import StateBooks
from outdraft.cache.tables import PageTables
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


LayerMemory = KVLayer | RecurrentLayer


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start .. start + n_rows - 1` of a call belong to one sequence, in position order."""

    sequence: str
    start: int
    n_rows: int


class _Group:
    """Layers that share page tables, with their keys and values."""

    def __init__(self, books: GroupBooks) -> None:
        self.window = books.window
        self.max_pages = books.max_pages
        self.pool = books.pool
        self.tables = books.tables
        self.layers: dict[int, KvPages] = {}


class Memory:
    """Paged keys and values of all layers, shared by sequences."""

    def __init__(
        self,
        layers: Sequence[LayerMemory],
        *,
        max_sequences: int,
        max_tokens: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        pool_tokens: int | None = None,
        prefix_cache: bool = False,
        n_draft_max: int = 0,
        kept_states: int | None = None,
    ) -> None:
        """Allocate all pages at once.

        Args:
            layers: one entry a model layer.
            max_tokens: longest sequence, rows of a step included.
            max_rows: most rows one sequence brings in one step.
            dtype: of keys and values.
            device: where they are; None is the CPU.
            pool_tokens: positions of full attention that all sequences share; at least one
                sequence always fits. None plans for the worst case of all sequences at once.
            prefix_cache: keep verified pages for later sequences that begin alike, and states of
                recurrent layers behind some of them.
            n_draft_max: most rows of a step that `rollback` takes back.
            kept_states: most states of the prefix cache; None for what `plan_states` says.
        """
        self.layers = kv_layers(layers)
        self.device = device or torch.device("cpu")
        pages = plan_pages(
            layers, max_sequences, max_tokens, max_rows, pool_tokens, prefix_cache=prefix_cache
        )
        windows = {layer.group: layer.window for layer in self.layers.values()}
        books = {
            group: GroupBooks(windows[group], n_pages, PagePool(n_pool))
            for group, (n_pages, n_pool) in pages.items()
        }
        self.recurrent: RecurrentMemory | None = None
        if recurrent := {i: x for i, x in enumerate(layers) if isinstance(x, RecurrentLayer)}:
            n_kept = plan_states(layers, pages, dtype, kept_states) if prefix_cache else 0
            states = StateBooks(max_sequences=max_sequences, n_ring=n_draft_max + 2, n_kept=n_kept)
            self.recurrent = RecurrentMemory(recurrent, states, device)
        self.books = PageBooks(
            books,
            PAGE_SLOTS,
            prefix_cache=prefix_cache and bool(books),
            states=None if self.recurrent is None else self.recurrent.books,
        )
        self.tables = PageTables(self.books, max_sequences)
        self.lengths = self.books.lengths
        self.groups = {name: _Group(group) for name, group in books.items()}
        for index, layer in self.layers.items():
            group = self.groups[layer.group]
            if layer.source == index:
                group.layers[index] = empty_pages(
                    group.pool.n_pages, layer.n_kv_heads, layer.head_dim, dtype, device
                )

    @property
    def n_bytes(self) -> int:
        """Bytes of all pages and states."""
        stores = [store for group in self.groups.values() for store in group.layers.values()]
        states = 0 if self.recurrent is None else self.recurrent.n_bytes
        return states + sum(n_bytes(store) for store in stores)

    def bytes_per_token(self, group: str) -> int:
        """Bytes that one more position costs in the layers of a group."""
        pages = self.groups[group].pool.n_pages
        total = sum(n_bytes(store) for store in self.groups[group].layers.values())
        return total // (pages * PAGE_SLOTS)

    def open(self, sequence: str, tokens: Sequence[int] = (), salt: str = "", most: int = 0) -> int:
        """A sequence begins; how many of its first `most` tokens are in memory already."""
        return self.books.open(sequence, tokens, salt, most)

    def close(self, sequence: str) -> None:
        """A sequence is forgotten."""
        self.books.close(sequence)

    def reserve(self, sequence: str, n_rows: int) -> None:
        """Make room for n rows behind the length. New pages are zeros.

        Raises:
            CapacityError: there are too few pages; nothing is changed.
        """
        for name, pages in self.books.reserve(sequence, n_rows).items():
            if pages:
                for store in self.groups[name].layers.values():
                    clear_pages(store, pages)

    def advance(self, sequence: str, n_rows: int) -> None:
        """n rows were written behind the length."""
        self.books.advance(sequence, n_rows)

    def rollback(self, sequence: str, n_rows: int) -> None:
        """Forget the last n rows. They are not erased: the next rows overwrite them."""
        self.books.rollback(sequence, n_rows)

    def share(self, sequence: str, tokens: Sequence[int]) -> None:
        """Let later sequences use pages whose rows are all verified. Between rollback and trim."""
        self.books.share(sequence, tokens)

    def trim(self, sequence: str) -> None:
        """Free pages that no later row sees. The length must be final: rollback comes first."""
        self.books.trim(sequence)

    def positions(self, span: Span) -> range:
        """Where the next rows of a sequence stand."""
        length = self.lengths[span.sequence]
        return range(length, length + span.n_rows)


def kv_layers(layers: Sequence[LayerMemory]) -> dict[int, KVLayer]:
    """Those that keep keys and values, by index."""
    return {i: layer for i, layer in enumerate(layers) if isinstance(layer, KVLayer)}


def plan_pages(
    layers: Sequence[LayerMemory],
    max_sequences: int,
    max_tokens: int,
    max_rows: int,
    pool_tokens: int | None,
    *,
    prefix_cache: bool,
) -> dict[str, tuple[int, int]]:
    """By group: most pages of one sequence, and pages in all. Arguments as `Memory`'s."""
    n_full = -(-max_tokens // PAGE_SLOTS) + 1
    n_shared = n_full * max_sequences
    if pool_tokens is not None:
        n_shared = max(n_full, -(-pool_tokens // PAGE_SLOTS))
    found: dict[str, tuple[int, int]] = {}
    for layer in kv_layers(layers).values():
        if layer.group in found:
            continue
        n_pages, n_pool = n_full, n_shared
        if layer.window is not None:
            reach = min(max_tokens, layer.window + max_rows + PAGE_SLOTS)
            n_pages = -(-reach // PAGE_SLOTS) + 1
            n_cached = n_shared // 4 if prefix_cache else 0
            n_pool = max(n_pages, min(n_shared, n_pages * max_sequences + n_cached))
        found[layer.group] = n_pages, n_pool
    return found


def memory_bytes(
    layers: Sequence[LayerMemory],
    *,
    max_sequences: int,
    max_tokens: int,
    max_rows: int,
    dtype: torch.dtype,
    pool_tokens: int | None = None,
    prefix_cache: bool = False,
    n_draft_max: int = 0,
    kept_states: int | None = None,
) -> int:
    """`Memory.n_bytes` of a memory that does not exist yet. Arguments as `Memory`'s."""
    pages = plan_pages(
        layers, max_sequences, max_tokens, max_rows, pool_tokens, prefix_cache=prefix_cache
    )
    n_states = max_sequences * (n_draft_max + 2)
    n_states += plan_states(layers, pages, dtype, kept_states) if prefix_cache else 0
    return n_states * state_bytes(layers) + kv_bytes(layers, pages, dtype)


def state_bytes(layers: Sequence[LayerMemory]) -> int:
    """Of one state of all recurrent layers."""
    return sum(layer.n_bytes for layer in layers if isinstance(layer, RecurrentLayer))


def kv_bytes(
    layers: Sequence[LayerMemory], pages: dict[str, tuple[int, int]], dtype: torch.dtype
) -> int:
    """Of keys and values in so many pages, as `plan_pages` gives them."""
    total = 0
    for index, layer in kv_layers(layers).items():
        if layer.source == index:
            n_rows = pages[layer.group][1] * layer.n_kv_heads * PAGE_SLOTS
            scale_bytes = 4 if dtype == torch.int8 else 0
            total += 2 * n_rows * (layer.head_dim * dtype.itemsize + scale_bytes)
    return total


LEAST_STATES = 4


def plan_states(
    layers: Sequence[LayerMemory],
    pages: dict[str, tuple[int, int]],
    dtype: torch.dtype,
    asked: int | None = None,
) -> int:
    """States that the prefix cache keeps at most: as asked, or what keys and values take in bytes.

    At least four, and no more than there are pages.
    """
    one = state_bytes(layers)
    if one == 0 or not pages:
        return 0
    if asked is not None:
        return asked
    n_pages = max(n_pool for _, n_pool in pages.values())
    return min(n_pages, max(LEAST_STATES, kv_bytes(layers, pages, dtype) // one))
