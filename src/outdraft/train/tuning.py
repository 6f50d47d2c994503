"""The objective of tuning: draft steps on what the served target wrote.

Here: batches of prompts with their continuations, the loss over anchors in the continuation. Not
here: the unrolled graph's definition (gemma4_assistant.py), the stages (tune.py).

Shapes: R texts, B texts of a batch, S tokens each, A anchors, K target hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.models.gemma4_config import AssistantConfig
from outdraft.ops.batched import BatchedOps
from outdraft.train.attention import FrozenAttention
from outdraft.train.gemma4_assistant import target_states
from outdraft.train.losses import draft_loss, step_weights
from outdraft.train.weights import compute_in, trainable

MAX_PROBS = 1 << 27
"""Most probabilities of a batch that are in memory at once."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of different lengths, padded: ids int64 [R, S], tokens given and tokens in all [R]."""

    ids_RS: Tensor
    given_R: Tensor
    length_R: Tensor

    @classmethod
    def of(cls, texts: Sequence[tuple[Sequence[int], int]]) -> "Texts":
        """From (tokens, how many of them were given)."""
        width = max(len(tokens) for tokens, _ in texts)
        ids_RS = torch.zeros(len(texts), width, dtype=torch.int64)
        for row, (tokens, _) in enumerate(texts):
            ids_RS[row, : len(tokens)] = torch.tensor(tokens)
        given = torch.tensor([given for _, given in texts])
        return cls(ids_RS, given, torch.tensor([len(tokens) for tokens, _ in texts]))

    def batch(self, step: int, size: int, seed: int) -> "Texts":
        """The texts of a step, a function of the seed and the step alone; every epoch shuffled."""
        n = len(self.given_R)
        rows = []
        for index in range(step * size, (step + 1) * size):
            epoch, place = divmod(index, n)
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            rows.append(int(torch.randperm(n, generator=generator)[place]))
        length_B = self.length_R[rows]
        ids_BS = self.ids_RS[rows, : int(length_B.max())]
        return Texts(ids_BS, self.given_R[rows], length_B)


def anchors(texts: Texts, n_steps: int) -> Tensor:
    """True where a round can start, bool [B, A]: anchor t has token t + 1 as its newest.

    That token is the first of the continuation or later, and all K steps end within the text.
    """
    n_anchors = texts.ids_RS.shape[1] - n_steps
    at_A = torch.arange(n_anchors)
    first_B, last_B = texts.given_R - 1, texts.length_R - n_steps - 1
    return (at_A >= first_B[:, None]) & (at_A <= last_B[:, None])


class Tuning:
    """Draft steps on continuations that the target wrote (an `Objective`)."""

    def __init__(
        self,
        target: Gemma4,
        config: AssistantConfig,
        weights: Mapping[str, Tensor],
        texts: Texts,
        *,
        batch: int,
        n_steps: int,
        loss: str,
        seed: int,
        dtype: torch.dtype,
        lead: tuple[Texts, int] | None = None,
    ) -> None:
        """`weights`: the assistant's leaves; `n_steps`: draft steps of a round.

        `lead`: other texts, for so many steps before those of `texts`.
        """
        self.target = target
        self.config = config
        self.all_weights = weights
        self.weights = trainable(weights)
        self.texts = texts
        self.lead, self.n_lead = lead or (texts, 0)
        width = max(texts.ids_RS.shape[1], self.lead.ids_RS.shape[1])
        self.batch = max(1, min(batch, MAX_PROBS // (width * config.text.vocab_size)))
        self.n_steps = n_steps
        self.kind = loss
        self.seed = seed
        self.dtype = dtype
        kept = anchors(texts, n_steps).sum()
        self.tokens_per_step = max(1, int(kept) * self.batch // len(texts.given_R))

    def loss(self, step: int) -> Tensor:
        """See `Objective.loss`; nats per draft."""
        with compute_in(self.dtype, torch.device("cpu")):
            leading = step < self.n_lead
            source, at = (self.lead, step) if leading else (self.texts, step - self.n_lead)
            texts = source.batch(at, self.batch, self.seed)
            assistant = Gemma4Assistant(self.config, self.all_weights, BatchedOps())
            return self._unrolled(assistant, texts)

    def _unrolled(self, assistant: Gemma4Assistant, texts: Texts) -> Tensor:
        states = target_states(self.target, texts.ids_RS, self.dtype)
        kept_BA = anchors(texts, self.n_steps)
        n_texts, n_anchors = kept_BA.shape
        width = states.hidden_BSK.shape[-1]
        kinds = set(assistant.config.text.layer_types)
        frozen = {kind: kv for kind, kv in states.keys_values.items() if kind in kinds}
        attention = FrozenAttention(assistant.config.text, frozen, n_anchors)
        positions_T = (torch.arange(n_anchors) + 1).repeat(n_texts)
        state_TK = states.hidden_BSK[:, :n_anchors].reshape(-1, width)
        total = state_TK.new_zeros((), dtype=torch.float32)
        # The head is used as the full one: the groups of an ordered head stay as they are.
        for k, weight in enumerate(step_weights(self.n_steps)):
            newest = slice(1 + k, 1 + k + n_anchors)
            embedded_TK = states.embedded_BSK[:, newest].reshape(-1, width)
            normed_Th = assistant.step(embedded_TK, state_TK, positions_T, attention)
            probs_TV = states.probs_BSV[:, newest][kept_BA]
            rows_Th = normed_Th[kept_BA.flatten()]
            total = total + weight * draft_loss(self.kind, rows_Th, probs_TV, assistant.text.logits)
            state_TK = assistant.carry(normed_Th)
        return total
