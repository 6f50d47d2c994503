"""Keys and values of one layer, in pages.

Shapes: P pages, G key/value heads, S slots in a page, D head dimension.
"""

import torch

from outdraft.ops.base import PAGE_SLOTS, KvPages
from outdraft.ops.memory import zeros


def empty_pages(
    n_pages: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> KvPages:
    """Pages of zeros; int8 ones with scales, fp32 [P, G, S]."""
    shape = (n_pages, n_kv_heads, PAGE_SLOTS, head_dim)
    if device is None or device.type == "cpu":
        k, v = zeros(shape, dtype), zeros(shape, dtype)
    else:
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return KvPages(k, v)
    return KvPages(k, v, zeros(shape[:3], torch.float32), zeros(shape[:3], torch.float32))


def clear_pages(store: KvPages, pages: list[int]) -> None:
    """Zero pages before another sequence gets them: a masked key still meets its value.

    The weight of an unseen key is an exact zero, and zero times an infinity that another request
    left behind would not be.
    """
    index = torch.tensor(pages, device=store.k_PGSD.device)
    for part in (store.k_PGSD, store.v_PGSD, store.k_scales_PGS, store.v_scales_PGS):
        if part is not None:
            part[index] = 0


def n_bytes(store: KvPages) -> int:
    """Bytes of all pages of a layer."""
    parts = (store.k_PGSD, store.v_PGSD, store.k_scales_PGS, store.v_scales_PGS)
    return sum(p.numel() * p.element_size() for p in parts if p is not None)
