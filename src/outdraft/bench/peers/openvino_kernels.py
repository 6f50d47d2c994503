"""OpenVINO's linear kernels as peers: a matrix product with compressed weights.

int4 in groups of 32 and int8 by row, symmetric, with scales in fp16, as its compressed models have
them; activations are fp32, rounded to int8 in groups inside where it finds that faster. The copies
of a weight are nodes of one graph, so that a run of it costs little beside them.

Shapes: T rows, N outputs, K inputs, C groups.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor

from outdraft.bench.peers.kernel_server import PeerKernel

GROUP = 32
Compiled = Any
"""An `openvino.CompiledModel`."""


class OpenVinoWeights:
    """A compiled graph with all copies, and one with the first alone."""

    def __init__(self, bits: int, threads: int, n: int, k: int, n_bytes: int) -> None:
        """As many copies as make up `n_bytes`."""
        scales = n * k // GROUP if bits == 4 else n
        self.n_bytes = n * k * bits // 8 + 2 * scales
        self.n_copies = -(-n_bytes // self.n_bytes)
        self.all = compiled(bits, threads, n, k, self.n_copies).create_infer_request()
        self.one = compiled(bits, threads, n, k, 1).create_infer_request()

    def linear(self, x_TK: Tensor) -> Tensor:
        """See `Loaded`."""
        self.one.infer([x_TK.numpy()])
        return torch.from_numpy(self.one.get_output_tensor(0).data.copy())

    def bind(self, x_TK: Tensor, n_calls: int) -> Callable[[], None]:
        """See `Loaded`. The first run with a number of rows makes ready for it and is not timed."""
        request, times = (self.all, 1) if n_calls == self.n_copies else (self.one, n_calls)
        x = ov.Tensor(x_TK.numpy())
        request.set_input_tensor(x)
        request.infer()

        def run() -> None:
            for _ in range(times):
                request.infer()

        return run


def weight(bits: int, n: int, k: int) -> Any:
    """A random compressed weight [N, K] with the nodes that make it fp32."""
    data = np.frombuffer(np.random.default_rng().bytes(n * k * bits // 8), np.uint8)
    if bits == 4:
        shape, scales = [n, k // GROUP, GROUP], np.full((n, k // GROUP, 1), 0.01, np.float16)
        packed = ops.constant(ov.Tensor(data, ov.Shape(shape), ov.Type.i4))
    else:
        shape, scales = [n, k], np.full((n, 1), 0.001, np.float16)
        packed = ops.constant(data.view(np.int8).reshape(shape))
    wide = ops.multiply(ops.convert(packed, "f16"), ops.constant(scales))
    if bits == 4:
        wide = ops.reshape(wide, ops.constant(np.array([n, k])), special_zero=False)
    return ops.convert(wide, "f32")


def compiled(bits: int, threads: int, n: int, k: int, n_copies: int) -> Compiled:
    """A graph of `n_copies` products of one input, compiled for the CPU."""
    x = ops.parameter([-1, k], np.float32)
    products = [
        ops.result(ops.matmul(x, weight(bits, n, k), transpose_a=False, transpose_b=True))
        for _ in range(n_copies)
    ]
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    return ov.Core().compile_model(ov.Model(products, [x]), "CPU", options)


def kernels(threads: int) -> list[PeerKernel]:
    """Both."""
    return [
        PeerKernel("int4", 4, partial(OpenVinoWeights, 4, threads)),
        PeerKernel("int8", 8, partial(OpenVinoWeights, 8, threads)),
    ]


def version() -> str:
    """Of the library."""
    return str(ov.__version__)
