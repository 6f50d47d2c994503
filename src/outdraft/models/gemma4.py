"""The Gemma 4 text model in every published shape: dense, mixture of experts, E2B/E4B.

Here: which tensors it has, what memory its layers need, and its arithmetic, from the published
checkpoints' layout and transformers `models/gemma4`. Not here: reading files (weights/), keeping
keys and values (cache/), vision and audio.

Shapes: T rows, K hidden size, H query heads, G key/value heads, D head dimension, V vocabulary,
L layers, P per-layer embedding size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outdraft.cache.memory import KVLayer
from outdraft.models.gemma4_config import Gemma4Config, LayerKind
from outdraft.models.layers import (
    Attend,
    at_least_fp32,
    gated_linear,
    inverse_frequencies,
    rotary_table,
)
from outdraft.ops.base import Fuses, Heads, Ops, Rotary, Weight
from outdraft.ops.stored import StoredWeight, stack
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
    """One decoder layer's weights, packed; q, k, v and gate, up are stacked: x is read once.

    `norms` holds the one-dimensional weights in fp32 and `matrices` the rest, by their name without
    `layers.N.` and `.weight`. `scalar` multiplies the layer's output.
    """

    norms: Mapping[str, Tensor]
    matrices: Mapping[str, Weight]
    scalar: float
    inner: int

    @classmethod
    def build(cls, weights: Mapping[str, Tensor | StoredWeight], prefix: str, ops: Ops) -> "Layer":
        """Read this layer's tensors and pack them."""
        own: dict[str, Any] = {
            name.removeprefix(prefix).removesuffix(".weight"): weights[name]
            for name in weights
            if name.startswith(prefix)
        }
        scalar = float(own.pop("layer_scalar").detach())
        stacks = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        qkv = [own.pop(name) for name in stacks if name in own]
        gate_up = [own.pop("mlp.gate_proj"), own.pop("mlp.up_proj")]
        matrices = {
            "qkv": ops.pack(stack(qkv)),
            "gate_up": ops.pack(stack(gate_up)),
        }
        norms = {}
        for name, tensor in own.items():
            if tensor.ndim == 1:
                norms[name] = at_least_fp32(tensor)
            else:
                matrices[name] = ops.pack(tensor, "router" if "router" in name else "linear")
        if "router.scale" in norms and isinstance(ops, Fuses):
            norms["router.gain"] = norms["router.scale"] * norms["router.scale"].shape[0] ** -0.5
        return cls(norms, matrices, scalar, gate_up[0].shape[0])


