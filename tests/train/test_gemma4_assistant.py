"""The unrolled graph against an explicit loop over rounds of one anchor each, losses and gradients.

Both use the model's own arithmetic, in fp64; the loop has its own attention,
one query at a time over the keys that the protocol lets it see.
"""

import pytest
import torch
from torch import Tensor

from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.ops.base import Heads
from outdraft.train import attention, gemma4_assistant
from outdraft.train.gemma4_assistant import target_states, unrolled_loss
from tests.train.graphs import WINDOW, build

N_WINDOWS, LENGTH, N_STEPS = 2, 13, 3
TOLERANCE = 2e-6


def one_query(q_HD: Tensor, k_GND: Tensor, v_GND: Tensor) -> Tensor:
    """Attention of one query over all given keys, unscaled: [H, D]."""
    group = q_HD.shape[0] // k_GND.shape[0]
    heads = []
    for head in range(q_HD.shape[0]):
        keys, values = k_GND[head // group], v_GND[head // group]
        heads.append(torch.softmax(keys @ q_HD[head], dim=0) @ values)
    return torch.stack(heads)


def one_round(target: Gemma4, assistant: Gemma4Assistant, ids_S: Tensor, t: int) -> Tensor:
    """The loss of the round in which token t + 1 is the newest, from the protocol alone."""
    known: dict[int, tuple[Tensor, Tensor]] = {}
    n = len(ids_S)
    types = target.config.layer_types

    def causal(layer: int, q: Heads, k: Heads | None, v: Heads | None) -> Tensor:
        assert k is not None and v is not None
        q_THD = q.value(target.ops)
        known[layer] = (k.value(target.ops), v.value(target.ops))
        rows = []
        for i in range(n):
            first = max(0, i + 1 - WINDOW) if types[layer] == "sliding_attention" else 0
            keys, values = (x[first : i + 1].transpose(0, 1) for x in known[layer])
            rows.append(one_query(q_THD[i], keys, values))
        return torch.stack(rows)

    with torch.no_grad():
        hidden = target.forward(ids_S, torch.arange(n), causal)
        p = torch.softmax(target.logits(hidden), dim=-1)

    def frozen(layer: int, q: Heads, k: Heads | None, v: Heads | None) -> Tensor:
        kind = assistant.config.text.layer_types[layer]
        first = max(0, t + 1 - WINDOW) if kind == "sliding_attention" else 0
        last_owner = max(i for i, other in enumerate(types) if other == kind)
        keys, values = (x[first : t + 1].transpose(0, 1) for x in known[last_owner])
        return one_query(q.value(assistant.ops)[0], keys, values)[None]

    state, total, weights = hidden[t : t + 1], torch.zeros(()), 0.0
    for k in range(N_STEPS):
        index = t + 1 + k
        embedded = target.embed(ids_S[index : index + 1])
        normed = assistant.step(embedded, state, torch.tensor([t + 1]), frozen)
        q = torch.softmax(assistant.logits(normed)[0], dim=-1)
        total = total + 0.8**k * (p[index] * (p[index] / q).log()).sum()
        weights += 0.8**k
        state = assistant.carry(normed)
    return total / weights


def windows(vocab: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, vocab, (N_WINDOWS, LENGTH), generator=generator)


def worst_difference(shape: str = "plain") -> float:
    """Largest difference of loss and gradients between graph and loop, relative to each."""
    target, assistant, leaves = build(shape)
    ids = windows(target.config.vocab_size)
    rounds = [one_round(target, assistant, row, t) for row in ids for t in range(LENGTH - N_STEPS)]
    expected = torch.stack(rounds).mean()
    grads = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    loss = unrolled_loss(assistant, target_states(target, ids, torch.float64), N_STEPS)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    worst = float(((loss - expected).abs() / expected).detach())
    for name, a, b in zip(leaves, grads, found, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert float(a.norm()) > 0, name
            worst = max(worst, float((a - b).norm() / a.norm()))
    return worst


@pytest.mark.parametrize("shape", ["plain", "dense"])
def test_graph_equals_rounds_of_one_anchor(shape: str) -> None:
    assert worst_difference(shape) < TOLERANCE


def test_a_peek_at_the_newest_tokens_key_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strictness test has teeth: one visible key more changes loss and gradients."""
    strict = attention.visible_keys

    def peeking(n_queries: int, n_keys: int, window: int | None) -> Tensor:
        return strict(n_queries + 1, n_keys, window)[1:]

    target, assistant, _ = build()
    states = target_states(target, windows(target.config.vocab_size), torch.float64)
    loss = unrolled_loss(assistant, states, N_STEPS)
    monkeypatch.setattr(attention, "visible_keys", peeking)
    peeked = unrolled_loss(assistant, states, N_STEPS)
    assert float((loss - peeked).detach().abs()) > 1e-3


def test_no_gradient_reaches_the_target() -> None:
    target, assistant, _ = build()
    for weight in (target.embedding, *(layer.matrices["qkv"] for layer in target.layers)):
        weight.requires_grad_()
    ids = windows(target.config.vocab_size)
    states = gemma4_assistant.target_states(target, ids, torch.float64)
    unrolled_loss(assistant, states, N_STEPS).backward()
    assert target.embedding.grad is None
    assert all(layer.matrices["qkv"].grad is None for layer in target.layers)
