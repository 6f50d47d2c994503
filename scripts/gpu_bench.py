"""The GPU operations measured on one card with made-up weights; see gpu_run.sh.

Usage: gpu_bench.py OUT.json SHAPE[:FORMAT] ...  Here: invariance of whole passes, reading speed,
passes of 1 to 8 rows as CUDA graphs, a forecast of drafting. The draft step is one assistant step,
also a graph.
"""

import json
import sys
import time
from dataclasses import astuple
from itertools import accumulate
from operator import mul
from statistics import median

import torch

from outdraft.bench.shapes import find_shape
from outdraft.cache.attend import CausalCall, ReadOnlyAttend
from outdraft.cache.memory import Memory, Span
from outdraft.cache.numbers import Numbers
from outdraft.models import gemma4_assistant
from outdraft.models.gemma4 import Gemma4, expected_tensors, memory_layers
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.ops.base import AttentionRows
from outdraft.ops.cuda.ops import CudaOps, CudaWeight

ACCEPT = [0.85, 0.75, 0.65]
CONTEXT = 1024


class MadeUp(CudaOps):
    """Packs random weights of the shape."""

    def pack(self, weight, role="linear"):
        shape = weight.shape
        if self.format == "w8" and role != "router" and len(shape) == 2:
            data = torch.randint(-127, 128, shape, dtype=torch.int8)
            return CudaWeight(data, torch.full((shape[0],), shape[1] ** -0.5 / 73), 8)
        if self.format == "w4" and role != "router" and len(shape) == 2 and shape[1] % 64 == 0:
            data = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8)
            scales = torch.full((shape[0], shape[1] // 32), shape[1] ** -0.5 / 4.6)
            return CudaWeight(data, scales.bfloat16(), 4)
        data = torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)
        return CudaWeight(data)

    def pack_blocks(self, weight_VK, ids_CN):
        return self.pack(torch.empty(*ids_CN.shape, weight_VK.shape[1], device="meta"))


class Cublas(MadeUp):
    """The same graph with cuBLAS linears and bf16 activations: nothing promises equal rows."""

    def embed(self, weight, token_T, scale):
        return (weight.data[token_T.long()] * scale).bfloat16()

    def linear(self, x_TK, weight, dtype=None):
        out = x_TK.bfloat16() @ weight.data.T
        return out if dtype is None else out.to(dtype)


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


def graph_of(fn):
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    return graph, out


def timed(graph, rounds=15):
    graph.replay()
    spent = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        spent.append(a.elapsed_time(b) / 1e3)
    return median(spent)


def measure(name, fmt):
    start = time.time()
    shape = find_shape(name)
    cublas = fmt == "cublas"
    kind = Cublas if cublas else MadeUp
    ops = kind(torch.device("cuda"), "bf16" if cublas else fmt, tune=True)
    positions = CONTEXT + 512
    memory = Memory(memory_layers(shape.target), max_sequences=1, max_tokens=positions,
                    max_rows=64, dtype=torch.bfloat16)  # fmt: skip
    for group in memory.groups.values():
        for store in group.layers.values():
            store.k_PGSD.normal_()
            store.v_PGSD.normal_()
    model = Gemma4(shape.target, placeholders(expected_tensors(shape.target)), ops, positions)
    assistant = Gemma4Assistant(
        shape.assistant,
        placeholders(gemma4_assistant.expected_tensors(shape.assistant)),
        ops,
        positions,
    )
    memory.open("s")
    clear = {}
    import outdraft.cache.memory as module

    clear["pages"], module.clear_pages = module.clear_pages, lambda store, pages: None
    for _ in range(CONTEXT // 64):
        memory.reserve("s", 64)
        memory.advance("s", 64)
        memory.trim("s")
    memory.reserve("s", 16)
    module.clear_pages = clear["pages"]
    tokens = torch.randint(0, 262144, (8,)).tolist()
    row_s, hidden = {}, {}
    for n in range(1, 9):
        call = CausalCall.prepare(memory, ops, [Span("s", 0, n)], tokens[:n])

        def run(call=call):
            h = model.forward(call.token_T, call.position_T, call.attend)
            logits = model.logits(h)
            return h, logits, ops.argmax(logits)

        graph, out = graph_of(run)
        row_s[n] = timed(graph)
        hidden[n] = [x.clone() for x in out]
        del graph, out
    exact = all(
        torch.equal(a, b[:n])
        for n in range(1, 8)
        for a, b in zip(hidden[n], hidden[8], strict=True)
    )
    draft_s = draft_step(memory, assistant, model, ops, hidden[1][0])
    plain = row_s[1]
    drafting = []
    for k, standing in enumerate(accumulate(accumulate(ACCEPT, mul)), start=1):
        seconds = row_s[k + 1] + k * draft_s
        speed = (1 + standing) / seconds
        drafting.append({"k": k, "tokens_per_pass": 1 + standing, "speedup": speed * plain})
    experts = 0
    total = model.head.n_bytes
    for layer in model.layers:
        for w in layer.matrices.values():
            if w.data.ndim == 3:
                experts += w.n_bytes
                total += w.n_bytes * shape.target.moe.top_k // w.data.shape[0]
            else:
                total += w.n_bytes
    if shape.target.ple_size:
        total += model.ple_projection.n_bytes
    return {
        "shape": name, "quant": fmt, "context": CONTEXT, "synthetic": True,
        "finite": bool(torch.isfinite(hidden[8][1]).all()), "rows_bit_identical": exact,
        "bytes_per_token": total, "plain_tok_s_kernels_only": 1 / plain,
        "read_gb_s": READ, "share_of_bandwidth": total / plain / 1e9 / READ,
        "cost_by_rows": {n: s / plain for n, s in row_s.items()},
        "us_by_rows": {n: s * 1e6 for n, s in row_s.items()},
        "draft_step_us": draft_s * 1e6, "acceptance": ACCEPT, "drafting": drafting,
        "cuts": {str(k): list(astuple(c)) for k, c in ops.cuts.items()},
        "peak_bytes": torch.cuda.max_memory_allocated(), "measuring_s": time.time() - start,
    }  # fmt: skip


def draft_step(memory, assistant, model, ops, hidden_1H):
    numbers = Numbers()
    numbers.add([2])
    numbers.add([CONTEXT - 1])
    kinds = assistant.config.text.layer_types
    own = list(dict.fromkeys(kinds))
    for kind in own:
        window = memory.groups[kind].window
        hi = CONTEXT - 1
        memory.add_rows(
            numbers, kind, [Span("s", 0, 1)], [max(0, hi - window + 1) if window else 0], [hi]
        )
    _, (token, position, *parts) = numbers.build()
    rows = {k: AttentionRows.of(parts[5 * i : 5 * i + 5]) for i, k in enumerate(own)}
    stores = [memory.groups[k].layers[model.config.last_owner(k)] for k in kinds]
    attend = ReadOnlyAttend(ops, stores, [rows[k] for k in kinds])

    def step():
        h = assistant.step(model.embed(token), hidden_1H, position, attend)
        best = ops.argmax(assistant.logits(h))
        return best, assistant.carry(h)

    return timed(graph_of(step)[0])


def read_speed():
    """A plain sum over 8 GB."""
    x = torch.empty(2_000_000_000, dtype=torch.float32).normal_()
    graph, _ = graph_of(x.sum)
    return x.nbytes / timed(graph) / 1e9


torch.set_default_device("cuda")
torch.inference_mode().__enter__()
READ = read_speed()
torch.cuda.empty_cache()
results = []
for asked in sys.argv[2:]:
    shape_name, _, quant = asked.partition(":")
    try:
        results.append(measure(shape_name, quant or "bf16"))
    except Exception as error:
        results.append({"shape": asked, "error": repr(error)[:600]})
    torch.cuda.empty_cache()
    print(json.dumps(results[-1]), flush=True)
    with open(sys.argv[1], "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "results": results}, file, indent=1)
