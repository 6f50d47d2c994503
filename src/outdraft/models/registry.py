"""Which families there are: one entry a `model_type`, and loading of targets through it.

Adding a family means adding a file beside this one and a line to `TARGETS`. Not here: drafters
(speculate/build.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.cache.memory import LayerMemory
from outdraft.config import DEFAULT_CTX_SIZE, EngineConfig
from outdraft.device import find_device, has_dependent_launch
from outdraft.errors import ModelError
from outdraft.models import (
    gemma4,
    gemma4_config,
    ministral3,
    nemotron_h,
    nemotron_h_config,
    qwen3_5,
    qwen3_5_config,
)
from outdraft.models.gemma4_config import ASSISTANT_TYPES, TARGET_TYPES, Gemma4Config
from outdraft.models.layers import TargetConfig, TargetModel
from outdraft.models.ministral3 import Ministral3Config
from outdraft.models.nemotron_h_config import NemotronHConfig
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.base import Ops
from outdraft.ops.cpu import HEAD_DIM_MULTIPLE, CpuOps
from outdraft.ops.packed import Format
from outdraft.ops.reference import ReferenceOps, rows_are_independent
from outdraft.ops.stored import pack_stored
from outdraft.ops.threads import set_threads
from outdraft.weights.adapter import Adapter, open_adapter
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.find import resolve_model
from outdraft.weights.int4 import int4_scheme
from outdraft.weights.load import ExpectedTensor, IgnoreRule, LoadReport, Weights, open_tensors
from outdraft.weights.loading import Loading
from outdraft.weights.packed_cache import (
    CacheFile,
    PackedCache,
    estimated_bytes,
    packer,
    packing_key,
)
from outdraft.weights.quantise import is_int8_channel

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
CANDIDATES = 16  # scales tried for a row or group when quantising
KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Family:
    """How to read, check and build the models of one architecture."""

    read_config: Callable[[Mapping[str, Any]], TargetConfig]
    expected_tensors: Callable[[Any], dict[str, ExpectedTensor]]
    ignore_rules: Callable[[Any], list[IgnoreRule]]
    memory_layers: Callable[[Any], Sequence[LayerMemory]]
    build: Callable[[Any, Mapping[str, Any], Ops, int], TargetModel]
    describe: Callable[[Any], dict[str, str | int | float]]
    prefixes: tuple[str, ...]
    cpu_only: str | None = None
    """Why it does not run on a GPU, if it does not."""


GEMMA4 = Family(
    read_config=Gemma4Config.from_hf,
    expected_tensors=gemma4.expected_tensors,
    ignore_rules=gemma4.ignore_rules,
    memory_layers=gemma4.memory_layers,
    build=gemma4.Gemma4,
    describe=gemma4_config.describe,
    prefixes=gemma4.PREFIXES,
)

MINISTRAL3 = Family(
    read_config=Ministral3Config.from_hf,
    expected_tensors=ministral3.expected_tensors,
    ignore_rules=ministral3.ignore_rules,
    memory_layers=ministral3.memory_layers,
    build=ministral3.Ministral3,
    describe=ministral3.describe,
    prefixes=ministral3.PREFIXES,
)

QWEN35 = Family(
    read_config=Qwen35Config.from_hf,
    expected_tensors=qwen3_5.expected_tensors,
    ignore_rules=qwen3_5.ignore_rules,
    memory_layers=qwen3_5.memory_layers,
    build=qwen3_5.Qwen35,
    prefixes=qwen3_5.PREFIXES,
    describe=qwen3_5_config.describe,
)

NEMOTRON_H = Family(
    read_config=NemotronHConfig.from_hf,
    expected_tensors=nemotron_h.expected_tensors,
    ignore_rules=nemotron_h.ignore_rules,
    memory_layers=nemotron_h.memory_layers,
    build=nemotron_h.NemotronH,
    prefixes=nemotron_h.PREFIXES,
    describe=nemotron_h_config.describe,
    cpu_only="the kernels of its recurrent layers are for CPUs",
)

TARGETS: dict[str, Family] = {
    **dict.fromkeys(TARGET_TYPES, GEMMA4),
    **dict.fromkeys(ministral3.MODEL_TYPES, MINISTRAL3),
    **dict.fromkeys(qwen3_5_config.MODEL_TYPES, QWEN35),
    **dict.fromkeys(nemotron_h_config.MODEL_TYPES, NEMOTRON_H),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target and what was seen while loading it."""

    path: Path
    family: Family
    config: TargetConfig
    model: TargetModel
    report: LoadReport
    dtype: torch.dtype
    ops: Ops
    ctx_size: int
    adapter: Adapter | None = None


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
    model: TargetConfig,
    *,
    stored_bits: int,
    weights: Iterable[Tensor],
    drafter: bool = False,
) -> Ops:
    """Operations for these weights: compiled kernels, or plain PyTorch.

    A drafter is stored with at least 8 bits: it is small, and what it loses in accuracy it loses
    in acceptance.

    Args:
        stored_bits: of the checkpoint's weights: 4, 8 or 16.
        weights: what the reference would multiply by; looked at for the reference only.

    Raises:
        ModelError: the kernels were asked for and cannot run this.
    """
    device = card(config)
    delta = getattr(model, "delta", None)
    dims = (*model.head_dims, *((delta.k_dim, delta.v_dim) if delta is not None else ()))
    uneven = [dim for dim in dims if dim & (dim - 1)]
    if device is not None and uneven:
        if config.device == "cuda":
            raise ModelError(f"device cuda has no heads of {uneven[0]}", "use --device cpu")
        device = None
    if device is not None:
        return cuda_ops(config, device, resolve_quant(config, stored_bits, drafter=drafter))
    odd = [dim for dim in model.head_dims if dim % HEAD_DIM_MULTIPLE]
    if config.backend == "cpu" and (config.dtype != "auto" or odd):
        what = f"heads of {odd[0]}" if odd else f"dtype {config.dtype}"
        raise ModelError(f"backend cpu has no {what}", "use --backend reference")
    kernels = config.backend == "auto" and config.dtype == "auto" and not odd
    if config.backend == "cpu" or kernels:
        quant = resolve_quant(config, stored_bits, drafter=drafter)
        kv_dtype = KV_DTYPES[config.kv_dtype]
        return CpuOps(format=quant, kv_dtype=kv_dtype, candidates=CANDIDATES)
    matrices = [w for w in weights if w.ndim == 2 and w.is_floating_point()]
    return ReferenceOps() if rows_are_independent(matrices) else ReferenceOps(tile=1)


