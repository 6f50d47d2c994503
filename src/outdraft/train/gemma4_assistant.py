"""The objective of a Gemma 4 assistant: K draft steps from every position, as in decoding.

Anchor t of a window stands for the round in which token t + 1 is the newest. In step k = 0 .. K - 1
the assistant reads the embedding of token t + 1 + k and a state: the target's final hidden state at
t in step 0, its own carried state after that. It stands at position t + 1 in every step, sees the
target's keys 0 .. t (in sliding layers the last `window` of them), and learns the target's
distribution after token t + 1 + k. Tokens are the window's; states are the assistant's own. All
anchors of all windows are queries of one call over frozen keys and values.

Here: that graph. Not here: the network (models/gemma4_assistant.py), a round of decoding
(speculate/gemma4_assistant.py), the target's own text (rollouts.py).

Shapes: B windows, S tokens each, A anchors of a window, K target hidden size, h own, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config, LayerKind
from outdraft.ops.batched import BatchedOps
from outdraft.train.attention import FrozenAttention, KeysValues
from outdraft.train.losses import CHUNK_ROWS, kl_divergence, probs_and_entropy, step_weights
from outdraft.train.pretrain import run_target
from outdraft.train.weights import compute_in, trainable


@dataclass(frozen=True, slots=True)
class TargetStates:
    """What the frozen target says about windows.

    `keys_values`: of the last owning layer of each kind. `probs_BSV` are in the type of the
    products, so that they are half the size in bf16; `entropy_BS` is their entropy, in nats.
    """

    embedded_BSK: Tensor
    hidden_BSK: Tensor
    probs_BSV: Tensor
    entropy_BS: Tensor
    keys_values: dict[LayerKind, KeysValues]


@torch.no_grad()
def target_states(model: Gemma4, ids_BS: Tensor, dtype: torch.dtype) -> TargetStates:
    """Run the target over windows int64 [B, S]."""
    hidden_TK, attention = run_target(model, ids_BS)
    parts = [
        probs_and_entropy(model.logits(rows), dtype) for rows in torch.split(hidden_TK, CHUNK_ROWS)
    ]
    config = model.config
    return TargetStates(
        embedded_BSK=model.embed(ids_BS),
        hidden_BSK=hidden_TK.view(*ids_BS.shape, -1),
        probs_BSV=torch.cat([probs for probs, _ in parts]).view(*ids_BS.shape, -1),
        entropy_BS=torch.cat([entropy for _, entropy in parts]).view(ids_BS.shape),
        keys_values={
            kind: attention.keys_values[config.last_owner(kind)]
            for kind in dict.fromkeys(config.layer_types)
        },
    )


def unrolled_loss(assistant: Gemma4Assistant, target: TargetStates, n_steps: int) -> Tensor:
    """The weighted mean over steps of KL(target || assistant), nats; K = `n_steps`.

    Anchors are the positions from which all K steps have a target within the window.
    """
    n_windows, length, width = target.embedded_BSK.shape
    n_anchors = length - n_steps
    assert n_anchors > 0
    kinds = set(assistant.config.text.layer_types)
    attention = FrozenAttention(
        assistant.config.text,
        {kind: kv for kind, kv in target.keys_values.items() if kind in kinds},
        n_anchors,
    )
    positions_T = (torch.arange(n_anchors) + 1).repeat(n_windows)
    state_TK = target.hidden_BSK[:, :n_anchors].reshape(-1, width)
    total = state_TK.new_zeros((), dtype=torch.float32)
    for k, weight in enumerate(step_weights(n_steps)):
        newest = slice(1 + k, 1 + k + n_anchors)
        embedded_TK = target.embedded_BSK[:, newest].reshape(-1, width)
        normed_Th = assistant.step(embedded_TK, state_TK, positions_T, attention)
        probs_TV = target.probs_BSV[:, newest].flatten(0, 1)
        entropy_T = target.entropy_BS[:, newest].flatten()
        total = total + weight * kl_divergence(normed_Th, probs_TV, entropy_T, assistant.logits)
        state_TK = assistant.carry(normed_Th)
    return total


class AssistantTraining:
    """Draft steps on text and on the target's own writing (an `Objective`)."""

    def __init__(
        self,
        config: AssistantConfig,
        weights: Mapping[str, Tensor],
        target_config: Gemma4Config,
        target_weights: Mapping[str, Tensor],
        batch: Callable[[int], Tensor],
        n_steps: int,
        dtype: torch.dtype,
        anchors_per_step: int,
    ) -> None:
        """`batch`: windows int64 [B, S] of a training step; `n_steps`: draft steps of a round."""
        self.config = config
        self.all_weights = weights
        self.weights = trainable(weights)
        self.target_config = target_config
        self.target_weights = target_weights
        self.batch = batch
        self.n_steps = n_steps
        self.dtype = dtype
        self.tokens_per_step = anchors_per_step

    def loss(self, step: int) -> Tensor:
        """See `Objective.loss`; nats per draft."""
        device = self.target_weights["embed_tokens.weight"].device
        ids_BS = self.batch(step).to(device)
        with torch.device(device), compute_in(self.dtype, device):
            target = Gemma4(self.target_config, self.target_weights, BatchedOps())
            assistant = Gemma4Assistant(self.config, self.all_weights, BatchedOps())
            states = target_states(target, ids_BS, self.dtype)
            return unrolled_loss(assistant, states, self.n_steps)
