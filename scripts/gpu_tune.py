"""Measures how each linear of the published shapes is best cut on this GPU; prints cuts.py's table.

`gpu_tune.py compile I N [SHAPE:QUANT …]` compiles the I-th of N parts of what will be measured, so
that N processes can do it side by side; `gpu_tune.py measure OUT.json [SHAPE:QUANT …]` measures;
`gpu_tune.py table OUT.json [SHAPE:QUANT …]` times the table's own cuts, and cuBLAS.
"""

import json
import sys
from dataclasses import astuple
from itertools import product
from statistics import median

import torch

from outdraft.bench.shapes import find_shape
from outdraft.device import has_dependent_launch
from outdraft.models import gemma4, gemma4_assistant
from outdraft.ops.cuda.cuts import Cut, cut_of
from outdraft.ops.cuda.ops import CudaOps
from outdraft.ops.cuda.weights import CudaWeight, empty_weight

DEVICE = torch.device("cuda")
ROWS = 4
COLD_BYTES = 300 << 20
WANTED = ["gemma-4-31b:bf16", "gemma-4-e4b:bf16", "gemma-4-26b-a4b:bf16", "gemma-4-31b:w4",
          "gemma-4-31b:w8"]  # fmt: skip


class Shapes(CudaOps):
    """Notes what is packed."""

    def pack(self, weight, role="linear"):
        if weight.ndim == 2:
            SEEN.setdefault((*weight.shape, self.stored_as(role)))
        return CudaWeight(torch.empty(0), None, 16, tuple(weight.shape))

    def pack_blocks(self, weight_VK, ids_CN):
        return None


SEEN: dict = {}


def placeholders(expected):
    made = {}
    for name, tensor in expected.items():
        if tensor.dtype is not None:
            made[name] = torch.arange(tensor.shape[0], dtype=tensor.dtype)
        elif len(tensor.shape) == 1:
            made[name] = torch.ones(tensor.shape)
        else:
            made[name] = torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
    return made


def shapes_of(asked):
    SEEN.clear()
    for one in asked:
        name, _, quant = one.partition(":")
        shape = find_shape(name)
        gemma4.Gemma4(shape.target, placeholders(gemma4.expected_tensors(shape.target)),
                      Shapes(torch.device("cpu"), quant), 1)  # fmt: skip
        own = "w8" if quant == "w4" else quant
        expected = gemma4_assistant.expected_tensors(shape.drafter)
        gemma4_assistant.Gemma4Assistant(
            shape.drafter, placeholders(expected), Shapes(torch.device("cpu"), own), 1
        )
    return list(SEEN)


