"""How a linear is cut into programs: a function of the weight's shape and bits alone.

The cut is part of the order of a sum, so of the bits of the output: it is never measured while
running. `MEASURED` holds what was fastest on one H200. Not here: measuring (scripts/gpu_tune.py).
"""

from dataclasses import dataclass

WAVES = 132 * 2  # programs under which tiles of N alone leave processors idle


@dataclass(frozen=True, slots=True)
class Cut:
    """Outputs and inputs a tile, warps, pipeline stages, parts of K, tiles asked for ahead.

    With `slices` above 1 there are as many warps, which take a part of K each (bf16 only). 8- and
    4-bit weights have tiles of 128 inputs, and 64 or 128 outputs.
    """

    tile_n: int = 64
    tile_k: int = 128
    warps: int = 4
    stages: int = 4
    split: int = 1
    ahead: int = 2
    slices: int = 1


MEASURED: dict[tuple[int, int, int], Cut] = {}
"""By outputs, inputs and bits."""


def cut_of(n: int, k: int, bits: int) -> Cut:
    """The cut of a weight [n, k]."""
    found = MEASURED.get((n, k, bits))
    if found is not None:
        return found
    split = 1
    while split < 4 and n * split // 64 < WAVES and k // (split * 2) >= 512:
        split *= 2
    return Cut(split=split)
