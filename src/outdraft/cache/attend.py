"""Attention of one call of a model over paged memory: what is handed to models as `Attend`.

Here: the target's own rows, written and then read causally, and a drafter's queries, which only
read. Where rows go and what they see are tensors, so that a recorded call can be replayed with
other contents. Not here: who is in the call (engine/).

Shapes: T rows, H query heads, D head dimension, B sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.cache.memory import Memory, Span
from outdraft.cache.numbers import Numbers
from outdraft.ops.base import AttentionRows, Heads, KvPages, Ops, PageSlots


@dataclass(frozen=True, slots=True)
class CausalAttend:
    """Writes rows into memory and lets them attend, causally and inside the window."""

    memory: Memory
    ops: Ops
    slots: Mapping[str, PageSlots]
    rows: Mapping[str, AttentionRows]

    def __call__(self, layer: int, q_THD: Tensor, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`. Rows beyond the spans (padding) are not stored and get zeros."""
        spec = self.memory.layers[layer]
        store = self.memory.groups[spec.group].layers[spec.source]
        slots, rows = self.slots[spec.group], self.rows[spec.group]
        n_rows = slots.page_T.shape[0]
        if k is not None and v is not None:
            write_rows(self.ops, k, store.k_PGSD, store.k_scales_PGS, slots)
            write_rows(self.ops, v, store.v_PGSD, store.v_scales_PGS, slots)
        return pad_back(self.ops.attention(q_THD[:n_rows], store, rows, 1.0), q_THD.shape[0])


@dataclass(frozen=True, slots=True)
class CausalCall:
    """What changes from one call of a model to the next with as many rows and sequences.

    All other tensors, those of `attend` included, are views of `numbers`: to prepare a recorded
    call is to copy one tensor.
    """

    numbers: Tensor
    token_T: Tensor
    position_T: Tensor
    attend: CausalAttend

    @classmethod
    def prepare(
        cls, memory: Memory, ops: Ops, spans: Sequence[Span], tokens: list[int]
    ) -> "CausalCall":
        """The next rows of these sequences, with their tokens; `memory.reserve` comes first."""
        numbers = Numbers()
        numbers.add(tokens)
        numbers.add([p for span in spans for p in memory.positions(span)])
        for group in memory.groups:
            memory.add_slots(numbers, group, spans)
            memory.add_causal_rows(numbers, group, spans)
        flat, (token_T, position_T, *parts) = numbers.build(memory.device)
        slots, rows = {}, {}
        for i, group in enumerate(memory.groups):
            own = parts[7 * i : 7 * i + 7]
            slots[group], rows[group] = PageSlots(own[0], own[1]), AttentionRows.of(own[2:])
        return cls(flat, token_T, position_T, CausalAttend(memory, ops, slots, rows))


@dataclass(frozen=True, slots=True)
class ReadOnlyAttend:
    """Attends to another model's keys and values; layer i reads `stores[i]` with `rows[i]`."""

    ops: Ops
    stores: Sequence[KvPages]
    rows: Sequence[AttentionRows]

    def __call__(self, layer: int, q_THD: Tensor, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`. Rows beyond those that see anything (padding) get zeros."""
        assert k is None and v is None
        rows = self.rows[layer]
        out = self.ops.attention(q_THD[: rows.lo_T.shape[0]], self.stores[layer], rows, 1.0)
        return pad_back(out, q_THD.shape[0])


def write_rows(
    ops: Ops, heads: Heads, pages: Tensor, scales: Tensor | None, slots: PageSlots
) -> None:
    """Store keys or values of as many rows as have a slot."""
    ops.write_heads(
        heads.raw_TGD[: slots.page_T.shape[0]],
        pages,
        scales,
        slots,
        heads.norm_D,
        heads.rotary,
        eps=heads.eps,
    )


def pad_back(x_THD: Tensor, n_rows: int) -> Tensor:
    """x with rows of zeros behind it."""
    missing = n_rows - x_THD.shape[0]
    return x_THD if missing == 0 else torch.cat((x_THD, x_THD.new_zeros(missing, *x_THD.shape[1:])))
