"""Ministral 3: a dense decoder with grouped-query attention over the whole context, and no norms
on queries and keys.

From the published checkpoints' layout and transformers `models/ministral3`. Rotary positions are
YaRN's (Peng et al. 2023, arXiv:2309.00071), and queries are scaled by their position (Llama 4).
Both scales of a query, that and D^-1/2, are in its table of cosines and sines.

Shapes: T rows, K hidden size, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outdraft.cache.memory import KVLayer
from outdraft.errors import ModelError
from outdraft.models.layers import Attend, at_least_fp32, gated_linear, positive, rotary_table
from outdraft.ops.base import Heads, Ops, Rotary, Weight
from outdraft.ops.stored import stack
from outdraft.weights.load import ExpectedTensor, IgnoreRule

MODEL_TYPES = ("ministral3", "mistral3")
PREFIXES = ("model.language_model.", "language_model.model.", "model.")
GROUP = "full_attention"


@dataclass(frozen=True, slots=True)
class Yarn:
    """Rotary positions: `rope_parameters` of the config under their published names."""

    rope_theta: float
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    llama_4_scaling_beta: float


@dataclass(frozen=True, slots=True)
class Ministral3Config:
    """Shape of a Ministral 3 text model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Yarn
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: str

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Of all layers."""
        return (self.head_dim,)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Ministral3Config":
        """Read a `ministral3` config; a multimodal one is entered at its `text_config`.

        Raises:
            ModelError: a field is missing or has an impossible value, or the text model inside a
                multimodal one is another's.
        """
        text = config.get("text_config", config)
        if (kind := text.get("model_type", "ministral3")) != "ministral3":
            raise ModelError(
                f"config.json: the text model is a {kind!r}",
                "of models of type mistral3 those over a ministral3 are supported",
            )
        for key, wanted in (("hidden_act", "silu"), ("sliding_window", None)):
            if text.get(key, wanted) != wanted:
                raise ModelError(
                    f"config.json: {key} = {text.get(key)!r} is not supported",
                    "no published Ministral 3 uses it; check the file",
                )
        n_heads, hidden = positive(text, "num_attention_heads"), positive(text, "hidden_size")
        n_kv_heads = int(text.get("num_key_value_heads") or n_heads)
        head_dim = int(text.get("head_dim") or hidden // n_heads)
        if n_heads % n_kv_heads or head_dim % 2:
            raise ModelError(
                f"{n_heads} heads, {n_kv_heads} key/value heads of {head_dim} do not fit",
                "check num_attention_heads, num_key_value_heads and head_dim in config.json",
            )
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(
            vocab_size=positive(text, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=positive(text, "intermediate_size"),
            n_layers=positive(text, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope=_yarn(text.get("rope_parameters") or text.get("rope_scaling") or {}),
            max_position_embeddings=positive(text, "max_position_embeddings"),
            rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
            tie_word_embeddings=bool(tied),
            dtype=str(config.get("dtype") or text.get("dtype") or "bfloat16"),
        )


def _yarn(given: Mapping[str, Any]) -> Yarn:
    kind = given.get("rope_type", given.get("type", "yarn"))
    if kind != "yarn":
        raise ModelError(
            f"config.json: rope_type {kind!r} is not supported", "Ministral 3 uses yarn"
        )
    factor = float(given.get("factor") or 16.0)
    mscale, all_dim = given.get("mscale", 1.0), given.get("mscale_all_dim", 1.0)
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        attention_factor = _mscale(factor, 1.0)
        if mscale and all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, all_dim)
    return Yarn(
        rope_theta=float(given.get("rope_theta") or 1e6),
        factor=factor,
        original_max_position_embeddings=int(
            given.get("original_max_position_embeddings") or 16384
        ),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=float(attention_factor),
        llama_4_scaling_beta=float(given.get("llama_4_scaling_beta") or 0.0),
    )


def _mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def yarn_frequencies(head_dim: int, rope: Yarn) -> Tensor:
    """Angle per position of each of the D/2 pairs, fp32 [D/2] (YaRN, section 3.2).

    Pairs that turn less than `beta_slow` times within the original context are slowed down by
    `factor`, those that turn more than `beta_fast` times are left as they are; a ramp lies between.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32)
    turning = 1.0 / rope.rope_theta ** (pairs / head_dim)

    def pair_of(turns: float) -> float:
        length = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.rope_theta))

    low = max(math.floor(pair_of(rope.beta_fast)), 0)
    high = min(math.ceil(pair_of(rope.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return turning / rope.factor * slowed + turning * (1 - slowed)


def expected_tensors(config: Ministral3Config) -> dict[str, ExpectedTensor]:
    """Canonical name (without a prefix) -> shape of every tensor the model needs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.n_layers):
        shapes |= {
            f"layers.{layer}.self_attn.q_proj.weight": (q_width, hidden),
            f"layers.{layer}.self_attn.k_proj.weight": (kv_width, hidden),
            f"layers.{layer}.self_attn.v_proj.weight": (kv_width, hidden),
            f"layers.{layer}.self_attn.o_proj.weight": (hidden, q_width),
            f"layers.{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"layers.{layer}.mlp.up_proj.weight": (inner, hidden),
            f"layers.{layer}.mlp.down_proj.weight": (hidden, inner),
            f"layers.{layer}.input_layernorm.weight": (hidden,),
            f"layers.{layer}.post_attention_layernorm.weight": (hidden,),
        }
    return {name: ExpectedTensor(shape) for name, shape in shapes.items()}


def ignore_rules(config: Ministral3Config) -> list[IgnoreRule]:
    """Tensors that a checkpoint may carry and the model does not use, each with the reason."""
    rules = [
        IgnoreRule(
            r"(model\.)?(vision_tower|multi_modal_projector|vision_encoder)\..*",
            "the vision tower: images are not supported yet",
        )
    ]
    if config.tie_word_embeddings:
        rules.append(IgnoreRule(r".*lm_head\.weight", "the head is tied to the embedding"))
    return rules


def memory_layers(config: Ministral3Config) -> list[KVLayer]:
    """What each layer asks of the memory, in layer order."""
    return [
        KVLayer(GROUP, config.n_kv_heads, config.head_dim, None, layer)
        for layer in range(config.n_layers)
    ]


def describe(config: Ministral3Config) -> dict[str, str | int | float]:
    """A text model's shape in the terms of its config."""
    rope = config.rope
    return {
        "layers": config.n_layers,
        "hidden size": config.hidden_size,
        "MLP": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "type": config.dtype,
        "heads": f"{config.n_heads} query, {config.n_kv_heads} key/value of {config.head_dim}",
        "positions": f"yarn, {rope.factor:g} times {rope.original_max_position_embeddings}",
    }


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer, packed; q, k, v and gate, up are stacked: x is read once."""

    qkv: Weight
    out: Weight
    gate_up: Weight
    down: Weight
    before_attention: Tensor
    before_mlp: Tensor


class Ministral3:
    """A Ministral 3 text model over given weights and operations."""

    def __init__(
        self,
        config: Ministral3Config,
        weights: Mapping[str, Any],
        ops: Ops,
        n_positions: int | None = None,
    ) -> None:
        """`weights`: canonical name -> tensor or, for compiled kernels, `StoredWeight`.

        `n_positions` is the longest sequence that will be run; None is the config's.
        """
        self.config = config
        self.ops = ops
        self.layers = [self._layer(weights, f"layers.{i}.") for i in range(config.n_layers)]
        self.embedding = ops.pack(weights["embed_tokens.weight"], "embedding")
        self.head = self.embedding
        if not config.tie_word_embeddings:
            self.head = ops.pack(weights["lm_head.weight"], "embedding")
        self.norm = at_least_fp32(weights["norm.weight"])
        cos, sin = rotary_table(
            n_positions or config.max_position_embeddings,
            yarn_frequencies(config.head_dim, config.rope),
        )
        cos, sin = cos * config.rope.attention_factor, sin * config.rope.attention_factor
        scale_P1 = query_scale(torch.arange(cos.shape[0]), config)[:, None]
        self.key_table = cos.to(ops.device), sin.to(ops.device)
        scaled = cos * scale_P1, sin * scale_P1
        self.query_table = scaled[0].to(ops.device), scaled[1].to(ops.device)

    def _layer(self, weights: Mapping[str, Any], prefix: str) -> _Layer:
        def matrix(*names: str) -> Weight:
            return self.ops.pack(stack([weights[f"{prefix}{name}.weight"] for name in names]))

        return _Layer(
            qkv=matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out=matrix("self_attn.o_proj"),
            gate_up=matrix("mlp.gate_proj", "mlp.up_proj"),
            down=matrix("mlp.down_proj"),
            before_attention=at_least_fp32(weights[prefix + "input_layernorm.weight"]),
            before_mlp=at_least_fp32(weights[prefix + "post_attention_layernorm.weight"]),
        )

    def embed(self, token_T: Tensor) -> Tensor:
        """Input embeddings [T, K]."""
        return self.ops.embed(self.embedding, token_T, 1.0)

    def forward(self, token_T: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, K].

        Args:
            token_T: int32 token ids.
            position_T: int32 positions, from 0.
            attend: stores keys and values and attends, for each layer in turn.
        """
        config, ops, eps = self.config, self.ops, self.config.rms_norm_eps
        keys = Rotary(*self.key_table, position_T)
        queries = Rotary(*self.query_table, position_T)
        n_q, n_kv = config.n_heads, config.n_kv_heads
        x = self.embed(token_T)
        for index, layer in enumerate(self.layers):
            normed = ops.rms_norm(x, layer.before_attention, eps)
            heads = ops.linear(normed, layer.qkv).view(x.shape[0], -1, config.head_dim)
            q = Heads(heads[:, :n_q], None, queries, None)
            k = Heads(heads[:, n_q : n_q + n_kv], None, keys, None)
            v = Heads(heads[:, n_q + n_kv :], None, None, None)
            mixed = attend(index, q, k, v).reshape(x.shape[0], -1)
            x = ops.add(ops.linear(mixed, layer.out), x)
            normed, width = ops.rms_norm(x, layer.before_mlp, eps), config.intermediate_size
            gated = gated_linear(ops, normed, layer.gate_up, width, "silu")
            x = ops.add(ops.linear(gated, layer.down), x)
        return ops.rms_norm(x, self.norm, eps)

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """fp32 logits [R, V] of final hidden states."""
        return self.ops.linear(hidden_RK, self.head, torch.float32)


def query_scale(position_P: Tensor, config: Ministral3Config) -> Tensor:
    """D^-1/2 (1 + beta ln(1 + floor(position / original context))), fp32 [P]."""
    rope = config.rope
    far_P = torch.floor(position_P.float() / rope.original_max_position_embeddings)
    grown_P = 1 + rope.llama_4_scaling_beta * torch.log1p(far_P)
    scale_P: Tensor = grown_P * config.head_dim**-0.5
    return scale_P
