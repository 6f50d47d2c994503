"""Logits equal transformers' Ministral 3, past the original context, with and without a cache."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM

from outdraft.cache.memory import Memory
from outdraft.errors import ModelError
from outdraft.models import ministral3
from outdraft.ops.reference import ReferenceOps
from tests import tiny
from tests.models.parity import assert_parity, memory_of


def reference(raw: dict[str, Any], weights: dict[str, Tensor]) -> Ministral3ForCausalLM:
    """transformers' model with the same weights."""
    config = Ministral3Config(**{k: v for k, v in raw.items() if k != "architectures"})
    config._attn_implementation = "eager"
    model = Ministral3ForCausalLM(config).eval()
    state = {n if n.startswith("lm_head") else f"model.{n}": t for n, t in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


def build(raw: dict[str, Any], weights: dict[str, Tensor]) -> tuple[ministral3.Ministral3, Memory]:
    config = ministral3.Ministral3Config.from_hf(raw)
    memory = memory_of(list(ministral3.memory_layers(config)))
    return ministral3.Ministral3(config, weights, ReferenceOps()), memory


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_prefill_and_cached_decoding_equal_transformers(tied: bool) -> None:
    raw = tiny.target_config("ministral3", tie_word_embeddings=tied)
    weights = tiny.target_weights(raw, seed=3)
    assert_parity(reference(raw, weights), lambda: build(raw, weights))


def test_queries_grow_with_their_position() -> None:
    config = ministral3.Ministral3Config.from_hf(tiny.target_config("ministral3"))
    scale = ministral3.query_scale(torch.arange(200), config)
    assert scale[63] == pytest.approx(32**-0.5)
    assert scale[64] == pytest.approx(32**-0.5 * (1 + 0.1 * math.log(2)))
    assert scale[199] == pytest.approx(32**-0.5 * (1 + 0.1 * math.log(4)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "'mistral'"),
    ],
)
def test_a_config_that_is_not_one_of_these_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ministral3.Ministral3Config.from_hf(tiny.target_config("ministral3") | change)


def test_the_published_multimodal_layout_is_read(tmp_path: Path) -> None:
    """Config below `text_config`, names below `language_model.model.`, a vision tower beside."""
    from outdraft.config import EngineConfig
    from outdraft.engine.engine import LLM

    inner = tiny.target_config("ministral3", tie_word_embeddings=True)
    weights = tiny.target_weights(inner, seed=3)
    plain = tiny.write_model(tmp_path / "plain", inner, weights)
    outer = {"model_type": "mistral3", "text_config": inner, "dtype": "float32"}
    extra = weights | {"vision_tower.patch_conv.weight": torch.randn(4, 4)}
    named = {
        k if k.startswith("vision") else f"language_model.model.{k}": v for k, v in extra.items()
    }
    whole = tiny.write_model(tmp_path / "whole", outer, named, prefix="")
    config = EngineConfig(backend="reference", spec_type="off", ctx_size=64)
    prompt = [5, 9, 77, 140]
    a, b = LLM(str(plain), config).generate(prompt), LLM(str(whole), config).generate(prompt)
    assert a.tokens == b.tokens
