"""What a pass and a draft round cost here, measured once on scratch sequences when a model loads.

Passes of 1 to as many rows as a batch may have, rounds for 1 to as many sequences, in a fraction of
a second; what a slow model leaves unmeasured is interpolated, and learned as it runs. Memory is
left as it was. Not here: what is made of it (speculate/costs.py).
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outdraft.cache.memory import Memory, Span
from outdraft.engine.graphs import TargetPass
from outdraft.engine.lengths import AutoLengths
from outdraft.models.registry import Target
from outdraft.ops.record import Recordable
from outdraft.request import SamplingParams
from outdraft.speculate.drafter import Drafter, SequenceView, TargetView
from outdraft.speculate.length import LengthController

SCRATCH = "cost measurement"
CONTEXT = 2
BUDGET_S = 0.6
GRAPH_BUDGET_S = 6.0  # where a call runs and is captured before it can be replayed
REPEATS = 3
SLOW_S = 0.02  # of a call that is disturbed little, and repeated once
STRIDE = 7919  # tokens that differ, since equal ones would go to the same experts


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured. Nothing runs on it meanwhile."""

    target: Target
    target_pass: TargetPass
    drafter: Drafter
    memory: Memory


@torch.inference_mode()
def measure_costs(
    lengths: AutoLengths,
    bench: Bench,
    n_draft_max: int,
    max_sequences: int,
    *,
    budget_s: float | None = None,
) -> int:
    """Fill the controllers' costs; how many sizes of a pass were measured.

    Whatever fails here is left for requests to report.
    """
    n_measured, opened, hidden = 0, list[str](), list[Tensor]()
    if bench.target.ctx_size < CONTEXT + n_draft_max + 2:
        return 0
    try:
        _open(bench, opened, hidden, 1)  # a GPU's kernels are compiled here
        deadline = time.perf_counter() + (budget_s or _budget_s(bench))
        for n_rows in _sizes(n_draft_max, max_sequences * (n_draft_max + 1)):
            if n_rows > n_draft_max + 1 and len(opened) == 1:
                _open(bench, opened, hidden, max_sequences)
            if n_rows > len(opened) * (n_draft_max + 1):
                break
            pass_s = _measure(partial(_verify, bench, opened, n_rows), deadline)
            if pass_s is None:
                break
            for controller, _ in _kinds(lengths):
                controller.costs.observe_pass(n_rows, pass_s)
            n_measured += 1
            if n_rows == n_draft_max + 1:  # the two ends of one sequence first
                _measure_rounds(lengths, bench, opened, hidden[:1], n_draft_max, deadline)
        for n in _sizes(0, len(opened))[1:]:
            _measure_rounds(lengths, bench, opened, hidden[:n], n_draft_max, deadline)
    except Exception:
        return n_measured
    finally:
        for name in opened:
            bench.memory.close(name)
            with suppress(Exception):
                bench.drafter.close(name)
    return n_measured


def _budget_s(bench: Bench) -> float:
    ops = bench.target.ops
    return GRAPH_BUDGET_S if isinstance(ops, Recordable) and ops.warms_up else BUDGET_S


def _kinds(lengths: AutoLengths) -> list[tuple[LengthController, SamplingParams]]:
    kinds = [(lengths.likeliest, SamplingParams())]
    if lengths.sample_drafts:
        kinds.append((lengths.drawn, SamplingParams(temperature=1.0)))
    return kinds


def _sizes(n_draft_max: int, most: int) -> list[int]:
    """Rows of one sequence: plain, longest, those between; then half as many again each time."""
    first = [1, n_draft_max + 1, *range(2, n_draft_max + 1)]
    sizes = list(dict.fromkeys(n for n in first if n <= most))
    n = max(sizes)
    while n < most:
        n = min(max(n + 1, n * 4 // 3), most)
        sizes.append(n)
    return sizes


def _measure_rounds(
    lengths: AutoLengths,
    bench: Bench,
    names: list[str],
    hidden: list[Tensor],
    n_draft_max: int,
    deadline: float,
) -> None:
    """Draft rounds of these sequences, of one step and of the most."""
    for controller, params in _kinds(lengths):
        views = [
            SequenceView(name, _tokens(CONTEXT + 1), params, 0, hidden_H)
            for name, hidden_H in zip(names, hidden, strict=False)
        ]
        view = TargetView(views, bench.memory, bench.target.model.embed, bench.target.ops)
        for depth in dict.fromkeys((n_draft_max, 1)):
            draft_s = _measure(partial(bench.drafter.propose, view, depth), deadline)
            if draft_s is None:
                return
            controller.costs.rounds.set(len(names), depth, draft_s)


def _tokens(n: int) -> list[int]:
    return list(range(n))


def _open(bench: Bench, opened: list[str], hidden: list[Tensor], n: int) -> None:
    """Begin scratch sequences, n in all, as far as memory has pages; they are read in one pass."""
    memory, first = bench.memory, len(opened)
    need = memory.books.worst(bench.memory.books.page_slots)
    pools = {name: group.pool for name, group in memory.books.groups.items()}
    while len(opened) < n and all(pools[name].n_free >= 2 * need[name] for name in pools):
        name = f"{SCRATCH} {len(opened)}"
        memory.open(name)
        opened.append(name)
        bench.drafter.open(name)
        memory.reserve(name, CONTEXT)
    new = opened[first:]
    if new:
        spans = [Span(name, i * CONTEXT, CONTEXT) for i, name in enumerate(new)]
        newest = [(i + 1) * CONTEXT - 1 for i in range(len(new))]
        done = bench.target_pass.run(_tokens(CONTEXT) * len(new), spans, newest)
        hidden += done.hidden_TH[newest].unbind()
    for name in new:
        memory.advance(name, CONTEXT)


def _verify(bench: Bench, names: list[str], n_rows: int) -> None:
    """A pass of so many rows; not counted by `advance`, so the next one overwrites it."""
    n = min(len(names), n_rows)
    spans, start = [], 0
    for i, name in enumerate(names[:n]):
        end = n_rows * (i + 1) // n
        bench.memory.reserve(name, end - start)
        spans.append(Span(name, start, end - start))
        start = end
    tokens = [i * STRIDE % bench.target.config.vocab_size for i in range(n_rows)]
    bench.target_pass.run(tokens, spans, list(range(n_rows)))


def _measure(call: Callable[[], object], deadline: float) -> float | None:
    """Seconds of a call after its first time; None where the time left does not allow it."""
    start = time.perf_counter()
    call()  # records
    first_s = time.perf_counter() - start
    repeats = REPEATS if first_s < SLOW_S else 1
    if time.perf_counter() + repeats * first_s > deadline:
        return None
    times: list[float] = []
    while len(times) < REPEATS and (not times or times[-1] < SLOW_S):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)  # what disturbs a measurement only adds to it
