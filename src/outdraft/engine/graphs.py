"""One pass of the target: call by call, or recorded once for a number of rows and replayed.

Both give the same bits; the recorded one costs Python next to nothing. Not here: what the rows are
(runner.py).

Shapes: T rows, B sequences, R rows with logits, V vocabulary, H hidden size.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.cache.attend import CausalAttend
from outdraft.cache.memory import Memory, Span
from outdraft.models.registry import Target
from outdraft.ops.record import Recordable, Replayable, fill_rows, fill_slots, recording
from outdraft.ops.reference import pad_rows

MAX_RECORDED_ROWS = 64
MAX_RECORDINGS = 64


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass gave: final hidden states of all rows, and scores of the rows that matter.

    `best_R` is int32, the lowest id of the largest fp32 logits. The tensors of a recorded pass are
    overwritten by the next one.
    """

    hidden_TH: Tensor
    logits_RV: Tensor
    best_R: Tensor


@dataclass(frozen=True, slots=True)
class _Recording:
    """A recorded pass over all of whose rows there are logits."""

    token_T: Tensor
    position_T: Tensor
    attend: CausalAttend
    program: Replayable
    result: Pass


class TargetPass:
    """Runs the target over rows of many sequences."""

    def __init__(self, target: Target, memory: Memory) -> None:
        self.model = target.model
        self.ops = target.ops
        self.memory = memory
        self.recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()

    def run(
        self, tokens: list[int], positions: list[int], spans: Sequence[Span], wanted: list[int]
    ) -> Pass:
        """One pass; `memory.reserve` comes first.

        Args:
            tokens: of all rows.
            positions: of all rows.
            spans: which rows belong to which sequence.
            wanted: rows that need logits, ascending.
        """
        attend = CausalAttend.bind(self.memory, self.ops, spans)
        token_T = torch.tensor(tokens, dtype=torch.int32)
        position_T = torch.tensor(positions, dtype=torch.int32)
        if isinstance(self.ops, Recordable) and len(wanted) == len(tokens) <= MAX_RECORDED_ROWS:
            return self._replay(self.ops, token_T, position_T, attend, len(spans))
        multiple = self.ops.row_multiple  # padded once here, so that no operation has to
        hidden_TH = self.model.forward(
            pad_rows(token_T, multiple), pad_rows(position_T, multiple), attend
        )
        chosen_RH = pad_rows(hidden_TH[torch.tensor(wanted, dtype=torch.int64)], multiple)
        if not wanted:
            return Pass(hidden_TH, torch.empty(0, 0), torch.empty(0, dtype=torch.int32))
        logits_RV = self.model.logits(chosen_RH)[: len(wanted)]
        return Pass(hidden_TH, logits_RV, self.ops.argmax(logits_RV))

    def _replay(
        self,
        ops: Recordable,
        token_T: Tensor,
        position_T: Tensor,
        attend: CausalAttend,
        n_sequences: int,
    ) -> Pass:
        key = (token_T.shape[0], n_sequences)
        if key not in self.recordings:
            self.recordings[key] = self._record(ops, token_T, position_T, attend)
            if len(self.recordings) > MAX_RECORDINGS:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        recording_ = self.recordings[key]
        recording_.token_T.copy_(token_T)
        recording_.position_T.copy_(position_T)
        for group, slots in recording_.attend.slots.items():
            fill_slots(slots, attend.slots[group])
            fill_rows(recording_.attend.rows[group], attend.rows[group])
        recording_.program.replay()
        return recording_.result

    def _record(
        self, ops: Recordable, token_T: Tensor, position_T: Tensor, attend: CausalAttend
    ) -> _Recording:
        """Over copies of these inputs, with page tables as wide as they can get."""
        token_T, position_T = token_T.clone(), position_T.clone()
        static = CausalAttend(
            self.memory,
            self.ops,
            attend.slots,
            {g: self.memory.widest(g, rows) for g, rows in attend.rows.items()},
        )
        with recording(ops) as program:
            hidden_TH = self.model.forward(token_T, position_T, static)
            logits_TV = self.model.logits(hidden_TH)
            best_T = self.ops.argmax(logits_TV)
        return _Recording(token_T, position_T, static, program, Pass(hidden_TH, logits_TV, best_T))
