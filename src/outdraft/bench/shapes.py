"""The published shapes of Gemma 4, as data: targets and the assistants made for them.

The fields are those of the published configs. `n_params` is the published number of parameters of
the language part (layer scalars left out), which tests hold the shapes to. Not here: weights of
such a shape (synthetic.py).
"""

from dataclasses import dataclass
from typing import Any

from outdraft.errors import OutdraftError
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config

SLIDING, FULL = "sliding_attention", "full_attention"
VOCAB = 262144

_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A target and its assistant."""

    name: str
    target: Gemma4Config
    assistant: AssistantConfig
    n_params: int
    n_assistant_params: int


def find_shape(name: str) -> Shape:
    """The shape of this name.

    Raises:
        OutdraftError: there is none.
    """
    if name not in SHAPES:
        raise OutdraftError(f"there is no shape {name!r}", f"the shapes are {', '.join(SHAPES)}")
    return SHAPES[name]


def _make(
    name: str,
    n_params: int,
    n_assistant_params: int,
    target: dict[str, Any],
    assistant: dict[str, Any],
    *,
    sliding_per_full: int,
    n_layers: int,
) -> Shape:
    group = [SLIDING] * sliding_per_full + [FULL]
    given = _COMMON | target
    given |= {
        "num_hidden_layers": n_layers,
        "layer_types": group * (n_layers // len(group)),
    }
    return Shape(
        name,
        Gemma4Config.from_hf(given),
        AssistantConfig.from_hf(_assistant(given, assistant)),
        n_params,
        n_assistant_params,
    )


def _assistant(target: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    text = target | {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
    }
    ordered = own["hidden_size"] == 256
    return {
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": ordered,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "text_config": text | own,
    }


_SMALL = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4}
_LARGE = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16}

E2B = _make(
    "gemma-4-e2b",
    4_628_569_344,
    77_731_328,
    {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": VOCAB,
        "sliding_window": 512,
        "max_position_embeddings": 131072,
    },
    _SMALL,
    sliding_per_full=4,
    n_layers=35,
)
E4B = _make(
    "gemma-4-e4b",
    7_463_013_376,
    78_517_760,
    {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": VOCAB,
        "sliding_window": 512,
        "max_position_embeddings": 131072,
    },
    _SMALL,
    sliding_per_full=5,
    n_layers=42,
)
DENSE_12B = _make(
    "gemma-4-12b",
    11_907_350_272,
    422_856_960,
    {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
    },
    _LARGE,
    sliding_per_full=5,
    n_layers=48,
)
MOE_26B = _make(
    "gemma-4-26b-a4b",
    25_233_141_760,
    419_711_232,
    {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    _LARGE,
    sliding_per_full=5,
    n_layers=30,
)
DENSE_31B = _make(
    "gemma-4-31b",
    30_697_345_280,
    469_518_592,
    {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
    },
    _LARGE | {"num_attention_heads": 32},
    sliding_per_full=5,
    n_layers=60,
)

SHAPES = {shape.name: shape for shape in (E2B, E4B, DENSE_12B, MOE_26B, DENSE_31B)}
