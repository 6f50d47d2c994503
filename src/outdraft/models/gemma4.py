"""The Gemma 4 text model in every published shape: dense, mixture of experts, E2B/E4B.

Here: which tensors it has, what memory its layers need, and its arithmetic, from the published
checkpoints' layout and transformers `models/gemma4`. Not here: reading files (weights/), keeping
keys and values (cache/), vision and audio.

Shapes: T rows, K hidden size, H query heads, G key/value heads, D head dimension, V vocabulary,
L layers, P per-layer embedding size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.cache.memory import KVLayer
from outdraft.models.gemma4_config import Gemma4Config, LayerKind
from outdraft.models.layers import Attend, inverse_frequencies, rotary_table
from outdraft.ops.base import Ops
from outdraft.weights.load import ExpectedTensor, IgnoreRule

PREFIXES = ("model.language_model.", "language_model.model.", "model.")

TOWERS = (
    (r"(model\.)?(vision_tower|embed_vision|multi_modal_projector|vision_embedder)\..*",
     "the vision tower: images are not supported yet"),
    (r"(model\.)?(audio_tower|embed_audio|audio_embedder)\..*",
     "the audio tower: audio is not supported yet"),
)  # fmt: skip


def expected_tensors(config: Gemma4Config) -> dict[str, ExpectedTensor]:
    """Canonical name (without a prefix) -> shape of every tensor the model needs."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    if config.ple_size:
        width = config.n_layers * config.ple_size
        shapes["embed_tokens_per_layer.weight"] = (config.ple_vocab_size, width)
        shapes["per_layer_model_projection.weight"] = (width, hidden)
        shapes["per_layer_projection_norm.weight"] = (config.ple_size,)
    for layer in range(config.n_layers):
        for name, shape in layer_shapes(config, layer).items():
            shapes[f"layers.{layer}.{name}"] = shape
    return {name: ExpectedTensor(shape) for name, shape in shapes.items()}


def layer_shapes(config: Gemma4Config, layer: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one layer's tensors, the names without `layers.N.`."""
    hidden, inner, heads = config.hidden_size, config.mlp_size(layer), config.attention[layer]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads.n_heads * heads.head_dim, hidden),
        "self_attn.q_norm.weight": (heads.head_dim,),
        "self_attn.o_proj.weight": (hidden, heads.n_heads * heads.head_dim),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
        "layer_scalar": (1,),
    }
    if config.kv_source(layer) == layer:
        kv_width = heads.n_kv_heads * heads.head_dim
        shapes["self_attn.k_proj.weight"] = (kv_width, hidden)
        shapes["self_attn.k_norm.weight"] = (heads.head_dim,)
        if not heads.k_eq_v:
            shapes["self_attn.v_proj.weight"] = (kv_width, hidden)
    if config.ple_size:
        shapes["per_layer_input_gate.weight"] = (config.ple_size, hidden)
        shapes["per_layer_projection.weight"] = (hidden, config.ple_size)
        shapes["post_per_layer_input_norm.weight"] = (hidden,)
    if (moe := config.moe) is not None:
        shapes |= {
            "router.proj.weight": (moe.n_experts, hidden),
            "router.scale": (hidden,),
            "router.per_expert_scale": (moe.n_experts,),
            "experts.gate_up_proj": (moe.n_experts, 2 * moe.intermediate_size, hidden),
            "experts.down_proj": (moe.n_experts, hidden, moe.intermediate_size),
            "post_feedforward_layernorm_1.weight": (hidden,),
            "post_feedforward_layernorm_2.weight": (hidden,),
            "pre_feedforward_layernorm_2.weight": (hidden,),
        }
    return shapes


def ignore_rules(config: Gemma4Config) -> list[IgnoreRule]:
    """Tensors that a checkpoint may carry and the model does not use, each with the reason."""
    rules = [IgnoreRule(pattern, reason) for pattern, reason in TOWERS]
    if config.tie_word_embeddings:
        rules.append(IgnoreRule(r".*lm_head\.weight", "the head is tied to the embedding"))
    shared = "|".join(
        str(layer) for layer in range(config.n_layers) if config.kv_source(layer) != layer
    )
    if shared:  # the plain E2B/E4B checkpoints carry them, the QAT ones do not
        rules.append(
            IgnoreRule(
                rf".*layers\.({shared})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight(_scale)?",
                "this layer reads another layer's keys and values",
            )
        )
    return rules


