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
from outdraft.engine.graphs import MAX_RECORDED_ROWS, Pass, TargetPass
from outdraft.engine.lengths import AutoLengths
from outdraft.models.registry import Target
from outdraft.ops.base import PAGE_SLOTS
from outdraft.ops.record import Recordable
from outdraft.request import SamplingParams
from outdraft.speculate.drafter import Drafter, ReadsStates, SequenceView, TargetView
from outdraft.speculate.length import LengthController, is_usual

SCRATCH = "cost measurement"
CONTEXT = 256
BUDGET_S = 0.7
RECORD_S = 0.4
GRAPH_BUDGET_S = 6.0  # where a call runs and is captured before it can be replayed
REPEATS = 2
SLOW_S = 0.02  # of a call that is disturbed little, and repeated once
OWN_CONTEXT = 16  # for drafters that have to read it themselves
DENSE = 4  # of more drafts than this only every other number is measured
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
    start = time.perf_counter()
    opened: list[str] = []
    passes: dict[tuple[int, int], float] = {}
    context = CONTEXT
    if bench.target.ctx_size < 4 * (n_draft_max + 2):
        return 0
    try:
        context = _open(bench, opened, 1)
        if budget_s is None:
            start, budget_s = _begin(bench, opened, start)
        deadline = start + budget_s
        greedy, *drawn = _kinds(lengths)
        measured: list[list[str]] = []
        for n, n_drafts in _batches(n_draft_max, max_sequences):
            if n > len(opened):
                _open(bench, opened, max_sequences)
            names = opened[:n]
            if len(names) < n:
                continue
            for k in n_drafts:
                call = partial(_verify, bench, names, n * (k + 1))
                pass_s = _measure(call, deadline, repeats=1)
                if pass_s is None:
                    return len(passes)
                passes[n, n * (k + 1)] = pass_s
            if names not in measured:
                kinds = [greedy] if measured else [greedy, *drawn]
                _measure_rounds(kinds, bench, names, context, n_draft_max, deadline)
                measured.append(names)
        for (n, n_rows), pass_s in passes.items():  # again, since a disturbance lasts for a while
            call = partial(_verify, bench, opened[:n], n_rows)
            again = _measure(call, deadline, repeats=1)
            passes[n, n_rows] = min(pass_s, again or pass_s)
        for names in measured[1:]:
            _measure_rounds(drawn, bench, names, context, n_draft_max, deadline)
        if time.perf_counter() < deadline:  # not a slow model
            deadline = start + budget_s + RECORD_S
            passes = _record(bench, opened, n_draft_max, context, deadline) | passes
    except Exception:
        return len(passes)
    finally:
        for controller, _ in _kinds(lengths):
            controller.costs.measured_batches(passes, context)
        for name in opened:
            bench.memory.close(name)
            with suppress(Exception):
                bench.drafter.close(name)
    return len(passes)


def _record(
    bench: Bench, names: list[str], n_draft_max: int, context: int, deadline: float
) -> dict[tuple[int, int], float]:
    """Run all sizes once: the first time of a size is slow. What passes cost behind that."""
    found: dict[tuple[int, int], float] = {}
    most = min(MAX_RECORDED_ROWS, len(names) * (n_draft_max + 1))
    for n_rows in filter(is_usual, range(1, most + 1)):
        pass_s = _measure(partial(_verify, bench, names, n_rows), deadline, repeats=1)
        if pass_s is None:
            return found
        found[min(n_rows, len(names)), n_rows] = pass_s
    hidden_H = _verify(bench, names, 1).hidden_TH[0].clone()
    for n in range(1, len(names) + 1):
        view = _view(bench, names[:n], SamplingParams(), context, hidden_H)
        for depth in range(1, n_draft_max + 1):
            if time.perf_counter() > deadline:
                return found
            _give_states(bench, view, hidden_H[None])
            bench.drafter.propose(view, depth)
    return found


def _begin(bench: Bench, names: list[str], start: float) -> tuple[float, float]:
    """When measuring begins and how long it may take; a GPU's kernels are built before."""
    ops = bench.target.ops
    if not (isinstance(ops, Recordable) and ops.warms_up):
        return start, BUDGET_S
    _verify(bench, names, 1)
    return time.perf_counter(), GRAPH_BUDGET_S


def _kinds(lengths: AutoLengths) -> list[tuple[LengthController, SamplingParams]]:
    kinds = [(lengths.likeliest, SamplingParams())]
    if lengths.sample_drafts:
        kinds.append((lengths.drawn, SamplingParams(temperature=1.0)))
    return kinds


