"""Bytes that a pass of a target reads: packed weights, and the keys and values of a sequence."""

from collections.abc import Sequence

from outdraft.cache.memory import Memory
from outdraft.models.gemma4 import Gemma4


def weights_touched(model: Gemma4, n_rows: int, experts_hit: Sequence[int]) -> int:
    """Packed bytes that a pass reads: matrices and the head once, of experts those that are hit."""
    total = model.head.n_bytes + n_rows * model.embedding.n_bytes // model.embedding.n
    if model.config.ple_size:
        total += (
            model.ple_projection.n_bytes + n_rows * model.ple_table.n_bytes // model.ple_table.n
        )
    for index, layer in enumerate(model.layers):
        for weight in layer.matrices.values():
            hit = experts_hit[index] if weight.n_blocks > 1 else 1
            total += weight.n_bytes * hit // weight.n_blocks
    return int(total)


def keys_touched(memory: Memory, sequence: str) -> int:
    """Bytes of keys and values that the next row sees, each layer's once."""
    length = memory.lengths[sequence]
    return sum(
        memory.bytes_per_token(name) * min(length, group.window or length)
        for name, group in memory.groups.items()
    )
