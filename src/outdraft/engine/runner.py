"""Doing one step: propose, forward, verify, roll back, commit.

The plan says what runs; the tensors live here. One path for plain decoding (no drafts), drafting
and prompts. A failure stays with who caused it: a drafter's costs drafts, a pass that fails is
repeated in halves until the guilty sequence is alone, and what fails behind the pass ends its own
sequence. Not here: who runs (scheduler.py), requests and text (engine.py).

Shapes: B sequences, T rows, R rows with logits, K draft length, V vocabulary, H hidden size.
"""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outdraft.cache.memory import Memory, Span
from outdraft.engine.decide import (
    NO_DRAFTS,
    Block,
    admissible,
    check_draft,
    decide,
    forced_blocks,
    goes_on,
    left_of,
    may_leave,
    report_prompt,
    reported,
)
from outdraft.engine.graphs import Left, Pass, Rows, TargetPass, rows_of
from outdraft.engine.lengths import AutoLengths, StepCosts
from outdraft.engine.plan import StepPlan, Work
from outdraft.engine.scheduler import most_cached
from outdraft.engine.sequence import Sequence
from outdraft.engine.stats import Counters, Faults, describe, not_finite
from outdraft.errors import OutdraftError
from outdraft.models.registry import Target
from outdraft.request import FinishReason, TokenEvent
from outdraft.speculate.drafter import (
    Drafter,
    LeavesTokens,
    ReadsStates,
    Scored,
    SequenceView,
    TargetView,
    confident,
)
from outdraft.speculate.verify import Verdict


@dataclass(slots=True)
class _Proposal:
    """What a drafter gave for a step: its view, and the block of each sequence."""

    view: TargetView | None
    blocks: dict[str, Block]
    accepted: dict[str, int]


