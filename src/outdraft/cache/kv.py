"""Keys and values of one layer, in pages.

Shapes: P pages, G key/value heads, S slots in a page, D head dimension, T rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.ops.base import PAGE_SLOTS


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Storage of one layer's keys and values, zero where nothing was written."""

    k_PGSD: Tensor
    v_PGSD: Tensor

    @classmethod
    def empty(
        cls, n_pages: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> "LayerPages":
        """Pages of zeros."""
        shape = (n_pages, n_kv_heads, PAGE_SLOTS, head_dim)
        return cls(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))

    def write(self, pages_T: Tensor, slots_T: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Put row t's key and value into slot `slots_T[t]` of page `pages_T[t]`."""
        self.k_PGSD[pages_T, :, slots_T] = k_TGD.to(self.k_PGSD.dtype)
        self.v_PGSD[pages_T, :, slots_T] = v_TGD.to(self.v_PGSD.dtype)

    def clear(self, pages: list[int]) -> None:
        """Zero pages before another sequence gets them: a masked key still meets its value.

        The weight of an unseen key is an exact zero, and zero times an infinity that another
        request left behind would not be.
        """
        index = torch.tensor(pages)
        self.k_PGSD[index] = 0
        self.v_PGSD[index] = 0
