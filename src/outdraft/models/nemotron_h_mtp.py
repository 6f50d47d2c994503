"""The native multi-token prediction head of Nemotron 3.5 Lightning and 3 Super, inside the target's
checkpoint.

u_t = eh_proj([norm(E(x_{t+1})) ; norm(h_t)]) goes through layers of the target's kinds (attention
with keys and values of its own, then experts) and a final norm of the head; the target's output
head scores the result for x_{t+2}. h_t is the target's state behind its final norm, or, for further
drafts, this head's own result: it was trained with the one block repeated. From the published
checkpoints' layout; tensors are `mtp.*`, and what is before and behind the layers belongs to the
first and the last of them. Not here: drafting with it (speculate/mtp.py).

Shapes: T rows, K hidden size.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from outdraft.cache.memory import LayerMemory
from outdraft.models.layers import Attend, at_least_fp32
from outdraft.models.nemotron_h import build_layers, layer_tensors, remembered
from outdraft.models.nemotron_h_config import NemotronHConfig
from outdraft.ops.base import Ops
from outdraft.weights.load import ExpectedTensor, IgnoreRule

PREFIXES = ("mtp.",)
IGNORED = [IgnoreRule(r"(?!mtp\.).*", "the target's own")]


def expected_tensors(config: NemotronHConfig) -> dict[str, ExpectedTensor]:
    """Canonical name (without a prefix) -> shape of every tensor of the head."""
    hidden, last = config.hidden_size, len(config.mtp_kinds) - 1
    norm = ExpectedTensor((hidden,))
    found = {
        "layers.0.enorm.weight": norm,
        "layers.0.hnorm.weight": norm,
        "layers.0.eh_proj.weight": ExpectedTensor((hidden, 2 * hidden)),
    }
    for layer, kind in enumerate(config.mtp_kinds):
        for name, tensor in layer_tensors(config, kind).items():
            found[f"layers.{layer}.{name}"] = tensor
    return found | {f"layers.{last}.final_layernorm.weight": norm}


def memory_layers(config: NemotronHConfig) -> list[LayerMemory]:
    """Of its layers that remember anything."""
    return remembered(config, config.mtp_kinds)


def unsupported(config: NemotronHConfig) -> str | None:
    """Why a head of this shape cannot be run, or None."""
    if config.n_mtp_layers > 1:
        return f"{config.n_mtp_layers} blocks are not supported, only one that is repeated"
    if "mamba" in config.mtp_kinds or "attention" not in config.mtp_kinds:
        return f"layers of {', '.join(config.mtp_kinds)} are not supported"
    return None


class NemotronHHead:
    """The head over given weights and operations."""

    def __init__(
        self, config: NemotronHConfig, weights: Mapping[str, Any], ops: Ops, n_positions: int
    ) -> None:
        """`weights`: canonical name -> tensor or `StoredWeight`; `n_positions` is of no use."""
        del n_positions
        self.config, self.ops = config, ops
        last = len(config.mtp_kinds) - 1
        self.join = ops.pack(weights["layers.0.eh_proj.weight"])
        self.embedding_norm = at_least_fp32(weights["layers.0.enorm.weight"])
        self.hidden_norm = at_least_fp32(weights["layers.0.hnorm.weight"])
        self.layers = build_layers(config, config.mtp_kinds, weights, ops)
        self.norm = at_least_fp32(weights[f"layers.{last}.final_layernorm.weight"])

    def forward(
        self, embedded_TK: Tensor, hidden_TK: Tensor, position_T: Tensor, attend: Attend
    ) -> Tensor:
        """Results behind the final norm, [T, K]. See `NativeHead`."""
        ops, eps = self.ops, self.config.eps
        both = ops.concat(
            ops.rms_norm(embedded_TK, self.embedding_norm, eps),
            ops.rms_norm(hidden_TK, self.hidden_norm, eps),
        )
        x = ops.linear(both, self.join)
        for layer in self.layers:
            x = layer.forward(x, position_T, attend, ops, eps)
        return ops.rms_norm(x, self.norm, eps)
