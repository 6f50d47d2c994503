"""What a pass and a draft round cost here, measured once on a scratch sequence when a model loads.

One sequence, 1 to k + 1 rows and rounds of 1 to k, in a fraction of a second; a model too slow for
that is measured as it runs. Memory is left as it was. Not here: what is made of it (lengths.py).

Shapes: T rows, H hidden size.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from outdraft.cache.memory import Memory, Span
from outdraft.engine.graphs import TargetPass
from outdraft.engine.lengths import AutoLengths
from outdraft.models.registry import Target
from outdraft.request import SamplingParams
from outdraft.speculate.drafter import Drafter, SequenceView, TargetView
from outdraft.speculate.length import LengthController

SCRATCH = "cost measurement"
CONTEXT = 32
MAX_DEPTH = 12  # drafters keep few recordings
BUDGET_S = 0.4
REPEATS = 3


@torch.inference_mode()
def measure_costs(
    lengths: AutoLengths,
    target: Target,
    target_pass: TargetPass,
    drafter: Drafter,
    memory: Memory,
    n_draft_max: int,
    *,
    budget_s: float = BUDGET_S,
) -> int:
    """Fill the controllers' cost curves for one sequence; how many draft lengths were measured.

    Call it while nothing runs. Whatever fails here is left for requests to report.
    """
    deadline = time.perf_counter() + budget_s
    n_context = min(CONTEXT, target.ctx_size - n_draft_max - 1)
    if n_context < 2:
        return 0
    tokens = [i % target.config.vocab_size for i in range(n_context + 1)]
    memory.open(SCRATCH)
    n_measured = 0
    try:
        drafter.open(SCRATCH)
        hidden_H = _read(target_pass, memory, tokens[:-1])
        for k in _order(min(n_draft_max, MAX_DEPTH)):
            start = time.perf_counter()
            _verify(target_pass, memory, tokens[-1], k)  # records
            if time.perf_counter() + 3 * (time.perf_counter() - start) > deadline:
                break
            pass_s = _seconds(partial(_verify, target_pass, memory, tokens[-1], k))
            for controller, params in _kinds(lengths):
                draft_s = 0.0
                if k > 0:
                    view = TargetView(
                        [SequenceView(SCRATCH, tokens, params, 0, hidden_H)],
                        memory,
                        target.model.embed,
                        target.ops,
                    )
                    drafter.propose(view, k)
                    draft_s = _seconds(partial(drafter.propose, view, k))
                controller.observe_step(1, k + 1, k, pass_s, draft_s)
            n_measured += 1
    except Exception:
        return n_measured
    finally:
        memory.close(SCRATCH)
        _forget(drafter)
    return n_measured


def _kinds(lengths: AutoLengths) -> list[tuple[LengthController, SamplingParams]]:
    kinds = [(lengths.likeliest, SamplingParams())]
    if lengths.sample_drafts:
        kinds.append((lengths.drawn, SamplingParams(temperature=1.0)))
    return kinds


def _order(k_max: int) -> list[int]:
    """Plain decoding first, then from long to short, since a length between two is a guess."""
    return [0, *range(k_max, 0, -1)]


def _read(target_pass: TargetPass, memory: Memory, tokens: list[int]) -> Tensor:
    memory.reserve(SCRATCH, len(tokens))
    done = target_pass.run(tokens, [Span(SCRATCH, 0, len(tokens))], [len(tokens) - 1])
    memory.advance(SCRATCH, len(tokens))
    return done.hidden_TH[len(tokens) - 1].clone()


def _verify(target_pass: TargetPass, memory: Memory, token: int, k: int) -> None:
    """A pass of k + 1 rows; not counted by `advance`, so the next one overwrites it."""
    memory.reserve(SCRATCH, k + 1)
    target_pass.run([token] * (k + 1), [Span(SCRATCH, 0, k + 1)], list(range(k + 1)))


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)  # what disturbs a measurement only adds to it


def _forget(drafter: Drafter) -> None:
    try:
        drafter.close(SCRATCH)
    except Exception:
        return
