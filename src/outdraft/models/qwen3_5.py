"""Qwen 3.5 and 3.6: three layers of a gated delta rule to one of gated full attention, dense or
with experts.

From the published checkpoints' layout and transformers `models/qwen3_5` and `models/qwen3_5_moe`.
Norm weights are stored as w and applied as 1 + w. Rotary positions turn the first dimensions of a
head, pair (i, i + half of them); the kernels turn (i, i + D/2), so dimensions of queries and keys
are put into that order when they are loaded, which no score sees. Vision is left out.

Shapes: T rows, K hidden size, H query heads, G key/value heads, D head dimension, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outdraft.cache.memory import KVLayer, LayerMemory
from outdraft.cache.recurrent import RecurrentLayer
from outdraft.models.layers import Attend, Recurs, at_least_fp32, gated_linear, rotary_table
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.base import Heads, Ops, Rotary
from outdraft.ops.recurrent_base import DeltaGates, DeltaNet
from outdraft.ops.stored import StoredWeight, reorder, stack
from outdraft.weights.load import ExpectedTensor, IgnoreRule

PREFIXES = ("model.language_model.", "language_model.model.", "model.")
GROUP = "full_attention"


def expected_tensors(config: Qwen35Config) -> dict[str, ExpectedTensor]:
    """Canonical name (without a prefix) -> shape of every tensor the model needs."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer, kind in enumerate(config.layer_types):
        own = delta_shapes(config) if kind == "linear_attention" else attention_shapes(config)
        for name, shape in (own | mlp_shapes(config)).items():
            shapes[f"layers.{layer}.{name}"] = shape
    return {name: ExpectedTensor(shape) for name, shape in shapes.items()}


def attention_shapes(config: Qwen35Config) -> dict[str, tuple[int, ...]]:
    """Of a layer with full attention, and of its first norm."""
    hidden, dim = config.hidden_size, config.head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (2 * config.n_heads * dim, hidden),  # queries and gates
        "self_attn.k_proj.weight": (config.n_kv_heads * dim, hidden),
        "self_attn.v_proj.weight": (config.n_kv_heads * dim, hidden),
        "self_attn.o_proj.weight": (hidden, config.n_heads * dim),
        "self_attn.q_norm.weight": (dim,),
        "self_attn.k_norm.weight": (dim,),
    }


