"""Native heads that draft for their own target: one entry a family that has them.

Not here: the heads (mtp.py, nemotron_h_mtp.py), drafting with one (speculate/mtp.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from outdraft.cache.memory import LayerMemory
from outdraft.models import mtp, nemotron_h_mtp
from outdraft.models.layers import Attend, TargetConfig
from outdraft.models.nemotron_h_config import NemotronHConfig
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.base import Ops
from outdraft.weights.load import ExpectedTensor, IgnoreRule


class NativeHead(Protocol):
    """A head over weights and operations."""

    @property
    def ops(self) -> Ops:
        """What it computes with."""
        ...

    def forward(
        self, embedded_TK: Tensor, hidden_TK: Tensor, position_T: Tensor, attend: Attend
    ) -> Tensor:
        """Results, [T, K], which the target's output head scores.

        Args:
            embedded_TK: embeddings of the tokens behind those of the states.
            hidden_TK: the target's states behind its final norm, or earlier results.
            position_T: int32, of the states.
            attend: stores keys and values and attends.
        """
        ...


@dataclass(frozen=True, slots=True)
class HeadFamily:
    """How to find and build the head of a family's targets; every function takes the config."""

    expected_tensors: Callable[[Any], dict[str, ExpectedTensor]]
    memory_layers: Callable[[Any], Sequence[LayerMemory]]
    build: Callable[[Any, Mapping[str, Any], Ops, int], NativeHead]
    n_claimed: Callable[[Any], int]
    """Layers that the config claims, which tensors need not bear out."""
    unsupported: Callable[[Any], str | None]
    prefixes: tuple[str, ...]
    ignored: list[IgnoreRule]


HEADS: dict[type, HeadFamily] = {
    Qwen35Config: HeadFamily(
        expected_tensors=mtp.expected_tensors,
        memory_layers=mtp.memory_layers,
        build=mtp.MtpHead,
        n_claimed=lambda config: int(config.n_mtp_layers),
        unsupported=lambda config: None,
        prefixes=mtp.PREFIXES,
        ignored=mtp.IGNORED,
    ),
    NemotronHConfig: HeadFamily(
        expected_tensors=nemotron_h_mtp.expected_tensors,
        memory_layers=nemotron_h_mtp.memory_layers,
        build=nemotron_h_mtp.NemotronHHead,
        n_claimed=lambda config: int(config.n_mtp_layers),
        unsupported=nemotron_h_mtp.unsupported,
        prefixes=nemotron_h_mtp.PREFIXES,
        ignored=nemotron_h_mtp.IGNORED,
    ),
}


def has_heads(config: TargetConfig) -> bool:
    """Whether targets of this family may have a native head."""
    return type(config) in HEADS


def head_family(config: TargetConfig) -> HeadFamily:
    """Of a config that `has_heads`."""
    return HEADS[type(config)]
