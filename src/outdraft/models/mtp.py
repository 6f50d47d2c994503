"""The native multi-token prediction head of Qwen 3.5 and 3.6, inside the target's checkpoint.

u_t = fc([norm(E(x_{t+1})) ; norm(h_t)]) goes through one full-attention layer with keys and values
of its own and a final norm; the target's output head scores the result for x_{t+2}. h_t is the
target's state behind its final norm, or, for further drafts, this head's own result. From the
published checkpoints' layout; tensors are `mtp.*`. Not here: drafting with it (speculate/mtp.py).

Shapes: T rows, K hidden size.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from outdraft.cache.memory import KVLayer
from outdraft.models.layers import Attend
from outdraft.models.qwen3_5 import (
    GROUP,
    Layer,
    attention_shapes,
    mlp_shapes,
    one_plus,
    rotary_tables,
)
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.base import Ops, Rotary
from outdraft.weights.load import ExpectedTensor, IgnoreRule

PREFIXES = ("mtp.", "model.mtp.", "model.language_model.mtp.", "language_model.mtp.")
IGNORED = [IgnoreRule(r"(?!(model\.)?(language_model\.)?mtp\.).*", "the target's own")]


def expected_tensors(config: Qwen35Config) -> dict[str, ExpectedTensor]:
    """Canonical name (without a prefix) -> shape of every tensor of the head."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, 2 * hidden),
        "norm.weight": (hidden,),
        "pre_fc_norm_embedding.weight": (hidden,),
        "pre_fc_norm_hidden.weight": (hidden,),
    }
    for name, shape in (attention_shapes(config) | mlp_shapes(config)).items():
        shapes[f"layers.0.{name}"] = shape
    return {name: ExpectedTensor(shape) for name, shape in shapes.items()}


def memory_layers(config: Qwen35Config) -> list[KVLayer]:
    """Its one layer."""
    return [KVLayer(GROUP, config.n_kv_heads, config.head_dim, None, 0)]


class MtpHead:
    """The head over given weights and operations."""

    def __init__(
        self, config: Qwen35Config, weights: Mapping[str, Any], ops: Ops, n_positions: int
    ) -> None:
        """`weights`: canonical name -> tensor or `StoredWeight`."""
        self.config, self.ops = config, ops
        self.fc = ops.pack(weights["fc.weight"])
        self.embedding_norm = one_plus(weights["pre_fc_norm_embedding.weight"])
        self.hidden_norm = one_plus(weights["pre_fc_norm_hidden.weight"])
        self.layer = Layer.build(config, weights, "layers.0.", ops, full=True)
        self.norm = one_plus(weights["norm.weight"])
        self.query_table, self.key_table = rotary_tables(config, n_positions, ops.device)

    def forward(
        self, embedded_TK: Tensor, hidden_TK: Tensor, position_T: Tensor, attend: Attend
    ) -> Tensor:
        """Results behind the final norm, [T, K].

        Args:
            embedded_TK: embeddings of the tokens behind those of the states.
            hidden_TK: the target's states, or earlier results.
            position_T: int32, of the states.
            attend: stores keys and values and attends.
        """
        ops, eps = self.ops, self.config.rms_norm_eps
        queries, keys = Rotary(*self.query_table, position_T), Rotary(*self.key_table, position_T)
        both = ops.concat(
            ops.rms_norm(embedded_TK, self.embedding_norm, eps),
            ops.rms_norm(hidden_TK, self.hidden_norm, eps),
        )
        x = self.layer.forward(0, ops.linear(both, self.fc), queries, keys, attend, eps)
        return ops.rms_norm(x, self.norm, eps)
