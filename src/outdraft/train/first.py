"""First weights of a new assistant, from the target's own: what a linear map can guess.

Here: the head, the projections and small layers, computed from the target's hidden states on some
text. Not here: the shape (propose.py), training (tune.py).

With H the second moment of the target's final hidden states h and E its head, the best rank-r
stand-in for its scores E h keeps the r leading eigenvectors W of H^1/2 E'E H^1/2 (reduced-rank
regression): the assistant's head is E H^1/2 W and its state W' H^-1/2 h, which has unit second
moment as the output of a norm should, and H^1/2 W carries it back to a hidden state. The input
projection is the ridge regression of the next state on what the assistant reads. Layers start as
small corrections of that guess.

Shapes: N rows, K target hidden size, r the assistant's, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from outdraft.errors import TrainingError
from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_assistant import expected_tensors
from outdraft.models.gemma4_config import AssistantConfig
from outdraft.train.export import export_new
from outdraft.train.pretrain import run_target
from outdraft.train.propose import propose_assistant
from outdraft.train.weights import fresh_weights
from outdraft.weights.config import read_config

RIDGE = 1e-3  # of the mean eigenvalue
BRANCH = 0.1  # weight of what a layer adds at first
ROWS_OF_WIDTH = 16  # rows of text wanted for each of the regression's inputs
_BATCH = 16


@torch.no_grad()
def first_weights(
    target: Gemma4, shape: AssistantConfig, texts: Sequence[Sequence[int]], seed: int
) -> dict[str, Tensor]:
    """fp32 weights by canonical name.

    Args:
        target: with fp32 weights.
        texts: token ids to look at, of at least two tokens each; as many are used as the
            regression needs.
    """
    weights = fresh_weights(expected_tensors(shape), seed)
    for name, weight in weights.items():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            weight.fill_(BRANCH)
    own, width = shape.text.hidden_size, shape.backbone_hidden_size
    hidden_NK, inputs_N2K = _states(target, texts, ROWS_OF_WIDTH * 2 * width)
    root_KK, inverse_KK = _roots(_ridged(hidden_NK.T @ hidden_NK / len(hidden_NK)))
    head_VK = target.head.double()
    weighted_VK = head_VK @ root_KK
    _, vectors_KK = torch.linalg.eigh(weighted_VK.T @ weighted_VK)
    rank = min(own, width)
    leading_Kr = vectors_KK[:, -rank:]
    state_Nr = hidden_NK @ (inverse_KK @ leading_Kr)
    moments = _ridged(inputs_N2K.T @ inputs_N2K / len(inputs_N2K))
    products = inputs_N2K.T @ state_Nr / len(inputs_N2K)
    weights["embed_tokens.weight"][:, :rank] = (weighted_VK @ leading_Kr).float()
    weights["post_projection.weight"][:, :rank] = (root_KK @ leading_Kr).float()
    weights["pre_projection.weight"][:rank] = torch.linalg.solve(moments, products).T.float()
    return weights


def write_first(
    directory: Path, target: Gemma4, source: Path, texts: Sequence[Sequence[int]], n_draft: int
) -> None:
    """A new assistant for the target in `source`, as a directory that the engine loads.

    Raises:
        TrainingError: there is no text, or it cannot be written.
    """
    if not texts:
        raise TrainingError(
            "there is no text to begin a new drafter with", "give text beside the conversations"
        )
    proposal = propose_assistant(read_config(source))
    weights = first_weights(target, proposal.shape, texts, 0)
    export_new(directory, proposal.config, weights, source, n_draft)


def _states(target: Gemma4, texts: Sequence[Sequence[int]], n_rows: int) -> tuple[Tensor, Tensor]:
    """Hidden states after each token but the first, and what is read to guess them; fp64.

    The inputs of row n are the embedding of its token and the hidden state before it, [N, 2 K].
    """
    hidden, inputs, found = [], [], 0
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        length = min(map(len, batch))
        ids_BS = torch.tensor([list(text[:length]) for text in batch])
        states_TK, _ = run_target(target, ids_BS)
        hidden_BSK = states_TK.view(*ids_BS.shape, -1).double()
        embedded_BSK = target.embed(ids_BS).double()
        hidden.append(hidden_BSK[:, 1:].flatten(0, 1))
        inputs.append(torch.cat((embedded_BSK[:, 1:], hidden_BSK[:, :-1]), dim=-1).flatten(0, 1))
        found += len(hidden[-1])
        if found >= n_rows:
            break
    return torch.cat(hidden), torch.cat(inputs)


def _ridged(moments_KK: Tensor) -> Tensor:
    mean = moments_KK.diagonal().mean()
    return moments_KK + RIDGE * mean * torch.eye(len(moments_KK), dtype=moments_KK.dtype)


def _roots(moments_KK: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse."""
    values_K, vectors_KK = torch.linalg.eigh(moments_KK)
    return (
        (vectors_KK * values_K.sqrt()) @ vectors_KK.T,
        (vectors_KK * values_K.rsqrt()) @ vectors_KK.T,
    )
