"""The shape of an assistant for a Gemma 4 target that has none.

Here: sizes from the target's, and why. Not here: its first weights (first.py), training (tune.py).

The published assistants have four layers, the last one full, a hidden size of a sixth to a quarter
of the target's, and heads as wide as the target's, whose keys and values they read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outdraft.models.gemma4_assistant import expected_tensors
from outdraft.models.gemma4_config import (
    KINDS,
    AssistantConfig,
    AttentionShape,
    Gemma4Config,
    LayerKind,
)

SLIDING, FULL = KINDS
LAYERS = 4
HEADS = 4
HIDDEN_PART = 4  # of the target's hidden size
MIN_HIDDEN, MAX_HIDDEN, HIDDEN_MULTIPLE = 32, 1024, 32
INNER_FACTOR = 4  # the MLP's width in hidden sizes
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class Proposal:
    """An assistant's config.json, and a sentence for each size."""

    config: dict[str, Any]
    reasons: tuple[str, ...]

    @property
    def shape(self) -> AssistantConfig:
        """The config, read."""
        return AssistantConfig.from_hf(self.config)


def propose_assistant(raw: Mapping[str, Any]) -> Proposal:
    """Sizes for the target whose config.json is `raw`.

    Raises:
        ModelError: the target's config cannot be used.
    """
    target = Gemma4Config.from_hf(raw)
    kinds = [kind for kind in KINDS if kind in target.layer_types]
    heads = {kind: target.attention[target.last_owner(kind)] for kind in kinds}
    groups = math.lcm(*(shape.n_kv_heads for shape in heads.values()))
    n_heads = groups * -(-HEADS // groups)
    hidden = target.hidden_size // HIDDEN_PART // HIDDEN_MULTIPLE * HIDDEN_MULTIPLE
    hidden = min(MAX_HIDDEN, max(MIN_HIDDEN, hidden))
    layers = [*[kinds[0]] * (LAYERS - 1), kinds[-1]]
    first, last = heads[kinds[0]], heads[kinds[-1]]
    text = raw.get("text_config", raw)
    config = {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": target.hidden_size,
        "use_ordered_embeddings": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma4_text",
            "vocab_size": target.vocab_size,
            "hidden_size": hidden,
            "intermediate_size": INNER_FACTOR * hidden,
            "num_hidden_layers": LAYERS,
            "num_kv_shared_layers": LAYERS,
            "layer_types": layers,
            "num_attention_heads": n_heads,
            "num_key_value_heads": first.n_kv_heads,
            "num_global_key_value_heads": last.n_kv_heads if last.k_eq_v else None,
            "attention_k_eq_v": last.k_eq_v,
            "head_dim": first.head_dim,
            "global_head_dim": last.head_dim,
            "sliding_window": target.sliding_window,
            "max_position_embeddings": target.max_position_embeddings,
            "rms_norm_eps": target.rms_norm_eps,
            "rope_parameters": _ropes(target),
            "final_logit_softcapping": None,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "enable_moe_block": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "dtype": "bfloat16",
        }
        | {name: text[name] for name in _TOKENS if text.get(name) is not None},
    }
    return Proposal(config, _reasons(config, target, heads, groups))


def _reasons(
    config: dict[str, Any],
    target: Gemma4Config,
    heads: Mapping[LayerKind, AttentionShape],
    groups: int,
) -> tuple[str, ...]:
    """Why these sizes, and what they come to."""
    text = config["text_config"]
    hidden, n_heads, layers = (
        text[name] for name in ("hidden_size", "num_attention_heads", "layer_types")
    )
    shape = AssistantConfig.from_hf(config)
    n_params = sum(math.prod(one.shape) for one in expected_tensors(shape).values())
    names = ", ".join(kind.removesuffix("_attention") for kind in layers)
    return (
        f"hidden size {hidden}: a quarter of the target's {target.hidden_size}, in steps of "
        f"{HIDDEN_MULTIPLE}, {MIN_HIDDEN} to {MAX_HIDDEN}",
        f"{LAYERS} layers ({names}): each reads the last layer of its kind that keeps keys",
        f"{n_heads} query heads of {' and '.join(str(h.head_dim) for h in heads.values())}: as "
        f"wide as those keys, and a multiple of {groups}, their heads",
        f"{n_params / 1e6:.1f} million parameters, {target.vocab_size * hidden / 1e6:.1f} of them "
        "the head over the whole vocabulary",
    )


def _ropes(target: Gemma4Config) -> dict[str, Any]:
    """The target's: its keys are turned already, the queries have to turn alike."""
    sliding, full = target.rope[SLIDING], target.rope[FULL]
    return {
        SLIDING: {"rope_type": "default", "rope_theta": sliding.theta},
        FULL: {
            "rope_type": "proportional",
            "rope_theta": full.theta,
            "partial_rotary_factor": full.partial_rotary_factor,
        },
    }