class Runner:
    """Runs steps of one target, with or without a drafter."""

    def __init__(self, target: Target, drafter: Drafter | None, memory: Memory) -> None:
        self.target = target
        self.drafter = drafter
        self._reader = drafter if isinstance(drafter, ReadsStates) else None
        self.memory = memory
        self.target_pass = TargetPass(target, memory)
        self.lengths: AutoLengths | None = None
        """Set to let draft lengths be learned; None while they are fixed."""
        self.p_min = 0.0  # confidence below which a draft and those behind it are left out
        self.hidden: dict[str, Tensor] = {}
        self.faults = Faults()
        self.counters = Counters()
        self.logits_log: dict[str, list[Tensor]] | None = None
        """Set to a dict to record the logits [V] behind every emitted token, by sequence."""

    def open(self, sequence: Sequence) -> None:
        """Begin a sequence, with what the prefix cache has of its tokens."""
        n_cached = self.memory.open(
            sequence.id, sequence.tokens, sequence.request.cache_salt, most_cached(sequence)
        )
        sequence.n_computed = n_cached
        if sequence.n_preempted == 0:
            sequence.n_cached = n_cached
        self.counters.begin(sequence)
        if self.drafter is not None:
            self._drafter_call(self.drafter.open, sequence.id)
        if isinstance(self.drafter, ReadsStates):
            salt = sequence.request.cache_salt
            self._drafter_call(self.drafter.begin, sequence.id, sequence.tokens, salt, n_cached)

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self.memory.close(sequence.id)
        self.forget(sequence.id)

    def forget(self, sequence_id: str) -> None:
        """Forget what is kept of a sequence beside its memory."""
        self.hidden.pop(sequence_id, None)
        if self.lengths is not None:
            self.lengths.close(sequence_id)
        if self.drafter is not None:
            self._drafter_call(self.drafter.close, sequence_id)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sequences: Mapping[str, Sequence]) -> list[TokenEvent]:
        """Run a step; its events in the order of the plan.

        Never raises for what one request or the drafter causes: the request ends with an event
        that says `error`.
        """
        start, n_failed = time.perf_counter(), self._n_failed
        given = forced_blocks(plan.work, sequences)
        proposal = self._propose([w for w in plan.work if w.sequence not in given], sequences)
        proposal.blocks.update(given)
        drafted = time.perf_counter()
        self.counters.plan(plan, sum(len(block.tokens) for block in proposal.blocks.values()))
        forward_s, events = self._run(plan.work, sequences, proposal)
        if proposal.view is not None and self.drafter is not None:
            accepted = [proposal.accepted.get(s.id, 0) for s in proposal.view.sequences]
            self._drafter_call(self.drafter.commit, proposal.view, accepted)
        if self.lengths is not None and self.lengths.looks(len(plan.work)):
            times = (drafted - start, forward_s, time.perf_counter() - drafted - forward_s)
            failed = self._n_failed > n_failed
            self._observe(self.lengths, plan, sequences, proposal, times, failed)
        self._clock(plan, sequences, start, drafted, drafted + forward_s)
        return events

    @property
    def _n_failed(self) -> int:
        return self.faults.n_drafter + self.faults.n_pass + self.faults.n_request

    def _observe(
        self,
        lengths: AutoLengths,
        plan: StepPlan,
        sequences: Mapping[str, Sequence],
        proposal: _Proposal,
        times: tuple[float, float, float],
        failed: bool,
    ) -> None:
        """Tell the length controller of a step. `times`: seconds of draft, pass and rest."""
        decoding = [sequences[w.sequence] for w in plan.work]
        blocks = {
            s: (len(block.tokens), proposal.accepted[s])
            for s, block in proposal.blocks.items()
            if block.tokens and not block.forced and s in proposal.accepted
        }
        n_rows = sum(w.n_rows for w in plan.work)
        n_rows += sum(len(block.tokens) for block in proposal.blocks.values())
        prompts = any(w.n_rows > 1 or sequences[w.sequence].stats.n_passes < 2 for w in plan.work)
        forced = any(block.forced for block in proposal.blocks.values())
        clean = not failed and not prompts and not forced and len(plan.work) > 0
        lengths.observe(decoding, StepCosts(len(decoding), n_rows, *times, blocks, clean=clean))

    def _run(
        self, work: Seq[Work], sequences: Mapping[str, Sequence], proposal: _Proposal
    ) -> tuple[float, list[TokenEvent]]:
        """One pass and what follows; in halves if the pass fails. Seconds of passes, and events."""
        if not work:
            return 0.0, []
        start = time.perf_counter()
        try:
            done = self._forward(work, sequences, proposal.blocks)
        except Exception as error:
            self.faults.n_pass += 1
            if len(work) > 1:
                half = len(work) // 2
                first_s, first = self._run(work[:half], sequences, proposal)
                second_s, second = self._run(work[half:], sequences, proposal)
                return first_s + second_s, first + second
            sequence = sequences[work[0].sequence]
            if proposal.blocks.pop(sequence.id, None) is not None:  # were it the drafts?
                self._count_drafter_failure(error, [sequence])
                return self._run(work, sequences, proposal)
            return 0.0, [self._fail(sequence, error)]
        forward_s = time.perf_counter() - start
        return forward_s, self._finish_all(work, sequences, done, proposal)

    def _finish_all(
        self, work: Seq[Work], sequences: Mapping[str, Sequence], done: Pass, proposal: _Proposal
    ) -> list[TokenEvent]:
        """What follows a pass, for one sequence after another."""
        best = done.best_R.tolist()
        events: list[TokenEvent] = []
        newest: dict[str, int] = {}  # the row of each sequence's newest token in memory
        row = scored = 0
        for w in work:
            sequence = sequences[w.sequence]
            block = proposal.blocks.get(w.sequence, NO_DRAFTS)
            n_rows = w.n_rows + len(block.tokens)
            n_scored = n_rows - w.n_rows + 1 if w.n_rows == sequence.n_pending else 0
            own = Rows(row, n_rows, scored, best[scored : scored + n_scored], done)
            row, scored = row + n_rows, scored + n_scored
            n_tokens = len(sequence.tokens)
            try:
                n_kept = self._finish(sequence, w, own, proposal, events)
                newest[sequence.id] = own.start + n_kept - 1
                if self._reader is not None:
                    first, rows_TH = sequence.n_computed - n_kept, own.hidden_TH[:n_kept]
                    self._drafter_call(self._reader.read, sequence.id, first, rows_TH)
            except Exception as error:
                del sequence.tokens[n_tokens:]
                events.append(self._fail(sequence, error))
        if self.drafter is not None and self.drafter.needs.final_hidden and newest:
            self.hidden.update(rows_of(done.hidden_TH, newest))
        return events

    def _finish(
        self,
        sequence: Sequence,
        work: Work,
        own: Rows,
        proposal: _Proposal,
        events: list[TokenEvent],
    ) -> int:
        """What follows the pass for one sequence; how many of its rows stay in memory."""
        self.memory.advance(sequence.id, own.n_rows)
        if sequence.request.params.prompt_logprobs is not None:
            report_prompt(self.target, sequence, own.hidden_TH)
        if work.n_rows < sequence.n_pending:  # a prompt with more chunks to come
            if not bool(torch.isfinite(own.hidden_TH).all()):
                raise not_finite()
            self._keep_rows(sequence, own.n_rows, work.n_rows)
            self._settle(sequence)
            return work.n_rows
        block = proposal.blocks.get(sequence.id, NO_DRAFTS)
        n_good = own.best.index(-1) if -1 in own.best else len(own.best)
        if n_good == 0:
            raise not_finite()
        if n_good <= len(block.tokens):  # a draft that breaks the model is not the request's fault
            probs = block.probs_KV
            probs = None if probs is None else probs[: n_good - 1]
            block = Block(block.tokens[: n_good - 1], probs, block.forced)
        logits_RV = own.logits(n_good)
        verdict = decide(sequence, block, logits_RV, own.best)
        n_kept = work.n_rows + verdict.n_accepted
        self._keep_rows(sequence, own.n_rows, n_kept)
        proposal.accepted[sequence.id] = verdict.n_accepted
        events += self._commit(sequence, block, verdict, logits_RV)
        self._settle(sequence)
        return n_kept

    def _fail(self, sequence: Sequence, error: Exception) -> TokenEvent:
        """End a request that caused an exception. Its memory is released when it is closed."""
        self.faults.n_request += 1
        message = str(error) if isinstance(error, OutdraftError) else describe(error)
        return sequence.abort(FinishReason.ERROR, message)

    def _propose(self, work: Seq[Work], sequences: Mapping[str, Sequence]) -> _Proposal:
        """Ask the drafter; if it fails, ask for each sequence alone; who fails has no drafts."""
        nothing = _Proposal(None, {}, {})
        work = [w for w in work if w.n_drafts > 0]
        if not work or self.drafter is None:
            return nothing
        try:
            return self._ask(self.drafter, work, sequences)
        except Exception as error:
            if len(work) == 1:
                self._count_drafter_failure(error, [sequences[work[0].sequence]])
                return nothing
        views: list[SequenceView] = []
        blocks: dict[str, Block] = {}
        for w in work:
            try:
                one = self._ask(self.drafter, [w], sequences)
            except Exception as error:
                self._count_drafter_failure(error, [sequences[w.sequence]])
                continue
            assert one.view is not None
            views += one.view.sequences
            blocks |= one.blocks
        return _Proposal(self._view(views), blocks, {}) if views else nothing

    def _ask(
        self, drafter: Drafter, work: Seq[Work], sequences: Mapping[str, Sequence]
    ) -> _Proposal:
        self.target_pass.ahead.drop()
        asking = [sequences[w.sequence] for w in work]
        view = self._view(
            [
                SequenceView(s.id, s.tokens, s.request.params, s.seed, self.hidden.get(s.id))
                for s in asking
            ]
        )
        k = max(w.n_drafts for w in work)
        leaves = not self.p_min and may_leave(work, sequences)
        if leaves and isinstance(drafter, LeavesTokens) and drafter.leaves:
            draft = drafter.leave(view, k)
        else:
            draft = drafter.propose(view, k)
        tokens = draft.tokens_BK.tolist()
        check_draft(draft, tokens, len(work), self.target.config.vocab_size)
        blocks = {}
        lengths = [min(w.n_drafts, n) for w, n in zip(work, draft.lengths, strict=True)]
        if self.lengths is not None and draft.left_K is None:
            lengths = self.lengths.worth_verifying(asking, lengths, draft)
        if self.p_min:
            lengths = confident(draft, lengths, self.p_min)
        for b, (w, n) in enumerate(zip(work, lengths, strict=True)):
            probs = draft.probs[b]
            block = Block(tokens[b][:n], None if probs is None else probs[:n])
            if draft.left_K is not None:
                follow = partial(self._follow, view, k) if asking[b].draft_room > k + 1 else None
                block.left = Left(draft.left_K[:n], block.tokens, follow)
            blocks[w.sequence] = admissible(sequences[w.sequence], block)
        return _Proposal(view, blocks, {})

    def _follow(self, view: TargetView, k: int, scored: Scored) -> None:
        assert isinstance(self.drafter, LeavesTokens)
        self._drafter_call(self.drafter.follow, view, k, scored)

    def _view(self, views: list[SequenceView]) -> TargetView:
        return TargetView(views, self.memory, self.target.model.embed, self.target.ops)

    def _drafter_call(self, call: Callable[..., None], *arguments: object) -> None:
        """Tell the drafter something; what it fails of costs nobody anything."""
        try:
            call(*arguments)
        except Exception as error:
            self._count_drafter_failure(error, [])

    def _count_drafter_failure(self, error: Exception, sequences: Seq[Sequence]) -> None:
        self.faults.n_drafter += 1
        self.faults.last_drafter_error = describe(error)
        for sequence in sequences:
            sequence.n_failed_drafts += 1

    def _forward(
        self, work: Seq[Work], sequences: Mapping[str, Sequence], blocks: Mapping[str, Block]
    ) -> Pass:
        tokens: list[int] = []
        wanted: list[int] = []
        spans = []
        left = left_of(work, blocks)
        for w in work:
            sequence = sequences[w.sequence]
            at, first = sequence.n_computed, len(tokens)
            drafts = blocks.get(w.sequence, NO_DRAFTS).tokens
            tokens += sequence.tokens[at : at + w.n_rows] + drafts
            spans.append(Span(w.sequence, first, len(tokens) - first))
            if w.n_rows == sequence.n_pending:
                wanted += range(first + w.n_rows - 1, len(tokens))
            self.memory.reserve(w.sequence, len(tokens) - first)
        ahead = not isinstance(self.drafter, ReadsStates) and goes_on(work, sequences)
        return self.target_pass.run(tokens, spans, wanted, ahead=ahead, left=left)

    def _keep_rows(self, sequence: Sequence, n_rows: int, n_kept: int) -> None:
        """Roll the memory back to the rows that belong to committed tokens."""
        if n_kept < n_rows:
            self.memory.rollback(sequence.id, n_rows - n_kept)
        sequence.n_computed += n_kept

    def _settle(self, sequence: Sequence) -> None:
        """Share pages of committed tokens with later requests, then free what is out of sight."""
        self.memory.share(sequence.id, sequence.tokens)
        self.memory.trim(sequence.id)

    def _commit(
        self, sequence: Sequence, block: Block, verdict: Verdict, logits_RV: Tensor
    ) -> list[TokenEvent]:
        tokens = [*block.tokens[: verdict.n_accepted], verdict.token]
        logprobs = reported(sequence, tokens, logits_RV)
        events = sequence.keep(tokens, verdict.n_accepted, logprobs)
        for stats in (sequence.stats, self.counters.drafts):
            stats.count(len(block.tokens), verdict.n_accepted, len(events), forced=block.forced)
        if self.logits_log is not None:
            self.logits_log.setdefault(sequence.id, []).extend(logits_RV[: len(events)].clone())
        return events

    def _clock(
        self,
        plan: StepPlan,
        sequences: Mapping[str, Sequence],
        start: float,
        drafted: float,
        forwarded: float,
    ) -> None:
        """Book the step's time on its sequences: prompts apart from decoding."""
        end = time.perf_counter()
        for w in plan.work:
            sequence = sequences[w.sequence]
            if sequence.stats.n_passes == 0 or (sequence.stats.n_passes == 1 and w.n_rows > 1):
                sequence.prefill_s += end - start
                continue
            sequence.decode_s += end - start
            sequence.times.draft_s += drafted - start
            sequence.times.forward_s += forwarded - drafted
            sequence.times.rest_s += end - forwarded
