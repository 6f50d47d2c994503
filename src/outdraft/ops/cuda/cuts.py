"""How a linear is cut into programs: a function of the weight's shape and bits alone.

The cut is part of the order of a sum, so of the bits of the output: it is never measured while
running. `MEASURED` holds what was fastest on one H200. Not here: measuring (scripts/gpu_tune.py).
"""

from dataclasses import dataclass

WAVES = 132 * 2  # programs under which tiles of N alone leave processors idle


@dataclass(frozen=True, slots=True)
class Cut:
    """Outputs and inputs a tile, warps, pipeline stages, parts of K.

    With `slices` above 1 there are as many warps, which take a part of K each (bf16 only). 8- and
    4-bit weights have tiles of 128 inputs, and 64 or 128 outputs.
    """

    tile_n: int = 64
    tile_k: int = 128
    warps: int = 4
    stages: int = 4
    split: int = 1
    slices: int = 1


MEASURED: dict[tuple[int, int, int], Cut] = {
    (16384, 5376, 16): Cut(64, 128, 4, 4, 1),
    (43008, 5376, 16): Cut(64, 128, 4, 4, 1),
    (5376, 8192, 16): Cut(64, 64, 4, 6, 3),
    (5376, 21504, 16): Cut(64, 128, 4, 4, 3),
    (18432, 5376, 16): Cut(128, 64, 4, 5, 1),
    (5376, 16384, 16): Cut(64, 128, 4, 4, 3),
    (262144, 5376, 16): Cut(64, 128, 4, 5, 1),
    (8192, 1024, 16): Cut(64, 128, 4, 5, 1),
    (16384, 1024, 16): Cut(128, 64, 4, 5, 1),
    (1024, 8192, 16): Cut(64, 128, 4, 5, 8),
    (1024, 16384, 16): Cut(32, 128, 4, 6, 8),
    (262144, 1024, 16): Cut(64, 128, 4, 5, 1),
    (1024, 10752, 16): Cut(64, 128, 4, 5, 6),
    (5376, 1024, 16): Cut(64, 128, 4, 4, 1),
    (3072, 2560, 16): Cut(64, 64, 4, 6, 4),
    (20480, 2560, 16): Cut(64, 128, 4, 4, 1),
    (2560, 2048, 16): Cut(128, 64, 4, 5, 5),
    (2560, 10240, 16): Cut(64, 128, 4, 4, 5),
    (256, 2560, 16): Cut(32, 128, 4, 6, 5),
    (2560, 256, 16): Cut(64, 128, 4, 4, 1),
    (6144, 2560, 16): Cut(64, 128, 4, 5, 1),
    (2560, 4096, 16): Cut(64, 64, 4, 6, 8),
    (2048, 2560, 16): Cut(64, 128, 4, 4, 4),
    (4096, 2560, 16): Cut(128, 64, 4, 5, 4),
    (262144, 2560, 16): Cut(64, 128, 4, 5, 1),
    (262144, 10752, 16): Cut(64, 128, 4, 4, 1),
    (10752, 2560, 16): Cut(64, 128, 4, 5, 1),
    (1024, 256, 16): Cut(16, 64, 4, 4, 1, 4),
    (4096, 256, 16): Cut(32, 128, 4, 6, 1),
    (256, 1024, 16): Cut(32, 128, 4, 6, 2),
    (256, 2048, 16): Cut(32, 128, 4, 6, 4),
    (2048, 256, 16): Cut(16, 64, 4, 4, 1, 4),
    (262144, 256, 16): Cut(128, 64, 4, 5, 1),
    (256, 5120, 16): Cut(32, 128, 4, 6, 8),
    (8192, 2816, 16): Cut(64, 128, 4, 5, 1),
    (4224, 2816, 16): Cut(32, 128, 4, 6, 2),
    (2816, 4096, 16): Cut(64, 64, 4, 6, 8),
    (2816, 2112, 16): Cut(128, 64, 4, 5, 4),
    (128, 2816, 16): Cut(32, 128, 4, 6, 6),
    (9216, 2816, 16): Cut(128, 64, 4, 5, 3),
    (2816, 8192, 16): Cut(64, 128, 4, 4, 5),
    (262144, 2816, 16): Cut(64, 128, 4, 5, 1),
    (4096, 1024, 16): Cut(32, 128, 4, 6, 1),
    (1024, 4096, 16): Cut(64, 128, 4, 4, 8),
    (1024, 5632, 16): Cut(64, 64, 4, 6, 8),
    (2816, 1024, 16): Cut(32, 128, 4, 6, 1),
    (262144, 5376, 8): Cut(128, 128, 4, 3, 1),
    (8192, 1024, 8): Cut(64, 128, 2, 4, 1),
    (16384, 1024, 8): Cut(64, 128, 2, 4, 1),
    (1024, 8192, 8): Cut(64, 128, 2, 4, 12),
    (1024, 16384, 8): Cut(64, 128, 2, 4, 12),
    (262144, 1024, 8): Cut(128, 128, 4, 3, 1),
    (1024, 10752, 8): Cut(64, 128, 2, 4, 12),
    (5376, 1024, 8): Cut(64, 128, 2, 4, 2),
    (16384, 5376, 8): Cut(64, 128, 2, 4, 2),
    (43008, 5376, 8): Cut(128, 128, 2, 3, 3),
    (5376, 8192, 8): Cut(64, 128, 2, 3, 8),
    (5376, 21504, 8): Cut(128, 128, 4, 3, 12),
    (18432, 5376, 8): Cut(128, 128, 2, 3, 3),
    (5376, 16384, 8): Cut(64, 128, 2, 3, 8),
    (16384, 5376, 4): Cut(128, 128, 2, 3, 6),
    (43008, 5376, 4): Cut(128, 128, 2, 3, 2),
    (5376, 8192, 4): Cut(128, 128, 2, 3, 12),
    (5376, 21504, 4): Cut(128, 128, 2, 3, 12),
    (18432, 5376, 4): Cut(64, 128, 1, 4, 3),
    (5376, 16384, 4): Cut(128, 128, 2, 3, 12),
}
"""By outputs, inputs and bits."""


def cut_of(n: int, k: int, bits: int) -> Cut:
    """The cut of a weight [n, k]."""
    found = MEASURED.get((n, k, bits))
    if found is not None:
        return found
    tile_n = 64 if bits == 16 else 128
    split = 1
    while split < 8 and n * split // tile_n < WAVES and k // (split * 2) >= 512:
        split *= 2
    return Cut(split=split) if bits == 16 else Cut(128, 128, 2, 3, split)
