"""One pass of the target: call by call, or recorded once for a number of rows and replayed.

Both give the same bits; the recorded one costs Python next to nothing. Passes in which few rows or
none need scores, prompts above all, are recorded once for all numbers of rows, where operations can
be replayed with fewer than were recorded. Not here: what the rows are (runner.py).

Shapes: T rows, B sequences, R rows with logits, V vocabulary, H hidden size.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outdraft.cache.attend import CausalCall, causal_numbers, further_numbers
from outdraft.cache.memory import Memory, Span
from outdraft.engine.ahead import Ahead
from outdraft.models.registry import Target
from outdraft.ops.base import Fuses
from outdraft.ops.record import Recordable, Replayable, Resizable, record
from outdraft.ops.reference import pad_rows
from outdraft.ops.staging import Staging
from outdraft.speculate.drafter import Scored

MAX_RECORDED_ROWS = 96
MAX_RECORDINGS = 64
LEAST_ROOM = 128


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass gave: final hidden states of all rows, and scores of the rows that matter.

    `best_R` is int32 and on the CPU, the lowest id of the largest fp32 logits, -1 where that is not
    finite. The tensors of a recorded pass are overwritten by the next one that is asked for.
    """

    hidden_TH: Tensor
    logits_RV: Tensor
    best_R: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """One sequence's part of a pass: where its rows are, the best id of the scored ones."""

    start: int
    n_rows: int
    scored: int  # the first of its rows among those that have scores
    best: list[int]
    done: Pass

    @property
    def hidden_TH(self) -> Tensor:
        """Of its rows."""
        return self.done.hidden_TH[self.start : self.start + self.n_rows]

    def logits(self, n: int) -> Tensor:
        """Of its first n rows with scores, [n, V]."""
        return self.done.logits_RV[self.scored : self.scored + n]


@dataclass(frozen=True, slots=True)
class Left:
    """Drafts that are on the device only, int32: the tokens of the last rows of a pass.

    `tokens` is as long, and has them when the pass has run. `follow` launches what is to run
    behind that pass.
    """

    drafts_K: Tensor
    tokens: list[int]
    follow: Callable[[Scored], None] | None = None

    def read(self) -> None:
        """Wait for the tokens."""
        self.tokens[:] = self.drafts_K.tolist()


@dataclass(frozen=True, slots=True)
class _Recording:
    """A recorded pass, all of whose rows have logits; finite or not, `best_T` may be unchecked."""

    call: CausalCall
    program: Replayable
    hidden_TH: Tensor
    logits_TV: Tensor
    best_T: Tensor


@dataclass(frozen=True, slots=True)
class _Wide:
    """A recorded pass without scores, replayed for any number of rows up to `n_rows`."""

    call: CausalCall
    program: Resizable
    hidden_TH: Tensor

    @property
    def n_rows(self) -> int:
        """Most rows."""
        return self.hidden_TH.shape[0]


