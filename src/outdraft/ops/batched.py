"""The same operations for training: differentiable, fast over many rows, not row-invariant.

Not here: attention over pages; training attends over whole sequences (train/).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import AttentionRows, KvPages
from outdraft.ops.reference import ReferenceOps


class BatchedOps(ReferenceOps):
    """`ReferenceOps` with one product for all rows and no paged attention."""

    def linear(self, x_TK: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See `Ops.linear`."""
        y_TN = F.linear(x_TK, weight)
        return y_TN if dtype is None else y_TN.to(dtype)

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return F.rms_norm(x_TK, (x_TK.shape[-1],), weight_K, eps)

    def gated(self, gate_TK: Tensor, up_TK: Tensor) -> Tensor:
        """See `Ops.gated`."""
        return F.gelu(gate_TK, approximate="tanh") * up_TK

    def attention(self, q_THD: Tensor, kv: KvPages, rows: AttentionRows, scale: float) -> Tensor:
        """Not part of training.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("training attends over whole sequences, not over pages")