def resolve_quant(config: EngineConfig, stored_bits: int, *, drafter: bool) -> Format:
    """How weights are stored; see `choose_ops`."""
    quant = config.quant
    if quant == "auto":
        quant = "w4" if stored_bits == 4 else "w8" if stored_bits == 8 else "bf16"
    return "w8" if drafter and quant == "w4" else quant


def card(config: EngineConfig) -> torch.device | None:
    """The GPU to use, or None for the CPU.

    Raises:
        OutdraftError: a GPU was asked for and cannot be used.
    """
    cpu_only = None
    if config.backend != "auto":
        cpu_only = f"backend {config.backend} runs on the CPU"
    elif config.dtype != "auto":
        cpu_only = f"a dtype ({config.dtype}) is the reference's, which runs on the CPU"
    elif config.kv_dtype != "bf16":
        cpu_only = f"keys and values in {config.kv_dtype} are on the CPU only"
    device = find_device(config.device, cpu_only=cpu_only)
    return None if device.type == "cpu" else device


def cuda_ops(config: EngineConfig, device: torch.device, quant: Format) -> Ops:
    """Triton's kernels; the module is loaded only where there is a GPU."""
    from outdraft.ops.cuda.ops import CudaOps

    return CudaOps(device, quant, KV_DTYPES[config.kv_dtype], pdl=has_dependent_launch(device))


