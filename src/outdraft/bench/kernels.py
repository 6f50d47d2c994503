"""How fast single kernels are: linear of every format, attention and norms, by number of rows.

Weights are cold, as in a model: calls go in turn through copies of a weight, and before its next
turn come those of all other backends. Ways of computing take turns, with a pure read of cold memory
in every round, so that a drift of the machine's speed falls on all alike, and each begins once the
threads of the one before sleep. Not here: other libraries' kernels (peers/), whole models
(shape.py).

Shapes: T rows, N outputs, K inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from outdraft.bench.hardware import cold_bytes, random_memory, read_seconds
from outdraft.bench.stopwatch import clock, settle
from outdraft.bench.synthetic import synthetic_weight
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import Format, PackedLinear
from outdraft.ops.record import recording

FORMATS: tuple[Format, ...] = ("w4", "w8", "bf16")
SIZES = ((2048, 2048), (6144, 1536), (10240, 2560), (3072, 512))
"""(N, K): a square, the MLPs of Gemma 4 E2B and E4B, and the built-in model's gate and up."""
ROWS = (1, 2, 3, 4, 5, 8, 16, 512)
FEW_ROWS = 16
"""Up to here a call is limited by reading, and all copies are gone through."""
MANY_ROWS_A_ROUND = 512
OURS = "outdraft"
BITS: dict[Format, int] = {"w4": 4, "w8": 8, "bf16": 16}


