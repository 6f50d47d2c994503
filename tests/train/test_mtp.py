"""The loss of multi-token prediction against Megatron-Core's formula written out, in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.models import mtp, qwen3_5
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.train.hybrid import SequenceLayers
from outdraft.train.mtp import (
    Losses,
    MtpOptions,
    build_heads,
    build_model,
    head_prefix,
    mtp_losses,
    segments,
)
from outdraft.train.tokenizer import EOS_ID
from tests import tiny

RAW = tiny.target_config("qwen3_5")
CONFIG = Qwen35Config.from_hf(RAW)
B, S, D = 3, 29, 3


def leaves(n_heads: int) -> dict[str, Tensor]:
    """A random model and heads in fp64."""
    found = tiny.random_tensors(qwen3_5.expected_tensors(CONFIG), 3, torch.float64)
    for index in range(n_heads):
        head = tiny.random_tensors(mtp.expected_tensors(CONFIG), 4 + index, torch.float64)
        found |= {head_prefix(index) + name: weight for name, weight in head.items()}
    return {name: weight.requires_grad_() for name, weight in found.items()}


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, a mask with holes, and texts that end within the rows."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(6, tiny.VOCAB, (B, S + 1), generator=generator)
    ids[0, 11] = ids[1, 4] = ids[1, 20] = EOS_ID
    mask = torch.rand(B, S, generator=generator) < 0.8
    mask[2, -4:] = False
    return ids[:, :-1], ids[:, 1:], mask, segments(ids[:, :-1])


def roll(x_BS: Tensor, segment_BS: Tensor) -> Tensor:
    """Megatron's roll_tensor for packed texts: one place to the left in each, zero at its end."""
    rolled = torch.zeros_like(x_BS)
    for b in range(x_BS.shape[0]):
        for i in range(x_BS.shape[1] - 1):
            if segment_BS[b, i + 1] == segment_BS[b, i]:
                rolled[b, i] = x_BS[b, i + 1]
    return rolled


def megatron(weights: dict[str, Tensor], options: MtpOptions) -> tuple[Tensor, list[Tensor]]:
    """The loss as Megatron-Core computes it: whole rows at every depth, the tail masked."""
    ids, labels, mask, segment = batch()
    model = build_model(CONFIG, weights, S)
    heads = build_heads(CONFIG, weights, S, options.n_heads)
    at_T = torch.arange(S).repeat(B)
    layers = SequenceLayers(B, CONFIG.delta)
    hidden = model.forward(ids.reshape(-1), at_T, layers)

    def entropy(hidden_TK: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(
            F.linear(hidden_TK, weights["lm_head.weight"]), label.reshape(-1), reduction="none"
        )

    m = mask.double().reshape(-1)
    total = (m * entropy(hidden, labels)).sum() / m.sum().clamp_min(1)
    depths = []
    whole = torch.zeros_like(segment)
    for k in range(1, options.depths + 1):
        # Megatron's packed texts do not see each other, so nothing sees the tokens at their ends.
        ids, labels, mask = roll(ids, whole), roll(labels, whole), roll(mask, segment)
        head = heads[0 if options.repeat else k - 1]
        embedded = F.embedding(ids.reshape(-1), weights["embed_tokens.weight"])
        hidden = head.forward(embedded, hidden, at_T, layers)
        m = mask.double().reshape(-1)
        depths.append((m * entropy(hidden, labels)).sum() / m.sum().clamp_min(1))
        total = total + options.scale / options.depths * depths[-1]
    return total, depths


def ours(weights: dict[str, Tensor], options: MtpOptions, **changes: Any) -> Losses:
    ids, labels, mask, segment = batch()
    given = {"mask_BS": mask, "segment_BS": segment} | changes
    return mtp_losses(
        build_model(CONFIG, weights, S),
        build_heads(CONFIG, weights, S, options.n_heads),
        ids,
        labels,
        options=options,
        **given,
    )


@pytest.mark.parametrize("repeat", [True, False])
def test_loss_and_gradients_are_megatrons(repeat: bool) -> None:
    options = MtpOptions(D, 0.3, repeat=repeat)
    weights = leaves(options.n_heads)
    got = ours(weights, options)
    want, depths = megatron(weights, options)
    for mine, theirs in zip(got.depths, depths, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.total(options), want, rtol=1e-10, atol=0)
    names = list(weights)
    mine_all = torch.autograd.grad(got.total(options), list(weights.values()))
    theirs_all = torch.autograd.grad(want, list(weights.values()))
    for name, mine, theirs in zip(names, mine_all, theirs_all, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10, msg=name)


def test_a_detached_head_leaves_the_model_as_it_is() -> None:
    options = MtpOptions(D, 0.3, detach=True)
    weights = leaves(1)
    losses = ours(weights, options)
    body = {n: w for n, w in weights.items() if not n.startswith("mtp")}
    head = {n: w for n, w in weights.items() if n.startswith("mtp")}
    main = torch.autograd.grad(losses.main, list(body.values()), retain_graph=True)
    total = losses.total(options)
    both = torch.autograd.grad(total, [*body.values(), *head.values()])
    for one, other in zip(main, both[: len(body)], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert all(float(gradient.abs().max()) > 0 for gradient in both[len(body) :])


def test_without_labels_that_count_a_depth_is_zero() -> None:
    nothing = torch.zeros(B, S, dtype=torch.bool)
    losses = ours(leaves(1), MtpOptions(D), mask_BS=nothing)
    assert [loss.item() for loss in (losses.main, *losses.depths)] == [0.0] * (D + 1)


def test_texts_are_counted_from_the_ends_before_them() -> None:
    ids = torch.tensor([[7, EOS_ID, 8, 9, EOS_ID, EOS_ID, 7]])
    assert segments(ids).tolist() == [[0, 0, 1, 1, 1, 2, 3]]
