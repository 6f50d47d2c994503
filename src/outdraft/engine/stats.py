"""What the engine says of itself: who is in progress, memory, what drafting gains.

Here: counts that grow with the steps, and a snapshot of them. Not here: one request's own counts
(speculate/stats.py), how they are published (server/).
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from outdraft.cache.books import GroupBooks
from outdraft.cache.states import StateBooks
from outdraft.engine.plan import StepPlan
from outdraft.engine.replay import LearnStats
from outdraft.engine.scheduler import Scheduler
from outdraft.engine.sequence import Sequence
from outdraft.errors import OutdraftError
from outdraft.request import FinishReason
from outdraft.speculate.stats import DraftStats


@dataclass(slots=True)
class Faults:
    """What went wrong since the start, and was contained."""

    n_drafter: int = 0
    n_pass: int = 0
    n_request: int = 0
    last_drafter_error: str = ""


@dataclass(slots=True)
class Counters:
    """Sums since the start. `n_cached_tokens` of the prompts' came from the prefix cache.

    A prompt counts when its request begins, once, however often it is preempted.
    """

    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    drafts: DraftStats = field(default_factory=DraftStats)
    finished: Counter[FinishReason] = field(default_factory=Counter)
    draft_length: float = 0.0

    def plan(self, plan: StepPlan, n_drafted: int) -> None:
        """A step runs as planned, with so many drafts in all."""
        n_decoding = sum(w.n_rows == 1 for w in plan.work)
        if n_decoding:
            self.draft_length = n_drafted / n_decoding

    def begin(self, sequence: Sequence) -> None:
        """A request has come into progress and its memory is open."""
        if sequence.n_preempted == 0:
            self.n_prompt_tokens += len(sequence.request.prompt_tokens)
            self.n_cached_tokens += sequence.n_cached

    def end(self, sequence: Sequence) -> None:
        """A request has ended."""
        assert sequence.finish_reason is not None
        self.finished[sequence.finish_reason] += 1


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages of a group of layers: free + used + cached = total.

    `used` are held by a request in progress, `cached` by the prefix cache alone.
    """

    total: int
    free: int
    used: int
    cached: int

    @classmethod
    def of(cls, group: GroupBooks) -> "PageCounts":
        """As they are now."""
        pool = group.pool
        free, cached = pool.n_free, pool.n_idle
        return cls(pool.n_pages, free, pool.n_pages - free - cached, cached)


@dataclass(frozen=True, slots=True)
class StateCounts:
    """States of recurrent layers. `kept` are in the prefix cache, of at most `kept_max`."""

    total: int
    free: int
    kept: int
    kept_max: int

    @classmethod
    def of(cls, books: StateBooks) -> "StateCounts":
        """As they are now."""
        pool = books.pool
        return cls(pool.n_pages, pool.n_free, sum(pool.cached), books.n_kept)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine.

    Attributes:
        n_running: requests in progress.
        n_waiting: requests in the queue, those that were preempted included.
        max_running: requests that may be in progress at once.
        n_admitted: times a request came into progress, since the start like all counts below.
        n_preempted: times one gave its memory back.
        n_refused: requests refused because the queue was full.
        finished: requests that have ended, by reason.
        pages: key/value memory by group of layers.
        page_tokens: positions in a page.
        n_prompt_tokens: tokens of prompts, looked up in the prefix cache.
        n_cached_tokens: how many of them were found there.
        drafts: passes, emitted tokens, and drafts and accepted ones by position.
        drafter: its name; None without one.
        draft_length: drafts a decoding request brought to the last step that decoded, on average.
        why_not_drafting: why nothing is drafted now; None while drafts are made or may be.
        speed_up: decoding with the drafts of late over the plain decoding that was measured for
            the same batches, in tokens per second; None while that is not known.
        faults: what went wrong and was contained.
        states: of recurrent layers; None where the model has none.
        learn: how learning goes; None where it is off.
    """

    n_running: int
    n_waiting: int
    max_running: int
    n_admitted: int
    n_preempted: int
    n_refused: int
    finished: dict[FinishReason, int]
    pages: dict[str, PageCounts]
    page_tokens: int
    n_prompt_tokens: int
    n_cached_tokens: int
    drafts: DraftStats
    drafter: str | None
    draft_length: float
    why_not_drafting: str | None
    speed_up: float | None
    faults: Faults
    states: StateCounts | None = None
    learn: LearnStats | None = None

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that came from the prefix cache."""
        return self.n_cached_tokens / self.n_prompt_tokens if self.n_prompt_tokens else 0.0


def snapshot(
    scheduler: Scheduler,
    counters: Counters,
    faults: Faults,
    *,
    drafter: str | None,
    reason: str,
    chosen: bool,
    speed_up: float | None,
    learn: LearnStats | None = None,
) -> EngineStats:
    """The engine as it is between two steps. Any thread may ask; counts may be a step apart.

    Args:
        drafter: its name, None without one; then `reason` says why.
        chosen: draft lengths are chosen by what pays.
    """
    why = None
    if drafter is None:
        why = reason
    elif scheduler.n_draft_max == 0:
        why = "drafting is off: the draft length is set to 0"
    elif chosen and counters.draft_length == 0 and counters.drafts.n_passes:
        why = "drafting does not pay now: plain decoding is measured to be faster"
    stats, states = counters.drafts, scheduler.books.states
    return EngineStats(
        n_running=len(scheduler.running),
        n_waiting=len(scheduler.waiting),
        max_running=scheduler.max_sequences,
        n_admitted=scheduler.stats.n_admitted,
        n_preempted=scheduler.stats.n_preempted,
        n_refused=scheduler.stats.n_refused,
        finished=dict(counters.finished),
        pages={name: PageCounts.of(group) for name, group in scheduler.books.groups.items()},
        page_tokens=scheduler.books.page_slots,
        n_prompt_tokens=counters.n_prompt_tokens,
        n_cached_tokens=counters.n_cached_tokens,
        drafts=replace(stats, drafted=list(stats.drafted), accepted=list(stats.accepted)),
        drafter=drafter,
        draft_length=counters.draft_length,
        why_not_drafting=why,
        speed_up=speed_up,
        faults=replace(faults),
        states=None if states is None else StateCounts.of(states),
        learn=learn,
    )


def not_finite() -> OutdraftError:
    """The fault of a pass that gave no number."""
    return OutdraftError(
        "the model's logits are not finite", "try --dtype float32, or check the weights"
    )


def describe(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}"
