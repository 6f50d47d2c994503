"""Models of a given shape whose weights are made up in packed form, for measuring cost.

No weight ever exists unpacked: a few hundred rows are drawn at random and packed, and the packed
weight is filled with copies of their panels. All of it is real memory, so reading costs what it
costs with trained weights; values are plausible, so activations stay finite. What such a model
says is noise. Not here: which shapes there are (shapes.py) and measuring (shape.py).

Shapes: T rows, N outputs, K inputs, E experts, A experts used by a row, C blocks.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outdraft.models import gemma4_assistant
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.models.gemma4_config import AssistantConfig
from outdraft.models.heads import NativeHead, head_family
from outdraft.models.layers import TargetConfig, TargetModel
from outdraft.models.registry import GEMMA4, Family
from outdraft.ops.arena import Arena
from outdraft.ops.base import Ops, Role, SigmoidRouter
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import PANEL_ROWS, Format, PackedLinear, part_bytes
from outdraft.ops.program import Program
from outdraft.ops.record import Replayable
from outdraft.ops.stored import Rows, StoredWeight
from outdraft.weights.load import ExpectedTensor

DISTINCT_ROWS = 16 * PANEL_ROWS
GROUP = 32


class TimedProgram(Program):
    """A program that adds up how long its replays took."""

    def __init__(self, arena: Arena) -> None:
        """An empty program."""
        super().__init__(arena)
        self.seconds = 0.0
        self.n_replays = 0

    def replay(self) -> None:
        """Run all recorded calls."""
        start = time.perf_counter()
        super().replay()
        self.seconds += time.perf_counter() - start
        self.n_replays += 1


@dataclass(slots=True)
class SyntheticOps(CpuOps):
    """The compiled kernels over made-up weights: `pack` reads the shape of a tensor, no values.

    Attributes:
        weights: everything that was packed.
        programs: everything that was recorded.
        patterns: what weights of a format and a number of inputs are copies of.
        routed: the expert ids [T, A] of every routing that was recorded or run, in order.
    """

    weights: list[PackedLinear] = field(default_factory=list)
    programs: list[TimedProgram] = field(default_factory=list)
    patterns: dict[tuple[Format, int], PackedLinear] = field(default_factory=dict)
    routed: list[Tensor] = field(default_factory=list)

    def begin(self, program: Replayable | None) -> Program:
        """See `Recordable`."""
        if program is None:
            program = TimedProgram(self.arena)
            self.programs.append(program)
        return CpuOps.begin(self, program)

    def pack(self, weight: Any, role: Role = "linear") -> PackedLinear:
        """A weight of this shape."""
        n_blocks, n, k = _dimensions(weight.shape)
        key = self.stored_as(role), k
        if key not in self.patterns:  # kept: their memory lies among that of the weights
            self.patterns[key] = pattern_of(*key)
        packed = synthetic_weight(key[0], n_blocks, n, k, self.patterns[key])
        self.weights.append(packed)
        return packed

    def pack_blocks(self, weight_VK: Any, ids_CN: Tensor) -> PackedLinear:
        """See `Ops.pack_blocks`."""
        return self.pack(weight_VK.take(ids_CN), "embedding")

    def route(
        self, scores_TE: Tensor, count: int, per_expert_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.route`."""
        ids_TA, weights_TA = CpuOps.route(self, scores_TE, count, per_expert_E)
        self.routed.append(ids_TA)
        return ids_TA, weights_TA

    def route_sigmoid(self, scores_TE: Tensor, router: SigmoidRouter) -> tuple[Tensor, Tensor]:
        """See `Ops.route_sigmoid`."""
        ids_TA, weights_TA = CpuOps.route_sigmoid(self, scores_TE, router)
        self.routed.append(ids_TA)
        return ids_TA, weights_TA


@dataclass(slots=True)
class CountingOps(CpuOps):
    """Packs nothing and adds up what `SyntheticOps` would need."""

    n_bytes: int = 0

    def pack(self, weight: Any, role: Role = "linear") -> Any:
        """Count a weight of this shape."""
        self.n_bytes += packed_bytes(self.stored_as(role), *_dimensions(weight.shape))

    def pack_blocks(self, weight_VK: Any, ids_CN: Tensor) -> Any:
        """See `Ops.pack_blocks`."""
        self.pack(weight_VK.take(ids_CN), "embedding")