def candidates(n, k, quant):
    """Cuts to try: a number of programs a little above what runs at once is the worst."""
    if quant == "bf16":
        tiles = [(64, 128, 4, 4), (64, 128, 4, 5), (128, 64, 4, 5), (64, 64, 4, 6), (32, 128, 4, 6)]
        sliced = [(16, 64, 4, 4), (32, 128, 4, 3), (64, 64, 2, 5)]
    else:
        tiles = [(128, 128, 2, 3), (128, 128, 4, 3), (64, 128, 1, 4), (64, 128, 2, 4)]
        sliced = []
    for tile, split in product(tiles, (1, 2, 3, 4, 6, 8, 12)):
        n_programs = -(-n // tile[0]) * split
        if split == 1 or (k // split >= 384 and n_programs <= 132 * 12):
            yield Cut(*tile, split)
    for tile_n, tile_k, slices, stages in sliced:
        if n * k < 120e6 and k >= slices * tile_k:
            yield Cut(tile_n, tile_k, slices, stages, 1, slices)


def make(n, k, quant):
    weight = empty_weight((n, k), quant, DEVICE)
    if weight.bits == 16:
        weight.data.normal_(0, k**-0.5)
    else:
        weight.data.random_(-(2**15), 2**15)
        weight.scales.fill_(0.01)
    return weight


def launch(ops, weights, x, out, gain, cut):
    """A linear for each weight, each behind a small kernel whose result it reads."""
    for weight in weights:
        normed = ops.rms_norm(x, gain, 1e-6)
        ops.launch_linear(normed, weight, out, cut)


def timed(ops, weights, x, out, gain, cut, rounds=5):
    launch(ops, weights, x, out, gain, cut)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(ops, weights, x, out, gain, cut)
    graph.replay()
    spent = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        spent.append(a.elapsed_time(b) * 1e3 / len(weights))
    return median(spent)


def rig(n, k, quant, copies):
    ops = CudaOps(DEVICE, quant, pdl=has_dependent_launch(DEVICE))
    weights = [make(n, k, quant) for _ in range(copies)]
    x, gain = torch.randn(ROWS, k, device=DEVICE), torch.ones(k, device=DEVICE)
    return ops, weights, x, torch.empty(ROWS, n, device=DEVICE), gain


def compile_part(i, n_parts, asked):
    jobs = [(s, c) for s in shapes_of(asked or WANTED) for c in candidates(*s)]
    seen = set()
    for (n, k, quant), cut in jobs:
        ops, weights, x, out, gain = None, None, None, None, None
        key = (quant, cut, n % 16, n % cut.tile_n == 0, k % (cut.tile_k * cut.split) == 0)
        if key in seen:
            continue
        seen.add(key)
        if len(seen) % n_parts != i:
            continue
        n_small = n % cut.tile_n + 4 * cut.tile_n if n % 16 == 0 else n
        ops, weights, x, out, gain = rig(n_small, k, quant, 1)
        launch(ops, weights, x, out, gain, cut)
    torch.cuda.synchronize()


def measure(path, asked):
    found = {}
    for n, k, quant in shapes_of(asked or WANTED):
        torch.cuda.empty_cache()
        n_bytes = make(n, k, quant).n_bytes
        ops, weights, x, out, gain = rig(n, k, quant, max(3, COLD_BYTES // n_bytes))
        tried = {}
        for cut in candidates(n, k, quant):
            try:
                tried[cut] = timed(ops, weights, x, out, gain, cut)
            except Exception as error:
                print(n, k, quant, cut, repr(error)[:200], flush=True)
                torch.cuda.synchronize()
        best = min(tried, key=tried.get)
        bits = {"bf16": 16, "w8": 8, "w4": 4}[quant]
        found[f"{n},{k},{bits}"] = {
            "cut": astuple(best),
            "us": tried[best],
            "gb_s": n_bytes / tried[best] / 1e3,
            "tried": [(astuple(cut), us) for cut, us in tried.items()],
        }
        print(f"({n}, {k}, {bits}): Cut{astuple(best)},  # {tried[best]:.1f} us,"
              f" {n_bytes / tried[best] / 1e3:.0f} GB/s", flush=True)  # fmt: skip
        with open(path, "w") as file:
            json.dump(found, file)


def table(path, asked):
    """Each linear as it is cut, at 1, 4 and 8 rows, and cuBLAS beside it where there is one."""
    found = []
    for n, k, quant in shapes_of(asked or WANTED):
        torch.cuda.empty_cache()
        n_bytes = make(n, k, quant).n_bytes
        ops, weights, x, out, gain = rig(n, k, quant, max(3, COLD_BYTES // n_bytes))
        row = {"n": n, "k": k, "quant": quant}
        for rows in (1, 4, 8):
            x = torch.randn(rows, k, device=DEVICE)
            out = torch.empty(rows, n, device=DEVICE)
            bits = weights[0].bits
            row[f"us_{rows}"] = timed(ops, weights, x, out, gain, cut_of(n, k, bits))
            if quant == "bf16":
                row[f"cublas_us_{rows}"] = timed(Cublas(ops), weights, x, out, gain, None)
        row["gb_s"] = n_bytes / row["us_1"] / 1e3
        found.append(row)
    with open(path, "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "linears": found}, file, indent=1)


class Cublas:
    """PyTorch's product in place of ours, behind the same small kernel."""

    def __init__(self, ops):
        self.ops = ops

    def rms_norm(self, x, gain, eps):
        return self.ops.rms_norm(x.bfloat16(), gain, eps)

    def launch_linear(self, x, weight, out, cut):
        del out, cut
        return x @ weight.data.T


torch.inference_mode().__enter__()
if sys.argv[1] == "compile":
    compile_part(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
elif sys.argv[1] == "table":
    table(sys.argv[2], sys.argv[3:])
else:
    measure(sys.argv[2], sys.argv[3:])
