"""Which device computes, and what memory it has.

Not here: operations on it (ops/), what is put into its memory (engine/fit.py).
"""

from importlib.util import find_spec

import torch

from outdraft.errors import OutdraftError

CPU = torch.device("cpu")


def find_device(asked: str, *, cpu_only: str | None = None) -> torch.device:
    """The device for `--device`: `auto` takes a GPU that can be used.

    Args:
        asked: auto, cpu or cuda.
        cpu_only: what else was asked for that only a CPU has, in words.

    Raises:
        OutdraftError: a GPU was asked for and cannot be used; the message says why.
    """
    missing = cpu_only or _missing()
    if asked == "cpu" or (asked == "auto" and missing is not None):
        return CPU
    if missing is not None:
        raise OutdraftError(f"--device cuda cannot be used: {missing}", "use --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def free_bytes(device: torch.device) -> tuple[int, int]:
    """What a GPU has free, PyTorch's own reserve included, and in all."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused, total


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be launched before its predecessor is done (compute capability 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return None
