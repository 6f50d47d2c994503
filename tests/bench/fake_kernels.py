"""A library of two made-up kernels for `bench kernels`; prints on stdout as libraries do."""

from collections.abc import Callable

import torch
from torch import Tensor

from outdraft.bench.peers.kernel_server import PeerKernel


class Weights:
    """`mixes`: a row's result depends on how many there are."""

    def __init__(self, mixes: bool, n: int, k: int, n_bytes: int) -> None:
        self.mixes = mixes
        self.weight_NK = torch.randn(n, k)
        self.n_bytes = n * k // 2
        self.n_copies = -(-n_bytes // self.n_bytes)

    def linear(self, x_TK: Tensor) -> Tensor:
        y_TN = torch.stack([self.weight_NK @ row for row in x_TK])
        return y_TN + (x_TK.shape[0] - 1) if self.mixes else y_TN

    def bind(self, x_TK: Tensor, n_calls: int) -> Callable[[], None]:
        print("a line that is no answer", n_calls)

        def run() -> None:
            for _ in range(n_calls):
                self.linear(x_TK)

        return run


def kernels(threads: int) -> list[PeerKernel]:
    print("threads", threads)
    return [
        PeerKernel("alone", 4, lambda n, k, size: Weights(False, n, k, size)),
        PeerKernel("mixed", 4, lambda n, k, size: Weights(True, n, k, size)),
        PeerKernel("dies", 8, die),
    ]


def die(_n: int, _k: int, _bytes: int) -> Weights:
    raise MemoryError("no room")


def version() -> str:
    return "7.1"
