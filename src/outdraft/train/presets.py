"""The sizes of demo pairs that the trainer knows, and how each is trained.

Here: shapes, batch sizes, learning rates. Not here: the recipe that uses them (recipe.py).
"""

from dataclasses import dataclass, replace
from typing import Any

from outdraft.train.optimiser import OptimiserConfig
from outdraft.train.tokenizer import BOS_ID, END_OF_TURN_ID, EOS_ID, PAD_ID

SLIDING, FULL = "sliding_attention", "full_attention"
DRAFT_DEFAULT = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that a preset chooses of a Gemma 4 text model."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    global_head_dim: int


@dataclass(frozen=True, slots=True)
class Preset:
    """One size of target and assistant.

    Attributes:
        context: tokens of a training window, `<bos>` not counted.
        batch, assistant_batch: windows of a step.
        unroll: draft steps of a training round.
        assistant_ratio: assistant steps for one target step, where steps are given.
        assistant_share: share of the training time for the assistant, where minutes are given.
        own_text: share of the assistant's windows that the target wrote.
        corpus_bytes: most text read, in bytes.
        n_candidates: assistant checkpoints that selection compares.
        n_prompts, prompt_tokens, new_tokens: of a measurement of acceptance.
    """

    name: str
    vocab_size: int
    target: Shape
    assistant: Shape
    window: int
    max_positions: int
    context: int
    batch: int
    assistant_batch: int
    unroll: int
    assistant_ratio: float
    assistant_share: float
    own_text: float
    corpus_bytes: int
    n_candidates: int
    n_prompts: int
    prompt_tokens: int
    new_tokens: int
    target_optimiser: OptimiserConfig
    assistant_optimiser: OptimiserConfig

    def target_config(self) -> dict[str, Any]:
        """config.json of the target."""
        text = self._text_config(self.target) | {
            "architectures": ["Gemma4ForCausalLM"],
            "eos_token_id": [EOS_ID, END_OF_TURN_ID],
            "final_logit_softcapping": 30.0,
            "num_kv_shared_layers": 0,
        }
        return dict(sorted(text.items()))

    def assistant_config(self) -> dict[str, Any]:
        """config.json of the assistant."""
        text = self._text_config(self.assistant) | {
            "eos_token_id": EOS_ID,
            "final_logit_softcapping": None,
            "num_kv_shared_layers": self.assistant.n_layers,
        }
        return {
            "architectures": ["Gemma4AssistantForCausalLM"],
            "model_type": "gemma4_assistant",
            "backbone_hidden_size": self.target.hidden_size,
            "use_ordered_embeddings": False,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
            "text_config": dict(sorted(text.items())),
        }

    def _text_config(self, shape: Shape) -> dict[str, Any]:
        kinds = [FULL if (i + 1) % 4 == 0 else SLIDING for i in range(shape.n_layers - 1)] + [FULL]
        return {
            "model_type": "gemma4_text",
            "vocab_size": self.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.n_layers,
            "layer_types": kinds,
            "num_attention_heads": shape.n_heads,
            "num_key_value_heads": shape.n_kv_heads,
            "num_global_key_value_heads": None,
            "head_dim": shape.head_dim,
            "global_head_dim": shape.global_head_dim,
            "sliding_window": self.window,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.25,
                },
            },
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "enable_moe_block": False,
            "attention_k_eq_v": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": BOS_ID,
            "pad_token_id": PAD_ID,
            "dtype": "bfloat16",
        }


CPU = Preset(
    name="cpu",
    vocab_size=2048,
    target=Shape(256, 640, 4, 4, 2, 32, 64),
    assistant=Shape(128, 384, 2, 4, 2, 32, 64),
    window=128,
    max_positions=2048,
    context=256,
    batch=16,
    assistant_batch=16,
    unroll=4,
    assistant_ratio=0.35,
    assistant_share=0.3,
    own_text=0.5,
    corpus_bytes=18_000_000,
    n_candidates=4,
    n_prompts=12,
    prompt_tokens=64,
    new_tokens=128,
    target_optimiser=OptimiserConfig(muon_lr=0.02, adam_lr=4e-3, weight_decay=0.05),
    assistant_optimiser=OptimiserConfig(muon_lr=0.02, adam_lr=4e-3),
)

# The pair that comes with the package; its batches are meant for an accelerator.
DEMO = Preset(
    name="demo",
    vocab_size=4096,
    target=Shape(512, 1536, 8, 8, 2, 64, 128),
    assistant=Shape(128, 512, 4, 4, 2, 64, 128),
    window=256,
    max_positions=4096,
    context=1024,
    batch=128,
    assistant_batch=64,
    unroll=6,
    assistant_ratio=0.6,
    assistant_share=0.33,
    own_text=0.5,
    corpus_bytes=256_000_000,
    n_candidates=6,
    n_prompts=12,
    prompt_tokens=64,
    new_tokens=128,
    target_optimiser=OptimiserConfig(muon_lr=0.03, adam_lr=2e-3, weight_decay=0.05),
    assistant_optimiser=OptimiserConfig(muon_lr=0.02, adam_lr=2e-3),
)

# Twice the shipped size, for minutes on a large accelerator.
LARGE = replace(
    DEMO,
    name="large",
    target=Shape(640, 1920, 10, 10, 2, 64, 128),
    assistant=Shape(192, 768, 4, 4, 2, 64, 128),
    corpus_bytes=128_000_000,
    n_candidates=3,
)

# For tests: learns next to nothing, in seconds.
TINY = Preset(
    name="tiny",
    vocab_size=320,
    target=Shape(32, 48, 4, 2, 1, 16, 32),
    assistant=Shape(16, 32, 4, 2, 1, 16, 32),
    window=16,
    max_positions=512,
    context=32,
    batch=4,
    assistant_batch=4,
    unroll=3,
    assistant_ratio=1.0,
    assistant_share=0.4,
    own_text=0.5,
    corpus_bytes=400_000,
    n_candidates=2,
    n_prompts=2,
    prompt_tokens=16,
    new_tokens=16,
    target_optimiser=OptimiserConfig(muon_lr=0.02, adam_lr=4e-3),
    assistant_optimiser=OptimiserConfig(muon_lr=0.02, adam_lr=4e-3),
)

PRESETS = {preset.name: preset for preset in (CPU, DEMO, LARGE, TINY)}