class Gemma4:
    """A Gemma 4 text model over given weights and operations."""

    def __init__(
        self,
        config: Gemma4Config,
        weights: Mapping[str, Any],
        ops: Ops,
        n_positions: int | None = None,
    ) -> None:
        """`weights`: canonical name -> tensor or, for compiled kernels, `StoredWeight`.

        Names are as `expected_tensors` lists them; each is asked for once, when it is packed.

        `n_positions` is the longest sequence that will be run; None is the config's.
        """
        self.config = config
        self.ops = ops
        self.layers = [Layer.build(weights, f"layers.{i}.", ops) for i in range(config.n_layers)]
        embedding = weights["embed_tokens.weight"]
        # The published models round the scale to the weights' type.
        self.embed_scale = float(torch.tensor(config.hidden_size**0.5).to(embedding.dtype))
        self.ple_scale = float(torch.tensor(config.ple_size**0.5).to(embedding.dtype))
        self.embedding = ops.pack(embedding, "embedding")
        self.head = self.embedding
        if not config.tie_word_embeddings:
            self.head = ops.pack(weights["lm_head.weight"], "embedding")
        if config.ple_size:
            self.ple_table = ops.pack(weights["embed_tokens_per_layer.weight"], "embedding")
            self.ple_projection = ops.pack(weights["per_layer_model_projection.weight"])
            self.ple_norm = at_least_fp32(weights["per_layer_projection_norm.weight"])
        self.norm = at_least_fp32(weights["norm.weight"])
        n_positions = n_positions or config.max_position_embeddings
        self.rotary: dict[LayerKind, tuple[Tensor, Tensor]] = {
            kind: rotary_table(
                n_positions,
                inverse_frequencies(
                    config.attention[config.layer_types.index(kind)].head_dim,
                    config.rope[kind].theta,
                    config.rope[kind].partial_rotary_factor,
                ),
                ops.device,
            )
            for kind in dict.fromkeys(config.layer_types)
        }

    def embed(self, token_T: Tensor) -> Tensor:
        """Scaled input embeddings [T, K] (an assistant reads these too)."""
        return self.ops.embed(self.embedding, token_T, self.embed_scale)

    def forward(self, token_T: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, K].

        Args:
            token_T: int32 token ids.
            position_T: int32 positions, from 0.
            attend: stores keys and values and attends, for each layer in turn.
        """
        x = self.embed(token_T)
        ple_TL = self._per_layer_inputs(token_T, x) if self.config.ple_size else None
        return self.layers_forward(x, position_T, attend, ple_TL)

    def layers_forward(
        self, x: Tensor, position_T: Tensor, attend: Attend, ple_TL: Tensor | None = None
    ) -> Tensor:
        """All layers and the final norm over inputs x [T, K]; see `forward`."""
        eps = self.config.rms_norm_eps
        rotary = {kind: Rotary(*table, position_T) for kind, table in self.rotary.items()}
        normed = self.ops.rms_norm(x, self.layers[0].norms["input_layernorm"], eps)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            next_norm = self.norm if last else self.layers[index + 1].norms["input_layernorm"]
            mixed = self._attention(
                index, layer, normed, rotary[self.config.layer_types[index]], attend
            )
            if self.config.moe is not None and isinstance(self.ops, Fuses):
                x, normed = self._mixture(self.ops, layer, mixed, x, next_norm)
                continue
            x, normed = self.ops.add_norm(
                mixed,
                x,
                layer.norms["post_attention_layernorm"],
                eps,
                next_weight=layer.norms["pre_feedforward_layernorm"],
            )
            y = self._feedforward(layer, x, normed)
            after = layer.norms["post_feedforward_layernorm"]
            if ple_TL is not None:
                x, _ = self.ops.add_norm(y, x, after, eps)
                y = self._per_layer_update(index, layer, x, ple_TL)
                after = layer.norms["post_per_layer_input_norm"]
            x, normed = self.ops.add_norm(
                y, x, after, eps, scale=layer.scalar, next_weight=next_norm
            )
        return normed

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """fp32 logits [R, V] of final hidden states, soft-capped as the config says."""
        logits_RV = self.ops.linear(hidden_RK, self.head, torch.float32)
        cap = self.config.final_logit_softcapping
        return logits_RV if cap is None else self.ops.softcap(logits_RV, cap)

    def _attention(
        self, index: int, layer: Layer, normed: Tensor, rotary: Rotary, attend: Attend
    ) -> Tensor:
        shape, eps = self.config.attention[index], self.config.rms_norm_eps
        n_rows = normed.shape[0]
        heads = self.ops.linear(normed, layer.matrices["qkv"]).view(n_rows, -1, shape.head_dim)
        q_norm = layer.norms["self_attn.q_norm"]
        q = Heads(heads[:, : shape.n_heads], q_norm, rotary, eps)
        k = v = None
        if self.config.kv_source(index) == index:
            raw_k = heads[:, shape.n_heads : shape.n_heads + shape.n_kv_heads]
            raw_v = raw_k if shape.k_eq_v else heads[:, -shape.n_kv_heads :]
            k = Heads(raw_k, layer.norms["self_attn.k_norm"], rotary, eps)
            v = Heads(raw_v, None, None, eps)
        mixed = attend(index, q, k, v).reshape(n_rows, -1)
        return self.ops.linear(mixed, layer.matrices["self_attn.o_proj"])

    def _feedforward(self, layer: Layer, x: Tensor, normed: Tensor) -> Tensor:
        """Before its last norm."""
        gated = gated_linear(self.ops, normed, layer.matrices["gate_up"], layer.inner)
        y = self.ops.linear(gated, layer.matrices["mlp.down_proj"])
        if self.config.moe is None:
            return y
        eps = self.config.rms_norm_eps
        dense = self.ops.rms_norm(y, layer.norms["post_feedforward_layernorm_1"], eps)
        routed = self._experts(layer, x)
        routed = self.ops.rms_norm(routed, layer.norms["post_feedforward_layernorm_2"], eps)
        return self.ops.add(routed, dense)

    def _mixture(
        self, ops: Fuses, layer: Layer, mixed: Tensor, x: Tensor, next_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What follows attention in a layer with experts, in few calls: x and its next norm."""
        moe, eps, own = self.config.moe, self.config.rms_norm_eps, layer.norms
        assert moe is not None
        names = ("pre_feedforward_layernorm", "router.gain", "pre_feedforward_layernorm_2")
        x, (normed, for_router, for_experts) = ops.add_norms(
            mixed, x, own["post_attention_layernorm"], eps, [own[name] for name in names]
        )
        gated = gated_linear(self.ops, normed, layer.matrices["gate_up"], layer.inner)
        dense = self.ops.linear(gated, layer.matrices["mlp.down_proj"])
        scores_TE = self.ops.linear(for_router, layer.matrices["router.proj"], torch.float32)
        return ops.add_mixture(
            for_experts,
            (layer.matrices["experts.gate_up_proj"], layer.matrices["experts.down_proj"]),
            self.ops.route(scores_TE, moe.top_k, own["router.per_expert_scale"]),
            dense,
            x,
            [own[f"post_feedforward_layernorm{i}"] for i in ("_2", "_1", "")],
            eps,
            scale=layer.scalar,
            next_weight=next_norm,
        )

    def _experts(self, layer: Layer, x: Tensor) -> Tensor:
        """Routed experts; the router reads the residual stream through its own norm."""
        moe, eps = self.config.moe, self.config.rms_norm_eps
        assert moe is not None
        scale_K = layer.norms["router.scale"] * x.shape[-1] ** -0.5
        scores_TE = self.ops.linear(
            self.ops.rms_norm(x, scale_K, eps), layer.matrices["router.proj"], torch.float32
        )
        ids_TA, weights_TA = self.ops.route(
            scores_TE, moe.top_k, layer.norms["router.per_expert_scale"]
        )
        return self.ops.experts(
            self.ops.rms_norm(x, layer.norms["pre_feedforward_layernorm_2"], eps),
            layer.matrices["experts.gate_up_proj"],
            layer.matrices["experts.down_proj"],
            ids_TA,
            weights_TA,
        )

    def _per_layer_inputs(self, token_T: Tensor, x: Tensor) -> Tensor:
        """Per-layer embeddings [T, L * P]: a table by token plus a projection of the embedding."""
        n_rows, size = x.shape[0], self.config.ple_size
        table = self.ops.embed(self.ple_table, token_T, self.ple_scale)
        projected = self.ops.linear(x, self.ple_projection).view(-1, size)
        # The model scales the projection by K^-1/2 first; in a norm that only moves epsilon.
        eps = self.config.rms_norm_eps * self.config.hidden_size
        normed = self.ops.rms_norm(projected, self.ple_norm, eps).view(n_rows, -1)
        return self.ops.add(normed, table, 2**-0.5)

    def _per_layer_update(self, index: int, layer: Layer, x: Tensor, ple_TL: Tensor) -> Tensor:
        """Before its norm."""
        size = self.config.ple_size
        own_TP = ple_TL[:, index * size : (index + 1) * size]
        if isinstance(self.ops, Fuses):
            gated = self.ops.gated_linear(x, layer.matrices["per_layer_input_gate"], own_TP)
        else:
            gated = self.ops.gated(
                self.ops.linear(x, layer.matrices["per_layer_input_gate"]), own_TP
            )
        return self.ops.linear(gated, layer.matrices["per_layer_projection"])