def packed_bytes(format: Format, n_blocks: int, n: int, k: int) -> int:
    """`PackedLinear.n_bytes` of a weight that does not exist yet."""
    return sum(part_bytes(format, n, k, group=GROUP, n_blocks=n_blocks))


def synthetic_weight(
    format: Format, n_blocks: int, n: int, k: int, pattern: PackedLinear | None = None
) -> PackedLinear:
    """A packed weight [N, K], or E of them, filled with copies of a pattern's panels.

    Args:
        pattern: from `pattern_of` with the same format and inputs; None makes one.
    """
    pattern = pattern or pattern_of(format, k)
    packed = PackedLinear.empty(format, n, k, group=GROUP, n_blocks=n_blocks)
    for whole, part in (
        (packed.data, pattern.data),
        (packed.scales, pattern.scales),
        (packed.zeros, pattern.zeros),
    ):
        repeat_into(whole, part)
    return packed


def pattern_of(format: Format, k: int) -> PackedLinear:
    """A few packed rows that make unit-size outputs of unit-size inputs."""
    return PackedLinear.pack(torch.randn(DISTINCT_ROWS, k) * k**-0.5, format, group=GROUP)


def repeat_into(whole: Tensor, part: Tensor) -> None:
    """Fill a vector with copies of another one, the last one cut off."""
    for start in range(0, whole.numel(), max(1, part.numel())):
        piece = whole[start : start + part.numel()]
        piece.copy_(part[: piece.numel()])


def synthetic_target(
    config: TargetConfig, ops: Ops, n_positions: int, family: Family = GEMMA4
) -> TargetModel:
    """A target whose weights `ops` makes up (or only counts)."""
    weights = placeholders(family.expected_tensors(config), ops.device)
    return family.build(config, weights, ops, n_positions)


def synthetic_assistant(config: AssistantConfig, ops: Ops, n_positions: int) -> Gemma4Assistant:
    """An assistant whose weights `ops` makes up (or only counts)."""
    weights = placeholders(gemma4_assistant.expected_tensors(config), ops.device)
    return Gemma4Assistant(config, weights, ops, n_positions)


def synthetic_head(config: TargetConfig, ops: Ops, n_positions: int) -> NativeHead:
    """A native head whose weights `ops` makes up (or only counts)."""
    family = head_family(config)
    weights = placeholders(family.expected_tensors(config), ops.device)
    return family.build(config, weights, ops, n_positions)


def placeholders(
    expected: Mapping[str, ExpectedTensor], device: torch.device | None = None
) -> dict[str, Tensor | StoredWeight]:
    """Matrices that are nothing but a shape; norms of ones, and tokens in their own order.

    A convolution, which is small and never packed, has a value for each of its inputs.

    No tensors of PyTorch's `meta` device: making one loads 150 MB of code.
    """
    made: dict[str, Tensor | StoredWeight] = {}
    for name, tensor in expected.items():
        if tensor.dtype is not None and not tensor.dtype.is_floating_point:
            made[name] = torch.arange(tensor.shape[0], dtype=tensor.dtype, device=device)
        elif len(tensor.shape) == 1:
            made[name] = torch.ones(tensor.shape, device=device)
        elif tensor.shape[-2] == 1 and len(tensor.shape) == 3:
            made[name] = torch.full(tensor.shape, 1 / tensor.shape[-1], device=device)
        else:
            made[name] = nothing_but_shape(tensor.shape)
    return made


def nothing_but_shape(shape: tuple[int, ...]) -> StoredWeight:
    """A weight that cannot be read."""

    def read(block: int, first: int, count: int) -> Rows:
        raise AssertionError("a made-up weight has no values")

    return StoredWeight("made up", shape, torch.bfloat16, "float", read)


def _dimensions(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """E, N, K."""
    n, k = shape[-2:]
    return shape[0] if len(shape) == 3 else 1, n, k
