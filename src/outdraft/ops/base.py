"""The operations a model is made of, as an interface: tensor in, tensor out.

Every implementation used for decoding must be *row-invariant*: what comes out for a row must not
depend, in a single bit, on how many or which other rows are in the call. That is what makes
drafting exact. `reference.py` is plain PyTorch and is the specification; `cpu.py` calls the
compiled kernels; `batched.py` is the differentiable version for training, which gives the promise
up.

Shapes: T rows (tokens), K inputs, N outputs, H query heads, G key/value heads, D head dimension,
P pages, S slots in a page, B sequences, E experts, A experts used by a row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from outdraft.ops.recurrent_base import RecurrentOps

PAGE_SLOTS = 64
"""Key/value positions held by one page. Attention sums page by page, so this is part of the bits
of the output and is the same for every sequence."""

Activation = Literal["gelu_tanh", "silu", "sigmoid", "relu"]

Role = Literal["linear", "embedding", "router"]
"""What a weight is for, which decides how few bits it may get."""

Weight: TypeAlias = Any
"""What `Ops.pack` made of a weight; only the same operations read it."""


@dataclass(frozen=True, slots=True)
class KvPages:
    """Keys and values of a layer, [P, G, S, D] in fp32, bf16, or int8 with scales [P, G, S]."""

    k_PGSD: Tensor
    v_PGSD: Tensor
    k_scales_PGS: Tensor | None = None
    v_scales_PGS: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Which keys each row sees; all int32.

    Row t sees key positions `lo_T[t]..hi_T[t]`, both included, of sequence `sequence_T[t]`; rows of
    a sequence lie together, and every row sees at least one key. Position p of sequence b is in
    slot p % PAGE_SLOTS of page `table_BP[b, p // PAGE_SLOTS - first_page_B[b]]`. What pages hold
    above the visible keys may be anything finite.
    """

    table_BP: Tensor
    first_page_B: Tensor
    sequence_T: Tensor
    lo_T: Tensor
    hi_T: Tensor
    scratch: dict[str, Any] = field(default_factory=dict, compare=False)
    """Of the implementation: what it derives once for all layers that share these rows."""

    @classmethod
    def of(cls, parts: list[Tensor]) -> "AttentionRows":
        """From the five tensors in the order of the fields."""
        table_BP, first_page_B, sequence_T, lo_T, hi_T = parts
        return cls(table_BP, first_page_B, sequence_T, lo_T, hi_T)


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin of the angles, fp32 [positions, D / 2], and the position of each row, int32."""

    cos: Tensor
    sin: Tensor
    position_T: Tensor


@dataclass(frozen=True, slots=True)
class PageSlots:
    """Where each row's key or value goes: int32 page and slot."""

    page_T: Tensor
    slot_T: Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """Raw keys or values of one call, with what is to be done to them before they are stored.

    Storing is part of it because a kernel does norm, rotation and the write to memory at once.
    `eps` None: no norm.
    """

    raw_TGD: Tensor
    norm_D: Tensor | None
    rotary: Rotary | None
    eps: float | None

    def value(self, ops: "Ops") -> Tensor:
        """Normed and rotated, [T, G, D]."""
        return ops.norm_rope(self.raw_TGD, self.norm_D, self.rotary, self.eps)


@dataclass(frozen=True, slots=True)
class SigmoidRouter:
    """How experts are chosen by sigmoids; see `Ops.route_sigmoid`.

    `bias_E` is fp32 and only helps to choose. With `n_groups` > 1 experts are taken from the
    `top_groups` groups with the largest sum of their two best.
    """

    bias_E: Tensor
    top_k: int
    n_groups: int
    top_groups: int
    normalise: bool
    scale: float


