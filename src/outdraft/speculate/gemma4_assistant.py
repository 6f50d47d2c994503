"""Drafting with a Gemma 4 assistant: one round of the protocol.

All queries of a round stand at position n - 1 and see the target's keys 0 .. n - 2 (in sliding
layers the last `window` of them); what earlier drafts said travels in the token's embedding and the
carried hidden state. The assistant has no state of its own, so `commit` has nothing to do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.cache.attend import ReadOnlyAttend
from outdraft.cache.memory import Memory, Span
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.ops.base import AttentionRows
from outdraft.ops.cpu import CpuOps
from outdraft.ops.record import Recordable, Replayable, fill_rows, recording
from outdraft.ops.reference import pad_rows
from outdraft.speculate.chain import draft_chain
from outdraft.speculate.drafter import Draft, SequenceView, Taps, TargetView

Step = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _Recording:
    """One recorded draft step for a number of sequences."""

    token_B: Tensor
    hidden_BH: Tensor
    position_B: Tensor
    attend: ReadOnlyAttend
    program: Replayable
    logits_BV: Tensor
    best_B: Tensor


class Gemma4AssistantDrafter:
    """Proposes with an assistant that reads the target's last keys and values (a `Drafter`)."""

    name = "gemma4-assistant"

    def __init__(
        self, model: Gemma4Assistant, kv_layers: dict[str, int], *, sample_drafts: bool = True
    ) -> None:
        """`kv_layers`: group of the target's memory -> the layer of it that is read."""
        self.model = model
        self.kv_layers = kv_layers
        self.sample_drafts = sample_drafts
        self.recordings: dict[int, _Recording] = {}
        self.needs = Taps(final_hidden=True, kv_groups=tuple(kv_layers))

    def open(self, sequence: str) -> None:
        """Nothing to keep."""

    def close(self, sequence: str) -> None:
        """Nothing was kept."""

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        """Nothing to keep."""

    def propose(self, view: TargetView, k: int) -> Draft:
        """See `Drafter.propose`."""
        hidden_BH = torch.stack([_hidden(s) for s in view.sequences])
        position_B = torch.tensor([s.n - 1 for s in view.sequences], dtype=torch.int32)
        attend = self._attend(view.memory, view.sequences)
        if isinstance(self.model.ops, Recordable) and self.model.ordering_CN is None:
            step = self._recorded_step(view, hidden_BH, position_B, attend)
        else:
            step = self._plain_step(view, hidden_BH, position_B, attend)
        return draft_chain(view.sequences, k, step, sample_drafts=self.sample_drafts)

    def _plain_step(
        self, view: TargetView, hidden_BH: Tensor, position_B: Tensor, attend: ReadOnlyAttend
    ) -> Step:
        ops, n = self.model.ops, position_B.shape[0]
        # T: one row a sequence, padded once here so that no operation has to.
        position_T = pad_rows(position_B, ops.row_multiple)
        carried_TH = pad_rows(hidden_BH, ops.row_multiple)

        def step(newest_B: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal carried_TH
            embedded_TH = view.embed(pad_rows(newest_B, ops.row_multiple))
            normed_Th = self.model.step(embedded_TH, carried_TH, position_T, attend)
            carried_TH = self.model.carry(normed_Th)
            logits_BV = self.model.logits(normed_Th)[:n]
            return logits_BV, ops.argmax(logits_BV)

        return step

    def _recorded_step(
        self, view: TargetView, hidden_BH: Tensor, position_B: Tensor, attend: ReadOnlyAttend
    ) -> Step:
        n = position_B.shape[0]
        if n not in self.recordings:
            self.recordings[n] = self._record(view, hidden_BH, position_B, attend)
        own = self.recordings[n]
        own.hidden_BH.copy_(hidden_BH)
        own.position_B.copy_(position_B)
        for static, new in zip(own.attend.rows, attend.rows, strict=True):
            fill_rows(static, new)

        def step(newest_B: Tensor) -> tuple[Tensor, Tensor]:
            own.token_B.copy_(newest_B)
            own.program.replay()
            return own.logits_BV, own.best_B

        return step

    def _record(
        self, view: TargetView, hidden_BH: Tensor, position_B: Tensor, attend: ReadOnlyAttend
    ) -> "_Recording":
        """One step for this number of sequences; it leaves the carried state in `hidden_BH`."""
        ops = self.model.ops
        assert isinstance(ops, CpuOps) and isinstance(view.ops, Recordable)
        token_B = torch.zeros(position_B.shape, dtype=torch.int32)
        hidden_BH, position_B = hidden_BH.clone(), position_B.clone()
        wide: dict[int, AttentionRows] = {}
        kinds = self.model.config.text.layer_types
        for kind, rows in zip(kinds, attend.rows, strict=True):
            wide.setdefault(id(rows), view.memory.widest(kind, rows))
        static = ReadOnlyAttend(ops, attend.stores, [wide[id(rows)] for rows in attend.rows])
        with recording(ops, view.ops) as program:
            normed_Bh = self.model.step(view.embed(token_B), hidden_BH, position_B, static)
            logits_BV = self.model.logits(normed_Bh)
            best_B = ops.argmax(logits_BV)
            ops.copy_rows(self.model.carry(normed_Bh), hidden_BH)
        return _Recording(token_B, hidden_BH, position_B, static, program, logits_BV, best_B)

    def _attend(self, memory: Memory, sequences: Sequence[SequenceView]) -> ReadOnlyAttend:
        """One query a sequence, over the keys that the target has verified."""
        kinds = self.model.config.text.layer_types
        rows = {kind: visible_rows(memory, kind, sequences) for kind in dict.fromkeys(kinds)}
        stores = [memory.groups[kind].layers[self.kv_layers[kind]] for kind in kinds]
        return ReadOnlyAttend(self.model.ops, stores, [rows[kind] for kind in kinds])


def visible_rows(memory: Memory, group: str, sequences: Sequence[SequenceView]) -> AttentionRows:
    """Keys 0 .. n - 2 of each sequence; in a sliding group the last `window` of them."""
    window = memory.groups[group].window
    spans = [Span(sequence.id, b, 1) for b, sequence in enumerate(sequences)]
    hi = [sequence.n - 2 for sequence in sequences]
    lo = [0 if window is None else max(0, newest - window + 1) for newest in hi]
    return memory.rows(group, spans, lo, hi)


def _hidden(sequence: SequenceView) -> Tensor:
    assert sequence.hidden_H is not None, "the engine fills the taps that a drafter declares"
    return sequence.hidden_H
