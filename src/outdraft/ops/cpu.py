"""The compiled kernels as the operations of a model (`Ops`).

Here: how weights are packed and how operations are put together from kernel calls (ops/kernels.py).
Not here: packing itself (ops/packed.py), the plain specification (ops/reference.py).

Shapes: T rows, K inputs, N outputs, A experts or blocks used by a row, C blocks, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.arena import Arena
from outdraft.ops.base import Activation, Role
from outdraft.ops.kernels import Kernels
from outdraft.ops.packed import Format, PackedLinear
from outdraft.ops.program import Program
from outdraft.ops.record import Replayable
from outdraft.ops.stored import Packer, StoredWeight, pack_stored

HEAD_DIM_MULTIPLE = 32  # halves of a head are turned sixteen at a time


@dataclass(slots=True)
class CpuOps(Kernels):
    """Operations that run at once, or are recorded when `program` is set.

    Attributes:
        format: how `pack` stores weights: `w4`, `w8` or `bf16`. Embeddings and heads get at least
            8 bits, routers bf16.
        kv_dtype: of keys and values: fp32, bf16 or int8.
        candidates: scales tried for each group or row when quantising.
        packer: packs weights that are still in their files.
        arena: memory of what recorded programs compute.
    """

    format: Format = "w8"
    kv_dtype: torch.dtype = torch.bfloat16
    candidates: int = 1
    packer: Packer = pack_stored
    arena: Arena = field(default_factory=Arena)

    def describe(self) -> str:
        """See `Ops.describe`."""
        kv = str(self.kv_dtype).removeprefix("torch.")
        return f"cpu ({_core.current_isa()}, {_core.threads()} threads), {self.format}, {kv} keys"

    @property
    def device(self) -> torch.device:
        """See `Ops.device`."""
        return torch.device("cpu")

    @property
    def records_all(self) -> bool:
        """See `Recordable`."""
        return False

    @property
    def warms_up(self) -> bool:
        """See `Recordable`."""
        return False

    def begin(self, program: Replayable | None) -> Program:
        """See `Recordable`."""
        assert self.program is None and (program is None or isinstance(program, Program))
        self.program = Program(self.arena) if program is None else program
        return self.program

    def end(self) -> None:
        """See `Recordable`."""
        self.program = None

    @property
    def row_multiple(self) -> int:
        """Any number of rows is as good as any other."""
        return 1

    def stored_as(self, role: Role) -> Format:
        """How `pack` stores weights of this role."""
        if role == "router":
            return "bf16"
        return "w8" if role == "embedding" and self.format == "w4" else self.format

    def pack(self, weight: Any, role: Role = "linear") -> PackedLinear:
        """See `Ops.pack`. A `StoredWeight` is packed chunk by chunk while it is read."""
        if isinstance(weight, StoredWeight):
            return self.packer(weight, self.stored_as(role), self.candidates)
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.float()
        return PackedLinear.pack(weight, self.stored_as(role), candidates=self.candidates)

    def pack_blocks(self, weight_VK: Any, ids_CN: Tensor) -> PackedLinear:
        """See `Ops.pack_blocks`."""
        if isinstance(weight_VK, StoredWeight):
            return self.pack(weight_VK.take(ids_CN), "embedding")
        return self.pack(weight_VK[ids_CN.long()], "embedding")

    def embed(self, weight: PackedLinear, token_T: Tensor, scale: float) -> Tensor:
        """See `Ops.embed`; fp32."""
        out_TK = self.empty((token_T.shape[0], weight.k), torch.float32)
        return self.embed_into(weight, token_T, scale, out_TK)

    def concat(self, a_TK: Tensor, b_TN: Tensor) -> Tensor:
        """See `Ops.concat`."""
        width = a_TK.shape[1]
        out = self.empty((a_TK.shape[0], width + b_TN.shape[1]), a_TK.dtype)
        self.copy_rows(a_TK, out[:, :width])
        self.copy_rows(b_TN, out[:, width:])
        return out

    def experts(
        self,
        x_TK: Tensor,
        gate_up: PackedLinear,
        down: PackedLinear,
        ids_TA: Tensor,
        weights_TA: Tensor,
        activation: Activation = "gelu_tanh",
    ) -> Tensor:
        """See `Ops.experts`. Only the experts that are hit are read, each once."""
        n_pairs, inner = ids_TA.numel(), down.k
        groups = self.group_pairs(ids_TA, gate_up.n_blocks)
        both = self.expert_linear(x_TK, gate_up, groups, n_pairs)
        gated = self.gated(both[:, :inner], both[:, gate_up.n - inner :], activation)
        return self.combine(self.expert_linear(gated, down, groups, n_pairs), weights_TA)

    def score_blocks(
        self, x_TK: Tensor, blocks: PackedLinear, ids_CN: Tensor, chosen_TA: Tensor, n_vocab: int
    ) -> Tensor:
        """See `Ops.score_blocks`."""
        scores_TX = self._block_scores(x_TK, blocks, chosen_TA)
        return self.scatter_blocks(scores_TX, ids_CN, chosen_TA, n_vocab)

    def best_of_blocks(
        self, x_TK: Tensor, blocks: PackedLinear, ids_CN: Tensor, chosen_TA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.best_of_blocks`."""
        scores_TX = self._block_scores(x_TK, blocks, chosen_TA)
        sure_T = self.empty((x_TK.shape[0],), torch.float32)
        return self.argmax_of_blocks(scores_TX, ids_CN, chosen_TA, sure_T), sure_T

    def _block_scores(self, x_TK: Tensor, blocks: PackedLinear, chosen_TA: Tensor) -> Tensor:
        """fp32 scores of each row's chosen blocks, in their order."""
        n_rows, count = chosen_TA.shape
        groups = self.group_pairs(chosen_TA, blocks.n_blocks)
        scores_PN = self.expert_linear(x_TK, blocks, groups, n_rows * count, torch.float32)
        return scores_PN.view(n_rows, -1)

    def gated(self, gate_TK: Tensor, up_TK: Tensor, activation: Activation = "gelu_tanh") -> Tensor:
        """See `Ops.gated`."""
        return self.activate(gate_TK, up_TK, activation)

    def gate_rows(self, x_TK: Tensor, gate_T1: Tensor) -> Tensor:
        """See `Ops.gate_rows`."""
        return self.combine(x_TK, self.activate(gate_T1, torch.ones_like(gate_T1), "sigmoid"))
