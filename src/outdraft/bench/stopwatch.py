"""Where the time of a pass goes: operations that are timed call by call, a clock, and quiet.

Not here: what is measured (shape.py).
"""

import time
from collections.abc import Callable
from typing import Any

from outdraft.ops.base import Ops

PARTS = {
    "linear": "linear",
    "experts": "linear",
    "attention": "attention",
    "norm_rope": "attention",
    "write_heads": "attention",
    "short_conv": "recurrence",
    "delta_rule": "recurrence",
    "gated_norm": "recurrence",
    "scan": "recurrence",
    "group_norm": "recurrence",
}


class Stopwatch:
    """Operations that add up the time of their calls by name."""

    def __init__(self, ops: Ops) -> None:
        """Over these operations."""
        self.ops = ops
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        """An operation, timed."""
        call = getattr(self.ops, name)
        if not callable(call):
            return call

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **options)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed

    def by_part(self) -> dict[str, float]:
        """Seconds of linear, attention, recurrence where there is one, and all others."""
        total = {"linear": 0.0, "attention": 0.0, "norms and the rest": 0.0}
        for name, seconds in self.seconds.items():
            part = PARTS.get(name, "norms and the rest")
            total[part] = total.get(part, 0.0) + seconds
        return total


def settle(limit_s: float = 2.0, step_s: float = 0.004, idle_share: float = 0.1) -> bool:
    """Wait until no thread of this process works or spins; whether that came within the limit.

    Workers without work spin before they sleep, 0.5 ms ours, up to hundreds those of others, and
    would take the cores from whoever is measured next.
    """
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(step_s)
        if time.process_time() - used < idle_share * (time.perf_counter() - start):
            return True
    return False


def clock(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start
