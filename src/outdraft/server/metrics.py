"""What /metrics says: vLLM's shapes under our prefix, and what drafting does.

No label comes from a client: routes are those of the application, everything else is `other`.
Counts of the engine are those of its process, and begin anew when it is restarted.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from outdraft.server.engine import Engine, State
from outdraft.server.guard import Visit
from outdraft.server.jobs import End, Jobs
from outdraft.server.learn_metrics import learning

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry as Registry

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_COUNTS = (
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts."),
    ("prompt_tokens_cached", "cached_tokens", "Tokens of prompts that were not computed again."),
    ("generation_tokens", "tokens", "Tokens written."),
    ("num_preemptions", "preempted", "Requests that gave their memory up for a while."),
    ("target_passes", "passes", "Blocks that the target verified; plain steps count, too."),
    ("spec_decode_draft_seconds", "draft_s", "Seconds of drafting, by request."),
    ("spec_decode_verify_seconds", "verify_s", "Seconds of the target's passes, by request."),
)


class Metrics:
    """One registry; its own, so that nothing else writes into it."""

    def __init__(self, engine: Engine, jobs: Jobs, model: str) -> None:
        self.registry: Registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, jobs, model))
        self.requests = Counter(
            "outdraft_http_requests",
            "Answers, by route and status.",
            ("route", "status"),
            registry=self.registry,
        )
        self.finished = Counter(
            "outdraft_request_success",
            "Completions that ended, by reason.",
            ("finished_reason",),
            registry=self.registry,
        )
        self.duration = Histogram(
            "outdraft_e2e_request_latency_seconds",
            "From a request to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "outdraft_time_to_first_token_seconds",
            "Of the engine's work on a prompt, up to the first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "outdraft_time_per_output_token_seconds",
            "Decoding, divided by the tokens after the first.",
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )

    def visited(self, visit: Visit, seconds: float) -> None:
        """A request was answered."""
        route = visit.route or "other"
        self.requests.labels(route, str(visit.status or 499)).inc()
        self.duration.labels(route).observe(seconds)

    def ended(self, visit: Visit, end: End) -> None:
        """A completion ended."""
        timings = end.usage.timings
        self.finished.labels(end.reason.value).inc()
        self.first_token.observe(timings["prompt_ms"] / 1e3)
        if end.usage.n_completion > 1:
            self.per_token.observe(timings["predicted_ms"] / 1e3 / (end.usage.n_completion - 1))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the newest report of the engine when it is asked."""

    def __init__(self, engine: Engine, jobs: Jobs, model: str) -> None:
        self.engine = engine
        self.jobs = jobs
        self.model = model

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        stats, engine = self.engine.snapshot(), self.engine
        yield _gauge("up", "1 while the engine answers.", engine.state is State.READY)
        yield _count(
            "engine_restarts", "Times the engine's process was restarted.", engine.n_restarts
        )
        yield _gauge("requests_in_flight", "Requests taken on.", self.jobs.n_in_flight)
        yield _gauge("num_requests_running", "Requests in a batch.", stats.get("running", 0))
        yield _gauge("num_requests_waiting", "Requests that wait.", stats.get("waiting", 0))
        yield _gauge("generation_tokens_per_second", "Of the last seconds.", stats.get("tok_s", 0))
        for name, key, text in _COUNTS:
            yield _count(name, text, stats.get(key, 0))
        yield from _aborts(stats)
        yield from _pages(stats.get("pages", {}))
        yield from _drafts(stats, engine.info)
        if stats.get("learn"):
            yield from learning(stats["learn"])
        faults = CounterMetricFamily("outdraft_faults", "Failures, contained.", labels=("stage",))
        for stage, n in stats.get("faults", {}).items():
            faults.add_metric((stage,), n)
        yield faults


def _aborts(stats: dict[str, Any]) -> Iterator[Metric]:
    aborts = stats.get("aborts", {})
    yield _count("engine_steps", "Steps of the engine.", stats.get("steps", 0))
    for name, key, text in (
        ("aborts", "n", "Requests in progress that were ended."),
        ("abort_late_steps", "late_steps", "Steps they were in after the order to end them."),
        ("disconnects", "left", "Requests ended because their connection closed."),
        ("disconnect_steps", "left_steps", "Steps they were in after it had closed."),
    ):
        yield _count(name, text, aborts.get(key, 0))


def _drafts(stats: dict[str, Any], info: dict[str, Any]) -> Iterator[Metric]:
    drafted, accepted = stats.get("drafted", []), stats.get("accepted", [])
    name = "spec_decode_num_"
    yield _count(name + "drafts", "Blocks with drafts.", drafted[0] if drafted else 0)
    yield _count(name + "draft_tokens", "Tokens drafted and verified.", sum(drafted))
    yield _count(name + "accepted_tokens", "Drafts that the target accepted.", sum(accepted))
    for kind, counts, text in (
        ("draft", drafted, "Drafts, by position in the block."),
        ("accepted", accepted, "Accepted drafts, by position in the block."),
    ):
        family = CounterMetricFamily(
            f"outdraft_{name}{kind}_tokens_per_pos", text, labels=("position",)
        )
        for position, n in enumerate(counts):
            family.add_metric((str(position),), n)
        yield family
    if stats.get("draft_n_now") is not None:
        yield _gauge("spec_decode_draft_length", "Drafts a step now.", stats["draft_n_now"])
    if stats.get("speedup_measured") is not None:
        yield _gauge("spec_decode_speedup", "Measured, against plain.", stats["speedup_measured"])
    why = GaugeMetricFamily(
        "outdraft_spec_decode_info", "Which drafter, and why.", labels=("drafter", "reason")
    )
    reason = str(stats.get("draft_reason") or info.get("draft_reason") or "")
    why.add_metric((str(info.get("drafter") or "off"), reason), 1)
    yield why


def _pages(pages: dict[str, int]) -> Iterator[Metric]:
    family = GaugeMetricFamily("outdraft_kv_pages", "Pages of keys and values.", labels=("state",))
    for state in ("free", "used", "cached"):
        family.add_metric((state,), pages.get(state, 0))
    yield family
    total = sum(pages.get(s, 0) for s in ("free", "used", "cached"))
    used = pages.get("used", 0) / total if total else 0.0
    yield _gauge("kv_cache_usage_perc", "Share of the pages that requests hold, 0 to 1.", used)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"outdraft_{name}", text, value=float(value))


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"outdraft_{name}", text, value=float(value))
