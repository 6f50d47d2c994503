"""What a measurement of a shape needs beside weights: operations, a filled context, no text.

Not here: the weights (synthetic.py, cuda_synthetic.py), what is measured (shape.py).
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from outdraft.bench.synthetic import SyntheticOps, repeat_into
from outdraft.cache.memory import Memory
from outdraft.models.layers import TargetConfig, TargetModel
from outdraft.models.registry import Family, Target
from outdraft.ops.base import PAGE_SLOTS, Ops
from outdraft.ops.packed import Format
from outdraft.text.stream import IncrementalDetokenizer
from outdraft.weights.load import LoadReport

FILL_ROWS = 4 * PAGE_SLOTS
SEQUENCE = "synthetic"


class NoText(IncrementalDetokenizer):
    """Made-up tokens have no text."""

    def __init__(self) -> None:
        """Without a tokenizer."""

    def push(self, token_id: int) -> str:
        """Nothing."""
        return ""

    def flush(self) -> str:
        """Nothing."""
        return ""


def as_target(
    family: Family, config: TargetConfig, model: TargetModel, ops: Ops, n_positions: int
) -> Target:
    """A target that was loaded from nowhere."""
    nothing = LoadReport(0, 0, Counter(), ())
    where = Path(SEQUENCE)
    return Target(where, family, config, model, nothing, torch.bfloat16, ops, n_positions)


def made_up_ops(device: torch.device, format: Format) -> Any:
    """Operations over made-up weights, on a CPU or a GPU."""
    if device.type == "cpu":
        return SyntheticOps(format)
    from outdraft.bench.cuda_synthetic import cuda_ops

    return cuda_ops(device, format)


def fill_context(memory: Memory, n_tokens: int) -> None:
    """A sequence of n positions with random keys and values."""
    memory.open(SEQUENCE)
    for start in range(0, n_tokens, FILL_ROWS):
        n_rows = min(FILL_ROWS, n_tokens - start)
        memory.reserve(SEQUENCE, n_rows)
        memory.advance(SEQUENCE, n_rows)
        memory.trim(SEQUENCE)
    for group in memory.groups.values():
        for store in group.layers.values():
            pattern = torch.randn(PAGE_SLOTS * store.k_PGSD.shape[3]).to(store.k_PGSD)
            repeat_into(store.k_PGSD.view(-1), pattern)
            repeat_into(store.v_PGSD.view(-1), pattern)