class Ops(RecurrentOps, Protocol):
    """See the module docstring. Activations are fp32, bf16 or fp16."""

    def describe(self) -> str:
        """What computes and how weights are stored, in a few words for people."""
        ...

    @property
    def device(self) -> torch.device:
        """Where weights, keys, values and all tensors of a call are."""
        ...

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of keys and values in memory."""
        ...

    @property
    def row_multiple(self) -> int:
        """Calls whose number of rows is a multiple of this need no padding."""
        ...

    def pack(self, weight: Tensor, role: Role = "linear") -> Weight:
        """A weight [N, K], or [E, N, K] for experts, as `linear`, `embed` and `experts` read it."""
        ...

    def embed(self, weight: Weight, token_T: Tensor, scale: float) -> Tensor:
        """Rows `token_T` (int32) of the weight times scale, [T, K]."""
        ...

    def concat(self, a_TK: Tensor, b_TN: Tensor) -> Tensor:
        """Columns of a, then columns of b: [T, K + N]."""
        ...

    def linear(self, x_TK: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
        """x W^T in `dtype`, by default that of x; [T, N]."""
        ...

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps), times the fp32 weight (not 1 + weight), computed in fp32."""
        ...

    def add_norm(
        self,
        x_TK: Tensor,
        residual_TK: Tensor,
        weight_K: Tensor | None,
        eps: float,
        *,
        scale: float = 1.0,
        next_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """y = (residual + rms_norm(x, weight)) * scale, and rms_norm(y, next_weight)."""
        ...

    def add(self, x_TK: Tensor, residual_TK: Tensor, scale: float = 1.0) -> Tensor:
        """(residual + x) * scale."""
        ...

    def norm_rope(
        self, x_THD: Tensor, weight_D: Tensor | None, rotary: Rotary | None, eps: float | None
    ) -> Tensor:
        """RMS norm over each head, then rotation of (i, i + D/2) pairs unless `rotary` is None.

        With an `eps` of None there is no norm.
        """
        ...

    def write_heads(
        self,
        x_TGD: Tensor,
        pages_PGSD: Tensor,
        scales_PGS: Tensor | None,
        slots: PageSlots,
        weight_D: Tensor | None,
        rotary: Rotary | None,
        *,
        eps: float | None,
    ) -> None:
        """As `norm_rope`, written into pages of keys or of values."""
        ...

    def gated(self, gate_TK: Tensor, up_TK: Tensor, activation: Activation = "gelu_tanh") -> Tensor:
        """activation(gate) * up. relu(x)^2 is `gated(x, x, "relu")`."""
        ...

    def gate_rows(self, x_TK: Tensor, gate_T1: Tensor) -> Tensor:
        """sigmoid(gate) * x, the gate (fp32) one number a row; [T, K]."""
        ...

    def attention(self, q_THD: Tensor, kv: KvPages, rows: AttentionRows, scale: float) -> Tensor:
        """Grouped-query softmax attention over paged keys, [T, H, D]; sums are fp32."""
        ...

    def route(
        self, scores_TE: Tensor, count: int, per_expert_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The best experts of each row and their weights.

        Softmax over fp32 scores, the `count` largest (the lowest id of equals), made to sum to one,
        times `per_expert_E`: int32 and fp32 [T, A].
        """
        ...

    def route_sigmoid(self, scores_TE: Tensor, router: SigmoidRouter) -> tuple[Tensor, Tensor]:
        """The best experts of each row by sigmoid(score) + bias, and their weights.

        Weights are sigmoid(score), made to sum to one if the router says so, times its scale. Of
        equals the lowest id is taken: int32 and fp32 [T, A], the best first.
        """
        ...

    def experts(
        self,
        x_TK: Tensor,
        gate_up: Weight,
        down: Weight,
        ids_TA: Tensor,
        weights_TA: Tensor,
        activation: Activation = "gelu_tanh",
    ) -> Tensor:
        """Sum over a row's experts of weight * down(gated(gate_up x)), shape [T, K].

        Where `gate_up` has no more outputs than `down` has inputs there are no gates: u = gate_up x
        is gated by itself.
        """
        ...

    def top(self, scores_TE: Tensor, count: int) -> Tensor:
        """int32 [T, A]: ids of the largest of each row of fp32 scores, the lowest of equals."""
        ...

    def pack_blocks(self, weight_VK: Tensor, ids_CN: Tensor) -> Weight:
        """The weight's rows in C blocks, block c of rows `ids_CN[c]`, for `score_blocks`."""
        ...

    def score_blocks(
        self, x_TK: Tensor, blocks: Weight, ids_CN: Tensor, chosen_TA: Tensor, n_vocab: int
    ) -> Tensor:
        """fp32 scores [T, V] of the tokens in each row's chosen blocks, -inf elsewhere."""
        ...

    def best_of_blocks(
        self, x_TK: Tensor, blocks: Weight, ids_CN: Tensor, chosen_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`best` of `score_blocks`, without the scores."""
        ...

    def softcap(self, logits_TV: Tensor, cap: float) -> Tensor:
        """tanh(logits / cap) * cap of fp32 logits; may be done in place."""
        ...

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """int32 id of each row's largest fp32 logit, the lowest of equals."""
        ...

    def best(self, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        """`argmax` of each row, and what softmax over its fp32 logits gives it: int32, fp32 [T]."""
        ...


@runtime_checkable
class Fuses(Protocol):
    """Operations that do in one call what else takes several: on a GPU every call costs time.

    What comes out may be rounded in other places than by the single calls; it is as row-invariant.
    """

    def gated_linear(
        self,
        x_TK: Tensor,
        weight: Weight,
        up_TN: Tensor | None = None,
        activation: Activation = "gelu_tanh",
    ) -> Tensor:
        """`gated` of a `linear` by `up_TN`, or by the second half of its outputs; [T, N]."""
        ...

    def turn_and_write(
        self, q: Heads, k: Heads, v: Heads, pages: KvPages, slots: PageSlots
    ) -> Tensor:
        """`norm_rope` of queries, `write_heads` of keys and values; the queries [T, H, D].

        Keys and queries are rotated at the same positions, values are not rotated.
        """
        ...

    def add_norms(
        self,
        x_TK: Tensor,
        residual_TK: Tensor,
        weight_K: Tensor,
        eps: float,
        next_weights: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """`add_norm` with three weights for the norm behind it."""
        ...

    def add_mixture(
        self,
        x_TK: Tensor,
        experts: tuple[Weight, Weight],
        routed: tuple[Tensor, Tensor],
        dense_TK: Tensor,
        residual_TK: Tensor,
        weights: Sequence[Tensor],
        eps: float,
        *,
        scale: float = 1.0,
        next_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`add_norm` of rms_norm(experts(x)) + rms_norm(dense).

        Args:
            experts: gate and up, down, as for `experts`.
            routed: what `route` gave.
            weights: of the norm of the experts, of the dense part, and of their sum.
        """
        ...

    def accept(
        self,
        token_T: Tensor,
        best_T: Tensor,
        hidden_TH: Tensor,
        windows_G: Tensor,
        numbers: Tensor,
        hidden_1H: Tensor,
    ) -> None:
        """Move the next draft round of a sequence on by the drafts that stay; all on the device.

        Draft i stays if those before it do and row i's best token is it. The best token of the
        row behind the last that stays is the newest token.

        Args:
            token_T: int32, the newest token and its drafts; `best_T`: int32, of each row.
            hidden_TH: of each row.
            windows_G: int32, of each group of layers that the drafter reads; 0: all keys.
            numbers: int32, those of the round as if none stayed: token, position, sequence, newest
                key, and for each group the oldest key. All but the third are changed.
            hidden_1H: gets that of the row.
        """
        ...

    def best_or_none(self, logits_TV: Tensor) -> Tensor:
        """`argmax`, and -1 where that logit is not finite."""
        ...
