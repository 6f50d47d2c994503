"""Bytes that a pass of a target reads: packed weights, and keys, values and states of a sequence.

The states that a recurrent layer writes, one a row, are counted too.
"""

from collections.abc import Sequence
from typing import Any

from outdraft.cache.memory import Memory


def weights_touched(
    model: Any, weights: Sequence[Any], n_rows: int, experts_hit: Sequence[int]
) -> int:
    """Packed bytes that a pass reads: matrices and the head once, of experts those that are hit.

    Args:
        model: with an `embedding` and a `head`, which may be one, of which rows are looked up;
            a `ple_table` is another table of that kind.
        weights: all that were packed for it, in the order of its layers.
        experts_hit: of each layer with experts, which has two weights of them.
    """
    tables = [model.embedding, getattr(model, "ple_table", None)]
    total = n_experts = 0
    for weight in weights:
        if any(weight is table for table in tables):
            total += n_rows * weight.n_bytes // weight.n
            if weight is not model.head:
                continue
        hit = 1
        if weight.n_blocks > 1:
            hit = experts_hit[n_experts // 2]
            n_experts += 1
        total += weight.n_bytes * hit // weight.n_blocks
    return int(total)


def memory_touched(memory: Memory, sequence: str, n_rows: int) -> int:
    """Bytes of keys and values that the next row sees, each layer's once, and of states."""
    length = memory.lengths[sequence]
    total = sum(
        memory.bytes_per_token(name) * min(length, group.window or length)
        for name, group in memory.groups.items()
    )
    if memory.recurrent is not None:
        total += memory.recurrent.state_bytes * (1 + n_rows)
    return total
