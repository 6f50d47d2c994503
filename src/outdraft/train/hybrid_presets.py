"""Sizes of hybrids that `outdraft pretrain` knows, and what it reads of a config of one's own.

Here: shapes, batch sizes, learning rates. Not here: the stages of a run (hybrid_run.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outdraft.errors import TrainingError
from outdraft.models.qwen3_5_config import MODEL_TYPES, Qwen35Config
from outdraft.train.optimiser import OptimiserConfig
from outdraft.train.tokenizer import BOS_ID, END_OF_TURN_ID, EOS_ID, PAD_ID, SMALLEST_VOCABULARY
from outdraft.weights.config import read_config


@dataclass(frozen=True, slots=True)
class HybridPreset:
    """One size and how it is trained.

    Attributes:
        config: config.json.
        context: tokens of a training window, `<bos>` not counted.
        batch: windows of a step.
        corpus_bytes: most text read, in bytes.
        n_prompts, prompt_tokens, new_tokens: of the measurement of acceptance.
    """

    name: str
    config: Mapping[str, Any]
    context: int
    batch: int
    corpus_bytes: int
    n_prompts: int
    prompt_tokens: int
    new_tokens: int
    optimiser: OptimiserConfig

    @property
    def shape(self) -> Qwen35Config:
        """The config, checked."""
        return Qwen35Config.from_hf(self.config)


def make_config(
    vocab: int, hidden: int, inner: int, n_layers: int, heads: tuple[int, int, int], delta: int
) -> dict[str, Any]:
    """config.json of a dense text model with a head.

    Args:
        heads: query heads, key/value heads, dimension.
        delta: heads of the delta rule, keys of 32 and values of 64.
    """
    n_heads, n_kv_heads, head_dim = heads
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": n_layers,
        "layer_types": [
            "full_attention" if i % 4 == 3 else "linear_attention" for i in range(n_layers)
        ],
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": delta,
        "linear_num_value_heads": delta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mtp_num_hidden_layers": 1,
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, END_OF_TURN_ID],
        "pad_token_id": PAD_ID,
        "dtype": "bfloat16",
    }


HYBRID = HybridPreset(
    name="hybrid",
    config=make_config(2048, 256, 640, 12, (4, 2, 64), 4),
    context=256,
    batch=8,
    corpus_bytes=18_000_000,
    n_prompts=12,
    prompt_tokens=64,
    new_tokens=128,
    optimiser=OptimiserConfig(muon_lr=0.02, adam_lr=4e-3, weight_decay=0.05),
)

# For tests: learns next to nothing, in seconds.
TINY = HybridPreset(
    name="hybrid-tiny",
    config=make_config(320, 64, 96, 4, (2, 1, 32), 1),
    context=48,
    batch=4,
    corpus_bytes=400_000,
    n_prompts=2,
    prompt_tokens=16,
    new_tokens=16,
    optimiser=OptimiserConfig(muon_lr=0.02, adam_lr=4e-3),
)

PRESETS = {preset.name: preset for preset in (HYBRID, TINY)}


def find_preset(name: str) -> HybridPreset:
    """A preset, or the preset `hybrid` with the config.json at a path or in a directory.

    Raises:
        TrainingError: there is neither, or the config is of a model that cannot be trained.
        ModelError: the config is wrong in itself.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name).expanduser()
    if not path.exists():
        raise TrainingError(
            f"there is no preset or config {name}",
            f"use one of {', '.join(PRESETS)}, or the path of a config.json",
        )
    raw = read_config(path.parent if path.is_file() else path)
    if raw.get("model_type") not in MODEL_TYPES:
        raise TrainingError(
            f"{path} is of a {raw.get('model_type')!r} model", "pretrain knows dense Qwen 3.5"
        )
    config = dict(raw.get("text_config", raw)) | {"mtp_num_hidden_layers": 1}
    config.setdefault("tie_word_embeddings", raw.get("tie_word_embeddings", False))
    config |= {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    shape = Qwen35Config.from_hf(config)
    if shape.moe is not None:
        raise TrainingError(f"{path} has experts", "pretrain knows dense Qwen 3.5")
    if shape.vocab_size < SMALLEST_VOCABULARY:
        raise TrainingError(
            f"{path} has a vocabulary of {shape.vocab_size}", f"use {SMALLEST_VOCABULARY} or more"
        )
    context = min(HYBRID.context, shape.max_position_embeddings - 1)
    return replace(HYBRID, name=str(path), config=config, context=context)