@dataclass(frozen=True, slots=True)
class Case:
    """One way of computing one thing: `seconds` does it some times, each with other weights.

    It gives the seconds of one call.
    """

    backend: str
    kernel: str
    rows: int
    n: int
    k: int
    n_bytes: int
    seconds: Callable[[], float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call of a case, in every round."""

    case: Case
    seconds: list[float]


class Backend:
    """Linear of a library: how it stores a weight in so many `bits`, and calls of it."""

    name: str
    kernel: str
    bits: int

    def prepare(self, n: int, k: int, n_bytes: int) -> None:
        """Make copies of a weight [N, K] that together have so many bytes."""
        raise NotImplementedError

    def case(self, rows: int) -> Case:
        """Calls with so many rows on the weights that were prepared."""
        raise NotImplementedError

    def row_invariant(self) -> bool:
        """Whether a row's bits depend on no other row, tried on the first weight."""
        raise NotImplementedError


class OwnLinear(Backend):
    """The compiled kernels, recorded as in a step of a model."""

    name = OURS

    def __init__(self, format: Format) -> None:
        """For weights of this format."""
        self.kernel = f"linear {format}"
        self.format, self.bits = format, BITS[format]
        self.ops = CpuOps(format=format)
        self.weights: list[PackedLinear] = []

    def prepare(self, n: int, k: int, n_bytes: int) -> None:
        """See `Backend`."""
        self.weights = []
        first = synthetic_weight(self.format, 1, n, k)
        self.weights = [first] + [
            synthetic_weight(self.format, 1, n, k) for _ in range(1, -(-n_bytes // first.n_bytes))
        ]

    def case(self, rows: int) -> Case:
        """See `Backend`."""
        first = self.weights[0]
        x_TK = torch.randn(rows, first.k)
        used = self.weights[: n_calls(len(self.weights), rows)]
        with recording(self.ops) as program:
            for weight in used:
                self.ops.linear(x_TK, weight)

        def seconds() -> float:
            return clock(program.replay) / len(used)

        return Case(OURS, self.kernel, rows, first.n, first.k, first.n_bytes, seconds)

    def row_invariant(self) -> bool:
        """See `Backend`."""
        return rows_agree(self.linear, self.weights[0].k)

    def linear(self, x_TK: Tensor) -> Tensor:
        """One call, with the first weight."""
        return self.ops.linear(x_TK, self.weights[0])


def n_calls(copies: int, rows: int) -> int:
    """Calls in a round: all copies where reading is the limit, fewer where computing is."""
    return copies if rows <= FEW_ROWS else max(1, min(copies, MANY_ROWS_A_ROUND // rows))


def measure_kernels(
    backends: Sequence[Backend],
    sizes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    rounds: int,
    more: Sequence[Case] = (),
) -> dict[str, Any]:
    """Time linear of all backends over all sizes, and say who is row-invariant.

    Args:
        more: cases of other operations, timed after that.

    Returns:
        `read_gb_s`; `rows`, one entry a backend, kernel, size and number of rows, see `_entry`;
        `others`, the same of `more`;
        `row_invariant`: backend and kernel -> whether a row's bits depend on no other row;
        `bits`: backend and kernel -> bits a weight.
    """
    cold = random_memory(cold_bytes())
    entries: list[dict[str, Any]] = []
    reads: list[float] = []
    invariant: dict[str, bool] = {}
    for n, k in sizes:
        for backend in backends:
            backend.prepare(n, k, cold.numel() // 2)
            label = f"{backend.name} {backend.kernel}"
            invariant[label] = invariant.get(label, True) and backend.row_invariant()
        cases = [backend.case(count) for count in rows for backend in backends]
        entries += timed(cases, rounds, cold, reads)
    others = timed(more, rounds, cold, reads)
    return {
        "read_gb_s": cold.numel() / median(reads) / 1e9,
        "rows": entries,
        "others": others,
        "row_invariant": invariant,
        "bits": {f"{backend.name} {backend.kernel}": backend.bits for backend in backends},
    }


def timed(
    cases: Sequence[Case], rounds: int, cold: Tensor, reads: list[float]
) -> list[dict[str, Any]]:
    """Figures of all cases beside the pure reads between their rounds, which join `reads`."""
    own: list[float] = []
    timings = time_in_turn(cases, rounds, lambda: own.append(read_seconds([cold])))
    reads += own
    read_gb_s = cold.numel() / median(own) / 1e9
    return [_entry(timing, timings, read_gb_s) for timing in timings]


def time_in_turn(cases: Sequence[Case], rounds: int, between: Callable[[], object]) -> list[Timing]:
    """All cases in each round, every other round backwards; the first round is not counted."""
    timings = [Timing(case, []) for case in cases]
    for index in range(rounds + 1):
        between()
        for timing in reversed(timings) if index % 2 else timings:
            settle()
            spent = timing.case.seconds()
            if index > 0:
                timing.seconds.append(spent)
    return timings


@torch.inference_mode()
def rows_agree(linear: Callable[[Tensor], Tensor], k: int, most: int = 9) -> bool:
    """Whether rows get the bits that they get alone, in calls of 1 to `most` rows."""
    x_TK = torch.randn(most, k)
    alone = [linear(x_TK[i : i + 1]) for i in range(most)]
    return all(
        torch.equal(linear(x_TK[:rows])[i : i + 1], alone[i])
        for rows in range(1, most + 1)
        for i in range(rows)
    )


def _entry(timing: Timing, timings: Sequence[Timing], read_gb_s: float) -> dict[str, Any]:
    """Figures of a case: time, bandwidth, its share of a pure read's, cost in calls of one row."""
    case, seconds = timing.case, median(timing.seconds)
    one = next((t for t in timings if _same_but_rows(t.case, case) and t.case.rows == 1), None)
    gb_s = case.n_bytes / seconds / 1e9
    return {
        "backend": case.backend,
        "kernel": case.kernel,
        "rows": case.rows,
        "n": case.n,
        "k": case.k,
        "us": seconds * 1e6,
        "min_us": min(timing.seconds) * 1e6,
        "max_us": max(timing.seconds) * 1e6,
        "gb_s": gb_s,
        "read_gb_s": read_gb_s,
        "share_of_read": gb_s / read_gb_s,
        "cost": None if one is None else seconds / median(one.seconds),
    }


def _same_but_rows(a: Case, b: Case) -> bool:
    return (a.backend, a.kernel, a.n, a.k) == (b.backend, b.kernel, b.n, b.k)
