"""Weights of models in training: fresh ones, and the models built over them.

Here: initial values, which tensors learn, the compute type. Not here: how they are updated
(optimiser.py) or stored (checkpoint.py, export.py).
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.weights.load import ExpectedTensor


def fresh_weights(expected: Mapping[str, ExpectedTensor], seed: int) -> dict[str, Tensor]:
    """Initial fp32 weights by canonical name.

    Matrices have a standard deviation of 1 / sqrt(inputs), the embedding 0.02, norms are one. Norms
    of queries and keys start at D^(-1/4), which makes up for the missing 1 / sqrt(D) of the scores.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in expected.items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = torch.full(tensor.shape, tensor.shape[0] ** -0.25)
        elif len(tensor.shape) == 1:
            weights[name] = torch.ones(tensor.shape)
        else:
            spread = 0.02 if name == "embed_tokens.weight" else tensor.shape[-1] ** -0.5
            weights[name] = spread * torch.randn(tensor.shape, generator=generator)
    return weights


def make_trainable(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Leaf copies on the device that collect gradients; layer scalars stay constants."""
    leaves = {}
    for name, weight in weights.items():
        leaf = weight.detach().to(device=device, copy=True)
        leaves[name] = leaf.requires_grad_(not name.endswith("layer_scalar"))
    return leaves


def trainable(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that the optimiser updates."""
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bf16 where products in it are faster than in fp32, as measured here; else fp32.

    A CPU without bf16 instructions emulates it, many times slower.
    """
    seconds, on_gpu = {}, device.type == "cuda"
    rows, outputs, inputs = (16384, 4096, 4096) if on_gpu else (2048, 512, 256)
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.ones(n, inputs, dtype=dtype, device=device) for n in (rows, outputs))
        F.linear(x, w)
        if on_gpu:  # what is small there takes as long in any type
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            F.linear(x, w)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


def compute_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Context in which matrix products are computed in `dtype`; weights and sums stay fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
