"""Logits equal transformers' Nemotron-H, dense, with experts and with a latent, with and without a
cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from outdraft.cache.memory import Memory
from outdraft.config import EngineConfig
from outdraft.errors import ModelError
from outdraft.models import nemotron_h
from outdraft.models.nemotron_h_config import NemotronHConfig
from outdraft.models.registry import load_target
from outdraft.ops.cpu import CpuOps
from outdraft.ops.reference import ReferenceOps
from outdraft.speculate.mtp import find_head
from tests import tiny
from tests.models.parity import assert_parity, memory_of, run

UNSTACKED = tuple(f".experts.{e}.{name}_proj" for e in range(1, 8) for name in ("up", "down"))


def reference(raw: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """transformers' model with the same weights; it stacks experts."""
    given = {k: v for k, v in raw.items() if k != "architectures"}
    # It holds time steps above time_step_min in prompts only.
    config = transformers.NemotronHConfig(**given, time_step_min=1e-30)
    config._attn_implementation = "eager"
    model = transformers.NemotronHForCausalLM(config).eval()
    state = {n: t for n, t in weights.items() if n.startswith("lm_head")}
    for name, tensor in weights.items():
        if ".experts.0." in name:
            first, last = name.split(".experts.0.")
            parts = [weights[f"{first}.experts.{e}.{last}"] for e in range(8)]
            tensor, name = torch.stack(parts), f"{first}.experts.{last.removesuffix('.weight')}"
        if not name.startswith("lm_head"):
            state[f"model.{name}"] = tensor
    state = {n: t for n, t in state.items() if not n.removesuffix(".weight").endswith(UNSTACKED)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return model


def build(raw: dict[str, Any], weights: dict[str, Tensor]) -> tuple[nemotron_h.NemotronH, Memory]:
    config = NemotronHConfig.from_hf(raw)
    memory = memory_of(nemotron_h.memory_layers(config))
    return nemotron_h.NemotronH(config, weights, ReferenceOps()), memory


@pytest.mark.parametrize("shape", tiny.NEMOTRONS)
@torch.inference_mode()
def test_prefill_and_cached_decoding_equal_transformers(shape: str) -> None:
    """A prompt of several chunks of transformers' scan, then single tokens."""
    raw = tiny.target_config(shape)
    weights = tiny.target_weights(raw, seed=3)
    assert_parity(reference(raw, weights), lambda: build(raw, weights))


@torch.inference_mode()
def test_the_compiled_kernels_compute_the_same() -> None:
    """In bf16 weights and fp32 keys, close to the reference over the same rounded weights."""
    raw = tiny.target_config("nemotron_h_latent")
    weights = {
        n: t.bfloat16().float() if t.ndim > 1 else t
        for n, t in tiny.target_weights(raw, seed=3).items()
    }
    tokens = torch.randint(6, tiny.VOCAB, (90,), generator=torch.Generator().manual_seed(4))
    model, memory = build(raw, weights)
    want = run(model, memory, tokens.tolist())
    _, memory = build(raw, weights)
    ops = CpuOps(format="bf16", kv_dtype=torch.float32)
    ours = run(nemotron_h.NemotronH(model.config, weights, ops), memory, tokens.tolist())
    spread = float(want.max() - want.min())
    assert float((ours - want).abs().max()) <= 0.02 * spread


def test_layers_are_the_same_as_letters_and_as_names() -> None:
    letters = NemotronHConfig.from_hf(tiny.target_config("nemotron_h_moe"))
    for names in (
        ["mamba", "moe", "mamba", "attention", "moe"],
        ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
    ):
        raw = tiny.target_config("nemotron_h_moe", layers_block_type=names)
        del raw["hybrid_override_pattern"]
        assert NemotronHConfig.from_hf(raw) == letters


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"hybrid_override_pattern": "MMM"}, "no layer has attention"),
        ({"hybrid_override_pattern": "M*X"}, "'X' are not supported"),
        ({"hybrid_override_pattern": None}, "neither layers_block_type"),
        ({"num_hidden_layers": 7}, "5 kinds are given"),
        ({"mamba_num_heads": 3}, "do not fit"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
        ({"n_group": 4, "topk_group": 1}, "3 of 8 experts from 1 of 4 groups"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
    ],
)
def test_a_config_that_is_not_one_of_these_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        NemotronHConfig.from_hf(tiny.target_config("nemotron_h_moe") | change)


@torch.inference_mode()
def test_packed_int4_experts_and_projections_are_taken_over(tmp_path: Path) -> None:
    """Experts have tensors of their own, a projection is cut in two, and the head is there, too."""
    sizes = {"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64}
    sizes |= {"mamba_num_heads": 8, "mamba_head_dim": 16}
    source = tiny.tiny_hybrid(tmp_path / "source", "nemotron_h_moe", **sizes)
    path = tiny.int4_target(tmp_path / "int4", source)
    tokens = torch.randint(6, tiny.VOCAB, (60,), generator=torch.Generator().manual_seed(4))
    logits = []
    for given in ({"backend": "reference"}, {"quant": "w4", "kv_dtype": "fp32"}):
        target = load_target(path, EngineConfig(ctx_size=64, **given))
        memory = memory_of(list(target.family.memory_layers(target.config)))
        logits.append(run(target.model, memory, tokens.tolist()))
    want, got = logits
    assert float((got - want).square().mean()) <= 0.01 * float(want.var())
    assert find_head(path, target.config) is None
