"""ONNX Runtime's linear kernels as peers: MatMulNBits with int4 and int8 weights, groups of 32.

Activations are fp32 and may be rounded to int8 inside (accuracy level 4), which is its fastest way.
The copies of a weight are nodes of one graph, so that a run of it costs little beside them.

Shapes: T rows, N outputs, K inputs, C groups.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from outdraft.bench.peers.kernel_server import PeerKernel

GROUP = 32
OPSETS = (("", 21), ("com.microsoft", 1))
Session = Any
"""An `onnxruntime.InferenceSession`."""


class OnnxWeights:
    """A session with all copies, and one with the first alone."""

    def __init__(self, bits: int, threads: int, n: int, k: int, n_bytes: int) -> None:
        """As many copies as make up `n_bytes`."""
        groups = k // GROUP
        self.n_bytes = n * groups * (GROUP * bits // 8 + 4)  # and a scale in fp32
        self.n_copies = -(-n_bytes // self.n_bytes)
        self.all = session(bits, threads, n, k, self.n_copies)
        self.one = session(bits, threads, n, k, 1)

    def linear(self, x_TK: Tensor) -> Tensor:
        """See `Loaded`."""
        (y_TN,) = self.one.run(None, {"x": x_TK.numpy()})
        return torch.from_numpy(y_TN)

    def bind(self, x_TK: Tensor, n_calls: int) -> Callable[[], None]:
        """See `Loaded`."""
        if n_calls == self.n_copies:
            return lambda: self.all.run(None, {"x": x_TK.numpy()})

        def run() -> None:
            for _ in range(n_calls):
                self.one.run(None, {"x": x_TK.numpy()})

        return run


def session(bits: int, threads: int, n: int, k: int, n_copies: int) -> Session:
    """A graph of `n_copies` products of one input, loaded."""
    random, groups = np.random.default_rng(), k // GROUP
    nodes, weights, outputs = [], [], []
    for i in range(n_copies):
        packed = random.bytes(n * groups * GROUP * bits // 8)
        scales = np.full(n * groups, 0.01, np.float32).tobytes()
        shape = (n, groups, GROUP * bits // 8)
        weights += [
            helper.make_tensor(f"w{i}", TensorProto.UINT8, shape, packed, raw=True),
            helper.make_tensor(f"s{i}", TensorProto.FLOAT, (n * groups,), scales, raw=True),
        ]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"w{i}", f"s{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                K=k,
                N=n,
                bits=bits,
                block_size=GROUP,
                accuracy_level=4,
            )
        )
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", n]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])
    opsets = [helper.make_opsetid(*opset) for opset in OPSETS]
    model = helper.make_model(
        helper.make_graph(nodes, "linears", [x], outputs, weights),
        opset_imports=opsets,
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def kernels(threads: int) -> list[PeerKernel]:
    """Both."""
    return [
        PeerKernel("q4", 4, partial(OnnxWeights, 4, threads)),
        PeerKernel("q8", 8, partial(OnnxWeights, 8, threads)),
    ]


def version() -> str:
    """Of the library."""
    return str(onnxruntime.__version__)
