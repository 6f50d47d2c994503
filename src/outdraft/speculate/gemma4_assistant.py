"""Drafting with a Gemma 4 assistant: one round of the protocol.

All queries of a round stand at position n - 1 and see the target's keys 0 .. n - 2 (in sliding
layers the last `window` of them); what earlier drafts said travels in the token's embedding and the
carried hidden state. The assistant has no state of its own, so `commit` has nothing to do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from outdraft.cache.attend import ReadOnlyAttend
from outdraft.cache.memory import Memory, Span
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.ops.base import AttentionRows
from outdraft.ops.reference import pad_rows
from outdraft.speculate.chain import draft_chain
from outdraft.speculate.drafter import Draft, SequenceView, Taps, TargetView


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
        self.needs = Taps(final_hidden=True, kv_groups=tuple(kv_layers))

    def open(self, sequence: str) -> None:
        """Nothing to keep."""

    def close(self, sequence: str) -> None:
        """Nothing was kept."""

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        """Nothing to keep."""

    def propose(self, view: TargetView, k: int) -> Draft:
        """See `Drafter.propose`."""
        sequences = view.sequences
        attend = self._attend(view.memory, sequences)
        ops = self.model.ops
        # T: one row a sequence, padded once here so that no operation has to.
        positions = torch.tensor([s.n - 1 for s in sequences], dtype=torch.int32)
        position_T = pad_rows(positions, ops.row_multiple)
        hidden_TH = pad_rows(torch.stack([_hidden(s) for s in sequences]), ops.row_multiple)
        normed_Th: Tensor | None = None

        def step(newest_B: Tensor) -> Tensor:
            nonlocal normed_Th
            carried_TH = hidden_TH if normed_Th is None else self.model.carry(normed_Th)
            embedded_TH = view.embed(pad_rows(newest_B.int(), ops.row_multiple))
            normed_Th = self.model.step(embedded_TH, carried_TH, position_T, attend)
            return self.model.logits(normed_Th)[: len(sequences)]

        return draft_chain(sequences, k, step, sample_drafts=self.sample_drafts)

    def _attend(self, memory: Memory, sequences: Sequence[SequenceView]) -> ReadOnlyAttend:
        """One query a sequence, over the keys that the target has verified."""
        kinds = self.model.config.text.layer_types
        rows = {kind: visible_rows(memory, kind, sequences) for kind in dict.fromkeys(kinds)}
        stores = [memory.groups[kind].layers[self.kv_layers[kind]] for kind in kinds]
        return ReadOnlyAttend(self.model.ops, stores, [rows[kind] for kind in kinds])


def visible_rows(
    memory: Memory, group: str, sequences: Sequence[SequenceView]
) -> AttentionRows:
    """Keys 0 .. n - 2 of each sequence; in a sliding group the last `window` of them."""
    window = memory.groups[group].window
    spans = [Span(sequence.id, b, 1) for b, sequence in enumerate(sequences)]
    hi = [sequence.n - 2 for sequence in sequences]
    lo = [0 if window is None else max(0, newest - window + 1) for newest in hi]
    return memory.rows(group, spans, lo, hi)


def _hidden(sequence: SequenceView) -> Tensor:
    assert sequence.hidden_H is not None, "the engine fills the taps that a drafter declares"
    return sequence.hidden_H
