"""Kernel calls that choose: the largest scores of a row, and scores by block of the vocabulary.

Not here: the other kernels (ops/kernels.py). Shapes: as there, and X scores of a row's blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.calls import address, check
from outdraft.ops.packed import matrix
from outdraft.ops.state_space import StateSpaceCalls


@dataclass(slots=True, kw_only=True)
class Choices(StateSpaceCalls):
    """See the module docstring; comparisons are exact, ties go to the lower id."""

    def softcap(self, logits_TV: Tensor, cap: float) -> Tensor:
        """tanh(logits / cap) * cap in place, fp32."""
        assert logits_TV.dtype == torch.float32
        _core.softcap(self._target(logits_TV), matrix(logits_TV), cap, *logits_TV.shape)
        return logits_TV

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """int32 id of each row's largest fp32 logit, the lowest of equals."""
        return self._argmax(logits_TV, None)

    def best(self, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        """As `argmax`, and what softmax gives that logit, fp32 [T]."""
        sure_T = self.empty((logits_TV.shape[0],), torch.float32)
        return self._argmax(logits_TV, sure_T), sure_T

    def argmax_of_blocks(
        self, scores_TX: Tensor, ids_EN: Tensor, chosen_TA: Tensor, sure_T: Tensor | None = None
    ) -> Tensor:
        """As `argmax`, where row t has scores of the blocks `chosen_TA[t]` of ids (int32) only.

        Args:
            sure_T: gets what softmax over the scores of the row gives the largest.
        """
        check(ids_EN, torch.int32)
        check(chosen_TA, torch.int32)
        assert scores_TX.shape[1] == chosen_TA.shape[1] * ids_EN.shape[1]
        return self._argmax(scores_TX, sure_T, ids_EN, chosen_TA)

    def scatter_blocks(
        self, scores_TX: Tensor, ids_EN: Tensor, chosen_TA: Tensor, n_vocab: int
    ) -> Tensor:
        """fp32 [T, V] of the scores of the blocks `chosen_TA[t]` of ids; -inf elsewhere."""
        check(ids_EN, torch.int32)
        check(chosen_TA, torch.int32)
        n_rows, count = chosen_TA.shape
        assert scores_TX.dtype == torch.float32
        assert scores_TX.shape == (n_rows, count * ids_EN.shape[1])
        out_TV = self.empty((n_rows, n_vocab), torch.float32)
        _core.scatter_blocks(
            self._target(scores_TX, ids_EN, chosen_TA, out_TV),
            matrix(scores_TX),
            ids_EN.data_ptr(),
            chosen_TA.data_ptr(),
            ids_EN.shape[1],
            count,
            matrix(out_TV),
            n_rows,
            n_vocab,
        )
        return out_TV

    def top(self, scores_TE: Tensor, count: int) -> Tensor:
        """int32 [T, count]: the largest of each row of fp32 scores, largest first, then lowest."""
        return self._top(scores_TE, count, None, None)

    def route(
        self, scores_TE: Tensor, count: int, per_expert_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`top` and its fp32 weights: softmax made to sum to one, times `per_expert_E`."""
        weights_TA = self.empty((scores_TE.shape[0], count), torch.float32)
        return self._top(scores_TE, count, weights_TA, per_expert_E), weights_TA

    def _argmax(
        self,
        logits: Tensor,
        sure: Tensor | None,
        ids: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        assert logits.dtype == torch.float32
        out_T = self.empty((logits.shape[0],), torch.int32)
        _core.argmax(
            self._target(logits, ids, chosen, out_T, sure),
            matrix(logits),
            address(ids),
            address(chosen),
            0 if ids is None else ids.shape[1],
            out_T.data_ptr(),
            address(sure),
            *logits.shape,
        )
        return out_T

    def _top(
        self, scores: Tensor, count: int, weights: Tensor | None, per_expert: Tensor | None
    ) -> Tensor:
        assert scores.dtype == torch.float32 and 0 < count <= scores.shape[1]
        ids_TA = self.empty((scores.shape[0], count), torch.int32)
        _core.top(
            self._target(scores, ids_TA, weights, per_expert),
            matrix(scores),
            ids_TA.data_ptr(),
            address(weights),
            address(per_expert),
            count,
            *scores.shape,
        )
        return ids_TA
