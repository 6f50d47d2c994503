"""The compiled kernels run every shape of model as the reference does.

With weights that bf16 holds exactly and keys in fp32, both compute the same function in fp32 and
differ by rounding only; with fewer bits the distribution stays close.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from outdraft.cache.attend import CausalCall
from outdraft.cache.memory import Memory, Span
from outdraft.models.gemma4 import Gemma4, memory_layers
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.ops.base import Ops
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import Format
from outdraft.ops.reference import ReferenceOps
from tests import tiny

TOLERANCE = 1e-4  # of the logits' spread
N_TOKENS = 140


def logits(ops: Ops, raw: dict[str, Any], weights: dict[str, Tensor]) -> Tensor:
    config = Gemma4Config.from_hf(raw)
    memory = Memory(
        memory_layers(config), max_sequences=1, max_tokens=256, max_rows=160, dtype=ops.kv_dtype
    )
    memory.open("s")
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(6, tiny.VOCAB, (N_TOKENS,), generator=generator).tolist()
    memory.reserve("s", N_TOKENS)
    call = CausalCall.prepare(memory, ops, [Span("s", 0, N_TOKENS)], tokens)
    model = Gemma4(config, weights, ops)
    return model.logits(model.forward(call.token_T, call.position_T, call.attend))


@pytest.mark.parametrize("shape", tiny.SHAPES)
@torch.inference_mode()
def test_logits_equal_the_reference(shape: str) -> None:
    raw = tiny.target_config(shape)
    weights = {n: w.bfloat16().float() for n, w in tiny.target_weights(raw, seed=8).items()}
    want = logits(ReferenceOps(), raw, weights)
    got = logits(CpuOps(format="bf16", kv_dtype=torch.float32), raw, weights)
    assert float((got - want).abs().max()) <= TOLERANCE * float(want.max() - want.min())


@pytest.mark.parametrize(
    "format,kv_dtype,limit",
    [
        ("bf16", torch.bfloat16, 0.002),
        ("w8", torch.bfloat16, 0.02),
        ("w8", torch.int8, 0.03),
        ("w4", torch.bfloat16, 0.3),
    ],
)
@torch.inference_mode()
def test_fewer_bits_keep_the_distribution(
    format: Format, kv_dtype: torch.dtype, limit: float
) -> None:
    """Mean KL divergence in nats from the reference; random weights are the hard case."""
    raw = tiny.target_config("plain", hidden_size=128, intermediate_size=256)
    weights = tiny.target_weights(raw, seed=9)
    want = torch.log_softmax(logits(ReferenceOps(), raw, weights), dim=-1)
    got = torch.log_softmax(logits(CpuOps(format=format, kv_dtype=kv_dtype), raw, weights), dim=-1)
    kl = (want.exp() * (want - got)).sum(-1).mean()
    assert 0 < float(kl) < limit
