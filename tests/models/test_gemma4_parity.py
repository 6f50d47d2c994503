"""Logits equal transformers' Gemma 4, for every published shape, with and without a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from outdraft.cache.memory import Memory
from outdraft.models.gemma4 import Gemma4, memory_layers
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.ops.reference import ReferenceOps
from tests import tiny
from tests.models.parity import assert_parity, memory_of


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


def build(raw: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Gemma4, Memory]:
    config = Gemma4Config.from_hf(raw)
    memory = memory_of(list(memory_layers(config)))
    return Gemma4(config, weights, ReferenceOps()), memory


@pytest.mark.parametrize("shape", tiny.SHAPES)
@torch.inference_mode()
def test_prefill_and_cached_decoding_equal_transformers(shape: str) -> None:
    raw = tiny.target_config(shape)
    weights = tiny.target_weights(raw, seed=3)
    assert_parity(reference(raw, weights), lambda: build(raw, weights))
