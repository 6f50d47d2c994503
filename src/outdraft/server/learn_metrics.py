"""Learning while serving, for /metrics; nothing where it is off. The rest is in metrics.py."""

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

STATES = ("waiting", "learning", "paused", "restarting", "failed")
_COUNTS = (
    ("steps", "n_steps", "Updates of the weights in training."),
    ("cpu_seconds", "seconds", "Processor time of the learner, while no request ran."),
    ("candidates", "n_candidates", "Drafters compared with the one in use, on texts held out."),
    ("refused", "n_refused", "Of those, the ones that were not better, or did not load."),
    ("swaps", "n_swaps", "Times a learned drafter came into use."),
    ("rollbacks", "n_rollbacks", "Times the drafter before it came back."),
    ("restarts", "n_restarts", "Times the learner died and was started again."),
)
_GAUGES = (
    ("version", "version", "Which drafter is in use; 0 is the one that was loaded."),
    ("buffer_texts", "n_texts", "Finished requests that are kept to learn from."),
    ("buffer_tokens", "n_tokens", "Their tokens."),
    ("buffer_bytes", "n_bytes", "Their memory."),
)


def learning(stats: dict[str, Any]) -> Iterator[Metric]:
    """Of a report of the engine."""
    state = GaugeMetricFamily("outdraft_learn_state", "1 for the present one.", labels=("state",))
    for name in STATES:
        state.add_metric((name,), float(stats["state"] == name))
    yield state
    for name, key, text in _COUNTS:
        yield CounterMetricFamily(f"outdraft_learn_{name}", text, value=stats[key])
    for name, key, text in _GAUGES:
        yield GaugeMetricFamily(f"outdraft_learn_{name}", text, value=stats[key])
    compared = GaugeMetricFamily(
        "outdraft_learn_tokens_per_pass",
        "Of the last comparison, on texts held out: the drafter in use then, and the new one.",
        labels=("drafter",),
    )
    for name in ("live", "candidate"):
        if stats[name] is not None:
            compared.add_metric((name,), stats[name])
    yield compared
