"""Gemma 4 configurations, read from a Hugging Face `config.json` and checked.

Here: the shape of a text model and what an assistant adds to it. Not here: weights or arithmetic.
Field names are those of the published files.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from outdraft.errors import ModelError
from outdraft.models.layers import positive

LayerKind = Literal["sliding_attention", "full_attention"]
KINDS: tuple[LayerKind, ...] = ("sliding_attention", "full_attention")

TARGET_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
ASSISTANT_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one kind of layer: base and the share of the pairs that turn."""

    theta: float
    partial_rotary_factor: float


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of one layer. `k_eq_v`: the layer has no v_proj, values are made from the keys'."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    k_eq_v: bool


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Experts beside the dense MLP."""

    n_experts: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class Gemma4Config:
    """Shape of a Gemma 4 text model (also of an assistant's own layers)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[LayerKind, ...]
    attention: tuple[AttentionShape, ...]
    rope: Mapping[LayerKind, Rope]
    sliding_window: int
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float | None
    num_kv_shared_layers: int
    use_double_wide_mlp: bool
    ple_size: int
    ple_vocab_size: int
    moe: MoeShape | None
    tie_word_embeddings: bool
    dtype: str

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Of all layers."""
        return tuple(shape.head_dim for shape in self.attention)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values this layer reads: itself, or the last owner of its kind.

        -1 in an assistant, all of whose layers read another model's.

        Raises:
            ModelError: the layers that own keys and values lack this kind.
        """
        if self.num_kv_shared_layers == self.n_layers:
            return -1
        first_shared = self.n_layers - self.num_kv_shared_layers
        if layer < first_shared:
            return layer
        return self.last_owner(self.layer_types[layer])

    def last_owner(self, kind: LayerKind) -> int:
        """The last layer of this kind that owns its keys and values: what an assistant reads."""
        owners = self.layer_types[: self.n_layers - self.num_kv_shared_layers]
        if kind not in owners:
            raise ModelError(
                f"no layer of type {kind} owns keys and values",
                "check layer_types and num_kv_shared_layers in config.json",
            )
        return len(owners) - 1 - owners[::-1].index(kind)

    def mlp_size(self, layer: int) -> int:
        """Inner width of the layer's dense MLP."""
        wide = self.use_double_wide_mlp and self.kv_source(layer) != layer
        return self.intermediate_size * (2 if wide else 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gemma4Config":
        """Read a `gemma4*` config; a multimodal one is entered at its `text_config`.

        Raises:
            ModelError: a field is missing, has an impossible value, or asks for something that
                is not supported.
        """
        text = config.get("text_config", config)
        _refuse_unsupported(text)
        layer_types = _layer_types(text)
        if (moe := bool(text.get("enable_moe_block"))) and not text.get("num_experts"):
            raise ModelError("enable_moe_block is set without num_experts", "check config.json")
        shared = int(text.get("num_kv_shared_layers") or 0)
        if not 0 <= shared <= len(layer_types):
            raise ModelError(f"num_kv_shared_layers is {shared}", "check config.json")
        return cls(
            vocab_size=positive(text, "vocab_size"),
            hidden_size=positive(text, "hidden_size"),
            intermediate_size=positive(text, "intermediate_size"),
            layer_types=layer_types,
            attention=tuple(_attention(text, i, kind) for i, kind in enumerate(layer_types)),
            rope=_ropes(text),
            sliding_window=positive(text, "sliding_window"),
            max_position_embeddings=positive(text, "max_position_embeddings"),
            rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
            final_logit_softcapping=text.get("final_logit_softcapping"),
            num_kv_shared_layers=shared,
            use_double_wide_mlp=bool(text.get("use_double_wide_mlp")),
            ple_size=int(text.get("hidden_size_per_layer_input") or 0),
            ple_vocab_size=int(text.get("vocab_size_per_layer_input") or 0),
            moe=_moe(text) if moe else None,
            tie_word_embeddings=bool(
                config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
            ),
            dtype=str(config.get("dtype") or text.get("dtype") or "bfloat16"),
        )


@dataclass(frozen=True, slots=True)
class AssistantConfig:
    """An assistant: its own layers, and the width of the target it was made for."""

    text: Gemma4Config
    backbone_hidden_size: int
    n_centroids: int
    centroid_top_k: int
    n_draft_default: int

    @property
    def ordered(self) -> bool:
        """True for the head that scores only the tokens of the best centroids."""
        return self.n_centroids > 0

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "AssistantConfig":
        """Read a `gemma4_assistant` config and the default draft length beside it.

        Raises:
            ModelError: as for `Gemma4Config.from_hf`, and for layers that own keys and values,
                experts or per-layer embeddings, none of which an assistant has.
        """
        text = Gemma4Config.from_hf(config)
        if text.ple_size or text.moe or text.use_double_wide_mlp:
            raise ModelError(
                "an assistant has no per-layer embeddings, experts or double-wide MLP",
                "check the assistant's config.json",
            )
        if text.num_kv_shared_layers != text.n_layers:
            raise ModelError(
                f"num_kv_shared_layers is {text.num_kv_shared_layers} of {text.n_layers} layers",
                "an assistant reads all keys and values from its target; check its config.json",
            )
        ordered = bool(config.get("use_ordered_embeddings"))
        n_centroids = positive(config, "num_centroids") if ordered else 0
        if ordered and text.vocab_size % n_centroids:
            raise ModelError(
                f"{n_centroids} centroids do not divide {text.vocab_size} tokens",
                "check num_centroids in the assistant's config.json",
            )
        return cls(
            text=text,
            backbone_hidden_size=positive(config, "backbone_hidden_size"),
            n_centroids=n_centroids,
            centroid_top_k=positive(config, "centroid_intermediate_top_k") if ordered else 0,
            n_draft_default=int((generation or {}).get("num_assistant_tokens") or 4),
        )


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    refusals = (
        ("use_bidirectional_attention", text.get("use_bidirectional_attention") == "all"),
        ("attention_bias", bool(text.get("attention_bias"))),
        (
            "hidden_activation",
            text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh",
        ),
    )
    for key, refused in refusals:
        if refused:
            raise ModelError(
                f"config.json: {key} = {text.get(key)!r} is not supported",
                "no published Gemma 4 text model uses it; check the file",
            )


def _layer_types(text: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    n_layers = positive(text, "num_hidden_layers")
    given = text.get("layer_types")
    if given is None:  # transformers' default: five sliding layers, then a full one
        given = [KINDS[(i + 1) % 6 == 0] for i in range(n_layers)]
    if len(given) != n_layers or any(kind not in KINDS for kind in given):
        raise ModelError(
            f"config.json: layer_types does not name {n_layers} layers as sliding or full",
            "it lists sliding_attention or full_attention once a layer",
        )
    return tuple(given)


def _attention(text: Mapping[str, Any], layer: int, kind: LayerKind) -> AttentionShape:
    """Published files have `global_head_dim`; transformers saves `per_layer_config` instead."""
    full = kind == "full_attention"
    k_eq_v = full and bool(text.get("attention_k_eq_v"))
    head_dim, n_kv = positive(text, "head_dim"), positive(text, "num_key_value_heads")
    per_layer = text.get("per_layer_config")
    if isinstance(per_layer, Mapping):
        override = per_layer.get(str(layer)) or per_layer.get(kind) or {}
        head_dim = override.get("head_dim", head_dim)
        n_kv = override.get("num_key_value_heads", n_kv)
    elif full:
        head_dim = text.get("global_head_dim") or 512
        if k_eq_v:
            n_kv = text.get("num_global_key_value_heads") or n_kv
    n_heads = positive(text, "num_attention_heads")
    if n_heads % n_kv or head_dim % 2:
        raise ModelError(
            f"layer {layer}: {n_heads} heads, {n_kv} key/value heads of {head_dim} do not fit",
            "check num_attention_heads, num_key_value_heads and head_dim in config.json",
        )
    return AttentionShape(n_heads, n_kv, head_dim, k_eq_v)


def _ropes(text: Mapping[str, Any]) -> dict[LayerKind, Rope]:
    given = text.get("rope_parameters") or {}
    defaults: dict[LayerKind, Rope] = {
        "sliding_attention": Rope(1e4, 1.0),
        "full_attention": Rope(1e6, 0.25),
    }
    ropes: dict[LayerKind, Rope] = {}
    for kind in KINDS:
        one = given.get(kind)
        if one is None:
            ropes[kind] = defaults[kind]
            continue
        rope_type = one.get("rope_type", "default")
        if rope_type not in ("default", "proportional"):
            raise ModelError(
                f"config.json: rope_type {rope_type!r} is not supported",
                "Gemma 4 uses default (sliding layers) and proportional (full layers)",
            )
        partial = float(one.get("partial_rotary_factor", 1.0)) if rope_type != "default" else 1.0
        ropes[kind] = Rope(float(one.get("rope_theta", defaults[kind].theta)), partial)
    return ropes


def _moe(text: Mapping[str, Any]) -> MoeShape:
    return MoeShape(
        n_experts=positive(text, "num_experts"),
        top_k=positive(text, "top_k_experts"),
        intermediate_size=positive(text, "moe_intermediate_size"),
    )


def describe(config: Gemma4Config) -> dict[str, str | int | float]:
    """A text model's shape in the terms of its config."""
    kinds = Counter(kind.removesuffix("_attention") for kind in config.layer_types)
    shape: dict[str, str | int | float] = {
        "layers": f"{config.n_layers} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})",
        "hidden size": config.hidden_size,
        "MLP": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "window": config.sliding_window,
        "type": config.dtype,
    }
    for kind in dict.fromkeys(config.layer_types):
        heads = config.attention[config.layer_types.index(kind)]
        values = ", values made from keys" if heads.k_eq_v else ""
        shape[f"{kind.removesuffix('_attention')} heads"] = (
            f"{heads.n_heads} query, {heads.n_kv_heads} key/value of {heads.head_dim}{values}"
        )
    if config.num_kv_shared_layers:
        shape["layers that share keys and values"] = config.num_kv_shared_layers
    if config.ple_size:
        shape["per-layer embedding"] = config.ple_size
    if config.moe is not None:
        shape["experts"] = (
            f"{config.moe.n_experts}, {config.moe.top_k} a token, "
            f"inner size {config.moe.intermediate_size}"
        )
    return shape
