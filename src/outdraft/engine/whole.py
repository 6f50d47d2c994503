"""What whole steps of one sequence cost, measured as the engine runs them.

For devices that work beside the host: a plain step is launched before the one before it is read
(ahead.py), so it takes less than its pass and what follows measured apart, and a step with drafts
takes more than its parts. A scratch request is decoded plainly and with every number of drafts,
which also records all that one sequence needs. Not here: costs of batches and of processors, where
the parts of a step follow one another (costs.py).
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from outdraft.engine.costs import CONTEXT, SCRATCH, STRIDE
from outdraft.engine.lengths import AutoLengths
from outdraft.engine.scheduler import SchedulerStats
from outdraft.engine.sequence import Sequence
from outdraft.engine.stats import Counters
from outdraft.ops.record import Recordable
from outdraft.request import SamplingParams

if TYPE_CHECKING:
    from outdraft.engine.engine import LLM

BUDGET_S = 4.0
UNTIMED = 4  # steps until everything is recorded
PLAIN_STEPS = 24  # the host and the device need some to settle into a rhythm
DRAFT_STEPS = 8
GREEDY = SamplingParams(ignore_eos=True)
DRAWN = SamplingParams(ignore_eos=True, temperature=1.0)


@dataclass(frozen=True, slots=True)
class _Whole:
    """Seconds of a step: its draft round, its pass, what else there is until the next begins."""

    draft_s: float
    pass_s: float
    rest_s: float


def works_beside(ops: object) -> bool:
    """Whether the device works beside the host, so that parts of steps say little."""
    return isinstance(ops, Recordable) and ops.warms_up and ops.records_all


def measure_steps(llm: "LLM", lengths: AutoLengths) -> int:
    """Give the controllers the costs of whole steps of one sequence; how many were measured.

    Nothing may be in progress. What fails here is left for requests to report.
    """
    runner, scheduler = llm.runner, llm.scheduler
    counters, stats = runner.counters, scheduler.stats
    runner.counters, scheduler.stats = Counters(), SchedulerStats()
    deadline = time.perf_counter() + BUDGET_S
    n_done = 0
    try:
        for params in (GREEDY, DRAWN) if lengths.sample_drafts else (GREEDY,):
            for k in range(llm.pairing.n_draft_max + 1):
                whole = _decode(llm, params, k, deadline)
                if whole is None:
                    return n_done
                lengths.begin_whole(params, k, whole.draft_s, whole.pass_s, whole.rest_s)
                n_done += 1
    except Exception:
        return n_done
    finally:
        runner.counters, scheduler.stats = counters, stats
    return n_done


def _decode(llm: "LLM", params: SamplingParams, k: int, deadline: float) -> _Whole | None:
    """Steps of a scratch request with k drafts each; None if there was no time or room for them."""
    llm.set_draft_n_max(k)
    vocab = llm.target.config.vocab_size
    prompt = [i * STRIDE % vocab for i in range(min(CONTEXT, llm.ctx_size // 2))]
    sequence = llm.add(prompt, params, cache_salt=SCRATCH)
    try:
        return _timed(llm, sequence, k, deadline)
    finally:
        with suppress(Exception):
            llm.abort(sequence.id)


def _timed(llm: "LLM", sequence: Sequence, k: int, deadline: float) -> _Whole | None:
    found: list[tuple[float, float, float]] = []
    n_steps = DRAFT_STEPS if k else PLAIN_STEPS
    n_untimed = 0
    before = time.perf_counter()
    while len(found) < n_steps:
        draft_s, pass_s = sequence.times.draft_s, sequence.times.forward_s
        n_drafted = sequence.stats.n_drafted
        llm.step()
        now = time.perf_counter()
        if sequence.finish_reason is not None or now > deadline:
            return None
        if sequence.stats.n_passes > 1 and sequence.stats.n_drafted - n_drafted == k:
            n_untimed += 1
            if n_untimed > UNTIMED:
                draft_s = sequence.times.draft_s - draft_s
                pass_s = sequence.times.forward_s - pass_s
                found.append((draft_s, pass_s, now - before - draft_s - pass_s))
        before = now
    return _Whole(*(median(part) for part in zip(*found, strict=True)))
