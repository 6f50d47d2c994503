"""Several operations of a model as one kernel each (`Fuses`).

Shapes: as in ops/base.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from outdraft.ops.base import Activation, Heads, KvPages, PageSlots
from outdraft.ops.cuda import kernels, norms
from outdraft.ops.cuda.cuts import Cut, cut_of
from outdraft.ops.cuda.product import Gate
from outdraft.ops.cuda.weights import CudaWeight

BEST_PART = 4096
WIDE_WARPS = 16  # of a norm of rows above 2048


class FusedOps:
    """What `CudaOps` has beside the single operations."""

    __slots__ = ()

    device: torch.device

    @property
    def _launch(self) -> dict[str, Any]:
        raise NotImplementedError

    def launch_linear(
        self, x_TK: Tensor, weight: CudaWeight, out: Tensor, cut: Cut, gate: Gate | None = None
    ) -> None:
        """See `CudaOps`."""
        raise NotImplementedError

    def blocks(
        self,
        x: Tensor,
        weight: CudaWeight,
        ids_TA: Tensor,
        *,
        per_pair: bool,
        gate: Activation | None = None,
    ) -> Tensor:
        """See `CudaOps`."""
        raise NotImplementedError

    def gated_linear(
        self,
        x_TK: Tensor,
        weight: CudaWeight,
        up_TN: Tensor | None = None,
        activation: Activation = "gelu_tanh",
    ) -> Tensor:
        """See `Fuses`; bf16, which linears read."""
        assert activation in ("gelu_tanh", "silu")
        n = weight.n // 2 if up_TN is None else weight.n
        out = self._empty(x_TK.shape[0], n, dtype=torch.bfloat16)
        cut = cut_of(weight.n, weight.k, weight.bits)
        self.launch_linear(x_TK, weight, out, cut, Gate(up_TN, silu=activation == "silu"))
        return out

    def turn_and_write(
        self, q: Heads, k: Heads, v: Heads, pages: KvPages, slots: PageSlots
    ) -> Tensor:
        """See `Fuses`; queries in bf16."""
        (t, h, d), g, x = q.raw_TGD.shape, k.raw_TGD.shape[1], q.raw_TGD
        assert all(y.raw_TGD.stride() == x.stride() for y in (k, v)) and x.stride(1) == d
        assert v.rotary is None and pages.k_PGSD.stride() == pages.v_PGSD.stride()
        out = self._empty(t, h, d, dtype=torch.bfloat16)
        tables = [(x, x) if y.rotary is None else (y.rotary.cos, y.rotary.sin) for y in (q, k)]
        position = next((y.rotary.position_T for y in (q, k) if y.rotary is not None), x)
        norms.heads_kernel[(t, h + 2 * g)](
            x, k.raw_TGD, v.raw_TGD, *(x if y.norm_D is None else y.norm_D for y in (q, k, v)),
            *tables[0], *tables[1], position, slots.page_T, slots.slot_T, out, pages.k_PGSD,
            pages.v_PGSD, x.stride(0), h, g, pages.k_PGSD.stride(0), pages.k_PGSD.stride(1),
            *(y.eps or 0.0 for y in (q, k, v)), D=d, Q_NORM=q.eps is not None,
            Q_HAS_W=q.norm_D is not None, Q_ROPE=q.rotary is not None, K_NORM=k.eps is not None,
            K_HAS_W=k.norm_D is not None, K_ROPE=k.rotary is not None, V_NORM=v.eps is not None,
            V_HAS_W=v.norm_D is not None, **self._launch,
        )  # fmt: skip
        return out

    def add_norms(
        self,
        x_TK: Tensor,
        residual_TK: Tensor,
        weight_K: Tensor,
        eps: float,
        next_weights: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Fuses`; the norms in bf16."""
        y = self._empty(*x_TK.shape)
        normed = [self._empty(*x_TK.shape, dtype=torch.bfloat16) for _ in range(3)]
        launch_norm(x_TK, residual_TK, y, normed, weight_K, next_weights, eps, 1.0, self._launch)
        return y, normed

    def add_mixture(
        self,
        x_TK: Tensor,
        experts: tuple[CudaWeight, CudaWeight],
        routed: tuple[Tensor, Tensor],
        dense_TK: Tensor,
        residual_TK: Tensor,
        weights: Sequence[Tensor],
        eps: float,
        *,
        scale: float = 1.0,
        next_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Fuses`; the norm in bf16."""
        ids_TA, weights_TA = routed
        inner = self.blocks(x_TK, experts[0], ids_TA, per_pair=False, gate="gelu_tanh")
        pairs = self.blocks(inner, experts[1], ids_TA, per_pair=True)
        (t, k), y = dense_TK.shape, self._empty(*dense_TK.shape)
        normed = self._empty(t, k, dtype=torch.bfloat16)
        norms.mixture_kernel[(t,)](
            pairs, weights_TA, dense_TK, residual_TK, *weights,
            y if next_weight is None else next_weight, y, normed, k, eps, scale,
            A=ids_TA.shape[1], HAS_NEXT=next_weight is not None,
            BLOCK=triton.next_power_of_2(k), num_warps=WIDE_WARPS if k > 2048 else 4,
            **self._launch,
        )  # fmt: skip
        return y, normed

    def accept(
        self,
        token_T: Tensor,
        best_T: Tensor,
        hidden_TH: Tensor,
        windows_G: Tensor,
        numbers: Tensor,
        hidden_1H: Tensor,
    ) -> None:
        """See `Fuses`."""
        t, h = hidden_TH.shape
        assert hidden_TH.dtype == hidden_1H.dtype and hidden_TH.stride(1) == 1
        kernels.accept_kernel[(triton.cdiv(h, 1024),)](
            token_T, best_T, hidden_TH, windows_G, numbers, hidden_1H, t - 1, h,
            hidden_TH.stride(0), windows_G.shape[0], ROWS=triton.next_power_of_2(t),
            GROUPS=triton.next_power_of_2(windows_G.shape[0]), BLOCK=1024, **self._launch,
        )  # fmt: skip

    def best_or_none(self, logits_TV: Tensor) -> Tensor:
        """See `Fuses`."""
        return self._best(logits_TV, finite=True)[0]

    def _best(self, logits_TV: Tensor, *, finite: bool) -> tuple[Tensor, Tensor]:
        t, v = logits_TV.shape
        n_parts = triton.cdiv(v, BEST_PART)
        value, mass = self._empty(t, n_parts), self._empty(t, n_parts)
        index = self._empty(t, n_parts, dtype=torch.int32)
        out, sure = self._empty(t, dtype=torch.int32), self._empty(t)
        kernels.best_kernel[(t, n_parts)](
            logits_TV, value, index, mass, v, n_parts, BLOCK=BEST_PART, num_warps=8, **self._launch
        )
        kernels.best_merge_kernel[(t,)](
            value, index, mass, out, sure, n_parts, PARTS=triton.next_power_of_2(n_parts),
            FINITE=finite, **self._launch,
        )  # fmt: skip
        return out, sure

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype)


def launch_norm(
    x_TK: Tensor,
    residual_TK: Tensor | None,
    y: Tensor,
    normed: Sequence[Tensor],
    weight_K: Tensor | None,
    next_weights: Sequence[Tensor | None],
    eps: float,
    scale: float,
    options: dict[str, Any],
) -> None:
    """`norm_kernel`: one norm behind the sum, or three."""
    (t, k), more = x_TK.shape, len(normed) == 3
    following = [x_TK if w is None else w for w in next_weights]
    norms.norm_kernel[(t,)](
        x_TK, x_TK if residual_TK is None else residual_TK,
        x_TK if weight_K is None else weight_K, following[0], following[-1 if not more else 1],
        following[-1], y, normed[0], normed[1] if more else y, normed[-1], k, eps, scale,
        ADD=residual_TK is not None, HAS_W=weight_K is not None,
        HAS_NEXT=next_weights[0] is not None, MORE=more, BLOCK=triton.next_power_of_2(k),
        num_warps=WIDE_WARPS if k > 2048 else 4, **options,
    )  # fmt: skip
