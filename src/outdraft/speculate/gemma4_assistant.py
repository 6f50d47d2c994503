"""Drafting with a Gemma 4 assistant: one round of the protocol.

All queries of a round stand at position n - 1 and see the target's keys 0 .. n - 2 (in sliding
layers the last `window` of them); what earlier drafts said travels in the token's embedding and the
carried hidden state. The assistant has no state of its own, so `commit` has nothing to do.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from outdraft.cache.attend import ReadOnlyAttend, first_visible
from outdraft.cache.memory import Memory
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.ops.base import AttentionRows, Fuses
from outdraft.ops.record import Recordable, Replayable, record
from outdraft.ops.reference import pad_rows
from outdraft.ops.staging import Staging
from outdraft.speculate.chain import draft_chain
from outdraft.speculate.drafter import Draft, Scored, SequenceView, Taps, TargetView, draws

Step = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

ONE_STEP = 0  # as a number of steps: one, that the caller repeats with tokens of its own choice
MAX_RECORDINGS = 128


@dataclass(frozen=True, slots=True)
class _Call:
    """What changes from round to round; all tensors are views of `numbers`."""

    numbers: Tensor
    token_B: Tensor
    position_B: Tensor
    attend: ReadOnlyAttend


@dataclass(frozen=True, slots=True)
class _Recording:
    """A recorded round, or one step of it, for a number of sequences.

    `best` has the argmax of every step and `sure` what softmax gives it; `both_KB` has the one and
    the bits of the other where PyTorch's operations are recorded too. `logits_BV` are the scores of
    `ONE_STEP`; rounds keep none.
    """

    call: _Call
    hidden_BH: Tensor
    program: Replayable
    logits_BV: Tensor | None
    best: list[Tensor]
    sure: list[Tensor]
    both_KB: Tensor | None


@dataclass(slots=True)
class _Flight:
    """A round that was launched behind the pass that verifies the drafts before it.

    `n` tokens are committed when it is what comes next; None: not known yet, or never.
    """

    sequence: str
    n_before: int
    k: int
    own: _Recording
    n: int | None = None


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
        self.recorder = model.ops if isinstance(model.ops, Recordable) else None
        self._chains = isinstance(model.ops, Fuses)
        self.recordings: OrderedDict[tuple[int, int, int], _Recording] = OrderedDict()
        self.needs = Taps(final_hidden=True, kv_groups=tuple(kv_layers))
        self.flight: _Flight | None = None
        self.n_flown = 0
        """Rounds that were launched before they were asked for, and used."""
        self._staging: Staging | None = None
        self._windows_G: Tensor | None = None

    def open(self, sequence: str) -> None:
        """Nothing to keep."""

    def close(self, sequence: str) -> None:
        """Nothing was kept but a round that is under way."""
        if self.flight is not None and self.flight.sequence == sequence:
            self.flight = None

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        """Of the round that is under way: from where it goes on."""
        flight = self.flight
        if flight is not None and view.sequences[0].id == flight.sequence:
            flight.n = flight.n_before + n_accepted[0] + 1

    def exchange(self, model: Gemma4Assistant) -> Gemma4Assistant:
        """Draft with another network of the same config from the next round on; the old one."""
        old, self.model = self.model, model
        self.recorder = model.ops if isinstance(model.ops, Recordable) else None
        self.recordings, self.flight = OrderedDict(), None
        return old

    def replay(
        self, view: TargetView, newest_A: Sequence[int], hidden_AH: Tensor, k: int
    ) -> Tensor:
        """What rounds of a finished sequence would have drafted, most probable tokens [A, k].

        Args:
            view: one sequence, with all its keys and values in memory.
            newest_A: in each round, the position of the token that was the newest then.
            hidden_AH: the target's states of the tokens before those.
        """
        (sequence,) = view.sequences
        at_A = np.asarray(newest_A, np.int32)
        token_A = np.asarray(sequence.tokens, np.int32)[at_A]
        slots = view.memory.tables.slots([sequence.id]) * len(at_A)
        call = self._call(view.memory, self._rows(view.memory, token_A, at_A, slots))
        multiple = self.model.ops.row_multiple
        position_T = pad_rows(call.position_B, multiple)
        carried_TH, newest_B = pad_rows(hidden_AH, multiple), call.token_B
        best: list[Tensor] = []
        for _ in range(k):
            embedded_TH = view.embed(pad_rows(newest_B, multiple))
            normed_Th = self.model.step(embedded_TH, carried_TH, position_T, call.attend)
            carried_TH = self.model.carry(normed_Th)
            newest_B = self.model.best(normed_Th)[0][: len(at_A)].clone()
            best.append(newest_B)
        return torch.stack(best, dim=1).long()

    def propose(self, view: TargetView, k: int) -> Draft:
        """See `Drafter.propose`."""
        numbers = self._numbers(view.memory, view.sequences)
        hidden_BH = torch.stack([_hidden(s) for s in view.sequences])
        drawn = self.sample_drafts and any(draws(s.params) for s in view.sequences)
        if self.recorder is not None and not drawn:
            return self._recorded_round(self.recorder, view, numbers, hidden_BH, k)
        if self.recorder is not None:
            step = self._recorded_step(self.recorder, view, numbers, hidden_BH)
        else:
            step = self._plain_step(view, self._call(view.memory, numbers), hidden_BH)
        return draft_chain(view.sequences, k, step, sample_drafts=self.sample_drafts)

    @property
    def leaves(self) -> bool:
        """See `LeavesTokens`."""
        return self._chains and self.recorder is not None and self.recorder.records_all

    def leave(self, view: TargetView, k: int) -> Draft:
        """See `LeavesTokens`."""
        flight, self.flight = self.flight, None
        (sequence,) = view.sequences
        if flight is not None and (flight.sequence, flight.n) == (sequence.id, sequence.n):
            self.n_flown += 1
            own, k = flight.own, min(k, flight.k)
        else:
            assert self.recorder is not None
            hidden_BH = _hidden(sequence)[None]
            numbers = self._numbers(view.memory, view.sequences)
            own = self._recording(self.recorder, view, numbers, hidden_BH, k)
            own.program.replay()
        assert own.both_KB is not None
        no_tokens_BK = torch.zeros(1, k, dtype=torch.int64)
        return Draft(no_tokens_BK, [None], [k], left_K=own.both_KB[:k, 0])

    def follow(self, view: TargetView, k: int, scored: Scored) -> None:
        """See `LeavesTokens`: the round as if no draft stayed, moved on by `accept`."""
        ops, (sequence,) = self.model.ops, view.sequences
        assert self.recorder is not None and isinstance(ops, Fuses)
        numbers = self._numbers(view.memory, view.sequences, n_more=1)
        own = self._recording(self.recorder, view, numbers, scored.hidden_TH[:1], k)
        if self._windows_G is None:
            windows = [view.memory.groups[kind].window or 0 for kind in self.kv_layers]
            self._windows_G = torch.tensor(windows, dtype=torch.int32, device=own.hidden_BH.device)
        ops.accept(scored.token_T, scored.best_T, scored.hidden_TH, self._windows_G,
                   own.call.numbers, own.hidden_BH)  # fmt: skip
        own.program.replay()
        self.flight = _Flight(sequence.id, sequence.n, k, own)

    def _plain_step(self, view: TargetView, call: "_Call", hidden_BH: Tensor) -> Step:
        ops, n = self.model.ops, len(view.sequences)
        # T: one row a sequence, padded once here so that no operation has to.
        position_T = pad_rows(call.position_B, ops.row_multiple)
        carried_TH = pad_rows(hidden_BH, ops.row_multiple)

        def step(newest_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal carried_TH
            embedded_TH = view.embed(pad_rows(newest_B, ops.row_multiple))
            normed_Th = self.model.step(embedded_TH, carried_TH, position_T, call.attend)
            carried_TH = self.model.carry(normed_Th)
            logits_BV = self.model.logits(normed_Th)[:n]
            return logits_BV, *ops.best(logits_BV)

        return step

    def _recorded_round(
        self, ops: Recordable, view: TargetView, numbers: Tensor, hidden_BH: Tensor, k: int
    ) -> Draft:
        """All k steps of most probable tokens in one replay."""
        own = self._recording(ops, view, numbers, hidden_BH, k)
        own.program.replay()
        n, self.flight = len(view.sequences), None  # a round of one fills the same tensors
        if own.both_KB is None:
            tokens_BK = torch.stack(own.best, dim=1).long().cpu()
            sure_BK = torch.stack(own.sure, dim=1).cpu()
        else:
            both_KB = own.both_KB.cpu()  # one copy, and one wait for it
            tokens_BK, sure_BK = both_KB[:k].T.long(), both_KB[k:].view(torch.float32).T
        return Draft(tokens_BK, [None] * n, [k] * n, confidence_BK=sure_BK)

    def _recorded_step(
        self, ops: Recordable, view: TargetView, numbers: Tensor, hidden_BH: Tensor
    ) -> Step:
        own = self._recording(ops, view, numbers, hidden_BH, ONE_STEP)

        def step(newest_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            own.call.token_B.copy_(newest_B)
            own.program.replay()
            assert own.logits_BV is not None
            return own.logits_BV, own.best[0], own.sure[0]

        return step

    def _recording(
        self, ops: Recordable, view: TargetView, numbers: Tensor, hidden_BH: Tensor, k: int
    ) -> "_Recording":
        """That of this many sequences and steps, holding what the round begins with."""
        key = (len(view.sequences), k, numbers.shape[0])
        own = self.recordings.get(key)
        if own is None:
            call = self._call(view.memory, numbers)
            own = self.recordings[key] = self._record(ops, view, call, hidden_BH.clone(), k)
            if len(self.recordings) > MAX_RECORDINGS:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        self._staging = self._staging or Staging(own.hidden_BH.device)
        self._staging.send(numbers, own.call.numbers)
        own.hidden_BH.copy_(hidden_BH)
        return own

    def _record(
        self, ops: Recordable, view: TargetView, call: "_Call", hidden_BH: Tensor, k: int
    ) -> "_Recording":
        """k steps, the argmax of each embedded by the next.

        With `ONE_STEP` the carried state is left in `hidden_BH`, where the next replay reads it.
        """
        assert isinstance(view.ops, Recordable)

        def steps() -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None]:
            token_B, carried_BH, logits_BV = call.token_B, hidden_BH, None
            best: list[Tensor] = []
            sure: list[Tensor] = []
            for i in range(max(k, 1)):
                embedded_BH = view.embed(token_B)
                normed_Bh = self.model.step(embedded_BH, carried_BH, call.position_B, call.attend)
                if k == ONE_STEP:
                    logits_BV = self.model.logits(normed_Bh)
                    token_B, sure_B = self.model.ops.best(logits_BV)
                else:
                    token_B, sure_B = self.model.best(normed_Bh)
                best.append(token_B)
                sure.append(sure_B)
                if i + 1 < k or k == ONE_STEP:
                    carried_BH = self.model.carry(normed_Bh)
            if k == ONE_STEP:
                ops.copy_rows(carried_BH, hidden_BH)
            both_KB = None
            if ops.records_all and k != ONE_STEP:
                both_KB = torch.stack([*best, *(sure_B.view(torch.int32) for sure_B in sure)])
            return logits_BV, best, sure, both_KB

        program, made = record(steps, ops, view.ops)
        return _Recording(call, hidden_BH, program, *made)

    def _numbers(
        self, memory: Memory, sequences: Sequence[SequenceView], n_more: int = 0
    ) -> Tensor:
        """One query a sequence, over the keys 0 .. n - 2, which the target has verified.

        In a sliding group it sees the last `window` of them. `n_more`: tokens that are to come.
        """
        token = [sequence.tokens[-1] for sequence in sequences]
        position = [sequence.n - 1 + n_more for sequence in sequences]
        slots = memory.tables.slots([sequence.id for sequence in sequences])
        return self._rows(memory, token, position, slots)

    def _rows(
        self, memory: Memory, token: ArrayLike, position: ArrayLike, slots: list[int]
    ) -> Tensor:
        rows = np.empty((4 + len(self.kv_layers), len(slots)), np.int32)
        token_B, position_B, sequence_B, hi_B = rows[:4]
        token_B[:], position_B[:], sequence_B[:] = token, position, slots
        np.subtract(position_B, 1, out=hi_B)
        for i, kind in enumerate(self.kv_layers):
            rows[4 + i] = first_visible(hi_B, memory.groups[kind].window)
        return memory.tables.behind(rows)

    def _call(self, memory: Memory, numbers: Tensor) -> "_Call":
        numbers = numbers.to(memory.device)
        own, tables = memory.tables.views(numbers, 4 + len(self.kv_layers))
        token_B, position_B, sequence_B, hi_B, *lo = own
        rows = {
            kind: AttentionRows.of([*tables[kind], sequence_B, lo[i], hi_B])
            for i, kind in enumerate(self.kv_layers)
        }
        kinds = self.model.config.text.layer_types
        stores = [memory.groups[kind].layers[self.kv_layers[kind]] for kind in kinds]
        attend = ReadOnlyAttend(self.model.ops, stores, [rows[kind] for kind in kinds])
        return _Call(numbers, token_B, position_B, attend)


def _hidden(sequence: SequenceView) -> Tensor:
    assert sequence.hidden_H is not None, "the engine fills the taps that a drafter declares"
    return sequence.hidden_H
