"""The operations a model is made of, as an interface: tensor in, tensor out.

Every implementation used for decoding must be *row-invariant*: what comes out for a row must not
depend, in a single bit, on how many or which other rows are in the call. That is what makes
drafting exact. `reference.py` is plain PyTorch and is the specification; `batched.py` is the
differentiable version for training, which gives the promise up.

Shapes: T rows (tokens), K inputs, N outputs, H query heads, G key/value heads, D head dimension,
P pages, S slots in a page, E experts, A experts used by a row.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

PAGE_SLOTS = 64
"""Key/value positions held by one page. Attention sums page by page, so this is part of the bits
of the output and is the same for every sequence."""


@dataclass(slots=True)
class PagedRows:
    """Which keys each query row of one sequence may see.

    `pages` are the ids of the pages that hold key positions `first_page * PAGE_SLOTS` onwards.
    Row t sees key positions `lo[t] .. hi[t]`, both included; every row sees at least one key, and
    positions above `max(hi)` may hold anything finite.
    """

    pages: list[int]
    first_page: int
    lo: list[int]
    hi: list[int]
    masks: dict[int, Tensor] = field(default_factory=dict)
    """Scratch of the implementation: visibility per tile of rows, shared by layers of one kind."""


class Ops(Protocol):
    """See the module docstring. Floating-point tensors are fp32, bf16 or fp16."""

    def linear(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        """x W^T in the dtype of x, shape [T, N]."""
        ...

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps), times the weight (not 1 + weight), computed in fp32."""
        ...

    def norm_rope(
        self,
        x_THD: Tensor,
        weight_D: Tensor | None,
        cos_TD: Tensor | None,
        sin_TD: Tensor | None,
        eps: float,
    ) -> Tensor:
        """RMS norm over each head, then rotation of (i, i + D/2) pairs unless `cos_TD` is None."""
        ...

    def gelu(self, x_TK: Tensor) -> Tensor:
        """gelu with the tanh approximation, same shape."""
        ...

    def gated_gelu(self, gate_up_TK: Tensor) -> Tensor:
        """gelu_tanh(first half of the columns) * second half, shape [T, K/2]."""
        ...

    def attention(
        self, q_THD: Tensor, k_PGSD: Tensor, v_PGSD: Tensor, rows: PagedRows, scale: float
    ) -> Tensor:
        """Grouped-query softmax attention of one sequence over paged keys, shape [T, H, D]."""
        ...

    def experts(
        self,
        x_TK: Tensor,
        gate_up_EIK: Tensor,
        down_EKI: Tensor,
        ids_TA: Tensor,
        weights_TA: Tensor,
    ) -> Tensor:
        """Sum over a row's experts of weight * down(gated_gelu(gate_up x)), shape [T, K]."""
        ...
