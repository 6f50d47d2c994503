"""PyTorch's own linear kernels as peers: packed int4 in groups of 32, int8 by row, bf16.

Each is called as PyTorch's users call it, with bf16 activations. Not here: timing (kernels.py).

Shapes: T rows, N outputs, K inputs, C groups.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.bench.peers.kernel_server import PeerKernel

GROUP = 32
Linear = Callable[[Tensor], Tensor]


class TorchWeights:
    """Copies of a weight; `make` draws one and gives its call and its bytes."""

    def __init__(
        self, make: Callable[[int, int], tuple[Linear, int]], n: int, k: int, n_bytes: int
    ) -> None:
        """As many as make up `n_bytes`."""
        first, self.n_bytes = make(n, k)
        self.n_copies = -(-n_bytes // self.n_bytes)
        self.calls = [first] + [make(n, k)[0] for _ in range(1, self.n_copies)]

    def linear(self, x_TK: Tensor) -> Tensor:
        """See `Loaded`."""
        return self.calls[0](x_TK.bfloat16())

    def bind(self, x_TK: Tensor, n_calls: int) -> Callable[[], None]:
        """See `Loaded`."""
        used, x_TK = self.calls[:n_calls], x_TK.bfloat16()

        def run() -> None:
            for call in used:
                call(x_TK)

        return run


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


def kernels(_threads: int) -> list[PeerKernel]:
    """All three."""
    return [
        PeerKernel("int4 pack", 4, partial(TorchWeights, int4_linear)),
        PeerKernel("int8 pack", 8, partial(TorchWeights, int8_linear)),
        PeerKernel("bf16", 16, partial(TorchWeights, bf16_linear)),
    ]


def version() -> str:
    """Of the library."""
    return str(torch.__version__)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
