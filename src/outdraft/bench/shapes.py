"""Published shapes as data: targets, and what drafts for them.

The fields are those of the published configs. `n_params` is the published number of parameters of
the language part (layer scalars left out), which tests hold the shapes to. Not here: weights of
such a shape (synthetic.py).
"""

from dataclasses import dataclass
from typing import Any

from outdraft.errors import OutdraftError
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config
from outdraft.models.layers import TargetConfig
from outdraft.models.ministral3 import Ministral3Config
from outdraft.models.nemotron_h_config import NemotronHConfig
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.models.registry import GEMMA4, MINISTRAL3, NEMOTRON_H, QWEN35, Family

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
    """A target and its drafter.

    `drafter` is an assistant, the target's own config for its native head, or the config of a
    smaller model of the same family.
    """

    name: str
    target: TargetConfig
    drafter: AssistantConfig | TargetConfig
    n_params: int
    n_drafter_params: int
    family: Family = GEMMA4


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
    n_drafter_params: int,
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
        n_drafter_params,
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


def _qwen(
    name: str,
    n_params: int,
    n_head_params: int,
    n_layers: int,
    n_v_heads: int,
    target: dict[str, Any],
) -> Shape:
    """A Qwen 3.6 with its native head."""
    given = target | {
        "vocab_size": 248320,
        "num_hidden_layers": n_layers,
        "full_attention_interval": 4,
        "head_dim": 256,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": n_v_heads,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "mtp_num_hidden_layers": 1,
    }
    config = Qwen35Config.from_hf(given)
    return Shape(name, config, config, n_params, n_head_params, QWEN35)


QWEN_27B = _qwen(
    "qwen3.6-27b",
    26_895_998_464,
    424_699_392,
    64,
    48,
    {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
    },
)
QWEN_35B = _qwen(
    "qwen3.6-35b-a3b",
    34_660_610_688,
    844_640_768,
    40,
    32,
    {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
)


def _ministral(
    hidden_size: int, n_layers: int, intermediate_size: int, theta: float, *, tied: bool
) -> Ministral3Config:
    return Ministral3Config.from_hf(
        {
            "vocab_size": 131072,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
        }
    )


MINISTRAL_14B = Shape(
    "ministral-14b",
    _ministral(5120, 40, 16384, 1e9, tied=False),
    _ministral(3072, 26, 9216, 1e6, tied=True),
    13_506_073_600,
    3_429_006_336,
    MINISTRAL3,
)


def _nemotron(
    name: str, n_params: int, n_head_params: int, pattern: str, target: dict[str, Any]
) -> Shape:
    """A Nemotron-H with its native head."""
    given = target | {
        "vocab_size": 131072,
        "hybrid_override_pattern": pattern,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "max_position_embeddings": 262144,
        "layer_norm_epsilon": 1e-5,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    }
    config = NemotronHConfig.from_hf(given)
    return Shape(name, config, config, n_params, n_head_params, NEMOTRON_H)


LIGHTNING_30B = _nemotron(  # 3-Nano-30B-A3B is the same without the head
    "nemotron-3.5-lightning-30b-a3b",
    31_577_937_344,
    1_335_325_952 - 128,  # published with the biases of its router, the others without
    "MEMEM*E" * 5 + "MEMEMEM*E" + "MEMEMEME",
    {
        "hidden_size": 2688,
        "mamba_num_heads": 64,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "routed_scaling_factor": 2.5,
    },
)
SUPER_120B = _nemotron(
    "nemotron-3-super-120b-a12b",
    120_668_687_360,
    2_942_324_736,
    "MEMEMEM*E" * 3 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME",
    {
        "hidden_size": 4096,
        "mamba_num_heads": 128,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "routed_scaling_factor": 5.0,
    },
)

_ALL = (
    E2B,
    E4B,
    DENSE_12B,
    MOE_26B,
    DENSE_31B,
    QWEN_27B,
    QWEN_35B,
    MINISTRAL_14B,
    LIGHTNING_30B,
    SUPER_120B,
)
SHAPES = {shape.name: shape for shape in _ALL}
