"""What the engine's process counts for /metrics and for the page, as plain numbers.

Here: counts since the start, rates of the last seconds, and what is loaded, in words. Not here:
their names in Prometheus (metrics.py).
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from outdraft.engine.engine import LLM
from outdraft.engine.sequence import Sequence
from outdraft.request import TokenEvent
from outdraft.speculate.stats import DraftStats

WINDOW_S = 3.0
"""Rates are over so many last seconds with work."""


@dataclass(slots=True)
class _Totals:
    """Of requests that have ended."""

    draft: DraftStats = field(default_factory=DraftStats)
    draft_s: float = 0.0
    verify_s: float = 0.0
    n_prompt: int = 0
    n_cached: int = 0

    def add(self, sequence: Sequence) -> None:
        """A request's own."""
        self.draft.merge(sequence.stats)
        self.draft_s += sequence.times.draft_s
        self.verify_s += sequence.times.forward_s
        self.n_prompt += len(sequence.request.prompt_tokens)
        self.n_cached += sequence.n_cached


class Gauges:
    """Counts over one engine."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.ended = _Totals()
        self.n_tokens = 0
        self._times: deque[tuple[float, int]] = deque()

    def count(self, events: list[TokenEvent]) -> None:
        """Tokens of a step."""
        n = sum(e.token is not None for e in events)
        self.n_tokens += n
        if n:
            now = time.monotonic()
            self._times.append((now, n))
            while now - self._times[0][0] > WINDOW_S:
                self._times.popleft()

    def end(self, sequence: Sequence) -> None:
        """A request has ended."""
        self.ended.add(sequence)

    def read(self, now: float) -> dict[str, Any]:
        """All of it; counts include what is in progress."""
        scheduler = self.llm.scheduler
        totals = _Totals()
        for part in (self.ended.draft, *(s.stats for s in scheduler.running.values())):
            totals.draft.merge(part)
        running = list(scheduler.running.values())
        draft = totals.draft
        draft_s = self.ended.draft_s + sum(s.times.draft_s for s in running)
        verify_s = self.ended.verify_s + sum(s.times.forward_s for s in running)
        pool = self._pages()
        return {
            "running": len(running),
            "waiting": len(scheduler.waiting),
            "preempted": scheduler.stats.n_preempted,
            "tok_s": self._rate(now),
            "tokens": self.n_tokens,
            "prompt_tokens": self.ended.n_prompt
            + sum(len(s.request.prompt_tokens) for s in running),
            "cached_tokens": self.ended.n_cached + sum(s.n_cached for s in running),
            "passes": draft.n_passes,
            "drafted": draft.drafted,
            "accepted": draft.accepted,
            "tokens_per_pass": draft.tokens_per_pass,
            "acceptance_by_position": draft.acceptance_by_position,
            "draft_s": draft_s,
            "verify_s": verify_s,
            "pages": pool,
            "faults": {
                "drafter": self.llm.runner.faults.n_drafter,
                "pass": self.llm.runner.faults.n_pass,
                "request": self.llm.runner.faults.n_request,
            },
            "draft_n_now": None,
            "draft_reason": self.llm.pairing.reason,
            "speedup_measured": None,
        }

    def _pages(self) -> dict[str, int]:
        """Pages of all groups: free, held by requests, and kept for later prompts."""
        free = used = cached = 0
        for group in self.llm.memory.books.groups.values():
            pool = group.pool
            idle = pool.n_available - pool.n_free
            free += pool.n_free
            cached += idle
            used += pool.n_pages - pool.n_available
        return {"free": free, "used": used, "cached": cached}

    def _rate(self, now: float) -> float:
        """Tokens a second of the last seconds."""
        recent = [(t, n) for t, n in self._times if now - t <= WINDOW_S]
        if len(recent) < 2:
            return 0.0
        span = recent[-1][0] - recent[0][0]
        return sum(n for _, n in recent[1:]) / span if span > 0 else 0.0


def describe(llm: LLM) -> dict[str, Any]:
    """What is loaded. No paths: this reaches clients."""
    drafter, target = llm.pairing.drafter, llm.target
    return {
        "ctx_size": llm.ctx_size,
        "vocab_size": target.config.vocab_size,
        "n_params": target.report.n_params,
        "compute": llm.describe(),
        "drafter": None if drafter is None else drafter.name,
        "draft_n_max": llm.pairing.n_draft_max if drafter is not None else 0,
        "draft_reason": llm.pairing.reason,
        "max_sequences": llm.config.max_sequences,
        "hidden_size": target.config.hidden_size,
    }
