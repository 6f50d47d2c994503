"""Checkpoints as they are published: names, shards, towers, unused tensors, one error for all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import ModelError, WeightsError
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config
from outdraft.models.registry import load_target
from outdraft.request import SamplingParams
from tests import tiny

PROMPT = [2, 40, 91, 17]


def tokens(path: Path) -> list[int]:
    llm = LLM(str(path), EngineConfig(spec_type="off", ctx_size=64))
    return llm.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True)).tokens


def shard(path: Path) -> None:
    """Split model.safetensors in two with an index."""
    whole = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(whole)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: whole[name] for name in own}, path / file)
    index = {name: file for file, own in halves.items() for name in own}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (path / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("shape", ["dense", "moe", "e2b"])
def test_every_way_of_publishing_gives_the_same_model(tmp_path: Path, shape: str) -> None:
    config = tiny.target_config(shape)
    weights = tiny.target_weights(config)
    want = tokens(tiny.write_model(tmp_path / "text", config, weights))

    shard(tmp_path / "text")
    assert tokens(tmp_path / "text") == want

    towers = {
        "model.vision_tower.encoder.layers.0.weight": torch.randn(3, 3),
        "model.embed_vision.embedding_projection.weight": torch.randn(3, 3),
        "model.audio_tower.layers.0.weight": torch.randn(2),
    }
    whole = {"model_type": "gemma4", "text_config": config, "dtype": "float32"}
    path = tiny.write_model(tmp_path / "multimodal", whole, weights, prefix="model.language_model.")
    save_file(load_file(path / "model.safetensors") | towers, path / "model.safetensors")
    assert tokens(path) == want
    reasons = {group.reason for group in load_target(path, EngineConfig()).report.ignored}
    assert any("vision" in r for r in reasons) and any("audio" in r for r in reasons)

    tied = {name: tensor.clone() for name, tensor in weights.items()}
    tied["lm_head.weight"] = weights["embed_tokens.weight"].clone()
    assert tokens(tiny.write_model(tmp_path / "tied", config, tied)) == want


def test_unused_tensors_of_layers_that_share_keys(tmp_path: Path) -> None:
    """The plain E2B and E4B checkpoints carry them, the QAT ones leave them out."""
    config = tiny.target_config("e2b")
    weights = tiny.target_weights(config)
    want = tokens(tiny.write_model(tmp_path / "qat", config, weights))
    extra = dict(weights)
    for layer in (3, 4, 5):
        for name, like in (("k_proj", "k_proj"), ("v_proj", "k_proj"), ("k_norm", "k_norm")):
            own = torch.randn_like(weights[f"layers.1.self_attn.{like}.weight"])
            extra[f"layers.{layer}.self_attn.{name}.weight"] = own
    path = tiny.write_model(tmp_path / "plain", config, extra)
    assert tokens(path) == want
    (group,) = load_target(path, EngineConfig()).report.ignored
    assert group.count == 9 and "another layer" in group.reason


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    config = tiny.target_config("dense")
    weights = tiny.target_weights(config)
    weights["layers.1.mlp.up_proj.weight"] = torch.randn(5, 64)
    weights["layers.2.surprise.weight"] = torch.randn(2)
    del weights["layers.0.self_attn.q_norm.weight"]
    path = tiny.write_model(tmp_path / "odd", config, weights)
    with pytest.raises(WeightsError) as caught:
        load_target(path, EngineConfig())
    for name in ("layers.1.mlp.up_proj", "layers.2.surprise", "layers.0.self_attn.q_norm"):
        assert name in str(caught.value)


def test_full_layers_that_make_values_from_keys_refuse_a_v_proj(tmp_path: Path) -> None:
    config = tiny.target_config("dense")
    weights = tiny.target_weights(config)
    weights["layers.3.self_attn.v_proj.weight"] = torch.randn(64, 64)
    with pytest.raises(WeightsError, match=r"layers\.3\.self_attn\.v_proj"):
        load_target(tiny.write_model(tmp_path / "odd", config, weights), EngineConfig())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_load_and_run(tmp_path: Path, dtype: str) -> None:
    config = tiny.target_config("moe", dtype=dtype)
    weights = {n: w.to(getattr(torch, dtype)) for n, w in tiny.target_weights(config).items()}
    path = tiny.write_model(tmp_path / "model", config, weights)
    for engine in (EngineConfig(backend="reference"), EngineConfig()):
        llm = LLM(str(path), engine)
        assert llm.target.dtype == getattr(torch, dtype)
        assert len(llm.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True)).tokens) == 5


@pytest.mark.parametrize(
    "change,words",
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": ["mamba"] * 4}, "layer_types"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"num_kv_shared_layers": 9}, "num_kv_shared_layers"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"enable_moe_block": True}, "num_experts"),
        ({"rope_parameters": {tiny.F: {"rope_type": "yarn"}}}, "yarn"),
    ],
)
def test_configs_that_cannot_be_used_say_which_field(change: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Gemma4Config.from_hf(tiny.target_config() | change)


def test_an_assistants_config_is_checked() -> None:
    raw = tiny.assistant_config(tiny.target_config(), ordered=True)
    assert AssistantConfig.from_hf(raw).ordered
    with pytest.raises(ModelError, match="centroids"):
        AssistantConfig.from_hf(raw | {"num_centroids": 7})
    with pytest.raises(ModelError, match="num_kv_shared_layers"):
        AssistantConfig.from_hf(
            raw | {"text_config": raw["text_config"] | {"num_kv_shared_layers": 2}}
        )


def test_transformers_spelling_of_a_config_is_the_same() -> None:
    """Published files have global_head_dim, transformers saves per_layer_config."""
    published = tiny.target_config("dense")
    saved = {k: v for k, v in published.items() if "global" not in k}
    saved["per_layer_config"] = {"3": {"head_dim": 64, "num_key_value_heads": 1}}
    assert Gemma4Config.from_hf(saved) == Gemma4Config.from_hf(published)
