"""What the engine's process counts for /metrics and for the page, as plain numbers.

Here: counts since the start, rates of the last seconds, and what is loaded, in words. Not here:
their names in Prometheus (metrics.py).
"""

import time
from collections import deque
from dataclasses import asdict
from typing import Any

from outdraft.engine.engine import LLM
from outdraft.engine.sequence import Sequence
from outdraft.request import TokenEvent
from outdraft.server.errors import public

WINDOW_S = 3.0
"""Rates are over so many last seconds with work."""


class Gauges:
    """Counts over one engine."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.draft_s = self.verify_s = 0.0
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
        """A request has ended: its seconds of drafting and of passes count from now on."""
        self.draft_s += sequence.times.draft_s
        self.verify_s += sequence.times.forward_s

    def read(self, now: float) -> dict[str, Any]:
        """All of it."""
        stats = self.llm.stats()
        drafts = stats.drafts
        return {
            "running": stats.n_running,
            "waiting": stats.n_waiting,
            "preempted": stats.n_preempted,
            "tok_s": self._rate(now),
            "tokens": self.n_tokens,
            "prompt_tokens": stats.n_prompt_tokens,
            "cached_tokens": stats.n_cached_tokens,
            "passes": drafts.n_passes,
            "drafted": drafts.drafted,
            "accepted": drafts.accepted,
            "tokens_per_pass": drafts.tokens_per_pass,
            "acceptance_by_position": drafts.acceptance_by_position,
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
            "pages": {
                "free": sum(p.free for p in stats.pages.values()),
                "used": sum(p.used for p in stats.pages.values()),
                "cached": sum(p.cached for p in stats.pages.values()),
            },
            "faults": {
                "drafter": stats.faults.n_drafter,
                "pass": stats.faults.n_pass,
                "request": stats.faults.n_request,
            },
            "drafting": stats.why_not_drafting is None,
            "draft_n_now": stats.draft_length,
            "draft_reason": public(stats.why_not_drafting or self.llm.pairing.reason, names=True),
            "speedup_measured": stats.speed_up,
            "learn": None if stats.learn is None else asdict(stats.learn),
        }

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
        "draft_reason": public(llm.pairing.reason, names=True),
        "max_sequences": llm.config.max_sequences,
        "hidden_size": target.config.hidden_size,
        "learning": llm.config.learn,
    }
