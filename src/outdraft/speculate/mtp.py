"""Drafting with the target's native head, which has keys and values of its own.

The head's row t takes the target's state of token t and token t + 1. Rows of committed tokens are
computed before a round from the states that the engine hands over (`read`); the first draft comes
from the last of them, each further one from the head's own result, and those rows are taken back
before the next round, since their states were not the target's.

Behind a hit in the target's prefix cache the head begins with pages of its own cache. Its row t
depends on token t + 1 as well, so there a page goes by the tokens one further on. Where the head
has not read as far as the target has, it begins at the hit and sees nothing before it: its drafts
may then be worse, never what is emitted.

Shapes: B sequences, T rows, K hidden size, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from outdraft.cache.attend import CausalCall, causal_numbers
from outdraft.cache.memory import Memory, Span
from outdraft.config import EngineConfig
from outdraft.errors import CapacityError, PairingError, WeightsError
from outdraft.models.heads import NativeHead, head_family
from outdraft.models.layers import TargetConfig, TargetModel
from outdraft.models.registry import Target, choose_ops, open_weights, packing
from outdraft.ops.record import Recordable, Replayable, record
from outdraft.speculate.chain import draft_chain
from outdraft.speculate.draft_vocab import DraftVocab, load_draft_vocab
from outdraft.speculate.drafter import (
    Draft,
    SequenceView,
    Taps,
    TargetView,
    draws,
    no_drafts,
    with_own,
)
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.loading import Loading

CATCH_UP = (
    512  # rows of one sequence that a round reads at most; with more to come it has no drafts
)

MAX_RECORDED_ROWS = 64
MAX_RECORDINGS = 64


@dataclass(frozen=True, slots=True)
class _Rows:
    """A recorded pass of the head over some rows."""

    call: CausalCall
    hidden_TK: Tensor
    program: Replayable
    done_TK: Tensor


@dataclass(frozen=True, slots=True)
class _Scores:
    """The recorded scores of some of the head's results, their argmax and what softmax gives it."""

    done_BK: Tensor
    program: Replayable
    logits_BV: Tensor
    best_B: Tensor
    sure_B: Tensor


@dataclass(slots=True)
class _Own:
    """Of one sequence: rows of true states in memory, and states that were not read yet."""

    n_true: int = 0
    first: int = 0
    begins: int = 0  # rows before this were skipped
    waiting: list[Tensor] = field(default_factory=list)

    @property
    def n_waiting(self) -> int:
        """States that were not read yet."""
        return sum(part.shape[0] for part in self.waiting)


