"""Logits equal transformers' Qwen 3.5, dense and with experts, with and without a cache."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from outdraft.cache.memory import Memory
from outdraft.errors import ModelError
from outdraft.models import qwen3_5
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.cpu import CpuOps
from outdraft.ops.reference import ReferenceOps
from tests import tiny
from tests.models.parity import assert_parity, memory_of, run

NAMES = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}


def reference(shape: str, raw: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """transformers' model with the same weights."""
    config_class = getattr(transformers, NAMES[shape] + "TextConfig")
    config = config_class(**{k: v for k, v in raw.items() if k != "architectures"})
    config._attn_implementation = "eager"
    model = getattr(transformers, NAMES[shape] + "ForCausalLM")(config).eval()
    state = {n if n.startswith("lm_head") else f"model.{n}": t for n, t in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return model


def build(raw: dict[str, Any], weights: dict[str, Tensor]) -> tuple[qwen3_5.Qwen35, Memory]:
    config = Qwen35Config.from_hf(raw)
    layers = qwen3_5.memory_layers(config)
    memory = memory_of(list(layers))
    return qwen3_5.Qwen35(config, weights, ReferenceOps()), memory


@pytest.mark.parametrize("shape", NAMES)
@torch.inference_mode()
def test_prefill_and_cached_decoding_equal_transformers(shape: str) -> None:
    raw = tiny.target_config(shape)
    weights = tiny.target_weights(raw, seed=3)
    assert_parity(reference(shape, raw, weights), lambda: build(raw, weights))


@torch.inference_mode()
def test_the_compiled_kernels_compute_the_same() -> None:
    """In bf16 weights and fp32 keys, close to the reference over the same rounded weights."""
    raw = tiny.target_config("qwen3_5_moe")
    weights = {
        n: t.bfloat16().float() if t.ndim > 1 else t
        for n, t in tiny.target_weights(raw, seed=3).items()
    }
    tokens = torch.randint(6, tiny.VOCAB, (90,), generator=torch.Generator().manual_seed(4))
    model, memory = build(raw, weights)
    want = run(model, memory, tokens.tolist())
    _, memory = build(raw, weights)
    ops = CpuOps(format="bf16", kv_dtype=torch.float32)
    ours = run(qwen3_5.Qwen35(model.config, weights, ops), memory, tokens.tolist())
    spread = float(want.max() - want.min())
    assert float((ours - want).abs().max()) <= 0.02 * spread


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["linear_attention"] * 4}, "no layer has full attention"),
        ({"linear_num_value_heads": 3}, "do not fit"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
    ],
)
def test_a_config_that_is_not_one_of_these_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Qwen35Config.from_hf(tiny.target_config("qwen3_5") | change)