class TargetPass:
    """Runs the target over rows of many sequences."""

    def __init__(self, target: Target, memory: Memory) -> None:
        self.model = target.model
        self.ops = target.ops
        self.memory = memory
        self.recorder = target.ops if isinstance(target.ops, Recordable) else None
        self.recordings: OrderedDict[tuple[int, int, int], _Recording] = OrderedDict()
        self.wide: _Wide | None = None
        self.staging = Staging(memory.device)
        self.ahead = Ahead(self.staging)

    def run(
        self,
        tokens: list[int],
        spans: Sequence[Span],
        wanted: list[int],
        *,
        ahead: bool = False,
        left: Left | None = None,
    ) -> Pass:
        """One pass; `memory.reserve` comes first.

        Args:
            tokens: of all rows.
            spans: which rows belong to which sequence; they stand behind its length.
            wanted: rows that need logits, ascending.
            ahead: the next pass will probably have one row a sequence, each with the best token of
                its row here: where that can be done it is launched at once (`ahead.py`), and the
                logits of this one are lost.
            left: drafts whose tokens are on the device, in the place of those given; they are read
                with what the pass gave.
        """
        recorded = self.recorder is not None and len(wanted) == len(tokens) <= MAX_RECORDED_ROWS
        if left is not None and not recorded:
            left.read()
            tokens = tokens[: -len(left.tokens)] + left.tokens
        numbers = causal_numbers(self.memory, spans, tokens)
        if recorded and self.recorder is not None:
            if left is not None:
                return self._replay_left(self.recorder, numbers, len(tokens), left)
            return self._replay(self.recorder, numbers, len(tokens), ahead=ahead)
        self.ahead.drop()
        if self.recorder is not None and not self.recorder.records_all:
            hidden_TH = self._replay_wide(self.recorder, numbers, len(tokens))
        else:
            hidden_TH = self._forward(numbers)
        if not wanted:
            return Pass(hidden_TH, torch.empty(0, 0), torch.empty(0, dtype=torch.int32))
        index = torch.tensor(wanted, device=hidden_TH.device)
        wanted_RH = pad_rows(hidden_TH[index], self.ops.row_multiple)
        logits_RV = self.model.logits(wanted_RH)[: len(wanted)]
        best_R = finite_or_none(logits_RV, self.ops.argmax(logits_RV))
        return Pass(hidden_TH, logits_RV, best_R.cpu())

    def _forward(self, numbers: Tensor) -> Tensor:
        """Call by call."""
        call = CausalCall.of(self.memory, self.ops, numbers)
        multiple = self.ops.row_multiple  # padded once here, so that no operation has to
        return self.model.forward(
            pad_rows(call.token_T, multiple), pad_rows(call.position_T, multiple), call.attend
        )

    def _replay_wide(self, recorder: Recordable, numbers: Tensor, n_rows: int) -> Tensor:
        wide = self.wide
        if wide is None or not wide.call.fill(numbers, n_rows):
            room = max(LEAST_ROOM, 1 << (n_rows - 1).bit_length())
            if wide is not None:
                room = max(room, wide.n_rows)
            self.wide = wide = None  # its memory is the new one's
            call = CausalCall.wide(self.memory, self.ops, numbers, n_rows, room)
            program, hidden_TH = record(
                lambda: self.model.forward(call.token_T, call.position_T, call.attend), recorder
            )
            assert isinstance(program, Resizable)
            self.wide = wide = _Wide(call, program, hidden_TH)
        wide.program.resize(n_rows, wide.n_rows)
        wide.program.replay()
        return wide.hidden_TH[:n_rows]

    def _replay(self, recorder: Recordable, numbers: Tensor, n_rows: int, *, ahead: bool) -> Pass:
        turn = self.ahead.take(numbers)
        recorded = self._recording(recorder, numbers, n_rows, turn or 0)
        if turn is None:
            recorded.call.numbers.copy_(numbers)
            recorded.program.replay()
        further = None
        if ahead and recorder.records_all:
            further = further_numbers(self.memory, numbers, n_rows)
        best_T = recorded.best_T
        if further is not None:
            turn = 1 - (turn or 0)
            other = self._recording(recorder, further, n_rows, turn)
            best_T = self.ahead.launch(other.call, other.program, further, turn, best_T)
        elif not recorder.records_all:
            best_T = finite_or_none(recorded.logits_TV, best_T)
        return Pass(recorded.hidden_TH, recorded.logits_TV, best_T.cpu())

    def _replay_left(self, recorder: Recordable, numbers: Tensor, n_rows: int, left: Left) -> Pass:
        """As `_replay`; between the drafts and what is behind the pass, nothing waits."""
        self.ahead.drop()
        recorded = self._recording(recorder, numbers, n_rows, 0)
        token_T = recorded.call.token_T
        self.staging.send(numbers, recorded.call.numbers)
        token_T[-len(left.tokens) :].copy_(left.drafts_K, non_blocking=True)
        recorded.program.replay()
        best_T = recorded.best_T
        if not recorder.records_all:
            best_T = finite_or_none(recorded.logits_TV, best_T)
        fetched = self.staging.fetch(token_T, best_T)
        if left.follow is not None:
            left.follow(Scored(token_T, best_T, recorded.hidden_TH))
        tokens_T, best_T = fetched.wait()
        left.tokens[:] = tokens_T[-len(left.tokens) :].tolist()
        return Pass(recorded.hidden_TH, recorded.logits_TV, best_T)

    def _recording(
        self, recorder: Recordable, numbers: Tensor, n_rows: int, turn: int
    ) -> _Recording:
        """A pass of as many rows, recorded now if it was not before."""
        key = n_rows, numbers.shape[0], turn
        if key not in self.recordings:
            call = CausalCall.of(self.memory, self.ops, numbers)
            self.recordings[key] = self._record(recorder, call)
            if len(self.recordings) > MAX_RECORDINGS:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]

    def _record(self, recorder: Recordable, call: CausalCall) -> _Recording:
        """Over the tensors of this call, which later ones are copied into."""

        def run() -> tuple[Tensor, Tensor, Tensor]:
            hidden_TH = self.model.forward(call.token_T, call.position_T, call.attend)
            logits_TV = self.model.logits(hidden_TH)
            if isinstance(self.ops, Fuses):
                return hidden_TH, logits_TV, self.ops.best_or_none(logits_TV)
            best_T = self.ops.argmax(logits_TV)
            if recorder.records_all:
                best_T = finite_or_none(logits_TV, best_T)
            return hidden_TH, logits_TV, best_T

        program, results = record(run, recorder)
        return _Recording(call, program, *results)


def finite_or_none(logits_RV: Tensor, best_R: Tensor) -> Tensor:
    """The best ids, -1 where their logit is not finite."""
    if logits_RV.device.type == "cpu":  # few numbers, for which PyTorch's calls take longer
        best, logits = best_R.numpy(), logits_RV.numpy()
        finite = np.isfinite(logits[np.arange(len(best)), best])
        return torch.from_numpy(np.where(finite, best, -1).astype(np.int32))
    best_logit_R = logits_RV.gather(-1, best_R[:, None].long())[:, 0]
    return torch.where(torch.isfinite(best_logit_R), best_R, -1)


def rows_of(x_TH: Tensor, row_of: Mapping[str, int]) -> dict[str, Tensor]:
    """Copies [H] of these rows."""
    if x_TH.device.type != "cpu":  # an index of all would wait for the device
        return {name: x_TH[row].clone() for name, row in row_of.items()}
    rows_BH = x_TH[list(row_of.values())]
    return dict(zip(row_of, rows_BH.unbind(0), strict=True))
