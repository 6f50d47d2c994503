"""Which families there are: one entry a `model_type`, and loading of targets through it.

Adding a family means adding a file beside this one and a line to `TARGETS`. Not here: drafters
(speculate/build.py).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.cache.memory import KVLayer
from outdraft.config import DEFAULT_CTX_SIZE, EngineConfig
from outdraft.errors import ModelError
from outdraft.models import gemma4
from outdraft.models.gemma4_config import ASSISTANT_TYPES, TARGET_TYPES, Gemma4Config
from outdraft.ops.base import Ops
from outdraft.ops.cpu import HEAD_DIM_MULTIPLE, CpuOps
from outdraft.ops.reference import ReferenceOps, rows_are_independent
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.load import ExpectedTensor, IgnoreRule, LoadReport, load_tensors
from outdraft.weights.quantise import is_int8_channel

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Family:
    """How to read, check and build the models of one architecture."""

    read_config: Callable[[Mapping[str, Any]], Gemma4Config]
    expected_tensors: Callable[[Gemma4Config], dict[str, ExpectedTensor]]
    ignore_rules: Callable[[Gemma4Config], list[IgnoreRule]]
    memory_layers: Callable[[Gemma4Config], list[KVLayer]]
    build: Callable[[Gemma4Config, Mapping[str, Tensor], Ops, int], gemma4.Gemma4]
    prefixes: tuple[str, ...]


GEMMA4 = Family(
    read_config=Gemma4Config.from_hf,
    expected_tensors=gemma4.expected_tensors,
    ignore_rules=gemma4.ignore_rules,
    memory_layers=gemma4.memory_layers,
    build=gemma4.Gemma4,
    prefixes=gemma4.PREFIXES,
)

TARGETS: dict[str, Family] = dict.fromkeys(TARGET_TYPES, GEMMA4)


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target and what was seen while loading it."""

    path: Path
    family: Family
    config: Gemma4Config
    model: gemma4.Gemma4
    report: LoadReport
    dtype: torch.dtype
    ops: Ops
    ctx_size: int


def family_of(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.

    Raises:
        ModelError: the model type is unknown, or is a drafter's.
    """
    model_type = config.get("model_type")
    if model_type in ASSISTANT_TYPES:
        raise ModelError(
            f"{path} holds an assistant, which drafts for a target and cannot run alone",
            "give the target's directory; pass this one with --assistant",
        )
    if model_type not in TARGETS:
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported",
            f"supported are {', '.join(TARGETS)}",
        )
    return TARGETS[str(model_type)]


def resolve_dtype(asked: str, stored: str) -> torch.dtype:
    """The compute type: the one asked for, or with `auto` the checkpoint's.

    Raises:
        ModelError: the checkpoint's type is not one that can be computed in.
    """
    name = stored.removeprefix("torch.") if asked == "auto" else asked
    if name not in DTYPES:
        raise ModelError(
            f"dtype {name!r} is not supported", f"give --dtype, one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def choose_ops(
    config: EngineConfig,
    model: Gemma4Config,
    *,
    int8_weights: bool,
    weights: Iterable[Tensor],
    drafter: bool = False,
) -> Ops:
    """Operations for these weights: compiled kernels, or plain PyTorch.

    A drafter is stored with at least 8 bits: it is small, and what it loses in accuracy it loses
    in acceptance.

    Raises:
        ModelError: the kernels were asked for and cannot run this.
    """
    odd = [shape.head_dim for shape in model.attention if shape.head_dim % HEAD_DIM_MULTIPLE]
    if config.backend == "cpu" and (config.dtype != "auto" or odd):
        what = f"heads of {odd[0]}" if odd else f"dtype {config.dtype}"
        raise ModelError(f"backend cpu has no {what}", "use --backend reference")
    kernels = config.backend == "auto" and config.dtype == "auto" and not odd
    if config.backend == "cpu" or kernels:
        quant = config.quant
        if quant == "auto":
            quant = "w8" if int8_weights else "bf16"
        if drafter and quant == "w4":
            quant = "w8"
        return CpuOps(format=quant, kv_dtype=KV_DTYPES[config.kv_dtype])
    matrices = [w for w in weights if w.ndim == 2 and w.is_floating_point()]
    return ReferenceOps() if rows_are_independent(matrices) else ReferenceOps(tile=1)


def load_target(path: Path, engine: EngineConfig) -> Target:
    """Read a target from a Hugging Face directory.

    Raises:
        ModelError: the directory, its config or its tensors cannot be used; the message says why.
    """
    raw = read_config(path)
    family = family_of(raw, path)
    config = family.read_config(raw)
    torch_dtype = resolve_dtype(engine.dtype, config.dtype)
    int8_weights = is_int8_channel(raw)
    weights, report = load_tensors(
        Checkpoint.open(path),
        family.expected_tensors(config),
        family.ignore_rules(config),
        prefixes=family.prefixes,
        dtype=torch_dtype,
        int8_channel=int8_weights,
    )
    ops = choose_ops(engine, config, int8_weights=int8_weights, weights=weights.values())
    n_positions = min(config.max_position_embeddings, engine.ctx_size or DEFAULT_CTX_SIZE)
    model = family.build(config, weights, ops, n_positions)
    return Target(path, family, config, model, report, torch_dtype, ops, n_positions)