def memory_layers(config: Gemma4Config) -> list[KVLayer]:
    """What each layer asks of the memory, in layer order."""
    return [
        KVLayer(
            group=kind,
            n_kv_heads=config.attention[layer].n_kv_heads,
            head_dim=config.attention[layer].head_dim,
            window=config.sliding_window if kind == "sliding_attention" else None,
            source=config.kv_source(layer),
        )
        for layer, kind in enumerate(config.layer_types)
    ]


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights; q, k, v and gate, up are stacked so that x is read once."""

    tensors: Mapping[str, Tensor]
    qkv: Tensor
    gate_up: Tensor

    @classmethod
    def build(cls, weights: dict[str, Tensor], prefix: str) -> "Layer":
        """Take this layer's tensors out of `weights`."""
        own = {
            name.removeprefix(prefix): weights.pop(name)
            for name in list(weights)
            if name.startswith(prefix)
        }
        stacks = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        qkv = [own.pop(f"{name}.weight") for name in stacks if f"{name}.weight" in own]
        gate_up = [own.pop(f"mlp.{name}_proj.weight") for name in ("gate", "up")]
        return cls(own, torch.cat(qkv), torch.cat(gate_up))


class Gemma4:
    """A Gemma 4 text model over given weights and operations."""

    def __init__(self, config: Gemma4Config, weights: Mapping[str, Tensor], ops: Ops) -> None:
        """`weights`: canonical name -> tensor, as `expected_tensors` lists them."""
        self.config = config
        self.ops = ops
        # Norm weights multiply in fp32: converted once instead of in every call.
        rest = {n: w.float() if n.endswith("norm.weight") else w for n, w in weights.items()}
        self.layers = [Layer.build(rest, f"layers.{i}.") for i in range(config.n_layers)]
        self.embedding = rest["embed_tokens.weight"]
        self.head = rest.get("lm_head.weight", self.embedding)
        self.rest = rest
        dtype = self.embedding.dtype
        # The published models round the scale to the weights' type.
        self.embed_scale = torch.tensor(config.hidden_size**0.5).to(dtype)
        self.ple_scale = torch.tensor(config.ple_size**0.5).to(dtype)
        self.inverse: dict[LayerKind, Tensor] = {
            kind: inverse_frequencies(
                config.attention[config.layer_types.index(kind)].head_dim,
                config.rope[kind].theta,
                config.rope[kind].partial_rotary_factor,
            )
            for kind in dict.fromkeys(config.layer_types)
        }

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Scaled input embeddings [T, K] (an assistant reads these too)."""
        return self.embedding[tokens_T] * self.embed_scale

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, K].

        Args:
            tokens_T: int64 token ids.
            positions_T: int64 positions, from 0.
            attend: stores keys and values and attends, for each layer in turn.
        """
        x = self.embed(tokens_T)
        ple_TLP = self._per_layer_inputs(tokens_T, x) if self.config.ple_size else None
        return self.layers_forward(x, positions_T, attend, ple_TLP)

    def layers_forward(
        self, x: Tensor, positions_T: Tensor, attend: Attend, ple_TLP: Tensor | None = None
    ) -> Tensor:
        """All layers and the final norm over inputs x [T, K]; see `forward`."""
        tables = {kind: rotary_table(positions_T, inv) for kind, inv in self.inverse.items()}
        for index, layer in enumerate(self.layers):
            cos, sin = tables[self.config.layer_types[index]]
            x = x + self._attention(index, layer, x, cos, sin, attend)
            x = x + self._feedforward(layer, x)
            if ple_TLP is not None:
                x = x + self._per_layer_update(layer, x, ple_TLP[:, index])
            x = x * layer.tensors["layer_scalar"]
        return self.ops.rms_norm(x, self.rest["norm.weight"], self.config.rms_norm_eps)

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """fp32 logits [R, V] of final hidden states, soft-capped as the config says."""
        logits = self.ops.linear(hidden_RK, self.head).float()
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _norm(self, layer: Layer, name: str, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, layer.tensors[f"{name}.weight"], self.config.rms_norm_eps)

    def _attention(
        self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        shape, eps = self.config.attention[index], self.config.rms_norm_eps
        n_rows, dim = x.shape[0], shape.head_dim
        qkv = self.ops.linear(self._norm(layer, "input_layernorm", x), layer.qkv)
        heads = qkv.view(n_rows, -1, dim)
        q = self.ops.norm_rope(
            heads[:, : shape.n_heads], layer.tensors["self_attn.q_norm.weight"], cos, sin, eps
        )
        k = v = None
        if self.config.kv_source(index) == index:
            raw_k = heads[:, shape.n_heads : shape.n_heads + shape.n_kv_heads]
            raw_v = raw_k if shape.k_eq_v else heads[:, -shape.n_kv_heads :]
            k = self.ops.norm_rope(raw_k, layer.tensors["self_attn.k_norm.weight"], cos, sin, eps)
            v = self.ops.norm_rope(raw_v, None, None, None, eps)
        mixed = attend(index, q, k, v).reshape(n_rows, -1)
        out = self.ops.linear(mixed, layer.tensors["self_attn.o_proj.weight"])
        return self._norm(layer, "post_attention_layernorm", out)

    def _feedforward(self, layer: Layer, x: Tensor) -> Tensor:
        inner = self.ops.linear(self._norm(layer, "pre_feedforward_layernorm", x), layer.gate_up)
        y = self.ops.linear(self.ops.gated_gelu(inner), layer.tensors["mlp.down_proj.weight"])
        if self.config.moe is not None:
            y = self._norm(layer, "post_feedforward_layernorm_1", y)
            y = y + self._norm(layer, "post_feedforward_layernorm_2", self._experts(layer, x))
        return self._norm(layer, "post_feedforward_layernorm", y)

    def _experts(self, layer: Layer, x: Tensor) -> Tensor:
        """Routed experts; the router reads the residual stream through its own norm."""
        moe, eps = self.config.moe, self.config.rms_norm_eps
        assert moe is not None
        own = layer.tensors
        routed = self.ops.rms_norm(x, None, eps) * own["router.scale"] * x.shape[-1] ** -0.5
        scores = self.ops.linear(routed, own["router.proj.weight"])
        best, ids = torch.softmax(scores.float(), dim=-1).topk(moe.top_k, dim=-1)
        weights = best / best.sum(dim=-1, keepdim=True) * own["router.per_expert_scale"][ids]
        return self.ops.experts(
            self._norm(layer, "pre_feedforward_layernorm_2", x),
            own["experts.gate_up_proj"],
            own["experts.down_proj"],
            ids,
            weights,
        )

    def _per_layer_inputs(self, tokens_T: Tensor, x: Tensor) -> Tensor:
        """Per-layer embeddings [T, L, P]: a table by token plus a projection of the embedding."""
        shape = (x.shape[0], self.config.n_layers, self.config.ple_size)
        table = (self.rest["embed_tokens_per_layer.weight"][tokens_T] * self.ple_scale).view(shape)
        projected = self.ops.linear(x, self.rest["per_layer_model_projection.weight"])
        projected = (projected * self.config.hidden_size**-0.5).view(shape)
        norm = self.rest["per_layer_projection_norm.weight"]
        return (self.ops.rms_norm(projected, norm, self.config.rms_norm_eps) + table) * 2**-0.5

    def _per_layer_update(self, layer: Layer, x: Tensor, ple_TP: Tensor) -> Tensor:
        gate = self.ops.linear(x, layer.tensors["per_layer_input_gate.weight"])
        gated = self.ops.gelu(gate) * ple_TP
        out = self.ops.linear(gated, layer.tensors["per_layer_projection.weight"])
        return self._norm(layer, "post_per_layer_input_norm", out)
