"""What fits into so much memory, before anything is loaded: weights, keys and values, a pass.

Here: the sums, and which format and length to choose. Not here: how large a model's parts are (who
asks knows), and the engine's own check while it loads (fit.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outdraft.cache.memory import LayerMemory, memory_bytes
from outdraft.engine.fit import DEFAULT_SEQUENCES, SPARE_BYTES, pass_bytes
from outdraft.models.layers import TargetConfig

FORMATS = ("bf16", "w8", "w4")
"""From the most bits to the fewest."""
LEAST_TOKENS = 512
"""A shorter context is not worth recommending."""
GRAIN_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Parts:
    """What a model is made of.

    Attributes:
        memories: the layers of the target, then those of a drafter that has its own.
        weight_bytes: of the target, by format.
        drafter_bytes: of the drafter, by format of the target; empty without one.
        stored: the format that the checkpoint comes in.
        max_tokens: longest sequence that the model knows.
        prefill_rows: most rows of a pass.
    """

    config: TargetConfig
    memories: Sequence[Sequence[LayerMemory]]
    weight_bytes: dict[str, int]
    drafter_bytes: dict[str, int]
    stored: str
    max_tokens: int
    n_draft_max: int = 0
    prefill_rows: int = 512


@dataclass(frozen=True, slots=True)
class Room:
    """What one format needs and how far it goes.

    Attributes:
        other_bytes: what a pass holds, and a reserve.
        ctx_bytes: keys, values and states of one sequence of the length that was asked about.
        per_1k_bytes: of 1000 further tokens of it, behind all windows.
        most_tokens: longest single sequence that fits, 0 if none does.
        short_bytes: what is missing for the length that was asked about; 0 if it fits.
    """

    quant: str
    weight_bytes: int
    drafter_bytes: int
    other_bytes: int
    ctx_bytes: int
    per_1k_bytes: int
    most_tokens: int
    short_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What to run: `kv_tokens` is None where the engine's own number fits."""

    quant: str
    ctx_tokens: int
    kv_tokens: int | None


def sequence_bytes(parts: Parts, ctx_tokens: int, pool_tokens: int, n_sequences: int = 1) -> int:
    """Keys, values and states as the engine allocates them."""
    return sum(
        memory_bytes(
            layers,
            max_sequences=n_sequences,
            max_tokens=ctx_tokens,
            max_rows=parts.prefill_rows,
            dtype=torch.bfloat16,
            pool_tokens=pool_tokens,
            prefix_cache=True,
            n_draft_max=parts.n_draft_max,
        )
        for layers in parts.memories
    )


def room_of(parts: Parts, quant: str, free_bytes: int, ctx_tokens: int) -> Room:
    """One format in so much memory, with one sequence of so many tokens."""
    weights, drafter = parts.weight_bytes[quant], parts.drafter_bytes.get(quant, 0)
    other = SPARE_BYTES + pass_bytes(parts.config, parts.prefill_rows)
    left = free_bytes - weights - drafter - other
    ctx = sequence_bytes(parts, ctx_tokens, ctx_tokens)
    long = 1 << 20
    grown = sequence_bytes(parts, long + 64_000, long + 64_000) - sequence_bytes(parts, long, long)
    return Room(
        quant=quant,
        weight_bytes=weights,
        drafter_bytes=drafter,
        other_bytes=other,
        ctx_bytes=ctx,
        per_1k_bytes=grown // 64,
        most_tokens=most_tokens(parts, left),
        short_bytes=max(0, ctx - left),
    )


def most_tokens(parts: Parts, left_bytes: int) -> int:
    """The longest single sequence in so much memory, in whole pages."""
    low, high = 0, parts.max_tokens // GRAIN_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        tokens = middle * GRAIN_TOKENS
        if sequence_bytes(parts, tokens, tokens) <= left_bytes:
            low = middle
        else:
            high = middle - 1
    return low * GRAIN_TOKENS


def choose(parts: Parts, free_bytes: int, ctx_tokens: int, n_sequences: int) -> Choice | None:
    """The format with the most bits, none beyond the checkpoint's own, in which the length fits.

    Where it fits in none the fewest bits and as long a sequence as there is room for; None where
    that is too short to be of use.
    """
    sensible = [f for f in FORMATS[FORMATS.index(parts.stored) :] if f in parts.weight_bytes]
    rooms = [room_of(parts, quant, free_bytes, ctx_tokens) for quant in sensible]
    room = next((r for r in rooms if not r.short_bytes), rooms[-1])
    ctx = ctx_tokens if not room.short_bytes else room.most_tokens
    if ctx < min(LEAST_TOKENS, ctx_tokens):
        return None
    left = free_bytes - room.weight_bytes - room.drafter_bytes - room.other_bytes
    own = min(DEFAULT_SEQUENCES, n_sequences) * ctx
    if sequence_bytes(parts, ctx, own, n_sequences) <= left:
        return Choice(room.quant, ctx, None)
    pool = own
    while pool > ctx and sequence_bytes(parts, ctx, pool, n_sequences) > left:
        pool = max(ctx, pool - max(GRAIN_TOKENS, own // 16))
    return Choice(room.quant, ctx, pool)