def load_target(path: Path, engine: EngineConfig, loading: Loading | None = None) -> Target:
    """Read a target from a Hugging Face directory.

    Args:
        loading: told how far it is.

    Raises:
        ModelError: the directory, its config or its tensors cannot be used; the message says why.
    """
    raw = read_config(path)
    family = family_of(raw, path)
    if family.cpu_only is not None:
        if engine.device == "cuda":
            raise ModelError(f"{path} cannot run on the GPU: {family.cpu_only}", "use --device cpu")
        engine = replace(engine, device="cpu")
    config = family.read_config(raw)
    torch_dtype = resolve_dtype(engine.dtype, config.dtype)
    checkpoint = Checkpoint.open(path)
    weights, report, bits = open_weights(
        checkpoint,
        raw,
        family.expected_tensors(config),
        family.ignore_rules(config),
        prefixes=family.prefixes,
        dtype=torch_dtype,
    )
    adapter = find_adapter(engine, family, config)
    if adapter is not None:
        weights.changed = adapter.merged
    ops = choose_ops(engine, config, stored_bits=bits, weights=weights.matrices())
    set_threads(engine.threads, compiled=isinstance(ops, CpuOps))
    n_positions = min(config.max_position_embeddings, engine.ctx_size or DEFAULT_CTX_SIZE)
    key = None if adapter is None else adapter.key
    with packing(ops, weights, raw, engine, loading, adapter=key):
        model = family.build(config, weights, ops, n_positions)
    return Target(path, family, config, model, report, torch_dtype, ops, n_positions, adapter)


def find_adapter(engine: EngineConfig, family: Family, config: TargetConfig) -> Adapter | None:
    """The adapter that was asked for, checked against the model.

    Raises:
        ModelError: it is not on this machine, not supported, or for another model.
    """
    if engine.adapter is None:
        return None
    expected, ignore = family.expected_tensors(config), family.ignore_rules(config)
    return open_adapter(resolve_model(engine.adapter), expected, ignore, family.prefixes)


@contextmanager
def packing(
    ops: Ops,
    weights: Weights,
    raw: Mapping[str, Any],
    engine: EngineConfig,
    loading: Loading | None = None,
    *,
    adapter: str | None = None,
) -> Iterator[None]:
    """While it lasts, `ops` packs these weights, from the cache or into it if there is one.

    Args:
        raw: the model's config.json.
        adapter: digest of what is added to the weights.
    """
    weights.stored, weights.device = not isinstance(ops, ReferenceOps), ops.device
    loading = loading or Loading()
    if not isinstance(ops, CpuOps):
        loading.begin("reading weights", weights.n_bytes)
        weights.checkpoint.on_read = loading.advance
        yield
        weights.checkpoint.on_read = None
        return
    file, cache = None, packed_cache(engine)
    if cache is not None:
        key = packing_key(
            weights.checkpoint, raw, ops.format, ops.candidates, weights.dtype, adapter
        )
        file = CacheFile(cache, key, estimated_bytes(weights.n_params, ops.format))
    try:
        with packer(weights.checkpoint, weights.n_bytes, file, loading) as ops.packer:
            yield
    finally:
        ops.packer = pack_stored


def packed_cache(engine: EngineConfig) -> PackedCache | None:
    """Where packed weights are kept, if anywhere."""
    if engine.cache_dir is None:
        return None
    limit = engine.cache_max_gb
    return PackedCache(
        Path(engine.cache_dir).expanduser(),
        min_bytes=engine.cache_min_mb * 10**6,
        max_bytes=None if limit is None else limit * 10**9,
    )


def open_weights(
    checkpoint: Checkpoint,
    raw: Mapping[str, Any],
    expected: Mapping[str, ExpectedTensor],
    ignore: Sequence[IgnoreRule],
    *,
    prefixes: Sequence[str],
    dtype: torch.dtype,
) -> tuple[Weights, LoadReport, int]:
    """The tensors of a model as its config `raw` declares them, none read yet, and their bits.

    Raises:
        ModelError: a quantisation that is not supported, or tensors that do not fit the model.
    """
    four = int4_scheme(raw)
    eight = four is None and is_int8_channel(raw)
    weights, report = open_tensors(
        checkpoint,
        expected,
        ignore,
        prefixes=prefixes,
        dtype=dtype,
        int8_channel=eight,
        int4=four,
    )
    return weights, report, 4 if four is not None else 8 if eight else 16
