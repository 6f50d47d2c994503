"""Doing one step: propose, forward, verify, roll back, commit.

The plan says what runs; the tensors live here. One path for plain decoding (no drafts), drafting
and prompts. Not here: who runs (scheduler.py), requests and text (engine.py).

Shapes: B sequences, T rows, R rows with logits, K draft length, V vocabulary, H hidden size.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from outdraft.cache.memory import Memory, Span
from outdraft.engine.decide import NO_DRAFTS, Block, admissible, decide, report_prompt, reported
from outdraft.engine.graphs import Pass, TargetPass
from outdraft.engine.plan import StepPlan
from outdraft.engine.sequence import Sequence
from outdraft.errors import OutdraftError
from outdraft.models.registry import Target
from outdraft.request import TokenEvent
from outdraft.speculate.drafter import Drafter, SequenceView, TargetView
from outdraft.speculate.verify import Verdict


class Runner:
    """Runs steps of one target, with or without a drafter."""

    def __init__(self, target: Target, drafter: Drafter | None, memory: Memory) -> None:
        self.target = target
        self.drafter = drafter
        self.memory = memory
        self.target_pass = TargetPass(target, memory)
        self.hidden: dict[str, Tensor] = {}
        self.logits_log: dict[str, list[Tensor]] | None = None
        """Set to a dict to record the logits [V] behind every emitted token, by sequence."""

    def open(self, sequence: Sequence) -> None:
        """Begin a sequence."""
        self.memory.open(sequence.id)
        if self.drafter is not None:
            self.drafter.open(sequence.id)

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self.memory.close(sequence.id)
        self.hidden.pop(sequence.id, None)
        if self.drafter is not None:
            self.drafter.close(sequence.id)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sequences: Mapping[str, Sequence]) -> list[TokenEvent]:
        """Run a step; its events in the order of the plan."""
        start = time.perf_counter()
        view, blocks = self._propose(plan, sequences)
        drafted = time.perf_counter()
        done = self._forward(plan, sequences, blocks)
        forwarded = time.perf_counter()
        events: list[TokenEvent] = []
        accepted = {}
        row = scored = 0
        for work in plan.work:
            sequence = sequences[work.sequence]
            block = blocks.get(work.sequence, NO_DRAFTS)
            n_rows = work.n_rows + len(block.tokens)
            rows_H = done.hidden_TH[row : row + n_rows]
            row += n_rows
            self.memory.advance(sequence.id, n_rows)
            report_prompt(self.target, sequence, rows_H)
            if work.n_rows < sequence.n_pending:  # a prompt with more chunks to come
                self._keep_rows(sequence, rows_H, work.n_rows)
                continue
            scores = slice(scored, scored + len(block.tokens) + 1)
            scored = scores.stop
            logits_RV = done.logits_RV[scores]
            verdict = decide(sequence, block, logits_RV, done.best_R[scores])
            self._keep_rows(sequence, rows_H, work.n_rows + verdict.n_accepted)
            accepted[sequence.id] = verdict.n_accepted
            events += self._commit(sequence, block, verdict, logits_RV)
        if view is not None and self.drafter is not None:
            self.drafter.commit(view, [accepted[s.id] for s in view.sequences])
        self._clock(plan, sequences, start, drafted, forwarded)
        return events

    def _propose(
        self, plan: StepPlan, sequences: Mapping[str, Sequence]
    ) -> tuple[TargetView | None, dict[str, Block]]:
        work = [w for w in plan.work if w.n_drafts > 0]
        if not work or self.drafter is None:
            return None, {}
        views = []
        for w in work:
            s = sequences[w.sequence]
            views.append(SequenceView(s.id, s.tokens, s.request.params, s.seed, self.hidden[s.id]))
        view = TargetView(views, self.memory, self.target.model.embed, self.target.ops)
        draft = self.drafter.propose(view, max(w.n_drafts for w in work))
        blocks = {}
        for b, w in enumerate(work):
            n = min(w.n_drafts, draft.lengths[b])
            probs = draft.probs[b]
            block = Block(draft.tokens_BK[b, :n].tolist(), None if probs is None else probs[:n])
            blocks[w.sequence] = admissible(sequences[w.sequence], block)
        return view, blocks

    def _forward(
        self, plan: StepPlan, sequences: Mapping[str, Sequence], blocks: Mapping[str, Block]
    ) -> Pass:
        tokens: list[int] = []
        wanted: list[int] = []
        spans = []
        for w in plan.work:
            sequence = sequences[w.sequence]
            at, first = sequence.n_computed, len(tokens)
            drafts = blocks.get(w.sequence, NO_DRAFTS).tokens
            tokens += sequence.tokens[at : at + w.n_rows] + drafts
            spans.append(Span(w.sequence, first, len(tokens) - first))
            if w.n_rows == sequence.n_pending:
                wanted += range(first + w.n_rows - 1, len(tokens))
            self.memory.reserve(w.sequence, len(tokens) - first)
        done = self.target_pass.run(tokens, spans, wanted)
        best_R1 = done.logits_RV.gather(-1, done.best_R[:, None].long()) if wanted else None
        if best_R1 is not None and not bool(torch.isfinite(best_R1).all()):
            raise OutdraftError(
                "the model's logits are not finite", "try --dtype float32, or check the weights"
            )
        return done

    def _keep_rows(self, sequence: Sequence, rows_H: Tensor, n_kept: int) -> None:
        """Roll the memory back to the rows that belong to committed tokens."""
        self.memory.rollback(sequence.id, rows_H.shape[0] - n_kept)
        self.memory.trim(sequence.id)
        sequence.n_computed += n_kept
        self.hidden[sequence.id] = rows_H[n_kept - 1].clone()

    def _commit(
        self, sequence: Sequence, block: Block, verdict: Verdict, logits_RV: Tensor
    ) -> list[TokenEvent]:
        tokens = [*block.tokens[: verdict.n_accepted], verdict.token]
        logprobs = reported(sequence, tokens, logits_RV)
        events = sequence.keep(tokens, verdict.n_accepted, logprobs)
        sequence.stats.count(len(block.tokens), verdict.n_accepted, len(events))
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
