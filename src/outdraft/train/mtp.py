"""The multi-token prediction loss of Megatron-Core: a head learns with the model it is part of.

With x the tokens, h^0 the model's states behind its final norm and k = 1 .. D the depth,

    u^k_i = fc [norm(E(x_{i+k})) ; norm(h^{k-1}_i)]     h^k = norm(layer(u^k))
    the model's own output head scores h^k_i for x_{i+k+1}
    L = L_main + (scale / D) sum over k of (sum of m CE_k) / max(1, sum of m)

Tokens, labels and the mask m move by one place a depth, and no row counts whose label has moved
across the end of its text (`megatron/core/transformer/multi_token_prediction.py`: roll_tensor,
MTPLossAutoScaler). Rows whose label has moved off the end of a window are left out: no other row
sees them. Texts of a window do see those before, as in the model itself. All depths have the same
positions, of which rotary attention uses only differences.

Shapes: B sequences, S tokens, D depths, T rows, K hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.models.mtp import MtpHead
from outdraft.models.qwen3_5 import Qwen35
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.batched import BatchedOps
from outdraft.train.hybrid import SequenceLayers
from outdraft.train.losses import IGNORED, cross_entropy
from outdraft.train.tokenizer import EOS_ID
from outdraft.train.weights import compute_in, trainable
from outdraft.train.windows import Windows

PREFIX = "mtp."


@dataclass(frozen=True, slots=True)
class MtpOptions:
    """How a head is trained.

    Attributes:
        depths: tokens that are predicted beside the next one, D.
        scale: Megatron's `mtp_loss_scaling_factor`.
        detach: whether the head's losses leave the model as it is, embedding and output included.
        repeat: whether one layer is used for all depths, as drafting does; else each has its own.
    """

    depths: int = 2
    scale: float = 0.1
    detach: bool = False
    repeat: bool = True

    @property
    def n_heads(self) -> int:
        """Heads with weights of their own."""
        return 1 if self.repeat else self.depths


@dataclass(frozen=True, slots=True)
class Losses:
    """Nats per token: of the model, and of each depth of its head."""

    main: Tensor
    depths: tuple[Tensor, ...]

    def total(self, options: MtpOptions) -> Tensor:
        """What is minimised."""
        if not self.depths:
            return self.main
        return self.main + options.scale / len(self.depths) * torch.stack(self.depths).sum()


def head_prefix(index: int) -> str:
    """Where the weights of the head of depth index + 1 are; only the first is served."""
    return PREFIX if index == 0 else f"mtp{index + 1}."


def mtp_losses(
    model: Qwen35,
    heads: Sequence[MtpHead],
    ids_BS: Tensor,
    label_BS: Tensor,
    mask_BS: Tensor,
    segment_BS: Tensor,
    options: MtpOptions,
) -> Losses:
    """Losses of sequences that are read from their beginnings.

    Args:
        heads: one, or one for each depth.
        ids_BS, label_BS: int64 tokens and those behind them.
        mask_BS: bool, labels that count.
        segment_BS: number of the text that a token belongs to.
    """
    n_sequences, length = ids_BS.shape
    layers = SequenceLayers(n_sequences, model.config.delta)
    at_T = torch.arange(length).repeat(n_sequences)
    hidden_TK = model.forward(ids_BS.reshape(-1), at_T, layers)
    main = _masked(model, hidden_TK, label_BS, mask_BS)
    seen = _detached(model) if options.detach else model
    state_BSK = hidden_TK.view(n_sequences, length, -1)
    state_BSK = state_BSK.detach() if options.detach else state_BSK
    depths = []
    for k in range(1, options.depths + 1):
        left = length - k
        embedded_TK = seen.embed(ids_BS[:, k:].reshape(-1))
        state_TK = state_BSK[:, :left].reshape(-1, state_BSK.shape[-1])
        at_T = torch.arange(left).repeat(n_sequences)
        head = heads[(k - 1) % len(heads)]
        done_TK = head.forward(embedded_TK, state_TK, at_T, layers)
        kept_BS = mask_BS[:, k:] & (segment_BS[:, k:] == segment_BS[:, :left])
        depths.append(_masked(seen, done_TK, label_BS[:, k:], kept_BS))
        state_BSK = done_TK.view(n_sequences, left, -1)
    return Losses(main, tuple(depths))


def _masked(model: Qwen35, hidden_TK: Tensor, label_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean cross-entropy of the rows that count; zero if none does."""
    label_T = label_BS.masked_fill(~mask_BS, IGNORED).reshape(-1)
    scale = mask_BS.numel() / max(1, int(mask_BS.sum()))
    return cross_entropy(hidden_TK, label_T, model.logits) * scale


def _detached(model: Qwen35) -> Qwen35:
    """The model's embedding and output head as constants; its layers are not used."""
    copy = object.__new__(Qwen35)
    copy.__dict__ |= model.__dict__
    copy.embedding, copy.head = model.embedding.detach(), model.head.detach()
    return copy


def segments(ids_BS: Tensor) -> Tensor:
    """Texts end with `<eos>`: how many have ended before each token, [B, S]."""
    ended_BS = (ids_BS == EOS_ID).long()
    return ended_BS.cumsum(dim=1) - ended_BS


def build_model(config: Qwen35Config, weights: Mapping[str, Tensor], length: int) -> Qwen35:
    """The model over weights that may want gradients."""
    own = {name: weight for name, weight in weights.items() if not name.startswith("mtp")}
    return Qwen35(config, own, BatchedOps(), length)


def build_heads(
    config: Qwen35Config, weights: Mapping[str, Tensor], length: int, n_heads: int
) -> list[MtpHead]:
    """Its heads, each over the weights under its prefix."""
    prefixes = [head_prefix(index) for index in range(n_heads)]
    parts = [
        {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        for prefix in prefixes
    ]
    return [MtpHead(config, part, BatchedOps(), length) for part in parts]


class HybridPretraining:
    """The next token and those behind it, on windows of text (an `Objective`)."""

    def __init__(
        self,
        config: Qwen35Config,
        weights: Mapping[str, Tensor],
        windows: Windows,
        batch: int,
        options: MtpOptions,
        dtype: torch.dtype,
    ) -> None:
        """`weights`: leaves that want gradients, heads' under their prefixes."""
        self.config, self.all_weights = config, weights
        self.weights = trainable(weights)
        self.windows, self.batch = windows, batch
        self.options, self.dtype = options, dtype
        self.tokens_per_step = batch * windows.context

    def loss(self, step: int) -> Tensor:
        """See `Objective.loss`; nats per token."""
        return self.losses(self.windows.batch(step, self.batch)).total(self.options)

    def losses(self, ids: Tensor) -> Losses:
        """Of windows int64 [B, S + 1]."""
        length = ids.shape[1] - 1
        with compute_in(self.dtype, torch.device("cpu")):
            model = build_model(self.config, self.all_weights, length)
            heads = build_heads(self.config, self.all_weights, length, self.options.n_heads)
            return mtp_losses(
                model,
                heads,
                ids[:, :-1],
                ids[:, 1:],
                torch.ones_like(ids[:, 1:], dtype=torch.bool),
                segments(ids[:, :-1]),
                self.options,
            )
