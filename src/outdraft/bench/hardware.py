"""What limits a kernel on this machine: memory, the last-level cache, and the speed of reading.

Here: sizes, and the bandwidth that a pure read reaches. Not here: names and versions (machine.py).
"""

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.memory import zeros

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # Linux; elsewhere the default is used
MEMORY = Path("/proc/meminfo")
DEFAULT_CACHE_BYTES = 64 << 20
MIN_COLD_BYTES, MAX_COLD_BYTES = 64 << 20, 512 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def set_threads(n_threads: int | None) -> None:
    """Use this many CPU threads, ours and PyTorch's alike; None is PyTorch's own choice."""
    n_threads = n_threads or max(torch.get_num_threads(), _core.threads())
    torch.set_num_threads(n_threads)
    _core.set_threads(n_threads)


def last_level_cache_bytes() -> int:
    """Size of the largest cache, or a guess where the system does not say."""
    sizes = []
    for path in CACHES.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text))
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def cold_bytes() -> int:
    """So much memory, read in turn, is never found in a cache: several times the largest one."""
    return min(MAX_COLD_BYTES, max(MIN_COLD_BYTES, 4 * last_level_cache_bytes()))


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    return _memory_field("MemAvailable")


def total_bytes() -> int | None:
    """Memory of the machine; None where the system does not say."""
    return _memory_field("MemTotal")


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def random_memory(n_bytes: int) -> Tensor:
    """uint8 of random bytes in the memory that packed weights have."""
    memory = zeros([n_bytes], torch.uint8)
    piece = torch.randint(0, 256, (min(n_bytes, 1 << 20),), dtype=torch.uint8)
    for start in range(0, n_bytes, piece.numel()):
        part = memory[start : start + piece.numel()]
        part.copy_(piece[: part.numel()])
    return memory


def read_seconds(parts: Sequence[Tensor]) -> float:
    """Time of one pure read of all parts, on all threads."""
    start = time.perf_counter()
    for part in parts:
        _core.read_all(part.data_ptr(), part.numel() * part.element_size())
    return time.perf_counter() - start


def read_gb_s(parts: Sequence[Tensor], repeats: int = 5) -> float:
    """Bandwidth of a pure read: the median of some, in 1e9 bytes a second."""
    read_seconds(parts)
    n_bytes = sum(part.numel() * part.element_size() for part in parts)
    return n_bytes / median(read_seconds(parts) for _ in range(repeats)) / 1e9


def _memory_field(name: str) -> int | None:
    try:
        text = MEMORY.read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
