"""Operations that have no GPU kernels: models that need them are refused before they get here."""

from torch import Tensor

from outdraft.ops.base import SigmoidRouter
from outdraft.ops.recurrent_base import DeltaGates, StateRows, StateSpace


class NoRecurrence:
    """Recurrent layers."""

    __slots__ = ()

    def gate_rows(self, x_TK: Tensor, gate_T1: Tensor) -> Tensor:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def short_conv(
        self,
        x_TC: Tensor,
        weight_WC: Tensor,
        state_SWC: Tensor,
        rows: StateRows,
        bias_C: Tensor | None = None,
    ) -> Tensor:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def delta_rule(
        self,
        qkv_TC: Tensor,
        a_TH: Tensor,
        b_TH: Tensor,
        gates: DeltaGates,
        state_SHKV: Tensor,
        rows: StateRows,
        n_k_heads: int,
    ) -> Tensor:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def gated_norm(self, x_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError


class NoStateSpace:
    """Mamba 2 layers and routing by sigmoids."""

    __slots__ = ()

    def scan(
        self, x_TC: Tensor, dt_TH: Tensor, space: StateSpace, state_SHNP: Tensor, rows: StateRows
    ) -> Tensor:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def group_norm(self, x_TGV: Tensor, gate_TGV: Tensor, weight_GV: Tensor, eps: float) -> Tensor:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def route_sigmoid(self, scores_TE: Tensor, router: SigmoidRouter) -> tuple[Tensor, Tensor]:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError
