"""Nemotron-H configurations (Nemotron Nano 2 and 3, Lightning, Super), read from a Hugging Face
`config.json` and checked.

Field names are those of the published files. Not here: weights or arithmetic (nemotron_h.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from outdraft.errors import ModelError
from outdraft.models.layers import positive

LayerKind = Literal["mamba", "attention", "mlp", "moe"]
MODEL_TYPES = ("nemotron_h",)

_LETTERS: dict[str, LayerKind] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_NAMES: dict[str, LayerKind] = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
_WANTED: tuple[tuple[str, Any], ...] = (
    ("mlp_hidden_act", "relu2"),
    ("mamba_hidden_act", "silu"),
    ("attention_bias", False),
    ("mlp_bias", False),
    ("use_bias", False),
    ("mamba_proj_bias", False),
    ("sliding_window", None),
    ("tie_word_embeddings", False),
    ("n_shared_experts", 1),
)


@dataclass(frozen=True, slots=True)
class MambaShape:
    """A Mamba 2 layer: heads of `head_dim` inputs, `n_groups` that share what leads in and out."""

    n_heads: int
    head_dim: int
    n_groups: int
    state_size: int
    conv_width: int
    conv_bias: bool
    time_step_limits: tuple[float, float]

    @property
    def inner(self) -> int:
        """Inputs of all heads."""
        return self.n_heads * self.head_dim

    @property
    def channels(self) -> int:
        """What passes the convolution: inputs, then what leads in and out."""
        return self.inner + 2 * self.n_groups * self.state_size


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Experts without gates, chosen by sigmoids; `latent_size` is what they read and write."""

    n_experts: int
    top_k: int
    intermediate_size: int
    shared_size: int
    latent_size: int | None
    n_groups: int
    top_groups: int
    normalise: bool
    scale: float


@dataclass(frozen=True, slots=True)
class NemotronHConfig:
    """Shape of a Nemotron-H model. `n_mtp_layers` is what the file claims of a head."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_kinds: tuple[LayerKind, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mamba: MambaShape
    moe: MoeShape | None
    max_position_embeddings: int
    eps: float
    n_mtp_layers: int
    mtp_kinds: tuple[LayerKind, ...]
    dtype: str

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Of all attention layers."""
        return (self.head_dim,)

    @property
    def n_layers(self) -> int:
        """Number of layers, each one mixer."""
        return len(self.layer_kinds)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "NemotronHConfig":
        """Read a `nemotron_h` config.

        Raises:
            ModelError: a field is missing, has an impossible value, or asks for something that
                is not supported.
        """
        for key, wanted in _WANTED:
            if config.get(key, wanted) != wanted:
                raise ModelError(
                    f"config.json: {key} = {config[key]!r} is not supported",
                    "no published Nemotron-H uses it; check the file",
                )
        kinds = _layer_kinds(config)
        names = config.get("mtp_layers_block_type")
        mtp_kinds = _kinds(names, config.get("mtp_hybrid_override_pattern"), "MTP")
        mtp_kinds = mtp_kinds or ("attention", "moe")
        n_heads, n_kv_heads = (
            positive(config, "num_attention_heads"),
            positive(config, "num_key_value_heads"),
        )
        head_dim = int(config.get("head_dim") or config.get("attention_head_dim") or 128)
        if n_heads % n_kv_heads or head_dim % 2:
            raise ModelError(
                f"{n_heads} heads, {n_kv_heads} key/value heads of {head_dim} do not fit",
                "check num_attention_heads, num_key_value_heads and head_dim in config.json",
            )
        n_mtp = int(config.get("num_nextn_predict_layers") or 0)
        used = {*kinds, *mtp_kinds} if n_mtp else {*kinds}
        return cls(
            vocab_size=positive(config, "vocab_size"),
            hidden_size=positive(config, "hidden_size"),
            intermediate_size=positive(config, "intermediate_size") if "mlp" in used else 0,
            layer_kinds=kinds,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            mamba=_mamba(config),
            moe=_moe(config) if "moe" in used else None,
            max_position_embeddings=positive(config, "max_position_embeddings"),
            eps=float(config.get("layer_norm_epsilon") or 1e-5),
            n_mtp_layers=n_mtp,
            mtp_kinds=mtp_kinds,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        )


def _kinds(
    names: Sequence[str] | None, pattern: str | None, what: str
) -> tuple[LayerKind, ...] | None:
    """The kinds that a list of names or a pattern of letters gives; None without both."""
    spelled, known = (pattern, _LETTERS) if names is None else (names, _NAMES)
    if spelled is None:
        return None
    odd = [name for name in spelled if name not in known]
    if odd:
        raise ModelError(
            f"config.json: {what} layers of kind {odd[0]!r} are not supported",
            f"the kinds are {', '.join(known)}",
        )
    return tuple(known[name] for name in spelled)


def _layer_kinds(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    names = config.get("layers_block_type") or config.get("layer_types")
    kinds = _kinds(names, config.get("hybrid_override_pattern"), "model")
    if kinds is None:
        raise ModelError(
            "config.json: neither layers_block_type nor hybrid_override_pattern is there",
            "they say what each layer is",
        )
    n_layers = config.get("num_hidden_layers", len(kinds))
    if n_layers != len(kinds):
        raise ModelError(
            f"config.json: num_hidden_layers is {n_layers}, and {len(kinds)} kinds are given",
            "check hybrid_override_pattern or layers_block_type",
        )
    if "attention" not in kinds:
        raise ModelError("config.json: no layer has attention", "check hybrid_override_pattern")
    return kinds


def _mamba(config: Mapping[str, Any]) -> MambaShape:
    low, high = config.get("time_step_limit") or (0.0, float("inf"))
    shape = MambaShape(
        n_heads=positive(config, "mamba_num_heads"),
        head_dim=positive(config, "mamba_head_dim"),
        n_groups=positive(config, "n_groups"),
        state_size=positive(config, "ssm_state_size"),
        conv_width=positive(config, "conv_kernel"),
        conv_bias=bool(config.get("use_conv_bias", True)),
        time_step_limits=(float(low), float(high)),
    )
    if shape.n_heads % shape.n_groups or not 2 <= shape.conv_width <= 8:
        raise ModelError(
            f"{shape.n_heads} Mamba heads in {shape.n_groups} groups with a convolution of "
            f"{shape.conv_width} do not fit",
            "check mamba_num_heads, n_groups and conv_kernel",
        )
    return shape


def _moe(config: Mapping[str, Any]) -> MoeShape:
    latent = config.get("moe_latent_size")
    shape = MoeShape(
        n_experts=positive(config, "n_routed_experts"),
        top_k=positive(config, "num_experts_per_tok"),
        intermediate_size=positive(config, "moe_intermediate_size"),
        shared_size=positive(config, "moe_shared_expert_intermediate_size"),
        latent_size=None if latent is None else positive(config, "moe_latent_size"),
        n_groups=int(config.get("n_group") or 1),
        top_groups=int(config.get("topk_group") or 1),
        normalise=bool(config.get("norm_topk_prob", True)),
        scale=float(config.get("routed_scaling_factor") or 1.0),
    )
    size, odd = divmod(shape.n_experts, shape.n_groups)
    few = shape.n_groups > 1 and size < 2
    if odd or few or shape.top_groups > shape.n_groups or shape.top_k > size * shape.top_groups:
        raise ModelError(
            f"{shape.top_k} of {shape.n_experts} experts from {shape.top_groups} of "
            f"{shape.n_groups} groups do not fit",
            "check n_routed_experts, num_experts_per_tok, n_group and topk_group",
        )
    return shape


def describe(config: NemotronHConfig) -> dict[str, str | int | float]:
    """A model's shape in the terms of its config."""
    kinds, mamba = Counter(config.layer_kinds), config.mamba
    shape: dict[str, str | int | float] = {
        "layers": f"{config.n_layers} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})",
        "hidden size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "type": config.dtype,
        "heads": f"{config.n_heads} query, {config.n_kv_heads} key/value of {config.head_dim}, "
        "no positions",
        "Mamba heads": f"{mamba.n_heads} of {mamba.head_dim} in {mamba.n_groups} groups, state "
        f"{mamba.state_size}, convolution over {mamba.conv_width}",
    }
    if "mlp" in kinds:
        shape["MLP"] = config.intermediate_size
    if config.moe is not None:
        latent = config.moe.latent_size
        shape["experts"] = (
            f"{config.moe.n_experts}, {config.moe.top_k} a token, inner size "
            f"{config.moe.intermediate_size}, and a shared one of {config.moe.shared_size}"
            + ("" if latent is None else f", in a latent of {latent}")
        )
    if config.n_mtp_layers:
        shape["MTP layers, as the config claims"] = config.n_mtp_layers
    return shape
