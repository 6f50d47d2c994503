"""PyTorch's own linear kernels as peers: packed int4 in groups of 32, int8 by row, bf16.

Each is called as PyTorch's users call it, with bf16 activations. Not here: timing (kernels.py).

Shapes: T rows, N outputs, K inputs, C groups.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.bench.kernels import Backend, Case, n_calls, n_copies

GROUP = 32
Linear = Callable[[Tensor], Tensor]


class TorchLinear(Backend):
    """One of the kernels; `make` draws a weight [N, K] and gives its call and its bytes."""

    name = "torch"

    def __init__(self, kernel: str, make: Callable[[int, int], tuple[Linear, int]]) -> None:
        """Under this name."""
        self.kernel = kernel
        self.make = make
        self.calls: list[Linear] = []
        self.size = (0, 0, 0)  # N, K, bytes

    def prepare(self, n: int, k: int) -> None:
        """See `Backend`."""
        first, n_bytes = self.make(n, k)
        self.size = (n, k, n_bytes)
        self.calls = [first] + [self.make(n, k)[0] for _ in range(1, n_copies(n_bytes))]

    def case(self, rows: int) -> Case:
        """See `Backend`."""
        n, k, n_bytes = self.size
        x_TK = torch.randn(rows, k, dtype=torch.bfloat16)
        used = self.calls[: n_calls(len(self.calls), rows)]

        @torch.inference_mode()
        def run() -> None:
            for call in used:
                call(x_TK)

        return Case(self.name, self.kernel, rows, n, k, n_bytes, len(used), run)

    def linear(self, x_TK: Tensor) -> Tensor:
        """See `Backend`."""
        return self.calls[0](x_TK.bfloat16())


def int4_linear(n: int, k: int) -> tuple[Linear, int]:
    """`_weight_int4pack_mm_for_cpu`, with a scale and a zero-point in bf16 a group."""
    ids_NK = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(ids_NK, 1)
    scales_CN2 = torch.full((k // GROUP, n, 2), 0.01, dtype=torch.bfloat16)

    def linear(x_TK: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x_TK, packed, GROUP, scales_CN2)

    return linear, _bytes(packed) + _bytes(scales_CN2)


def int8_linear(n: int, k: int) -> tuple[Linear, int]:
    """`_weight_int8pack_mm`, with a scale in bf16 a row."""
    weight_NK = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scales_N = torch.full((n,), 0.001, dtype=torch.bfloat16)

    def linear(x_TK: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x_TK, weight_NK, scales_N)

    return linear, _bytes(weight_NK) + _bytes(scales_N)


def bf16_linear(n: int, k: int) -> tuple[Linear, int]:
    """`torch.nn.functional.linear` in bf16."""
    weight_NK = torch.randn(n, k).bfloat16()

    def linear(x_TK: Tensor) -> Tensor:
        return F.linear(x_TK, weight_NK)

    return linear, _bytes(weight_NK)


def torch_backends() -> list[Backend]:
    """All three."""
    return [
        TorchLinear("int4 pack", int4_linear),
        TorchLinear("int8 pack", int8_linear),
        TorchLinear("bf16", bf16_linear),
    ]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
