"""Logits equal transformers' Gemma 4, for every published shape, with and without a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig

from outdraft.cache.attend import CausalCall
from outdraft.cache.memory import Memory, Span
from outdraft.models.gemma4 import Gemma4, memory_layers
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.ops.reference import ReferenceOps
from tests import tiny

N_TOKENS = 150
TOLERANCE = 1e-4


def reference(raw: dict[str, Any], weights: dict[str, Tensor]) -> Gemma4ForCausalLM:
    """transformers' model with the same weights."""
    config = Gemma4TextConfig(**{k: v for k, v in raw.items() if k != "architectures"})
    config._attn_implementation = "eager"
    model = Gemma4ForCausalLM(config).eval()
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


def run(model: Gemma4, memory: Memory, tokens: list[int]) -> Tensor:
    """Logits [T, V] of the next tokens of the one sequence "s"."""
    memory.reserve("s", len(tokens))
    call = CausalCall.prepare(memory, model.ops, [Span("s", 0, len(tokens))], tokens)
    hidden = model.forward(call.token_T, call.position_T, call.attend)
    memory.advance("s", len(tokens))
    memory.trim("s")
    return model.logits(hidden)


def build(raw: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Gemma4, Memory]:
    config = Gemma4Config.from_hf(raw)
    memory = Memory(
        memory_layers(config), max_sequences=1, max_tokens=256, max_rows=160, dtype=torch.float32
    )
    memory.open("s")
    return Gemma4(config, weights, ReferenceOps()), memory


@pytest.mark.parametrize("shape", tiny.SHAPES)
@torch.inference_mode()
def test_prefill_and_cached_decoding_equal_transformers(shape: str) -> None:
    raw = tiny.target_config(shape)
    weights = tiny.target_weights(raw, seed=3)
    tokens = torch.randint(6, tiny.VOCAB, (N_TOKENS,), generator=torch.Generator().manual_seed(4))
    theirs = reference(raw, weights)
    cache = DynamicCache(config=theirs.config)
    split = N_TOKENS - 12
    expected = [theirs(tokens[None, :split], past_key_values=cache).logits[0]]
    for token in tokens[split:]:
        expected.append(theirs(token.view(1, 1), past_key_values=cache).logits[0])
    want = torch.cat(expected)
    spread = float(want.max() - want.min())

    model, memory = build(raw, weights)
    whole = run(model, memory, tokens.tolist())
    assert float((whole - want).abs().max()) <= TOLERANCE * spread

    model, memory = build(raw, weights)
    parts = [run(model, memory, tokens[:split].tolist())]
    parts += [run(model, memory, [int(token)]) for token in tokens[split:]]
    assert torch.equal(torch.cat(parts), whole)
