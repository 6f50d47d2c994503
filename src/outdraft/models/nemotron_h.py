"""Nemotron-H: layers of one mixer each: a Mamba 2 recurrence, attention, an MLP or experts.

From the published checkpoints' layout and transformers `models/nemotron_h`. Attention has no
position encoding; MLPs are down(relu(up x)^2); experts have no gates and are chosen by sigmoids
with a bias. The rows of a Mamba projection that make time steps are kept in bf16 however the rest
is stored: an exponential reads them. transformers holds time steps of a prompt above
`time_step_min` and those of single tokens not; here only `time_step_limit` holds, for all.

Shapes: T rows, K hidden size, H heads, D head dimension, C channels of the convolution, P inputs of
a Mamba head, G groups, V width of a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from outdraft.cache.memory import KVLayer, LayerMemory
from outdraft.cache.recurrent import RecurrentLayer
from outdraft.models.layers import Attend, Scans, at_least_fp32
from outdraft.models.nemotron_h_config import LayerKind, NemotronHConfig
from outdraft.ops.base import Heads, Ops, Rotary, SigmoidRouter, Weight
from outdraft.ops.recurrent_base import StateSpace
from outdraft.ops.stored import StoredWeight, blocks, part, stack
from outdraft.weights.load import ExpectedTensor, IgnoreRule

PREFIXES = ("backbone.", "model.")
GROUP = "attention"


def expected_tensors(config: NemotronHConfig) -> dict[str, ExpectedTensor]:
    """Canonical name (without a prefix) -> shape of every tensor the model needs."""
    vocabulary = ExpectedTensor((config.vocab_size, config.hidden_size))
    found = {
        "embeddings.weight": vocabulary,
        "norm_f.weight": ExpectedTensor((config.hidden_size,)),
        "lm_head.weight": vocabulary,
    }
    for layer, kind in enumerate(config.layer_kinds):
        for name, tensor in layer_tensors(config, kind).items():
            found[f"layers.{layer}.{name}"] = tensor
    return found


def layer_tensors(config: NemotronHConfig, kind: LayerKind) -> dict[str, ExpectedTensor]:
    """Of a layer: its norm and its mixer."""
    hidden = config.hidden_size
    if kind == "mamba":
        own = _mamba_tensors(config)
    elif kind == "attention":
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        own = {
            "q_proj.weight": ExpectedTensor((q_width, hidden)),
            "k_proj.weight": ExpectedTensor((kv_width, hidden)),
            "v_proj.weight": ExpectedTensor((kv_width, hidden)),
            "o_proj.weight": ExpectedTensor((hidden, q_width)),
        }
    elif kind == "mlp":
        own = _mlp_tensors("", hidden, config.intermediate_size)
    else:
        own = _moe_tensors(config)
    named = {f"mixer.{name}": tensor for name, tensor in own.items()}
    return {"norm.weight": ExpectedTensor((hidden,))} | named


def _mamba_tensors(config: NemotronHConfig) -> dict[str, ExpectedTensor]:
    hidden, mamba = config.hidden_size, config.mamba
    per_head = ExpectedTensor((mamba.n_heads,), dtype=torch.float32)
    width = mamba.inner + mamba.channels + mamba.n_heads
    found = {
        "in_proj.weight": ExpectedTensor((width, hidden)),
        "conv1d.weight": ExpectedTensor((mamba.channels, 1, mamba.conv_width)),
        "A_log": per_head,
        "D": per_head,
        "dt_bias": per_head,
        "norm.weight": ExpectedTensor((mamba.inner,)),
        "out_proj.weight": ExpectedTensor((hidden, mamba.inner)),
    }
    if mamba.conv_bias:
        found["conv1d.bias"] = ExpectedTensor((mamba.channels,))
    return found


def _mlp_tensors(prefix: str, hidden: int, inner: int) -> dict[str, ExpectedTensor]:
    return {
        f"{prefix}up_proj.weight": ExpectedTensor((inner, hidden)),
        f"{prefix}down_proj.weight": ExpectedTensor((hidden, inner)),
    }


def _moe_tensors(config: NemotronHConfig) -> dict[str, ExpectedTensor]:
    hidden, moe = config.hidden_size, config.moe
    assert moe is not None
    latent = moe.latent_size or hidden
    found = {
        "gate.weight": ExpectedTensor((moe.n_experts, hidden)),
        "gate.e_score_correction_bias": ExpectedTensor((moe.n_experts,), dtype=torch.float32),
    }
    for expert in range(moe.n_experts):
        found |= _mlp_tensors(f"experts.{expert}.", latent, moe.intermediate_size)
    found |= _mlp_tensors("shared_experts.", hidden, moe.shared_size)
    if moe.latent_size is not None:
        found["fc1_latent_proj.weight"] = ExpectedTensor((latent, hidden))
        found["fc2_latent_proj.weight"] = ExpectedTensor((hidden, latent))
    return found


def ignore_rules(config: NemotronHConfig) -> list[IgnoreRule]:
    """Tensors that a checkpoint may carry and the model does not use, each with the reason."""
    del config
    return [IgnoreRule(r"mtp\..*", "the MTP head, which the drafter reads")]


def memory_layers(config: NemotronHConfig) -> list[LayerMemory]:
    """What each layer that remembers anything asks of the memory, in layer order."""
    return remembered(config, config.layer_kinds)


def remembered(config: NemotronHConfig, kinds: Sequence[LayerKind]) -> list[LayerMemory]:
    """As `memory_layers`, of layers of these kinds; MLPs and experts have no entry."""
    mamba = config.mamba
    found: list[LayerMemory] = []
    for kind in kinds:
        if kind == "mamba":
            found.append(
                RecurrentLayer(
                    mamba.n_heads,
                    mamba.state_size,
                    mamba.head_dim,
                    mamba.channels,
                    mamba.conv_width,
                )
            )
        elif kind == "attention":
            index = len(found)
            found.append(KVLayer(GROUP, config.n_kv_heads, config.head_dim, None, index))
    return found


class Mixer(Protocol):
    """What a layer adds to the residual."""

    def __call__(self, normed: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """[T, K] from the normed residual [T, K]."""
        ...


class Attention:
    """Full attention without positions."""

    def __init__(
        self, config: NemotronHConfig, weights: Mapping[str, Any], prefix: str, ops: Ops, slot: int
    ) -> None:
        """`slot`: of the layer in the memory."""
        self.config, self.ops, self.slot = config, ops, slot
        self.qkv = ops.pack(stack([weights[f"{prefix}{name}_proj.weight"] for name in "qkv"]))
        self.out = ops.pack(weights[prefix + "o_proj.weight"])
        half = config.head_dim // 2
        # Every position is turned by an angle of zero; the scale of scores is in the cosine.
        self.cos = torch.full((1, half), config.head_dim**-0.5, device=ops.device)
        self.sin = torch.zeros(1, half, device=ops.device)

    def __call__(self, normed: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """See `Mixer`."""
        config, n_rows = self.config, normed.shape[0]
        n_q, n_kv = config.n_heads, config.n_kv_heads
        heads = self.ops.linear(normed, self.qkv).view(n_rows, -1, config.head_dim)
        scale = Rotary(self.cos, self.sin, torch.zeros_like(position_T))
        q = Heads(heads[:, :n_q], None, scale, None)
        k = Heads(heads[:, n_q : n_q + n_kv], None, None, None)
        v = Heads(heads[:, n_q + n_kv :], None, None, None)
        return self.ops.linear(attend(self.slot, q, k, v).reshape(n_rows, -1), self.out)


class Mamba:
    """A Mamba 2 layer: projections, convolution and recurrence, gated norm, output."""

    def __init__(
        self, config: NemotronHConfig, weights: Mapping[str, Any], prefix: str, ops: Ops, slot: int
    ) -> None:
        """`slot`: of the layer in the memory."""
        self.config, self.ops, self.slot = config, ops, slot
        mamba = config.mamba
        whole, width = weights[prefix + "in_proj.weight"], mamba.inner + mamba.channels
        self.zx = ops.pack(part(whole, 0, width))
        self.dt = ops.pack(part(whole, width, mamba.n_heads), "router")
        self.out = ops.pack(weights[prefix + "out_proj.weight"])
        self.norm = at_least_fp32(weights[prefix + "norm.weight"]).view(mamba.n_groups, -1)
        conv = weights[prefix + "conv1d.weight"]
        conv = conv.floats() if isinstance(conv, StoredWeight) else conv
        self.space = StateSpace(
            conv_WC=at_least_fp32(conv[:, 0].t()).contiguous(),
            conv_bias_C=at_least_fp32(weights[prefix + "conv1d.bias"]) if mamba.conv_bias else None,
            decay_H=-at_least_fp32(weights[prefix + "A_log"]).exp(),
            bias_H=at_least_fp32(weights[prefix + "dt_bias"]),
            skip_H=at_least_fp32(weights[prefix + "D"]),
            n_groups=mamba.n_groups,
            limits=mamba.time_step_limits,
        )

    def __call__(self, normed: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """See `Mixer`."""
        assert isinstance(attend, Scans), "recurrent layers need a memory for their states"
        mamba, n_rows = self.config.mamba, normed.shape[0]
        zx = self.ops.linear(normed, self.zx)
        dt_TH = self.ops.linear(normed, self.dt, torch.float32)
        out_THP = attend.scan(self.slot, zx[:, mamba.inner :], dt_TH, self.space)
        out_TGV = out_THP.reshape(n_rows, mamba.n_groups, -1)
        z_TGV = zx[:, : mamba.inner].reshape(n_rows, mamba.n_groups, -1)
        normed_TGV = self.ops.group_norm(out_TGV, z_TGV, self.norm, self.config.eps)
        return self.ops.linear(normed_TGV.reshape(n_rows, -1).to(normed.dtype), self.out)


class Mlp:
    """down(relu(up x)^2)."""

    def __init__(self, weights: Mapping[str, Any], prefix: str, ops: Ops) -> None:
        self.ops = ops
        self.up = ops.pack(weights[prefix + "up_proj.weight"])
        self.down = ops.pack(weights[prefix + "down_proj.weight"])

    def __call__(self, normed: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """See `Mixer`."""
        inner = self.ops.linear(normed, self.up)
        return self.ops.linear(self.ops.gated(inner, inner, "relu"), self.down)


class Moe:
    """Experts, in a latent if there is one, and an MLP that every token passes."""

    def __init__(
        self, config: NemotronHConfig, weights: Mapping[str, Any], prefix: str, ops: Ops
    ) -> None:
        assert config.moe is not None
        moe, self.ops = config.moe, ops

        def experts(name: str) -> Weight:
            names = (f"{prefix}experts.{e}.{name}_proj.weight" for e in range(moe.n_experts))
            return ops.pack(blocks([weights[name] for name in names]))

        self.gate = ops.pack(weights[prefix + "gate.weight"], "router")
        bias_E = weights[prefix + "gate.e_score_correction_bias"]
        self.router = SigmoidRouter(
            at_least_fp32(bias_E), moe.top_k, moe.n_groups, moe.top_groups, moe.normalise, moe.scale
        )
        self.up, self.down = experts("up"), experts("down")
        self.shared = Mlp(weights, prefix + "shared_experts.", ops)
        self.into_latent: Weight | None = None
        if moe.latent_size is not None:
            self.into_latent = ops.pack(weights[prefix + "fc1_latent_proj.weight"])
            self.from_latent = ops.pack(weights[prefix + "fc2_latent_proj.weight"])

    def __call__(self, normed: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """See `Mixer`."""
        ops, x = self.ops, normed
        scores_TE = ops.linear(normed, self.gate, torch.float32)
        ids_TA, weights_TA = ops.route_sigmoid(scores_TE, self.router)
        if self.into_latent is not None:
            x = ops.linear(x, self.into_latent)
        routed = ops.experts(x, self.up, self.down, ids_TA, weights_TA, "relu")
        if self.into_latent is not None:
            routed = ops.linear(routed, self.from_latent)
        return ops.add(routed, self.shared(normed, position_T, attend))


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: norm and mixer."""

    norm: Tensor
    mixer: Mixer

    def forward(
        self, x: Tensor, position_T: Tensor, attend: Attend, ops: Ops, eps: float
    ) -> Tensor:
        """The residual stream behind the layer."""
        return ops.add(self.mixer(ops.rms_norm(x, self.norm, eps), position_T, attend), x)


