"""Whether a model fits, said in numbers before anything is served, and how many tokens it can keep.

Here: what a GPU has free against weights, keys and values and what a pass needs. Not here: the
memory itself (cache/memory.py).
"""

import torch

from outdraft.cache.memory import Memory, memory_bytes
from outdraft.config import EngineConfig
from outdraft.device import free_bytes
from outdraft.engine.graphs import MAX_RECORDED_ROWS
from outdraft.errors import OutdraftError
from outdraft.models.layers import TargetConfig
from outdraft.models.registry import Target

SPARE_BYTES = 512 << 20  # kernels, graphs, and what the allocator cannot use
ACTIVATIONS = 40  # numbers a row that a pass holds at once, in hidden sizes
DEFAULT_SEQUENCES = 4


def build_memory(target: Target, config: EngineConfig, max_rows: int, n_draft_max: int) -> Memory:
    """Pages for keys and values: as many as were asked for, or as the device has room for.

    Without a number of tokens a CPU gets enough for four of the longest sequences; a GPU gets as
    many as all sequences at once could need, or fewer, but one sequence.

    Raises:
        OutdraftError: they do not fit on the GPU.
    """
    layers = target.family.memory_layers(target.config)
    asked = config.kv_cache_tokens
    least = min(DEFAULT_SEQUENCES, config.max_sequences) * target.ctx_size
    same = {
        "max_sequences": config.max_sequences,
        "max_tokens": target.ctx_size,
        "max_rows": max_rows,
        "dtype": target.ops.kv_dtype,
        "prefix_cache": config.prefix_cache,
        "kept_states": config.kept_states,
        "n_draft_max": n_draft_max,
    }
    device = target.ops.device
    if device.type == "cpu":
        return Memory(layers, pool_tokens=asked or least, **same)  # type: ignore[arg-type]
    free, total = free_bytes(device)
    room = free - SPARE_BYTES - pass_bytes(target.config, config.prefill_chunk)
    sizes = [asked] if asked else _halves(config.max_sequences * target.ctx_size, target.ctx_size)
    for tokens in sizes:
        needed = memory_bytes(layers, pool_tokens=tokens, **same)  # type: ignore[arg-type]
        if needed <= room:
            return Memory(layers, pool_tokens=tokens, device=device, **same)  # type: ignore[arg-type]
    raise OutdraftError(
        f"keys and values of {tokens} tokens need {needed / 1e9:.2f} GB and the GPU has "
        f"{max(0, room) / 1e9:.2f} of its {total / 1e9:.1f} GB left beside the weights and a pass",
        "use a smaller --ctx-size or --quant w4, or free the GPU's memory",
    )


def pass_bytes(config: TargetConfig, n_rows: int) -> int:
    """About what a pass of n rows holds at once: activations, and logits of those recorded."""
    hidden, vocab = config.hidden_size, config.vocab_size
    return 4 * (n_rows * ACTIVATIONS * hidden + 2 * MAX_RECORDED_ROWS * vocab)


def _halves(most: int, least: int) -> list[int]:
    """From most to least, by halves."""
    sizes = [most]
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] // 2))
    return sizes


def out_of_memory(device: torch.device, what: str) -> OutdraftError:
    """What to raise when the allocator gives up while loading."""
    free, total = free_bytes(device)
    return OutdraftError(
        f"{what} does not fit: {free / 1e9:.2f} of the GPU's {total / 1e9:.1f} GB are left",
        "use --quant w4, a smaller model, or --device cpu",
    )
