"""The training graph of a native head that is tuned: a round of K drafts from every position.

Anchor t is a state of the target; x_{t+1} is the newest token. Row 1 of its round reads the
target's state t, row k the head's own result of row k - 1, as drafting does. Row k stands at
position t + k - 1 and sees the keys of the target's states 0 .. t and of rows 2 .. k of its own
round: rows of other rounds were taken back before. Here: attention for all rounds at once and the
loss. Not here: the stages (tune.py), pre-training (mtp.py).

Shapes: B texts, S tokens each, A anchors of a text, T = B * A rows, H query heads, G key/value
heads, D head dimension, K hidden size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outdraft.models.mtp import MtpHead
from outdraft.models.qwen3_5 import Qwen35
from outdraft.ops.base import Heads
from outdraft.ops.batched import BatchedOps
from outdraft.train.attention import split_sequences, visible_keys
from outdraft.train.hybrid import SequenceLayers
from outdraft.train.losses import CHUNK_ROWS, draft_loss, probs_and_entropy, step_weights
from outdraft.train.tuning import MAX_PROBS, Texts, anchors
from outdraft.train.weights import compute_in, trainable

_OPS = BatchedOps()


@dataclass(slots=True)
class Rounds:
    """`Attend` of a head's one layer, called once for each row of all rounds, in order."""

    n_texts: int
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`. Queries are scaled already."""
        assert k is not None and v is not None
        queries, keys, values = (split_sequences(x.value(_OPS), self.n_texts) for x in (q, k, v))
        group = queries.shape[1] // keys.shape[1]
        rows = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        self.own.append(rows)
        true_keys, true_values = self.own[0]
        n = queries.shape[2]
        scores = queries @ true_keys.transpose(-1, -2)
        beside = [(queries * own_keys).sum(dim=-1, keepdim=True) for own_keys, _ in self.own[1:]]
        scores = torch.cat((scores.masked_fill(~visible_keys(n, n, None), -torch.inf), *beside), -1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        shares = scores.to(wide).softmax(dim=-1).to(queries.dtype)
        out_BHAD = shares[..., :n] @ true_values
        for i, (_, own_values) in enumerate(self.own[1:]):
            out_BHAD = out_BHAD + shares[..., n + i, None] * own_values
        return out_BHAD.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class States:
    """What the frozen target says about texts."""

    embedded_BSK: Tensor
    hidden_BSK: Tensor
    probs_BSV: Tensor


@torch.no_grad()
def target_states(model: Qwen35, ids_BS: Tensor, dtype: torch.dtype) -> States:
    """Run the target over texts int64 [B, S]; its probabilities are kept in `dtype`."""
    n_texts, length = ids_BS.shape
    at_T = torch.arange(length).repeat(n_texts)
    layers = SequenceLayers(n_texts, model.config.delta)
    hidden_TK = model.forward(ids_BS.reshape(-1), at_T, layers)
    probs = [
        probs_and_entropy(model.logits(rows), dtype)[0]
        for rows in torch.split(hidden_TK, CHUNK_ROWS)
    ]
    embedded_TK = model.embed(ids_BS.reshape(-1))
    shape = *ids_BS.shape, -1
    return States(embedded_TK.view(shape), hidden_TK.view(shape), torch.cat(probs).view(shape))


def round_results(head: MtpHead, states: States, n_steps: int) -> list[Tensor]:
    """The head's results [T, K] of rows 1 .. `n_steps` of the rounds of all anchors.

    Anchors are the first S - `n_steps` positions of each text.
    """
    n_texts, length, width = states.hidden_BSK.shape
    n_anchors = length - n_steps
    attend = Rounds(n_texts)
    at_T = torch.arange(n_anchors).repeat(n_texts)
    state_TK = states.hidden_BSK[:, :n_anchors].reshape(-1, width)
    results = []
    for k in range(1, n_steps + 1):
        embedded_TK = states.embedded_BSK[:, k : k + n_anchors].reshape(-1, width)
        state_TK = head.forward(embedded_TK, state_TK, at_T + k - 1, attend)
        results.append(state_TK)
    return results


class HeadTuning:
    """Rounds of drafts on continuations that the target wrote (an `Objective`)."""

    def __init__(
        self,
        target: Qwen35,
        weights: Mapping[str, Tensor],
        texts: Texts,
        *,
        batch: int,
        n_steps: int,
        loss: str,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        """`weights`: the head's leaves by canonical name; `n_steps`: drafts of a round."""
        self.target = target
        self.all_weights = weights
        self.weights = trainable(weights)
        self.texts = texts
        width = texts.ids_RS.shape[1]
        self.batch = max(1, min(batch, MAX_PROBS // (width * target.config.vocab_size)))
        self.n_steps, self.kind, self.seed, self.dtype = n_steps, loss, seed, dtype
        kept = anchors(texts, n_steps).sum()
        self.tokens_per_step = max(1, int(kept) * self.batch // len(texts.given_R))

    def loss(self, step: int) -> Tensor:
        """See `Objective.loss`; nats per draft."""
        with compute_in(self.dtype, torch.device("cpu")):
            texts = self.texts.batch(step, self.batch, self.seed)
            states = target_states(self.target, texts.ids_RS, self.dtype)
            n_positions = texts.ids_RS.shape[1]
            head = MtpHead(self.target.config, self.all_weights, BatchedOps(), n_positions)
            kept_BA = anchors(texts, self.n_steps)
            n_anchors = kept_BA.shape[1]
            total = states.hidden_BSK.new_zeros((), dtype=torch.float32)
            results = round_results(head, states, self.n_steps)
            for k, (done_TK, weight) in enumerate(
                zip(results, step_weights(self.n_steps), strict=True), start=1
            ):
                probs_TV = states.probs_BSV[:, k : k + n_anchors][kept_BA]
                rows_TK = done_TK[kept_BA.flatten()]
                total = total + weight * draft_loss(
                    self.kind, rows_TK, probs_TV, self.target.logits
                )
            return total