def _batches(n_draft_max: int, max_sequences: int) -> list[tuple[int, list[int]]]:
    """Batches, and how many drafts of each of their sequences: the ends first, then between.

    A pass is measured as it will run: with all of a batch's sequences, as many rows of each.
    """
    ends = list(dict.fromkeys((0, 1, n_draft_max)))
    between = [k for k in range(2, n_draft_max) if k <= DENSE or k % 2 == 0]
    if max_sequences == 1:
        return [(1, ends), (1, between)]
    middle = [n for n in (4, 8, 2, *range(12, max_sequences, 4)) if n < max_sequences]
    every = [(n, sorted({*ends, *between})) for n in middle]
    many = (max_sequences, between)
    return [(1, ends), (max_sequences, ends), (1, between), *every[:2], many, *every[2:]]


def _measure_rounds(
    kinds: list[tuple[LengthController, SamplingParams]],
    bench: Bench,
    names: list[str],
    context: int,
    n_draft_max: int,
    deadline: float,
) -> None:
    """Draft rounds of these sequences, of one step and of the most, each behind a pass.

    A pass leaves the caches without the drafter's weights.
    """
    between = partial(_verify, bench, names, len(names))
    hidden_H = between().hidden_TH[0].clone()
    for controller, params in kinds:
        view = _view(bench, names, params, context, hidden_H)

        def before(view: TargetView = view) -> None:
            _give_states(bench, view, between().hidden_TH)

        for depth in dict.fromkeys((n_draft_max, 1)):
            draft_s = _measure(partial(bench.drafter.propose, view, depth), deadline, before)
            if draft_s is None:
                return
            controller.costs.rounds.set(len(names), depth, draft_s)


def _give_states(bench: Bench, view: TargetView, hidden_TH: Tensor) -> None:
    """To a drafter that reads states: as if one token had been decoded since the last round.

    The states are those of a pass and do not belong to the tokens; a round takes as long.
    """
    if not isinstance(bench.drafter, ReadsStates):
        return
    for i, sequence in enumerate(view.sequences):
        n_read, row = sequence.n - 1, min(i, hidden_TH.shape[0] - 1)
        start = n_read // PAGE_SLOTS * PAGE_SLOTS
        bench.drafter.begin(sequence.id, sequence.tokens, SCRATCH, start)
        bench.drafter.read(sequence.id, start, hidden_TH[row].expand(n_read - start, -1))


def _view(
    bench: Bench, names: list[str], params: SamplingParams, context: int, hidden_H: Tensor
) -> TargetView:
    if isinstance(bench.drafter, ReadsStates) and bench.target.ctx_size > 2 * PAGE_SLOTS:
        context = PAGE_SLOTS + 1  # one row to read behind a page that is skipped
    elif not bench.drafter.needs.final_hidden:
        context = min(context, OWN_CONTEXT)
    tokens = [i * STRIDE % bench.target.config.vocab_size for i in range(context + 1)]
    views = [SequenceView(name, tokens, params, 0, hidden_H) for name in names]
    return TargetView(views, bench.memory, bench.target.model.embed, bench.target.ops)


def _open(bench: Bench, opened: list[str], n: int) -> int:
    """Begin scratch sequences, n in all, as far as memory has pages; the context they have.

    Their keys and values are what pages begin with: reading them takes as long as others.
    """
    books = bench.memory.books
    context = min(CONTEXT, bench.target.ctx_size // 2)
    need = books.worst(context + books.page_slots)
    while len(opened) < n:
        if any(g.pool.n_free < 2 * need[group] for group, g in books.groups.items()):
            break
        name = f"{SCRATCH} {len(opened)}"
        bench.memory.open(name)
        opened.append(name)
        bench.drafter.open(name)
        bench.memory.reserve(name, context)
        bench.memory.advance(name, context)
        bench.memory.trim(name)
    return context


def _verify(bench: Bench, names: list[str], n_rows: int) -> Pass:
    """A pass of so many rows; not counted by `advance`, so the next one overwrites it."""
    n = min(len(names), n_rows)
    spans, start = [], 0
    for i, name in enumerate(names[:n]):
        end = n_rows * (i + 1) // n
        bench.memory.reserve(name, end - start)
        spans.append(Span(name, start, end - start))
        start = end
    tokens = [i * STRIDE % bench.target.config.vocab_size for i in range(n_rows)]
    return bench.target_pass.run(tokens, spans, list(range(n_rows)))


def _measure(
    call: Callable[[], object],
    deadline: float,
    between: Callable[[], object] = lambda: None,
    repeats: int = REPEATS,
) -> float | None:
    """Seconds of a call after its first time; None where the time left does not allow it."""
    start = time.perf_counter()
    between()
    call()  # records
    first_s = time.perf_counter() - start
    repeats = repeats if first_s < SLOW_S else 1
    if time.perf_counter() + repeats * first_s > deadline:
        return None
    times = []
    for _ in range(repeats):
        between()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)  # what disturbs a measurement only adds to it
