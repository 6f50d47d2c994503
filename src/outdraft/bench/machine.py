"""What a measurement was made on: processor, threads, versions, commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from outdraft import __version__, _core

PACKAGE = Path(__file__).parent.parent
CPU_INFO = Path("/proc/cpuinfo")  # Linux only; elsewhere the platform module knows less
ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads in use, instruction sets and versions."""
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "threads": max(torch.get_num_threads(), _core.threads()),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def describe_version() -> dict[str, Any]:
    """Release, commit when this is a checkout, and the time."""
    return {
        "version": __version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_info() -> dict[str, str]:
    """The fields of the first processor."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; `-dirty` if files have changed."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or (Path(top) / "src" / PACKAGE.name).resolve() != PACKAGE.resolve():
        return None
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return f"{head}-dirty" if changes else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
