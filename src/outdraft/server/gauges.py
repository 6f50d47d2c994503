"""What the engine's process counts for /metrics and for the page, as plain numbers.

Here: counts since the start, rates of the last seconds, and what is loaded, in words. Not here:
their names in Prometheus (metrics.py).
"""

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

from outdraft.engine.engine import LLM
from outdraft.engine.replay import LearnStats
from outdraft.engine.sequence import Sequence
from outdraft.request import TokenEvent
from outdraft.server.errors import public

WINDOW_S = 3.0
"""Rates are over so many last seconds with work."""


@dataclass(slots=True)
class Aborts:
    """Requests in progress that were ended, and how many steps they were in meanwhile.

    Attributes:
        late_steps: that began after the order to end a request had arrived, all together.
        left: how many were ended because their connection closed.
        left_steps: that began after it had closed, all together.
        left_steps_max: the most for one request.
        left_ms_max: the longest from a connection's end to the end of its request.
    """

    n: int = 0
    late_steps: int = 0
    left: int = 0
    left_steps: int = 0
    left_steps_max: int = 0
    left_ms_max: float = 0.0


class Gauges:
    """Counts over one engine."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.draft_s = self.verify_s = 0.0
        self.n_tokens = 0
        self.aborts = Aborts()
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
        """A request has ended: its seconds of drafting and of passes are kept."""
        self.draft_s += sequence.times.draft_s
        self.verify_s += sequence.times.forward_s

    def abort(self, n_late: int, left_at: float | None, step_starts: Seq[float]) -> None:
        """A request was ended before its time.

        Args:
            n_late: steps that began after the order to end it had arrived.
            left_at: when its connection closed, if that is why (time.monotonic).
            step_starts: when the last steps began, in order.
        """
        aborts = self.aborts
        aborts.n += 1
        aborts.late_steps += n_late
        if left_at is None:
            return
        n_steps = sum(started > left_at for started in step_starts)
        aborts.left += 1
        aborts.left_steps += n_steps
        aborts.left_steps_max = max(aborts.left_steps_max, n_steps)
        aborts.left_ms_max = max(aborts.left_ms_max, (time.monotonic() - left_at) * 1e3)

    def read(self, now: float) -> dict[str, Any]:
        """All of it."""
        stats, scheduler = self.llm.stats(), self.llm.scheduler
        times = [s.times for s in (*scheduler.running.values(), *scheduler.waiting)]
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
            "draft_s": self.draft_s + sum(t.draft_s for t in times),
            "verify_s": self.verify_s + sum(t.forward_s for t in times),
            "aborts": asdict(self.aborts),
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
            "learn": None if stats.learn is None else _learning(stats.learn),
        }

    def _rate(self, now: float) -> float:
        """Tokens a second of the last seconds."""
        recent = [(t, n) for t, n in self._times if now - t <= WINDOW_S]
        if len(recent) < 2:
            return 0.0
        span = recent[-1][0] - recent[0][0]
        return sum(n for _, n in recent[1:]) / span if span > 0 else 0.0


def _learning(stats: LearnStats) -> dict[str, Any]:
    """Without paths: this reaches clients."""
    return {**asdict(stats), "last_error": public(stats.last_error)}


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
