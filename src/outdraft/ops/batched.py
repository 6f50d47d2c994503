"""The same operations for training: differentiable, fast over many rows, not row-invariant.

They compute in the widest type they are given, fp64 included. Not here: attention over pages;
training attends over whole sequences (train/).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.ops.base import Activation, AttentionRows, KvPages, Rotary
from outdraft.ops.reference import ReferenceOps, activate


class BatchedOps(ReferenceOps):
    """`ReferenceOps` with one product for all rows and no paged attention."""

    @property
    def device(self) -> torch.device:
        """See `Ops.device`: that of the `with torch.device(…)` around the call."""
        return torch.get_default_device()

    def linear(self, x_TK: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See `Ops.linear`; never narrower than its inputs."""
        y_TN = F.linear(x_TK, weight)
        return y_TN if dtype is None else y_TN.to(torch.promote_types(y_TN.dtype, dtype))

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        if weight_K is not None:
            wider = torch.promote_types(x_TK.dtype, weight_K.dtype)
            x_TK, weight_K = x_TK.to(wider), weight_K.to(wider)
        return F.rms_norm(x_TK, (x_TK.shape[-1],), weight_K, eps)

    def norm_rope(
        self, x_THD: Tensor, weight_D: Tensor | None, rotary: Rotary | None, eps: float | None
    ) -> Tensor:
        """See `Ops.norm_rope`."""
        y = x_THD if eps is None else self.rms_norm(x_THD, weight_D, eps)
        if rotary is not None:
            cos, sin = (t[rotary.position_T][:, None] for t in (rotary.cos, rotary.sin))
            a, b = y.chunk(2, dim=-1)
            y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return y.to(x_THD.dtype)

    def gated(self, gate_TK: Tensor, up_TK: Tensor, activation: Activation = "gelu_tanh") -> Tensor:
        """See `Ops.gated`."""
        return activate(gate_TK, activation) * up_TK

    def gated_norm(self, x_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
        """See `Ops.gated_norm`."""
        wide = torch.promote_types(x_THV.dtype, torch.float32)
        normed_THV = self.rms_norm(x_THV.to(wide), weight_V, eps)
        return (normed_THV * F.silu(gate_THV.to(wide))).to(x_THV.dtype)

    def attention(self, q_THD: Tensor, kv: KvPages, rows: AttentionRows, scale: float) -> Tensor:
        """Not part of training.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("training attends over whole sequences, not over pages")
