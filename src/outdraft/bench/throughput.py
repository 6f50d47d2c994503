"""Many requests at once: tokens per second and waiting times by concurrency and way of drafting.

Here: the requests, the closed loop, the order of the runs, and figures from them. Not here: the
options and the table (cli/bench_throughput.py), the picture (chart.py).

In a closed loop of concurrency c, c requests are in progress until too few are left: as one ends,
the next is added. Every run answers the same requests, so that concurrency 1 is the same work one
after another, and greedy tokens can be compared over all runs.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from outdraft.bench.prompts import Prompt
from outdraft.engine.engine import LLM
from outdraft.engine.sequence import Sequence as Running
from outdraft.request import SamplingParams

PLAIN, CONTROLLER = "plain", "controller"
MAX_JOINED = 2  # prompts of prompts.py in one prompt here
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: token ids of its prompt, and how many tokens to write."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: its tokens; from adding it to the first of them, and from there to the last."""

    tokens: list[int]
    ttft_ms: float
    decode_ms: float

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds a token after the first; None where there is no other."""
        n = len(self.tokens) - 1
        return self.decode_ms / n if n > 0 else None


@dataclass(frozen=True, slots=True)
class Mode:
    """A way of decoding; `choose` switches an idle engine to it."""

    name: str
    llm: LLM
    choose: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Run:
    """All requests once, in one mode at one concurrency; answers in the order of the requests."""

    mode: str
    concurrency: int
    round: int
    wall_s: float
    answers: list[Answered]

    @property
    def tok_s(self) -> float:
        """Tokens written per second of the whole run, prompts included in its time."""
        return sum(len(answer.tokens) for answer in self.answers) / self.wall_s


def mix_requests(
    prompts: Sequence[Prompt], n: int, max_tokens: int, ctx_size: int, seed: int
) -> list[Asked]:
    """Requests of mixed lengths: 1 or 2 prompts joined, a quarter of `max_tokens` to all of it.

    Prompts are cut at their front where the context is too short for prompt and answer.
    """
    assert 0 < max_tokens < ctx_size - 1
    rng = random.Random(f"throughput/{seed}")
    order = rng.sample(prompts, len(prompts))
    requests = []
    for i in range(n):
        parts = [rng.choice(prompts) for _ in range(rng.randrange(MAX_JOINED))]
        bos, *first = order[i % len(order)].tokens
        joined = [token for part in parts for token in part.tokens[1:]] + first
        n_out = rng.randint(max(1, max_tokens // 4), max_tokens)
        requests.append(Asked((bos, *joined[-(ctx_size - max_tokens - 2) :]), n_out))
    return requests


def own_modes(llm: LLM) -> list[Mode]:
    """Plain decoding, every fixed draft length, and lengths chosen while running."""

    def fixed(k: int) -> Callable[[], None]:
        return lambda: llm.set_draft_n_max(k)

    longest = llm.pairing.n_draft_max
    drafting = [Mode(f"k={k}", llm, fixed(k)) for k in range(1, longest + 1)]
    return [Mode(PLAIN, llm, fixed(0)), *drafting, Mode(CONTROLLER, llm, llm.set_draft_auto)]


def answer_all(
    llm: LLM, requests: Sequence[Asked], concurrency: int
) -> tuple[float, list[Answered]]:
    """Seconds, and the answers in order, of a closed loop over all requests (greedy).

    Times are read after each step: all tokens of a step arrive at once.
    """
    added_s: dict[str, float] = {}
    first_s: dict[str, float] = {}
    last_s: dict[str, float] = {}
    sequences: list[Running] = []
    n_done, start_s = 0, time.perf_counter()
    while n_done < len(requests):
        while len(sequences) < len(requests) and len(sequences) - n_done < concurrency:
            asked = requests[len(sequences)]
            params = SamplingParams(max_tokens=asked.max_tokens, ignore_eos=True)
            now_s = time.perf_counter()
            sequences.append(llm.add(asked.prompt, params))
            added_s[sequences[-1].id] = now_s
        events = llm.step()
        now_s = time.perf_counter()
        for event in events:
            assert event.error is None, event.error
            first_s.setdefault(event.request_id, now_s)
            last_s[event.request_id] = now_s
            n_done += event.finish_reason is not None
    wall_s = time.perf_counter() - start_s
    answers = [
        Answered(
            s.output, 1e3 * (first_s[s.id] - added_s[s.id]), 1e3 * (last_s[s.id] - first_s[s.id])
        )
        for s in sequences
    ]
    return wall_s, answers


def warm_up(modes: Sequence[Mode], requests: Sequence[Asked], concurrency: int) -> None:
    """Run every mode briefly, so that no measurement pays for first times."""
    brief = [Asked(r.prompt, min(r.max_tokens, WARM_UP_TOKENS)) for r in requests[:concurrency]]
    for mode in modes:
        mode.choose()
        answer_all(mode.llm, brief, concurrency)


def measure_all(
    modes: Sequence[Mode],
    requests: Sequence[Asked],
    concurrencies: Sequence[int],
    rounds: int,
) -> Iterator[Run]:
    """Every mode at every concurrency, `rounds` times.

    The modes take turns at each concurrency, and every other round goes through them backwards, so
    that a slow drift of the machine's speed falls on all alike.
    """
    for i in range(rounds):
        for concurrency in concurrencies:
            for mode in reversed(modes) if i % 2 else modes:
                mode.choose()
                wall_s, answers = answer_all(mode.llm, requests, concurrency)
                yield Run(mode.name, concurrency, i, wall_s, answers)


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """`rows`, one for each concurrency and mode; `summary`; and `identical` over all runs."""
    by_row: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        by_row.setdefault((run.concurrency, run.mode), []).append(run)
    rows = [_row(own) for own in by_row.values()]
    expected = [answer.tokens for answer in runs[0].answers]
    return {
        "identical": all([a.tokens for a in run.answers] == expected for run in runs),
        "summary": _summary(by_row),
        "rows": rows,
    }


def _row(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over rounds of the rate; percentiles over the requests of all rounds."""
    rates = [run.tok_s for run in runs]
    answers = [answer for run in runs for answer in run.answers]
    ttft_ms = [answer.ttft_ms for answer in answers]
    tpot_ms = [answer.tpot_ms for answer in answers if answer.tpot_ms is not None]
    return {
        "concurrency": runs[0].concurrency,
        "mode": runs[0].mode,
        "tok_s": median(rates),
        "tok_s_min": min(rates),
        "tok_s_max": max(rates),
        "tok_s_rounds": rates,
        "ttft_ms_p50": percentile(ttft_ms, 50),
        "ttft_ms_p99": percentile(ttft_ms, 99),
        "tpot_ms_p50": percentile(tpot_ms, 50),
        "tpot_ms_p99": percentile(tpot_ms, 99),
    }


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Interpolated between the sorted values; None of no values."""
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def _summary(by_row: dict[tuple[int, str], list[Run]]) -> dict[str, Any]:
    """Ratios of rates: of runs of one round each, then medians (`ratio`) and extremes."""
    concurrencies = sorted({concurrency for concurrency, _ in by_row})
    others = list(dict.fromkeys(mode for _, mode in by_row if mode != CONTROLLER))
    by_concurrency = []
    for c in concurrencies:
        best = max(others, key=lambda mode: median(run.tok_s for run in by_row[c, mode]))
        own = by_row[c, CONTROLLER]
        by_concurrency.append(
            {
                "concurrency": c,
                "controller_over_plain": _ratio(own, by_row[c, PLAIN]),
                "best_other": best,
                "controller_over_best_other": _ratio(own, by_row[c, best]),
            }
        )
    most = concurrencies[-1]
    together = {
        mode: _ratio(by_row[most, mode], by_row[1, mode])
        for mode in (PLAIN, CONTROLLER)
        if 1 in concurrencies and most > 1
    }
    return {
        "by_concurrency": by_concurrency,
        "together_over_one_after_another": {"concurrency": most, **together} if together else None,
    }


def _ratio(fast: Sequence[Run], slow: Sequence[Run]) -> dict[str, float]:
    ratios = [a.tok_s / b.tok_s for a, b in zip(fast, slow, strict=True)]
    return {"ratio": median(ratios), "min": min(ratios), "max": max(ratios)}
