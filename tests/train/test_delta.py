"""The chunked delta rule and the convolution against the row-by-row specification, in fp64."""

import pytest
import torch
from torch import Tensor

from outdraft.models import mtp, qwen3_5
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.batched import BatchedOps
from outdraft.ops.recurrent_base import DeltaGates, DeltaNet, StateRows
from outdraft.ops.recurrent_reference import delta_rule, short_conv
from outdraft.ops.reference import ReferenceOps
from outdraft.train import delta
from outdraft.train.hybrid import SequenceLayers, fresh_hybrid
from tests import tiny
from tests.models.parity import memory_of, run

CONFIG = Qwen35Config.from_hf(tiny.target_config("qwen3_5", linear_key_head_dim=16))
SHAPE = CONFIG.delta


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def row_by_row(x_TC: Tensor, a_TH: Tensor, b_TH: Tensor, net: DeltaNet, n: int) -> Tensor:
    """What `SequenceLayers.recur` gives, by the reference: n sequences one after another."""
    n_rows = x_TC.shape[0]
    nowhere = torch.full((n_rows,), -1)
    rows = StateRows(torch.arange(n).repeat_interleave(n_rows // n), nowhere, nowhere)
    inputs = torch.zeros(1, SHAPE.conv_width - 1, SHAPE.channels, dtype=torch.float64)
    state = torch.zeros(1, SHAPE.n_v_heads, SHAPE.k_dim, SHAPE.v_dim, dtype=torch.float64)
    mixed_TC = short_conv(x_TC, net.conv_WC, inputs, rows)
    return delta_rule(mixed_TC, a_TH, b_TH, net.gates, state, rows, net.n_k_heads)


@pytest.mark.parametrize(("n", "length"), [(1, 1), (2, 7), (1, 64), (2, 65), (3, 150)])
def test_outputs_and_gradients_equal_the_rule_row_by_row(n: int, length: int) -> None:
    leaves = [
        drawn(1, n * length, SHAPE.channels),
        drawn(2, n * length, SHAPE.n_v_heads),
        drawn(3, n * length, SHAPE.n_v_heads),
        drawn(4, SHAPE.conv_width, SHAPE.channels),
        drawn(5, SHAPE.n_v_heads),
        drawn(6, SHAPE.n_v_heads),
    ]
    x_TC, a_TH, b_TH, conv_WC, a_log_H, bias_H = leaves
    net = DeltaNet(conv_WC, DeltaGates(-a_log_H.exp(), bias_H), SHAPE.n_k_heads)
    got = SequenceLayers(n, SHAPE).recur(0, x_TC, a_TH, b_TH, net)
    want = row_by_row(x_TC, a_TH, b_TH, net, n)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    towards = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, towards, retain_graph=True),
        torch.autograd.grad(want, leaves, towards),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_chunks_of_any_size_give_the_same() -> None:
    q, k = (torch.nn.functional.normalize(drawn(s, 2, 3, 50, 8).detach(), dim=-1) for s in (1, 2))
    v, decay = drawn(3, 2, 3, 50, 4).detach(), -drawn(4, 2, 3, 50).detach().abs()
    beta = drawn(5, 2, 3, 50).detach().sigmoid()
    want = delta.chunked_delta_rule(q, k, v, decay, beta, chunk=1)
    for chunk in (2, 16, 64):
        got = delta.chunked_delta_rule(q, k, v, decay, beta, chunk=chunk)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@torch.inference_mode()
def test_the_model_in_training_is_the_model_that_is_served() -> None:
    raw = tiny.target_config("qwen3_5")
    config, weights = Qwen35Config.from_hf(raw), tiny.target_weights(raw, seed=3)
    tokens = torch.randint(6, tiny.VOCAB, (90,), generator=torch.Generator().manual_seed(4))
    served = qwen3_5.Qwen35(config, weights, ReferenceOps())
    want = run(served, memory_of(list(qwen3_5.memory_layers(config))), tokens.tolist())
    model = qwen3_5.Qwen35(config, weights, BatchedOps())
    got = model.logits(model.forward(tokens, torch.arange(90), SequenceLayers(1, config.delta)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_first_weights_decay_as_they_should() -> None:
    weights = fresh_hybrid(qwen3_5.expected_tensors(CONFIG), 0)
    for name, weight in weights.items():
        if name.endswith("dt_bias"):
            step = torch.nn.functional.softplus(weight)
            assert float(step.min()) >= 0.9e-3 and float(step.max()) <= 0.101
        if name.endswith("A_log"):
            assert float(weight.exp().max()) <= 16.0
        assert torch.isfinite(weight).all()
    head = fresh_hybrid(mtp.expected_tensors(CONFIG), 1)
    assert float(head["norm.weight"].abs().max()) == 0.0