class MtpDrafter:
    """Proposes with a native head (a `Drafter`, and one that `ReadsStates`)."""

    name = "mtp"

    def __init__(
        self,
        head: NativeHead,
        target: TargetModel,
        memory: Memory,
        *,
        sample_drafts: bool = True,
        vocab: DraftVocab | None = None,
    ) -> None:
        """`target` scores the head's results, or `vocab`, a part of it; `memory` is the head's."""
        self.head, self.target, self.memory = head, target, memory
        self.vocab = vocab
        self.sample_drafts = sample_drafts
        self.recorder = head.ops if isinstance(head.ops, Recordable) else None
        self.needs = Taps()
        self._rows: OrderedDict[tuple[int, int], _Rows] = OrderedDict()
        self._scores: OrderedDict[int, _Scores] = OrderedDict()
        self._own: dict[str, _Own] = {}

    def open(self, sequence: str) -> None:
        """A sequence begins."""
        self.memory.open(sequence)
        self._own[sequence] = _Own()

    def begin(self, sequence: str, tokens: Sequence[int], salt: str, n_cached: int) -> None:
        """See `ReadsStates`."""
        self.close(sequence)
        n = self.memory.open(sequence, tokens[1:], f"{tokens[0]} {salt}", n_cached)
        self._own[sequence] = _Own(n_true=n)
        if n < n_cached:
            self.memory.books.skip(sequence, n_cached)
            self._own[sequence] = _Own(n_true=n_cached, begins=n_cached)

    def close(self, sequence: str) -> None:
        """Its memory is free again."""
        if sequence in self._own:
            self.memory.close(sequence)
            del self._own[sequence]

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        """Nothing to do: states of what was accepted come by `read`."""

    def read(self, sequence: str, first: int, hidden_TK: Tensor) -> None:
        """See `ReadsStates`."""
        if sequence not in self._own:
            return
        own = self._own[sequence]
        if not own.waiting:
            own.first = first
        own.waiting.append(hidden_TK.clone())

    def propose(self, view: TargetView, k: int) -> Draft:
        """See `Drafter.propose`. Sequences that it cannot draft for have a length of 0."""
        for sequence in view.sequences:
            self._rewind(sequence.id)
        able = [s for s in view.sequences if self._able(s, k)]
        ready = [s for s in able if self._own[s.id].n_waiting <= CATCH_UP]
        if long := [s for s in able if self._own[s.id].n_waiting > CATCH_UP]:
            self._catch_up(long, view)
        draft = no_drafts(len(view.sequences), k)
        if not ready:
            return draft
        names = {s.id for s in ready}
        rows = [b for b, s in enumerate(view.sequences) if s.id in names]
        return with_own(draft, self._chain(ready, view, k), rows)

    def _chain(self, ready: list[SequenceView], view: TargetView, k: int) -> Draft:
        carried_BK = self._catch_up(ready, view)
        fresh = True

        def step(newest_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal carried_BK, fresh
            if not fresh:
                spans = [Span(s.id, b, 1) for b, s in enumerate(ready)]
                carried_BK = self._run(newest_B, carried_BK, spans, view)
            fresh = False
            return self._of_all(self._score(carried_BK), drawn=drawn)

        drawn = self.sample_drafts and any(draws(s.params) for s in ready)
        return draft_chain(ready, k, step, sample_drafts=self.sample_drafts)

    def _catch_up(self, sequences: list[SequenceView], view: TargetView) -> Tensor:
        """Read waiting states; the head's result of the last row of each sequence, [B, K]."""
        tokens: list[int] = []
        states, spans, last = [], [], []
        for s in sequences:
            own = self._own[s.id]
            waiting_TK = torch.cat(own.waiting)
            rows_TK, rest_TK = waiting_TK[:CATCH_UP], waiting_TK[CATCH_UP:]
            n = rows_TK.shape[0]
            spans.append(Span(s.id, len(tokens), n))
            tokens += s.tokens[own.first + 1 : own.first + 1 + n]
            states.append(rows_TK)
            last.append(len(tokens) - 1)
            own.waiting = [rest_TK] if len(rest_TK) else []
            own.first += n
            own.n_true += n
        token_T = torch.tensor(tokens, dtype=torch.int32)
        done_TK = self._run(token_T, torch.cat(states), spans, view)
        for s in sequences:
            self._share(s)
        return done_TK[torch.tensor(last)]

    def _share(self, sequence: SequenceView) -> None:
        """Keep full pages for later sequences; all rows in memory are of true states."""
        books, own = self.memory.books, self._own[sequence.id]
        n_full = own.n_true // books.page_slots
        if own.begins == 0 and n_full > len(books.chains[sequence.id]):
            self.memory.share(sequence.id, sequence.tokens[1:])

    def _run(
        self, token_T: Tensor, hidden_TK: Tensor, spans: list[Span], view: TargetView
    ) -> Tensor:
        for span in spans:
            self.memory.reserve(span.sequence, span.n_rows)
        begins = {span.sequence: self._own[span.sequence].begins for span in spans}
        numbers = causal_numbers(self.memory, spans, token_T.tolist(), begins)
        if self.recorder is not None and len(token_T) <= MAX_RECORDED_ROWS:
            done_TK = self._replayed(self.recorder, numbers, hidden_TK, view)
        else:
            call = CausalCall.of(self.memory, self.head.ops, numbers)
            done_TK = self._forward(call, hidden_TK, view)
        for span in spans:
            self.memory.advance(span.sequence, span.n_rows)
        return done_TK

    def _forward(self, call: CausalCall, hidden_TK: Tensor, view: TargetView) -> Tensor:
        embedded_TK = view.embed(call.token_T)
        return self.head.forward(embedded_TK, hidden_TK, call.position_T, call.attend)

    def _replayed(
        self, recorder: Recordable, numbers: Tensor, hidden_TK: Tensor, view: TargetView
    ) -> Tensor:
        """`_forward`, recorded for each number of rows; a copy, as the next replay overwrites."""
        key = hidden_TK.shape[0], numbers.shape[0]
        own = self._rows.get(key)
        if own is None:
            assert isinstance(view.ops, Recordable)
            call, kept_TK = CausalCall.of(self.memory, self.head.ops, numbers), hidden_TK.clone()
            program, done_TK = record(
                lambda: self._forward(call, kept_TK, view), recorder, view.ops
            )
            own = self._rows[key] = _Rows(call, kept_TK, program, done_TK)
            if len(self._rows) > MAX_RECORDINGS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        own.call.numbers.copy_(numbers)
        own.hidden_TK.copy_(hidden_TK)
        own.program.replay()
        return own.done_TK.clone()

    def forget_recordings(self) -> None:
        """Of scores, which are of the vocabulary that they were recorded with."""
        self._scores.clear()

    def _of_all(
        self, scores: tuple[Tensor, Tensor, Tensor], *, drawn: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `_score` gave, by ids of the whole vocabulary; scores only where they are read."""
        if self.vocab is None:
            return scores
        logits_BN, best_B, sure_B = scores
        best_B = self.vocab.ids_N[best_B.to(self.vocab.ids_N.device).long()].int()
        return self.vocab.whole(logits_BN) if drawn else logits_BN, best_B, sure_B

    def _logits(self, done_BK: Tensor) -> Tensor:
        if self.vocab is not None:
            return self.vocab.logits(done_BK)
        return self.target.logits(done_BK)

    def _score(self, done_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The target's scores of the head's results, their argmax, and what softmax gives it."""
        ops, target_ops = self.head.ops, self.target.ops
        if not (isinstance(ops, Recordable) and isinstance(target_ops, Recordable)):
            logits_BV = self._logits(done_BK)
            return logits_BV, *ops.best(logits_BV)
        n = done_BK.shape[0]
        own = self._scores.get(n)
        if own is None:
            kept_BK = done_BK.clone()

            def scores() -> tuple[Tensor, Tensor, Tensor]:
                logits_BV = self._logits(kept_BK)
                return logits_BV, *ops.best(logits_BV)

            program, made = record(scores, ops, target_ops)
            own = self._scores[n] = _Scores(kept_BK, program, *made)
            if len(self._scores) > MAX_RECORDINGS:
                self._scores.popitem(last=False)
        self._scores.move_to_end(n)
        own.done_BK.copy_(done_BK)
        own.program.replay()
        return own.logits_BV, own.best_B, own.sure_B

    def _rewind(self, sequence: str) -> None:
        """Take back rows whose states were the head's own."""
        if sequence not in self._own:
            self.open(sequence)
        n_true = self._own[sequence].n_true
        self.memory.rollback(sequence, self.memory.lengths[sequence] - n_true)

    def _able(self, sequence: SequenceView, k: int) -> bool:
        """Whether every state is there that drafting needs, and room for its rows."""
        own = self._own[sequence.id]
        n = own.n_waiting
        if n == 0 or own.first != own.n_true or own.first + n != sequence.n - 1:
            return False
        try:
            self.memory.reserve(sequence.id, min(n, CATCH_UP) + k)
        except CapacityError:
            return False
        return True


def find_head(path: Path, config: TargetConfig) -> str | None:
    """Why a checkpoint has no head that can be used, or None if it has one.

    Tensors decide: conversions and tools for fine-tuning drop them and leave the config's claim.
    """
    names, family = Checkpoint.open(path).names(), head_family(config)
    prefix = next((p for p in family.prefixes if any(n.startswith(p) for n in names)), None)
    if prefix is None:
        claimed = family.n_claimed(config)
        claim = f"its config claims {claimed} MTP layer"
        return f"{claim} and no mtp.* tensor is there" if claimed else "it has none"
    if (reason := family.unsupported(config)) is not None:
        return reason
    present = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    missing = [n for n in family.expected_tensors(config) if not _there(n, present)]
    if missing:
        return f"{len(missing)} of its tensors are missing, such as {prefix}{missing[0]}"
    return None


def _there(name: str, present: set[str]) -> bool:
    """Whether a weight is there, whole or quantised."""
    stem = name.removesuffix("weight")
    return name in present or (stem + "weight_packed") in present or (stem + "qweight") in present


def load_head(
    target: Target, config: EngineConfig, n_draft_max: int, loading: Loading | None = None
) -> MtpDrafter:
    """Read the head from the target's checkpoint and plan its memory.

    Raises:
        PairingError: there is none, or it is not whole.
    """
    shape, family = target.config, head_family(target.config)
    reason = find_head(target.path, shape)
    if reason is not None:
        raise PairingError(f"{target.path} has no MTP head: {reason}", "use another --spec-type")
    raw = read_config(target.path)
    try:
        weights, _, bits = open_weights(
            Checkpoint.open(target.path),
            raw,
            family.expected_tensors(shape),
            family.ignored,
            prefixes=family.prefixes,
            dtype=target.dtype,
        )
    except WeightsError as error:
        raise PairingError(
            f"the MTP head of {target.path} cannot be read: {error.message}", error.hint
        ) from error
    ops = choose_ops(config, shape, stored_bits=bits, weights=weights.matrices(), drafter=True)
    with packing(ops, weights, raw, config, loading):
        head = family.build(shape, weights, ops, target.ctx_size + n_draft_max)
    memory = Memory(
        family.memory_layers(shape),
        max_sequences=config.max_sequences,
        max_tokens=target.ctx_size + n_draft_max,
        max_rows=CATCH_UP + n_draft_max,
        dtype=ops.kv_dtype,
        pool_tokens=config.kv_cache_tokens or min(4, config.max_sequences) * target.ctx_size,
        device=ops.device,
        prefix_cache=config.prefix_cache,
    )
    return MtpDrafter(
        head,
        target.model,
        memory,
        sample_drafts=config.sample_drafts,
        vocab=load_draft_vocab(target, config),
    )
