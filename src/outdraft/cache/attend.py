"""Attention of one call of a model over paged memory: what is handed to models as `Attend`.

Here: the target's own rows, written and then read causally, and a drafter's queries, which only
read. Where rows go and what they see are tensors, so that a recorded call can be replayed with
other contents. Not here: who is in the call (engine/).

Shapes: T rows, H query heads, D head dimension, B sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outdraft.cache.memory import Memory, Span
from outdraft.cache.tables import Ints
from outdraft.ops.base import PAGE_SLOTS, AttentionRows, Fuses, Heads, KvPages, Ops, PageSlots
from outdraft.ops.recurrent_base import DeltaNet, StateRows, StateSpace


@dataclass(frozen=True, slots=True)
class CausalAttend:
    """Writes rows into memory and lets them attend, causally and inside the window."""

    memory: Memory
    ops: Ops
    slots: Mapping[str, PageSlots]
    rows: Mapping[str, AttentionRows]
    states: StateRows | None = None

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`. Rows beyond the spans (padding) are not stored and get zeros."""
        spec = self.memory.layers[layer]
        store = self.memory.groups[spec.group].layers[spec.source]
        slots, rows = self.slots[spec.group], self.rows[spec.group]
        n_rows = slots.page_T.shape[0]
        if k is not None and v is not None and isinstance(self.ops, Fuses):
            q_THD = self.ops.turn_and_write(q, k, v, store, slots)
            return self.ops.attention(q_THD, store, rows, 1.0)
        q_THD = q.value(self.ops)
        if k is not None and v is not None:
            write_rows(self.ops, k, store.k_PGSD, store.k_scales_PGS, slots)
            write_rows(self.ops, v, store.v_PGSD, store.v_scales_PGS, slots)
        return pad_back(self.ops.attention(q_THD[:n_rows], store, rows, 1.0), q_THD.shape[0])

    def recur(self, layer: int, x_TC: Tensor, a_TH: Tensor, b_TH: Tensor, net: DeltaNet) -> Tensor:
        """See `Attend`. Rows beyond the spans (padding) are zeros."""
        assert self.states is not None and self.memory.recurrent is not None
        store, n = self.memory.recurrent.layers[layer], self.states.sequence_T.shape[0]
        qkv_TC = self.ops.short_conv(x_TC[:n], net.conv_WC, store.inputs_SWC, self.states)
        out_THV = self.ops.delta_rule(
            qkv_TC, a_TH[:n], b_TH[:n], net.gates, store.state_SHKV, self.states, net.n_k_heads
        )
        return pad_back(out_THV, x_TC.shape[0])

    def scan(self, layer: int, x_TC: Tensor, dt_TH: Tensor, space: StateSpace) -> Tensor:
        """See `Attend`. Rows beyond the spans (padding) are zeros."""
        assert self.states is not None and self.memory.recurrent is not None
        store, n = self.memory.recurrent.layers[layer], self.states.sequence_T.shape[0]
        x_nC = self.ops.short_conv(
            x_TC[:n], space.conv_WC, store.inputs_SWC, self.states, space.conv_bias_C
        )
        out_THP = self.ops.scan(x_nC, dt_TH[:n], space, store.state_SHKV, self.states)
        return pad_back(out_THP, x_TC.shape[0])


