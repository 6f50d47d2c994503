"""Made-up weights on a GPU, and what it takes to measure there; synthetic.py has those of a CPU.

Weights are random numbers of their packed form, drawn on the device. Not here: what is measured
(shape.py).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outdraft.device import has_dependent_launch
from outdraft.ops.base import Role
from outdraft.ops.cuda.graph import GraphProgram
from outdraft.ops.cuda.ops import CudaOps
from outdraft.ops.cuda.weights import CudaWeight, empty_weight
from outdraft.ops.packed import Format
from outdraft.ops.record import Replayable

READ_FLOATS = 1 << 30


class TimedGraph(GraphProgram):
    """A graph that adds up how long its replays took on the device."""

    def __init__(self, pool: Any, device: torch.device) -> None:
        """See `GraphProgram`."""
        super().__init__(pool, device)
        self.n_replays = 0
        self._running: list[tuple[Any, Any]] = []
        self._done_s = 0.0

    @property
    def seconds(self) -> float:
        """Of all replays so far."""
        for start, end in self._running:
            end.synchronize()
            self._done_s += start.elapsed_time(end) / 1e3
        self._running.clear()
        return self._done_s

    def replay(self) -> None:
        """Launch the graph."""
        start, end = timing_events()
        start.record()
        super().replay()
        end.record()
        self._running.append((start, end))
        self.n_replays += 1


@dataclass(slots=True)
class CudaSyntheticOps(CudaOps):
    """`CudaOps` over made-up weights: `pack` reads the shape of a tensor, no values.

    Attributes:
        weights: everything that was packed.
        programs: everything that was recorded.
        routed: the expert ids [T, A] of every routing that was recorded or run, in order.
    """

    weights: list[CudaWeight] = field(default_factory=list)
    programs: list[TimedGraph] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)

    def begin(self, program: Replayable | None) -> GraphProgram:
        """See `Recordable`."""
        if program is None:
            self.routed.clear()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.program = TimedGraph(self.pool, self.device)
            self.programs.append(self.program)
            self.program.enter()
            return self.program
        return CudaOps.begin(self, program)

    def pack(self, weight: Any, role: Role = "linear") -> CudaWeight:
        """A weight of this shape."""
        made = random_weight(tuple(weight.shape), self.stored_as(role), self.device)
        self.weights.append(made)
        return made

    def pack_blocks(self, weight_VK: Any, ids_CN: Tensor) -> CudaWeight:
        """See `Ops.pack_blocks`."""
        return self.pack(torch.empty(*ids_CN.shape, weight_VK.shape[1], device="meta"))

    def route(
        self, scores_TE: Tensor, count: int, per_expert_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.route`."""
        ids_TA, weights_TA = CudaOps.route(self, scores_TE, count, per_expert_E)
        self.routed.append(ids_TA)
        return ids_TA, weights_TA


def cuda_ops(device: torch.device, format: Format) -> CudaSyntheticOps:
    """Operations that make their weights up."""
    return CudaSyntheticOps(device, format, pdl=has_dependent_launch(device))


def random_weight(shape: tuple[int, ...], format: Format, device: torch.device) -> CudaWeight:
    """A packed weight that makes unit-size outputs of unit-size inputs."""
    made, size = empty_weight(shape, format, device), shape[-1] ** -0.5
    if made.bits == 16:
        made.data.normal_(0, size)
        return made
    made.data.random_(-(1 << 15), 1 << 15)
    assert made.scales is not None
    made.scales.fill_(size / (73 if made.bits == 8 else 4.6))
    return made


def read_seconds_a_byte(device: torch.device, rounds: int = 5) -> float:
    """Seconds that PyTorch's sum takes to read a byte, the best of some."""
    x = torch.empty(READ_FLOATS, device=device).normal_()
    times = []
    for _ in range(rounds + 1):
        start, end = timing_events()
        start.record()
        x.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(min(times[1:])) / x.nbytes


def timing_events() -> tuple[Any, Any]:
    """Two events that note the time on the device."""
    make: Any = torch.cuda.Event
    return make(enable_timing=True), make(enable_timing=True)
