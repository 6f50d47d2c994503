"""The same operations for training: differentiable, fast over many rows, not row-invariant.

Not here: attention over pages; training attends over whole sequences (train/).
"""

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
        """See `Ops.rms_norm`."""
        return F.rms_norm(x_TK, (x_TK.shape[-1],), weight_K, eps)

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
