"""The same operations for training: differentiable, fast over many rows, not row-invariant.

Not here: attention over pages; training attends over whole sequences (train/).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import PagedRows
from outdraft.ops.reference import ReferenceOps


class BatchedOps(ReferenceOps):
    """`ReferenceOps` with one product for all rows and no paged attention."""

    def linear(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        """See `Ops.linear`."""
        return F.linear(x_TK, weight_NK)

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """See `Ops.rms_norm`; in the wider of the two types, fp64 included."""
        if weight_K is not None:
            wider = torch.promote_types(x_TK.dtype, weight_K.dtype)
            x_TK, weight_K = x_TK.to(wider), weight_K.to(wider)
        return F.rms_norm(x_TK, (x_TK.shape[-1],), weight_K, eps)

    def norm_rope(
        self,
        x_THD: Tensor,
        weight_D: Tensor | None,
        cos_TD: Tensor | None,
        sin_TD: Tensor | None,
        eps: float,
    ) -> Tensor:
        """See `Ops.norm_rope`."""
        y = self.rms_norm(x_THD, weight_D, eps)
        if cos_TD is not None and sin_TD is not None:
            first, second = y.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
            y = y * cos_TD[:, None] + turned * sin_TD[:, None]
        return y.to(x_THD.dtype)

    def gelu(self, x_TK: Tensor) -> Tensor:
        """See `Ops.gelu`."""
        return F.gelu(x_TK, approximate="tanh")

    def attention(
        self, q_THD: Tensor, k_PGSD: Tensor, v_PGSD: Tensor, rows: PagedRows, scale: float
    ) -> Tensor:
        """Not part of training.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("training attends over whole sequences, not over pages")
