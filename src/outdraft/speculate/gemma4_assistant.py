"""Drafting with a Gemma 4 assistant: one round of the protocol.

All queries of a round stand at position n - 1 and see the target's keys 0 .. n - 2 (in sliding
layers the last `window` of them); what earlier drafts said travels in the token's embedding and the
carried hidden state. The assistant has no state of its own, so `commit` has nothing to do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from outdraft.cache.memory import Memory
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.ops.base import Ops, PagedRows
from outdraft.ops.reference import TILE_ROWS, pad_rows
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
        kv = TargetKeys(view.memory, sequences, self._layers(), self.model.ops)
        # T: one row a sequence, padded once here so that no operation has to.
        positions_T = pad_rows(torch.tensor([s.n - 1 for s in sequences]), TILE_ROWS)
        hidden_TH = pad_rows(torch.stack([_hidden(s) for s in sequences]), TILE_ROWS)
        normed_Th: Tensor | None = None

        def step(newest_B: Tensor) -> Tensor:
            nonlocal normed_Th
            carried_TH = hidden_TH if normed_Th is None else self.model.carry(normed_Th)
            embedded_TH = view.embed(pad_rows(newest_B, TILE_ROWS))
            normed_Th = self.model.step(embedded_TH, carried_TH, positions_T, kv)
            return self.model.logits(normed_Th, len(sequences))

        return draft_chain(sequences, k, step, sample_drafts=self.sample_drafts)

    def _layers(self) -> list[tuple[str, int]]:
        """For each of the assistant's layers, the group and layer of the target it reads."""
        return [(kind, self.kv_layers[kind]) for kind in self.model.config.text.layer_types]


class TargetKeys:
    """Attention of a round: one query a sequence over the target's keys (an `Attend`)."""

    def __init__(
        self,
        memory: Memory,
        sequences: Sequence[SequenceView],
        layers: list[tuple[str, int]],
        ops: Ops,
    ) -> None:
        self.ops = ops
        self.layers = [memory.groups[group].layers[layer] for group, layer in layers]
        ranges = {group: _visible(memory, group, sequences) for group, _ in layers}
        self.rows = [ranges[group] for group, _ in layers]

    def __call__(
        self, layer: int, q_THD: Tensor, k_TGD: Tensor | None, v_TGD: Tensor | None, /
    ) -> Tensor:
        """See `Attend`; row b belongs to sequence b, rows beyond them (padding) get zeros."""
        assert k_TGD is None and v_TGD is None
        store = self.layers[layer]
        parts = [
            self.ops.attention(q_THD[b : b + 1], store.k_PGSD, store.v_PGSD, rows, 1.0)
            for b, rows in enumerate(self.rows[layer])
        ]
        return pad_rows(torch.cat(parts), q_THD.shape[0])


def _visible(memory: Memory, group: str, sequences: Sequence[SequenceView]) -> list[PagedRows]:
    window = memory.groups[group].window
    rows = []
    for sequence in sequences:
        newest = sequence.n - 2
        oldest = 0 if window is None else max(0, newest - window + 1)
        rows.append(memory.visible(group, sequence.id, [oldest], [newest]))
    return rows


def _hidden(sequence: SequenceView) -> Tensor:
    assert sequence.hidden_H is not None, "the engine fills the taps that a drafter declares"
    return sequence.hidden_H