def delta_shapes(config: Qwen35Config) -> dict[str, tuple[int, ...]]:
    """Of a layer with a gated delta rule, and of its first norm."""
    hidden, delta = config.hidden_size, config.delta
    values = delta.n_v_heads * delta.v_dim
    return {
        "input_layernorm.weight": (hidden,),
        "linear_attn.in_proj_qkv.weight": (delta.channels, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_a.weight": (delta.n_v_heads, hidden),
        "linear_attn.in_proj_b.weight": (delta.n_v_heads, hidden),
        "linear_attn.conv1d.weight": (delta.channels, 1, delta.conv_width),
        "linear_attn.A_log": (delta.n_v_heads,),
        "linear_attn.dt_bias": (delta.n_v_heads,),
        "linear_attn.norm.weight": (delta.v_dim,),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def mlp_shapes(config: Qwen35Config) -> dict[str, tuple[int, ...]]:
    """Of the second half of a layer, and of its norm."""
    hidden, moe = config.hidden_size, config.moe
    shapes: dict[str, tuple[int, ...]] = {"post_attention_layernorm.weight": (hidden,)}
    if moe is None:
        inner, prefix = config.intermediate_size, "mlp."
    else:
        inner, prefix = moe.shared_size, "mlp.shared_expert."
        shapes |= {
            "mlp.gate.weight": (moe.n_experts, hidden),
            "mlp.experts.gate_up_proj": (moe.n_experts, 2 * moe.intermediate_size, hidden),
            "mlp.experts.down_proj": (moe.n_experts, hidden, moe.intermediate_size),
            "mlp.shared_expert_gate.weight": (1, hidden),
        }
    return shapes | {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


def ignore_rules(config: Qwen35Config) -> list[IgnoreRule]:
    """Tensors that a checkpoint may carry and the model does not use, each with the reason."""
    rules = [
        IgnoreRule(r"(model\.)?visual\..*", "the vision tower: images are not supported yet"),
        IgnoreRule(
            r"(model\.)?(language_model\.)?mtp\..*", "the MTP head, which the drafter reads"
        ),
    ]
    if config.tie_word_embeddings:
        rules.append(IgnoreRule(r".*lm_head\.weight", "the head is tied to the embedding"))
    return rules


def memory_layers(config: Qwen35Config) -> list[LayerMemory]:
    """What each layer asks of the memory, in layer order."""
    delta = config.delta
    state = RecurrentLayer(
        delta.n_v_heads, delta.k_dim, delta.v_dim, delta.channels, delta.conv_width
    )
    return [
        state
        if kind == "linear_attention"
        else KVLayer(GROUP, config.n_kv_heads, config.head_dim, None, layer)
        for layer, kind in enumerate(config.layer_types)
    ]


def turning_order(head_dim: int, rotary_dim: int) -> Tensor:
    """Dimensions of a head in the order in which (i, i + D/2) are the pairs that turn together."""
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    first = [*range(half), *range(rotary_dim, rotary_dim + rest)]
    return torch.tensor([*first, *range(half, rotary_dim), *range(rotary_dim + rest, head_dim)])


def rotary_tables(
    config: Qwen35Config, n_positions: int, device: torch.device | None = None
) -> tuple[tuple[Tensor, Tensor], ...]:
    """(cos, sin) for queries, times D^-1/2, and for keys; dimensions behind the part stay still."""
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    still = torch.zeros((config.head_dim - config.rotary_dim) // 2)
    cos, sin = rotary_table(
        n_positions, torch.cat((1.0 / config.rope_theta**exponent, still)), device
    )
    scale = config.head_dim**-0.5
    return (cos * scale, sin * scale), (cos, sin)


class Attention:
    """Gated full attention of one layer: norm, queries with gates, keys, values, output."""

    def __init__(
        self, config: Qwen35Config, weights: Mapping[str, Any], prefix: str, ops: Ops
    ) -> None:
        self.config, self.ops = config, ops
        dim, order = config.head_dim, turning_order(config.head_dim, config.rotary_dim)
        heads = torch.arange(config.n_heads)[:, None] * 2 * dim
        queries, gates = (heads + order).flatten(), (heads + dim + torch.arange(dim)).flatten()
        keys = (torch.arange(config.n_kv_heads)[:, None] * dim + order).flatten()
        q, k = weights[prefix + "q_proj.weight"], weights[prefix + "k_proj.weight"]
        parts = [reorder(q, torch.cat((queries, gates))), reorder(k, keys)]
        self.qgkv = ops.pack(stack([*parts, weights[prefix + "v_proj.weight"]]))
        self.out = ops.pack(weights[prefix + "o_proj.weight"])
        self.q_norm = one_plus(weights[prefix + "q_norm.weight"][order])
        self.k_norm = one_plus(weights[prefix + "k_norm.weight"][order])

    def __call__(
        self, index: int, normed: Tensor, queries: Rotary, keys: Rotary, attend: Attend
    ) -> Tensor:
        """What the layer adds to the residual, [T, K]; `index` is the layer for `attend`."""
        config, eps = self.config, self.config.rms_norm_eps
        n, n_rows = config.n_heads, normed.shape[0]
        heads = self.ops.linear(normed, self.qgkv).view(n_rows, -1, config.head_dim)
        q = Heads(heads[:, :n], self.q_norm, queries, eps)
        k = Heads(heads[:, 2 * n : 2 * n + config.n_kv_heads], self.k_norm, keys, eps)
        v = Heads(heads[:, 2 * n + config.n_kv_heads :], None, None, None)
        mixed = attend(index, q, k, v).reshape(n_rows, -1)
        gate = heads[:, n : 2 * n].reshape(n_rows, -1)
        return self.ops.linear(self.ops.gated(gate, mixed, "sigmoid"), self.out)


class Delta:
    """The gated delta rule of one layer: projections, recurrence, gated norm, output."""

    def __init__(
        self, config: Qwen35Config, weights: Mapping[str, Any], prefix: str, ops: Ops
    ) -> None:
        self.config, self.ops = config, ops
        self.qkvz = ops.pack(
            stack([weights[f"{prefix}in_proj_{name}.weight"] for name in ("qkv", "z")])
        )
        gates = stack([weights[f"{prefix}in_proj_{name}.weight"] for name in ("a", "b")])
        self.ab = ops.pack(gates, "router")
        self.out = ops.pack(weights[prefix + "out_proj.weight"])
        self.norm = at_least_fp32(weights[prefix + "norm.weight"])
        conv = weights[prefix + "conv1d.weight"]
        conv = conv.floats() if isinstance(conv, StoredWeight) else conv
        self.net = DeltaNet(
            at_least_fp32(conv[:, 0].t()).contiguous().to(ops.device),
            DeltaGates(
                -at_least_fp32(weights[prefix + "A_log"]).exp(),
                at_least_fp32(weights[prefix + "dt_bias"]),
            ),
            config.delta.n_k_heads,
        )

    def __call__(self, index: int, normed: Tensor, attend: Recurs) -> Tensor:
        """What the layer adds to the residual, [T, K]; `index` is the layer for `attend`."""
        delta, n_rows = self.config.delta, normed.shape[0]
        both = self.ops.linear(normed, self.qkvz)
        ab = self.ops.linear(normed, self.ab, torch.float32)
        n = delta.n_v_heads
        out_THV = attend.recur(index, both[:, : delta.channels], ab[:, :n], ab[:, n:], self.net)
        z_THV = both[:, delta.channels :].reshape(n_rows, n, delta.v_dim)
        normed_THV = self.ops.gated_norm(out_THV, z_THV, self.norm, self.config.rms_norm_eps)
        return self.ops.linear(normed_THV.reshape(n_rows, -1).to(normed.dtype), self.out)


class Mlp:
    """Gated MLP, or experts with one that all tokens pass."""

    def __init__(
        self, config: Qwen35Config, weights: Mapping[str, Any], prefix: str, ops: Ops
    ) -> None:
        self.config, self.ops, moe = config, ops, config.moe
        dense = prefix if moe is None else prefix + "shared_expert."
        self.inner = config.intermediate_size if moe is None else moe.shared_size
        both = [weights[f"{dense}{name}_proj.weight"] for name in ("gate", "up")]
        self.gate_up = ops.pack(stack(both))
        self.down = ops.pack(weights[dense + "down_proj.weight"])
        if moe is not None:
            self.router = ops.pack(weights[prefix + "gate.weight"], "router")
            self.experts_in = ops.pack(weights[prefix + "experts.gate_up_proj"])
            self.experts_out = ops.pack(weights[prefix + "experts.down_proj"])
            self.shared_gate = ops.pack(weights[prefix + "shared_expert_gate.weight"], "router")

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] of normed rows."""
        ops, moe = self.ops, self.config.moe
        dense = ops.linear(gated_linear(ops, x, self.gate_up, self.inner, "silu"), self.down)
        if moe is None:
            return dense
        ids_TA, weights_TA = ops.route(ops.linear(x, self.router, torch.float32), moe.top_k, None)
        routed = ops.experts(x, self.experts_in, self.experts_out, ids_TA, weights_TA, "silu")
        gate_T1 = ops.linear(x, self.shared_gate, torch.float32)
        return ops.add(routed, ops.gate_rows(dense, gate_T1))


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: norm, mixer, norm, MLP."""

    before: Tensor
    mixer: Attention | Delta
    between: Tensor
    mlp: Mlp

    @classmethod
    def build(
        cls, config: Qwen35Config, weights: Mapping[str, Any], prefix: str, ops: Ops, *, full: bool
    ) -> "Layer":
        """Read a layer's tensors and pack them."""
        mixer: Attention | Delta
        if full:
            mixer = Attention(config, weights, prefix + "self_attn.", ops)
        else:
            mixer = Delta(config, weights, prefix + "linear_attn.", ops)
        return cls(
            one_plus(weights[prefix + "input_layernorm.weight"]),
            mixer,
            one_plus(weights[prefix + "post_attention_layernorm.weight"]),
            Mlp(config, weights, prefix + "mlp.", ops),
        )

    def forward(
        self, index: int, x: Tensor, queries: Rotary, keys: Rotary, attend: Attend, eps: float
    ) -> Tensor:
        """The residual stream behind the layer."""
        ops = self.mixer.ops
        normed = ops.rms_norm(x, self.before, eps)
        if isinstance(self.mixer, Attention):
            mixed = self.mixer(index, normed, queries, keys, attend)
        else:
            assert isinstance(attend, Recurs), "recurrent layers need a memory for their states"
            mixed = self.mixer(index, normed, attend)
        x = ops.add(mixed, x)
        return ops.add(self.mlp(ops.rms_norm(x, self.between, eps)), x)


class Qwen35:
    """A Qwen 3.5 text model over given weights and operations."""

    def __init__(
        self,
        config: Qwen35Config,
        weights: Mapping[str, Any],
        ops: Ops,
        n_positions: int | None = None,
    ) -> None:
        """As `Gemma4`."""
        self.config, self.ops = config, ops
        self.layers = [
            Layer.build(config, weights, f"layers.{i}.", ops, full=kind == "full_attention")
            for i, kind in enumerate(config.layer_types)
        ]
        self.embedding = ops.pack(weights["embed_tokens.weight"], "embedding")
        self.head = self.embedding
        if not config.tie_word_embeddings:
            self.head = ops.pack(weights["lm_head.weight"], "embedding")
        self.norm = one_plus(weights["norm.weight"])
        n_positions = n_positions or config.max_position_embeddings
        self.query_table, self.key_table = rotary_tables(config, n_positions, ops.device)

    def embed(self, token_T: Tensor) -> Tensor:
        """Input embeddings [T, K]."""
        return self.ops.embed(self.embedding, token_T, 1.0)

    def forward(self, token_T: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, K]. See `TargetModel`."""
        queries, keys = Rotary(*self.query_table, position_T), Rotary(*self.key_table, position_T)
        x, eps = self.embed(token_T), self.config.rms_norm_eps
        for index, layer in enumerate(self.layers):
            x = layer.forward(index, x, queries, keys, attend, eps)
        return self.ops.rms_norm(x, self.norm, eps)

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """fp32 logits [R, V] of final hidden states."""
        return self.ops.linear(hidden_RK, self.head, torch.float32)


def one_plus(weight: Tensor) -> Tensor:
    """What a norm multiplies by."""
    return 1 + at_least_fp32(weight)