def build_layers(
    config: NemotronHConfig, kinds: Sequence[LayerKind], weights: Mapping[str, Any], ops: Ops
) -> list[Layer]:
    """Read the tensors `layers.0...` of layers of these kinds and pack them."""
    layers, n_remembered = [], 0
    for index, kind in enumerate(kinds):
        prefix = f"layers.{index}.mixer."
        mixer: Mixer
        if kind == "mamba":
            mixer = Mamba(config, weights, prefix, ops, n_remembered)
        elif kind == "attention":
            mixer = Attention(config, weights, prefix, ops, n_remembered)
        elif kind == "mlp":
            mixer = Mlp(weights, prefix, ops)
        else:
            mixer = Moe(config, weights, prefix, ops)
        n_remembered += kind in ("mamba", "attention")
        layers.append(Layer(at_least_fp32(weights[f"layers.{index}.norm.weight"]), mixer))
    return layers


class NemotronH:
    """A Nemotron-H model over given weights and operations."""

    def __init__(
        self,
        config: NemotronHConfig,
        weights: Mapping[str, Any],
        ops: Ops,
        n_positions: int | None = None,
    ) -> None:
        """As `Gemma4`; without tables of positions, `n_positions` is of no use."""
        del n_positions
        self.config, self.ops = config, ops
        self.layers = build_layers(config, config.layer_kinds, weights, ops)
        self.embedding = ops.pack(weights["embeddings.weight"], "embedding")
        self.head = ops.pack(weights["lm_head.weight"], "embedding")
        self.norm = at_least_fp32(weights["norm_f.weight"])

    def embed(self, token_T: Tensor) -> Tensor:
        """Input embeddings [T, K]."""
        return self.ops.embed(self.embedding, token_T, 1.0)

    def forward(self, token_T: Tensor, position_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, K]. See `TargetModel`."""
        x, eps = self.embed(token_T), self.config.eps
        for layer in self.layers:
            x = layer.forward(x, position_T, attend, self.ops, eps)
        return self.ops.rms_norm(x, self.norm, eps)

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """fp32 logits [R, V] of final hidden states."""
        return self.ops.linear(hidden_RK, self.head, torch.float32)
