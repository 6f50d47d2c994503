"""Tiny random models of every shape, as configs, weights, or Hugging Face directories on disk."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from outdraft.models import gemma4_assistant
from outdraft.models.gemma4_config import AssistantConfig
from outdraft.models.heads import head_family
from outdraft.models.registry import family_of
from outdraft.weights.load import ExpectedTensor

VOCAB = 512
S, F = "sliding_attention", "full_attention"

_ROPE = {
    S: {"rope_type": "default", "rope_theta": 10000.0},
    F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}

_BASE: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": [S, S, S, F],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "sliding_window": 96,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _ROPE,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    # 31B: full layers make their values from the keys, with fewer and wider heads
    "dense": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    # 26B-A4B: experts beside the dense MLP
    "moe": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 40,
    },
    # E2B: per-layer embeddings, layers that share keys and values, wider MLPs there
    "e2b": {
        "num_hidden_layers": 6,
        "layer_types": [S, S, F, S, S, F],
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
    # a window that the tests' prompts run past
    "window": {"sliding_window": 24},
}


MINISTRAL3: dict[str, Any] = {
    "architectures": ["Ministral3ForCausalLM"],
    "model_type": "ministral3",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    # an original context that the tests' prompts run past
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}


QWEN35: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
    },
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}

OTHERS: dict[str, dict[str, Any]] = {
    "ministral3": MINISTRAL3,
    "qwen3_5": QWEN35,
    "qwen3_5_moe": QWEN35
    | {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
    },
}


_NEMOTRON_H: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "chunk_size": 32,
    "use_conv_bias": True,
    "time_step_limit": [0.0, float("inf")],
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "max_position_embeddings": 1024,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}

NEMOTRONS: dict[str, dict[str, Any]] = {
    # Nano 2: dense
    "nemotron_h": _NEMOTRON_H | {"hybrid_override_pattern": "M-*-M"},
    # 3 Nano and 3.5 Lightning: experts
    "nemotron_h_moe": _NEMOTRON_H | {"hybrid_override_pattern": "MEM*E"},
    # 3 Super: experts in a latent; here in groups, too, the layers' kinds as names, and an MLP
    "nemotron_h_latent": _NEMOTRON_H
    | {
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
        "moe_latent_size": 48,
        "n_group": 4,
        "topk_group": 2,
    },
}
OTHERS |= NEMOTRONS


def target_config(shape: str = "plain", **changes: Any) -> dict[str, Any]:
    """config.json of a tiny target."""
    base = OTHERS[shape] if shape in OTHERS else _BASE | SHAPES[shape]
    return json.loads(json.dumps(base | changes))


def assistant_config(target: dict[str, Any], *, ordered: bool = False) -> dict[str, Any]:
    """config.json of a tiny assistant of that target."""
    text = target | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": [S, S, S, F],
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
    }
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": ordered,
        "num_centroids": 16,
        "centroid_intermediate_top_k": 4,
        "tie_word_embeddings": True,
        "text_config": text,
        "dtype": target["dtype"],
    }


def random_tensors(
    expected: dict[str, ExpectedTensor], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random weights that keep activations lively: unit-size outputs, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in expected.items():
        x = torch.randn(spec.shape, generator=generator)
        if name.endswith("token_ordering"):
            tensors[name] = torch.randperm(spec.shape[0], generator=generator)
            continue
        if name.endswith("layer_scalar"):
            x = 0.7 + 0.1 * x
        elif name.endswith(("mixer.dt_bias", "mixer.A_log", "e_score_correction_bias")):
            x = 0.2 * x - (2 if name.endswith("dt_bias") else 0)  # states that last
        elif len(spec.shape) == 1:
            x = 1 + 0.2 * x
        elif name in ("embed_tokens.weight", "embeddings.weight"):
            x = 0.3 * x
        else:
            x = x * spec.shape[-1] ** -0.5
        tensors[name] = x.to(dtype)
    return tensors


def target_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a target, canonical names."""
    family = family_of(config, Path("tiny"))
    return random_tensors(family.expected_tensors(family.read_config(config)), seed)


def assistant_weights(config: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Random weights of an assistant, canonical names."""
    expected = gemma4_assistant.expected_tensors(AssistantConfig.from_hf(config))
    return random_tensors(expected, seed)


def write_tokenizer(path: Path, vocab: int = VOCAB) -> None:
    """A byte-level tokenizer of the given size: specials, 256 bytes, then unused tokens."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*specials, *alphabet]
    names += [f"<unused{i}>" for i in range(vocab - len(names))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
    )
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    prefix: str = "model.",
    generation: dict[str, Any] | None = None,
) -> Path:
    """A Hugging Face directory. Tensors outside the text model keep their names."""
    path.mkdir(parents=True, exist_ok=True)
    outside = ("lm_head.", "pre_projection.", "post_projection.", "masked_embedding.")
    named = {
        name if name.startswith(outside) else prefix + name: tensor.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps(generation or {"eos_token_id": [1]}))
    write_tokenizer(path, config.get("text_config", config)["vocab_size"])
    return path


def tiny_target(path: Path, shape: str = "plain", *, seed: int = 0, **changes: Any) -> Path:
    """A tiny random target on disk."""
    config = target_config(shape, **changes)
    return write_model(path, config, target_weights(config, seed))


def int4_target(path: Path, source: Path, group: int = 32) -> Path:
    """The target at `source` with its layers' matrices packed to int4 (compressed-tensors)."""
    config = json.loads((source / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights | {"group_size": group}}},
    }
    tensors = {}
    for name, x in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = x
            continue
        grouped = x.float().unflatten(1, (-1, group))
        scales = grouped.abs().amax(2) / 7
        codes = ((grouped / scales[..., None]).round() + 8).long().flatten(1).unflatten(1, (-1, 8))
        words = sum(codes[..., i] << (4 * i) for i in range(8))
        tensors[f"{name}_packed"] = torch.where(words >= 2**31, words - 2**32, words).int()
        tensors[f"{name}_scale"] = scales
        tensors[f"{name}_shape"] = torch.tensor(x.shape)
    return write_model(path, config, tensors, prefix="")


def tiny_assistant(
    path: Path, target: Path, *, ordered: bool = False, seed: int = 1, **changes: Any
) -> Path:
    """A tiny random assistant of the target at `target`; `changes` go to its top-level config."""
    config = assistant_config(json.loads((target / "config.json").read_text()), ordered=ordered)
    config |= changes
    return write_model(
        path, config, assistant_weights(config, seed), generation={"num_assistant_tokens": 4}
    )


def tiny_hybrid(path: Path, shape: str = "qwen3_5", *, seed: int = 0, **changes: Any) -> Path:
    """A tiny random hybrid with a native head, in the layout of the published checkpoints."""
    claim = "num_nextn_predict_layers" if shape in NEMOTRONS else "mtp_num_hidden_layers"
    config = target_config(shape, **{claim: 1}, **changes)
    read = family_of(config, path).read_config(config)
    shapes = head_family(read).expected_tensors(read)
    head = {f"mtp.{name}": t for name, t in random_tensors(shapes, seed + 1).items()}
    body = target_weights(config, seed)
    prefix = "backbone." if shape in NEMOTRONS else "model."
    named = {n if n.startswith("lm_head") else prefix + n: t for n, t in body.items()}
    return write_model(path, config, named | head, prefix="")