@dataclass(frozen=True, slots=True)
class CausalCall:
    """What changes from one call of a model to the next with as many rows.

    All other tensors, those of `attend` included, are views of `numbers`: to prepare a recorded
    call is to copy one tensor.
    """

    numbers: Tensor
    token_T: Tensor
    position_T: Tensor
    attend: CausalAttend

    @classmethod
    def of(cls, memory: Memory, ops: Ops, numbers: Tensor) -> "CausalCall":
        """Over what `causal_numbers` made, on the memory's device."""
        numbers = numbers.to(memory.device)
        n_own = 4 if memory.recurrent is None else 6
        own, tables = memory.tables.views(numbers, n_own + 2 * len(memory.groups))
        token_T, position_T, sequence_T, slot_T = own[:4]
        parts = own[n_own:]
        states = None if n_own == 4 else StateRows(sequence_T, own[4], own[5])
        slots, rows = {}, {}
        for i, group in enumerate(memory.groups):
            page_T, lo_T = parts[2 * i : 2 * i + 2]
            slots[group] = PageSlots(page_T, slot_T)
            rows[group] = AttentionRows.of([*tables[group], sequence_T, lo_T, position_T])
        attend = CausalAttend(memory, ops, slots, rows, states)
        return cls(numbers, token_T, position_T, attend)

    def fill(self, numbers: Tensor, n_rows: int) -> bool:
        """Take the numbers of a call with as many rows as this one or fewer, as the first rows.

        Returns:
            Whether that was possible: tables are as large as they were here.
        """
        room = self.token_T.shape[0]
        n_parts = 4 if self.attend.states is None else 6
        n_parts += 2 * len(self.attend.memory.groups)
        own, given = n_parts * room, n_parts * n_rows
        if n_rows > room or self.numbers.shape[0] - own != numbers.shape[0] - given:
            return False
        self.numbers[:own].view(n_parts, room)[:, :n_rows] = numbers[:given].view(n_parts, n_rows)
        self.numbers[own:] = numbers[given:]
        return True

    @classmethod
    def wide(
        cls, memory: Memory, ops: Ops, numbers: Tensor, n_rows: int, room: int
    ) -> "CausalCall":
        """As `of` for `room` rows, of which the first `n_rows` are filled."""
        n_parts = (4 if memory.recurrent is None else 6) + 2 * len(memory.groups)
        call = cls.of(memory, ops, numbers.new_zeros(numbers.shape[0] + n_parts * (room - n_rows)))
        filled = call.fill(numbers, n_rows)
        assert filled
        return call

    @classmethod
    def prepare(
        cls, memory: Memory, ops: Ops, spans: Sequence[Span], tokens: list[int]
    ) -> "CausalCall":
        """The next rows of these sequences, with their tokens; `memory.reserve` comes first."""
        return cls.of(memory, ops, causal_numbers(memory, spans, tokens))


def causal_numbers(
    memory: Memory,
    spans: Sequence[Span],
    tokens: Sequence[int],
    first: Mapping[str, int] | None = None,
) -> Tensor:
    """All numbers of a call, int32, of which `CausalCall` is made; `memory.reserve` comes first.

    A row at position p sees keys `max(0, p - window + 1) .. p` of its own sequence, from `first`
    of the sequence on where that is given.
    """
    own = memory.tables.slots([span.sequence for span in spans])
    n_own = 4 if memory.recurrent is None else 6
    rows = np.empty((n_own + 2 * len(memory.groups), len(tokens)), np.int32)
    token_T, position_T, sequence_T, slot_T = rows[:4]
    if memory.recurrent is not None:
        at = 0
        for span in spans:
            length, end = memory.lengths[span.sequence], at + span.n_rows
            rows[4:6, at:end] = memory.recurrent.numbers(span.sequence, length, span.n_rows)
            at = end
    token_T[:] = tokens
    position_T[:] = [p for span in spans for p in memory.positions(span)]
    sequence_T[:] = [s for s, span in zip(own, spans, strict=True) for _ in range(span.n_rows)]
    np.remainder(position_T, PAGE_SLOTS, out=slot_T)
    page_T = position_T // PAGE_SLOTS
    for i, (name, group) in enumerate(memory.groups.items()):
        rows[n_own + 2 * i] = memory.tables.pages(name, sequence_T, page_T)
        lo_T = rows[n_own + 1 + 2 * i]
        lo_T[:] = first_visible(position_T, group.window)
        for span in spans if first else ():
            assert first is not None
            own_T = lo_T[span.start : span.start + span.n_rows]
            np.maximum(own_T, first.get(span.sequence, 0), out=own_T)
    return memory.tables.behind(rows)


def further_numbers(memory: Memory, numbers: Tensor, n_rows: int) -> Tensor | None:
    """`causal_numbers` of the next row of each sequence of a call that has one row of each.

    The tokens are those of that call. None where a row begins a page, and with recurrent layers.
    """
    if memory.recurrent is not None:
        return None
    further = numbers.clone()
    rows = further[: (4 + 2 * len(memory.groups)) * n_rows].numpy().reshape(-1, n_rows)
    position_T, slot_T = rows[1], rows[3]
    position_T += 1
    slot_T += 1
    if (slot_T == PAGE_SLOTS).any():
        return None
    for i, group in enumerate(memory.groups.values()):
        rows[5 + 2 * i] = first_visible(position_T, group.window)
    return further


def first_visible(newest_T: Ints, window: int | None) -> Ints | int:
    """The first key that a row sees whose last is `newest_T`."""
    return 0 if window is None else np.maximum(newest_T - (window - 1), 0)


@dataclass(frozen=True, slots=True)
class ReadOnlyAttend:
    """Attends to another model's keys and values; layer i reads `stores[i]` with `rows[i]`."""

    ops: Ops
    stores: Sequence[KvPages]
    rows: Sequence[AttentionRows]

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`. Rows beyond those that see anything (padding) get zeros."""
        assert k is None and v is None
        rows, q_THD = self.rows[layer], q.value(self.ops)
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
