"""Doing one step: propose, forward, verify, roll back, commit.

The plan says what runs; the tensors live here. One path for plain decoding (no drafts), drafting
and prompts. Not here: who runs (scheduler.py), requests and text (engine.py).

Shapes: B sequences, T rows, R rows with logits, K draft length, V vocabulary, H hidden size.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.cache.memory import Memory, Span
from outdraft.engine.plan import StepPlan, Work
from outdraft.engine.sequence import Sequence
from outdraft.models.registry import Target
from outdraft.ops.reference import TILE_ROWS, pad_rows
from outdraft.request import TokenEvent
from outdraft.sampling.logits import distribution, greedy
from outdraft.sampling.sampler import Purpose, uniforms
from outdraft.speculate.drafter import Drafter, SequenceView, TargetView
from outdraft.speculate.verify import Verdict, verify_greedy, verify_sampled


@dataclass(slots=True)
class Block:
    """The drafts of one sequence in one step: ids, and the distributions they were drawn from."""

    tokens: list[int]
    probs_KV: Tensor | None = None


class Runner:
    """Runs steps of one target, with or without a drafter."""

    def __init__(self, target: Target, drafter: Drafter | None, memory: Memory) -> None:
        self.target = target
        self.drafter = drafter
        self.memory = memory
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
        hidden_TH = self._forward(plan, sequences, blocks)
        ready = [w for w in plan.work if w.n_rows == sequences[w.sequence].n_pending]
        logits = self._logits(plan, ready, hidden_TH)
        forwarded = time.perf_counter()
        events, accepted = [], {}
        first = 0
        for work in plan.work:
            sequence = sequences[work.sequence]
            n_rows = work.n_rows + work.n_drafts
            rows_H = hidden_TH[first : first + n_rows]
            first += n_rows
            self.memory.advance(sequence.id, n_rows)
            if work.sequence not in logits:  # a prompt with more chunks to come
                self._keep_rows(sequence, rows_H, work.n_rows)
                continue
            block = blocks.get(work.sequence, Block([]))
            verdict = self._verify(sequence, block, logits[work.sequence])
            self._keep_rows(sequence, rows_H, work.n_rows + verdict.n_accepted)
            accepted[sequence.id] = verdict.n_accepted
            events += self._commit(sequence, block, verdict, logits[work.sequence])
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
        view = TargetView(views, self.memory, self.target.model.embed)
        draft = self.drafter.propose(view, max(w.n_drafts for w in work))
        blocks = {}
        for b, w in enumerate(work):
            n = min(w.n_drafts, draft.lengths[b])
            probs = draft.probs[b]
            blocks[w.sequence] = Block(
                draft.tokens_BK[b, :n].tolist(), None if probs is None else probs[:n]
            )
        return view, blocks

    def _forward(
        self, plan: StepPlan, sequences: Mapping[str, Sequence], blocks: Mapping[str, Block]
    ) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        spans = []
        for w in plan.work:
            sequence = sequences[w.sequence]
            at = sequence.n_computed
            rows = sequence.tokens[at : at + w.n_rows] + blocks.get(w.sequence, Block([])).tokens
            spans.append(Span(w.sequence, len(tokens), len(rows)))
            tokens += rows
            positions += range(at, at + len(rows))
            self.memory.reserve(w.sequence, len(rows))
        # Padded once here, so that no operation has to.
        tokens_T = pad_rows(torch.tensor(tokens), TILE_ROWS)
        positions_T = pad_rows(torch.tensor(positions), TILE_ROWS)
        attend = self.memory.bind(spans, self.target.ops)
        return self.target.model.forward(tokens_T, positions_T, attend)

    def _logits(self, plan: StepPlan, ready: list[Work], hidden_TH: Tensor) -> dict[str, Tensor]:
        """fp32 logits [K + 1, V] of every sequence that has nothing pending after its rows."""
        if not ready:
            return {}
        wanted: list[int] = []
        row = 0
        names = {w.sequence for w in ready}
        for w in plan.work:
            if w.sequence in names:
                wanted += range(row + w.n_rows - 1, row + w.n_rows + w.n_drafts)
            row += w.n_rows + w.n_drafts
        chosen = pad_rows(hidden_TH[torch.tensor(wanted)], TILE_ROWS)
        logits_RV = self.target.model.logits(chosen)[: len(wanted)]
        parts = torch.split(logits_RV, [w.n_drafts + 1 for w in ready])
        return {w.sequence: part for w, part in zip(ready, parts, strict=True)}

    def _verify(self, sequence: Sequence, block: Block, logits_RV: Tensor) -> Verdict:
        params, drafts = sequence.request.params, torch.tensor(block.tokens, dtype=torch.int64)
        # A drafter may have proposed fewer tokens than planned.
        logits_RV = logits_RV[: len(block.tokens) + 1]
        if params.greedy:
            return verify_greedy(drafts, greedy(logits_RV))
        n = len(sequence.tokens)
        positions = range(n, n + len(block.tokens))
        accept_K = [uniforms(sequence.seed, p, Purpose.ACCEPT)[0] for p in positions]
        final_R = [
            uniforms(sequence.seed, p, Purpose.TARGET)[0] for p in range(n, positions.stop + 1)
        ]
        p_RV = distribution(logits_RV, params)
        return verify_sampled(drafts, block.probs_KV, p_RV, accept_K, final_R)

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
        events = sequence.keep(tokens, verdict.n_accepted)
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
