"""The objectives of distilling: a teacher's traces, and a student's own answers under its teacher.

Here: cross-entropy on marked tokens, generalised Jensen-Shannon divergence on marked tokens. Not
here: where the texts come from (traces.py, distill.py).

Shapes: B texts, S tokens, T marked rows, K hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.ops.batched import BatchedOps
from outdraft.train.losses import cross_entropy, generalised_jsd
from outdraft.train.pretrain import run_target
from outdraft.train.traces import Batch, Trace, batch_of_step
from outdraft.train.weights import compute_in, trainable

_CPU = torch.device("cpu")


class Student:
    """A Gemma 4 over leaves that collect gradients, and the batches that it learns from."""

    def __init__(
        self,
        config: Gemma4Config,
        weights: Mapping[str, Tensor],
        traces: Sequence[Trace],
        *,
        batch: int,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        """`weights`: by canonical name; `dtype`: of products."""
        self.config = config
        self.all_weights = weights
        self.weights = trainable(weights)
        self.traces = traces
        self.batch = batch
        self.seed = seed
        self.dtype = dtype
        mean = sum(len(trace.ids) for trace in traces) / len(traces)
        self.tokens_per_step = int(mean * min(batch, len(traces)))

    def texts(self, step: int) -> Batch:
        """The batch of a step."""
        return batch_of_step(self.traces, step, self.batch, self.seed)

    def loss(self, step: int) -> Tensor:
        """See `Objective.loss`: what is learned from the texts of a step."""
        raise NotImplementedError

    def marked(self, texts: Batch) -> tuple[Gemma4, Tensor, Tensor]:
        """The model, hidden states [T, K] before marked tokens, and those tokens [T]."""
        model = Gemma4(self.config, self.all_weights, BatchedOps())
        return model, *_marked(model, texts)


class Following(Student):
    """Cross-entropy on a teacher's traces (an `Objective`; sequence distillation)."""

    def loss(self, step: int) -> Tensor:
        """See `Objective.loss`; nats per marked token."""
        with compute_in(self.dtype, _CPU):
            model, hidden_TK, tokens_T = self.marked(self.texts(step))
            return cross_entropy(hidden_TK, tokens_T, model.logits)


class Answering(Student):
    """Generalised JSD from the teacher on the student's own answers (an `Objective`).

    Source: on-policy distillation, Agarwal et al., arXiv 2306.13649.
    """

    def __init__(
        self,
        teacher: Gemma4,
        beta: float,
        config: Gemma4Config,
        weights: Mapping[str, Tensor],
        traces: Sequence[Trace],
        *,
        batch: int,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        """`beta`: 0 is KL(teacher || student), 1 KL(student || teacher)."""
        super().__init__(config, weights, traces, batch=batch, seed=seed, dtype=dtype)
        self.teacher = teacher
        self.beta = beta

    def loss(self, step: int) -> Tensor:
        """See `Objective.loss`; nats per marked token."""
        with compute_in(self.dtype, _CPU):
            texts = self.texts(step)
            with torch.no_grad():
                wise_TK, _ = _marked(self.teacher, texts)
                probs_TV = torch.softmax(self.teacher.logits(wise_TK).float(), dim=-1)
            model, hidden_TK, _ = self.marked(texts)
            return generalised_jsd(hidden_TK, probs_TV, model.logits, self.beta)


@torch.no_grad()
def heldout_loss(model: Gemma4, traces: Sequence[Trace], batch: int) -> float:
    """Mean cross-entropy of marked tokens in nats, products in fp32."""
    total, n_tokens = 0.0, 0
    ordered = sorted(traces, key=lambda trace: len(trace.ids))
    for start in range(0, len(ordered), batch):
        hidden_TK, tokens_T = _marked(model, Batch.of(ordered[start : start + batch]))
        total += float(cross_entropy(hidden_TK, tokens_T, model.logits)) * len(tokens_T)
        n_tokens += len(tokens_T)
    return total / n_tokens


def _marked(model: Gemma4, texts: Batch) -> tuple[Tensor, Tensor]:
    hidden_XK, _ = run_target(model, texts.ids_BS[:, :-1])
    marked_BS = texts.mask_BS[:, 1:]
    return hidden_XK[marked_BS.reshape(-1)], texts.ids_BS[:, 1:][marked_BS]
