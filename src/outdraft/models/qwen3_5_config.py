"""Qwen 3.5 and 3.6 configurations, read from a Hugging Face `config.json` and checked.

Field names are those of the published files. Not here: weights or arithmetic (qwen3_5.py).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from outdraft.errors import ModelError
from outdraft.models.layers import positive

LayerKind = Literal["linear_attention", "full_attention"]
KINDS: tuple[LayerKind, ...] = ("linear_attention", "full_attention")
MODEL_TYPES = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """A gated delta rule's heads and the width of the convolution before it."""

    n_k_heads: int
    n_v_heads: int
    k_dim: int
    v_dim: int
    conv_width: int

    @property
    def channels(self) -> int:
        """Queries, keys and values of a row."""
        return 2 * self.n_k_heads * self.k_dim + self.n_v_heads * self.v_dim


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Experts instead of the dense MLP, and one that every token passes."""

    n_experts: int
    top_k: int
    intermediate_size: int
    shared_size: int


@dataclass(frozen=True, slots=True)
class Qwen35Config:
    """Shape of a Qwen 3.5 text model. `n_mtp_layers` is what the file claims of a head."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[LayerKind, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    delta: DeltaShape
    moe: MoeShape | None
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    n_mtp_layers: int
    dtype: str

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Of all attention layers."""
        return (self.head_dim,)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen35Config":
        """Read a `qwen3_5*` config; a multimodal one is entered at its `text_config`.

        Raises:
            ModelError: a field is missing, has an impossible value, or asks for something that
                is not supported.
        """
        text = config.get("text_config", config)
        for key, wanted in (("hidden_act", "silu"), ("attention_bias", False)):
            if text.get(key, wanted) != wanted:
                raise ModelError(
                    f"config.json: {key} = {text.get(key)!r} is not supported",
                    "no published Qwen 3.5 uses it; check the file",
                )
        n_heads, n_kv_heads = (
            positive(text, "num_attention_heads"),
            positive(text, "num_key_value_heads"),
        )
        head_dim = int(text.get("head_dim") or 256)
        rope = text.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ModelError(
                f"config.json: rope_type {rope['rope_type']!r} is not supported",
                "published Qwen 3.5 models use default",
            )
        share = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
        rotary_dim = int(head_dim * float(share))
        if n_heads % n_kv_heads or head_dim % 2 or rotary_dim % 2:
            raise ModelError(
                f"{n_heads} heads, {n_kv_heads} key/value heads of {head_dim} do not fit",
                "check num_attention_heads, num_key_value_heads and head_dim in config.json",
            )
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(
            vocab_size=positive(text, "vocab_size"),
            hidden_size=positive(text, "hidden_size"),
            intermediate_size=int(text.get("intermediate_size") or 0),
            layer_types=_layer_types(text),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e7),
            delta=_delta(text),
            moe=_moe(text),
            max_position_embeddings=positive(text, "max_position_embeddings"),
            rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(tied),
            n_mtp_layers=int(text.get("mtp_num_hidden_layers") or 0),
            dtype=str(config.get("dtype") or text.get("dtype") or "bfloat16"),
        )


def _layer_types(text: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    n_layers = positive(text, "num_hidden_layers")
    given = text.get("layer_types")
    if given is None:
        interval = int(text.get("full_attention_interval") or 4)
        given = [KINDS[(i + 1) % interval == 0] for i in range(n_layers)]
    if len(given) != n_layers or any(kind not in KINDS for kind in given):
        raise ModelError(
            f"config.json: layer_types does not name {n_layers} layers as linear or full",
            "it lists linear_attention or full_attention once a layer",
        )
    if "full_attention" not in given:
        raise ModelError("config.json: no layer has full attention", "check layer_types")
    return tuple(given)


def _delta(text: Mapping[str, Any]) -> DeltaShape:
    shape = DeltaShape(
        n_k_heads=positive(text, "linear_num_key_heads"),
        n_v_heads=positive(text, "linear_num_value_heads"),
        k_dim=positive(text, "linear_key_head_dim"),
        v_dim=positive(text, "linear_value_head_dim"),
        conv_width=int(text.get("linear_conv_kernel_dim") or 4),
    )
    if shape.n_v_heads % shape.n_k_heads or not 2 <= shape.conv_width <= 8:
        raise ModelError(
            f"{shape.n_k_heads} key and {shape.n_v_heads} value heads with a convolution of "
            f"{shape.conv_width} do not fit",
            "check linear_num_key_heads, linear_num_value_heads and linear_conv_kernel_dim",
        )
    return shape


def _moe(text: Mapping[str, Any]) -> MoeShape | None:
    if not text.get("num_experts"):
        positive(text, "intermediate_size")
        return None
    return MoeShape(
        n_experts=positive(text, "num_experts"),
        top_k=positive(text, "num_experts_per_tok"),
        intermediate_size=positive(text, "moe_intermediate_size"),
        shared_size=positive(text, "shared_expert_intermediate_size"),
    )


def describe(config: Qwen35Config) -> dict[str, str | int | float]:
    """A text model's shape in the terms of its config."""
    kinds = Counter(kind.removesuffix("_attention") for kind in config.layer_types)
    delta = config.delta
    shape: dict[str, str | int | float] = {
        "layers": f"{config.n_layers} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})",
        "hidden size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "type": config.dtype,
        "full heads": f"{config.n_heads} query, {config.n_kv_heads} key/value of {config.head_dim}",
        "linear heads": f"{delta.n_k_heads} key of {delta.k_dim}, {delta.n_v_heads} value of "
        f"{delta.v_dim}, convolution over {delta.conv_width}",
    }
    if config.moe is None:
        shape["MLP"] = config.intermediate_size
    else:
        shape["experts"] = (
            f"{config.moe.n_experts}, {config.moe.top_k} a token, inner size "
            f"{config.moe.intermediate_size}, and a shared one of {config.moe.shared_size}"
        )
    if config.n_mtp_layers:
        shape["MTP layers, as the config claims"] = config.n_mtp_layers
    return shape
