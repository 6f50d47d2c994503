"""What this machine computes with and whether it does so as promised: short checks.

Here: the instruction set, threads, memory, the speed of reading, and whether the kernels are
row-invariant here. Not here: showing it (cli/doctor.py), model directories (cli/checkup.py).

Shapes: T rows, K inputs, H query heads, G key/value heads, D head dimension, S slots, P pages.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from outdraft import _core
from outdraft.bench.hardware import (
    available_bytes,
    cold_bytes,
    last_level_cache_bytes,
    random_memory,
    read_gb_s,
    total_bytes,
)
from outdraft.bench.kernels import FORMATS, OwnLinear, rows_agree
from outdraft.bench.machine import describe_machine
from outdraft.bench.synthetic import synthetic_weight
from outdraft.ops.base import PAGE_SLOTS, AttentionRows, KvPages
from outdraft.ops.cpu import CpuOps

CHECKED_SIZE = (272, 448)
LOW_MEMORY_BYTES = 2 << 30
BUSY_LOAD = 0.5  # of a core, beside this process


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong, and what to do about it; passing ones only slow things down."""

    message: str
    hint: str
    passing: bool = False


def examine() -> dict[str, Any]:
    """Everything, as it goes into the JSON; `problems` is empty when all is well."""
    machine = describe_machine()
    cold = random_memory(cold_bytes())
    found: dict[str, Any] = {
        "machine": machine,
        "kernels": {
            "isa": _core.current_isa(),
            "report": _core.isa_report(),
            "available": _core.available_isas(),
            "threads": _core.threads(),
        },
        "memory": {
            "total_bytes": total_bytes(),
            "available_bytes": available_bytes(),
            "last_level_cache_bytes": last_level_cache_bytes(),
            "read_gb_s": read_gb_s([cold], repeats=3),
        },
        "row_invariant": check_kernels(),
    }
    found["problems"] = [asdict(problem) for problem in problems_of(found)]
    return found


def check_kernels() -> dict[str, bool]:
    """Kernel -> whether its rows get the bits they get alone, in calls of 1 to 9 rows."""
    n, k = CHECKED_SIZE
    checks: dict[str, Callable[[Tensor], Tensor]] = {}
    for format in FORMATS:
        own = OwnLinear(format)
        own.weights = [synthetic_weight(format, 1, n, k)]
        checks[own.kernel] = own.linear
    ops = CpuOps()
    norm_K = torch.rand(k) + 0.5
    checks["rms norm"] = lambda x_TK: ops.rms_norm(x_TK, norm_K, 1e-6)
    checks["gated"] = lambda x_TK: ops.gated(x_TK, x_TK.flip(1).contiguous())
    found = {name: rows_agree(check, k) for name, check in checks.items()}
    for name, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8)):
        found[f"attention {name} keys"] = check_attention(dtype)
    return found


def check_attention(dtype: torch.dtype) -> bool:
    """Whether rows that see ever more keys get the bits that they get alone."""
    n_heads, n_kv_heads, dim, n_pages = 4, 2, 64, 3
    ops, kv = CpuOps(), _random_pages(n_pages, n_kv_heads, dim, dtype)
    table_BP = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    start_B = torch.zeros(1, dtype=torch.int32)

    def attention(q_TX: Tensor, first: int) -> Tensor:
        n_rows = q_TX.shape[0]
        hi_T = torch.arange(first, first + n_rows, dtype=torch.int32)
        zeros_T = torch.zeros(n_rows, dtype=torch.int32)
        rows = AttentionRows(table_BP, start_B, zeros_T, zeros_T, hi_T)
        q_THD = q_TX.view(n_rows, n_heads, dim)
        return ops.attention(q_THD, kv, rows, 1.0).flatten(1)

    newest = n_pages * PAGE_SLOTS - 9
    q_TX = torch.randn(9, n_heads * dim)
    alone = [attention(q_TX[i : i + 1], newest + i) for i in range(9)]
    return all(
        torch.equal(attention(q_TX[:n], newest)[i : i + 1], alone[i])
        for n in range(1, 10)
        for i in range(n)
    )


def problems_of(found: dict[str, Any]) -> list[Problem]:
    """What is wrong, in words."""
    machine, memory, kernels = found["machine"], found["memory"], found["kernels"]
    problems = [
        Problem(
            f"{name}: a row's bits depend on the other rows",
            "drafting is not exact here; run with --backend reference, and please report it",
        )
        for name, holds in found["row_invariant"].items()
        if not holds
    ]
    if kernels["isa"] == "portable":
        problems.append(
            Problem(
                "only the portable kernels run here, which are slow",
                "on x86-64 a CPU with AVX2 is needed; other CPUs have no kernels of their own yet",
            )
        )
    cores = machine["usable_cores"] or machine["cores"]
    if cores and kernels["threads"] > cores:
        problems.append(
            Problem(f"{kernels['threads']} threads share {cores} cores", f"give --threads {cores}")
        )
    load = (machine["load_average"] or [0.0])[0]
    if cores and load > cores - 1 + BUSY_LOAD:
        problems.append(
            Problem(
                f"the machine is busy: load {load:.1f} on {cores} cores",
                "speeds measured now are too low; stop other work first",
                passing=True,
            )
        )
    available = memory["available_bytes"]
    if available is not None and available < LOW_MEMORY_BYTES:
        problems.append(
            Problem(
                f"only {available / 1e9:.1f} GB of memory are free",
                "stop other work first",
                passing=True,
            )
        )
    return problems


def _random_pages(n_pages: int, n_kv_heads: int, dim: int, dtype: torch.dtype) -> KvPages:
    shape = (n_pages, n_kv_heads, PAGE_SLOTS, dim)
    if dtype == torch.int8:
        k, v = (torch.randint(-127, 128, shape, dtype=dtype) for _ in range(2))
        return KvPages(k, v, torch.full(shape[:3], 0.01), torch.full(shape[:3], 0.01))
    k, v = (torch.randn(shape).to(dtype) for _ in range(2))
    return KvPages(k, v)
