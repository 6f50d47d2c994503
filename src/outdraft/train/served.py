"""A target for training that has the weights the kernels multiply by.

Here: packing as the engine does and dequantising to fp32, and the drafter's weights as leaves. Not
here: the objective (tuning.py).

What differs from serving: products are in fp32 or bf16 over many rows, where kernels of w8 and w4
also round activations to 8 bits; keys and values are not rounded to the type of the engine's cache.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.config import EngineConfig
from outdraft.errors import TrainingError
from outdraft.models import gemma4_assistant, mtp
from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_config import TARGET_TYPES, AssistantConfig, Gemma4Config
from outdraft.models.qwen3_5 import Qwen35
from outdraft.models.qwen3_5_config import MODEL_TYPES as QWEN35_TYPES
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.models.registry import (
    CANDIDATES,
    GEMMA4,
    QWEN35,
    Family,
    find_adapter,
    open_weights,
    resolve_dtype,
    resolve_quant,
)
from outdraft.ops.base import Role
from outdraft.ops.batched import BatchedOps
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import Format
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config


@dataclass(frozen=True, slots=True)
class AsServed(BatchedOps):
    """`BatchedOps` whose weights are rounded as the compiled kernels store them, as fp32."""

    kernels: CpuOps = field(default_factory=CpuOps)

    def pack(self, weight: Any, role: Role = "linear") -> Tensor:
        """See `Ops.pack`: fp32 of the weight's shape."""
        if weight.ndim != 2:
            raise _experts()
        packed = self.kernels.pack(weight, role)
        n_inputs = weight.shape[1]
        rows = torch.arange(weight.shape[0], dtype=torch.int32)
        values = self.kernels.embed(packed, rows, 1.0).reshape(-1, n_inputs)
        return values.clone()


def check_target(path: Path) -> None:
    """Refuse targets that nothing here can be tuned for, before anything is computed.

    Raises:
        ModelError: its config cannot be read.
        TrainingError: it is neither a Gemma 4 nor a Qwen 3.5, or has experts.
    """
    raw = read_config(path)
    if raw.get("model_type") in QWEN35_TYPES:
        moe: object = Qwen35Config.from_hf(raw).moe
    elif raw.get("model_type") in TARGET_TYPES:
        moe = Gemma4Config.from_hf(raw).moe
    else:
        raise TrainingError(
            f"{path} is a {raw.get('model_type')!r:.40}: assistants are for Gemma 4",
            "give a Gemma 4 target, or a Qwen 3.5 with a head of its own",
        )
    if moe is not None:
        raise _experts()


def _experts() -> TrainingError:
    return TrainingError("a target with experts cannot be tuned for yet", "give a dense target")


def served_target(path: Path, engine: EngineConfig) -> Gemma4:
    """The target with fp32 weights of the values that `engine` serves.

    Raises:
        ModelError: it or the adapter cannot be read, or is no Gemma 4's.
        TrainingError: it has experts.
    """
    return Gemma4(*_as_served(path, engine, GEMMA4))


def served_hybrid(path: Path, engine: EngineConfig) -> Qwen35:
    """As `served_target`, of a Qwen 3.5.

    Raises:
        ModelError: it or the adapter cannot be read.
        TrainingError: it has experts.
    """
    return Qwen35(*_as_served(path, engine, QWEN35))


def _as_served(path: Path, engine: EngineConfig, family: Family) -> tuple[Any, Any, AsServed]:
    """Config, weights and operations of a target of this family."""
    raw = read_config(path)
    config = family.read_config(raw)
    weights, _, bits = open_weights(
        Checkpoint.open(path),
        raw,
        family.expected_tensors(config),
        family.ignore_rules(config),
        prefixes=family.prefixes,
        dtype=resolve_dtype(engine.dtype, config.dtype),
    )
    adapter = find_adapter(engine, family, config)
    if adapter is not None:
        weights.changed = adapter.merged
    format: Format = resolve_quant(engine, bits, drafter=False)
    weights.stored = True
    return config, weights, AsServed(kernels=CpuOps(format=format, candidates=CANDIDATES))


def head_leaves(path: Path) -> dict[str, Tensor]:
    """The weights of a Qwen 3.5's head in fp32, by canonical name.

    Raises:
        ModelError: it cannot be read.
    """
    raw = read_config(path)
    stored, _, _ = open_weights(
        Checkpoint.open(path),
        raw,
        mtp.expected_tensors(Qwen35Config.from_hf(raw)),
        mtp.IGNORED,
        prefixes=mtp.PREFIXES,
        dtype=torch.float32,
    )
    return {name: torch.as_tensor(stored[name]) for name in stored}


def assistant_leaves(path: Path) -> tuple[AssistantConfig, dict[str, Tensor]]:
    """An assistant's config and its weights in fp32.

    Raises:
        ModelError: it cannot be read.
    """
    raw = read_config(path)
    config = AssistantConfig.from_hf(raw, None)
    stored, _, _ = open_weights(
        Checkpoint.open(path),
        raw,
        gemma4_assistant.expected_tensors(config),
        gemma4_assistant.ignore_rules(config),
        prefixes=gemma4_assistant.PREFIXES,
        dtype=torch.float32,
    )
    return config, {name: torch.as_tensor(stored[name]) for name in stored}
