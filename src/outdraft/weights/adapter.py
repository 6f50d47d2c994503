"""LoRA adapters in PEFT's layout, added to a checkpoint's weights as they are read.

A weight W [N, K] becomes W + s B A, with B [N, r], A [r, K] and s = alpha / r, or alpha / sqrt(r)
with rslora (huggingface/peft `tuners/lora`). The sum is formed in fp32 and rounded once to the type
that the weight has in the checkpoint, so what is served is what a merged checkpoint would be. Here:
reading and checking an adapter, the sum. Not here: who asks for one (models/registry.py).
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outdraft.errors import ModelError, WeightsError
from outdraft.ops.stored import Rows, StoredWeight, to_floats
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_json
from outdraft.weights.header import read_header
from outdraft.weights.load import ExpectedTensor, IgnoreRule, find_prefix

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_OUTER = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight")
_HEAD = "lm_head.weight"
_MAX_LISTED = 4
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq")
"""Initialisations that also change the base model's weights."""

# What would give other values than W + s B A, or values that are not in the pairs of matrices.
_REFUSED = (
    ("use_dora", "DoRA also scales the columns of the weights"),
    ("use_qalora", "QA-LoRA pools the inputs"),
    ("alora_invocation_tokens", "an activated adapter is used for a part of the text only"),
    ("modules_to_save", "whole modules beside the pairs of matrices"),
    ("trainable_token_indices", "rows of the embedding beside the pairs of matrices"),
    ("target_parameters", "adapters of stacked experts"),
    ("layer_replication", "layers that the checkpoint has not"),
    ("fan_in_fan_out", "transposed weights, which these models do not have"),
    ("lora_bias", "biases, which these models do not have"),
    ("megatron_config", "adapters of a sharded model"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two matrices of one weight by their names in the file, and what B A is scaled by."""

    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits a model: pairs by the canonical names of the weights they change.

    `key` is a digest of the adapter's files.
    """

    directory: Path
    checkpoint: Checkpoint
    pairs: Mapping[str, Pair]
    key: str

    def merged(self, name: str, weight: StoredWeight) -> StoredWeight:
        """The weight with what the adapter adds to it, if anything."""
        pair = self.pairs.get(name)
        if pair is None:
            return weight

        def read(block: int, first: int, count: int) -> Rows:
            base_NK = to_floats(weight.read(block, first, count), torch.float32)
            # fp64: the result does not depend on how many rows are read at once
            a_rK = self.checkpoint.get(pair.a).double()
            b_Nr = self.checkpoint.rows(pair.b, first, count).double()
            return (base_NK + (pair.scale * (b_Nr @ a_rK)).float()).to(weight.dtype)

        return StoredWeight(weight.key, weight.shape, weight.dtype, "float", read)

    @property
    def ranks(self) -> list[int]:
        """All different ranks, ascending."""
        return sorted({pair.rank for pair in self.pairs.values()})


def open_adapter(
    directory: Path,
    expected: Mapping[str, ExpectedTensor],
    ignore: Sequence[IgnoreRule],
    prefixes: Sequence[str],
) -> Adapter:
    """Read an adapter's config and headers, and check every tensor against the model.

    Args:
        expected: the model's tensors by canonical name.
        ignore: tensors of the model that are not loaded; what is added to them is passed over.
        prefixes: what may stand before canonical names.

    Raises:
        WeightsError: it is not a LoRA adapter, of a kind that is not supported, or for another
            model; the message names the tensors.
    """
    config = _read_config(directory)
    specs = read_header(directory / WEIGHTS_NAME)
    checkpoint = Checkpoint(directory, specs)
    problems: list[str] = []
    modules = _modules(specs, problems)
    plain = {f"{module}.weight" for module in modules}
    prefix = find_prefix(sorted(plain), expected, prefixes)
    rules = [re.compile(rule.pattern) for rule in ignore]
    pairs = {}
    for module in modules:
        name = f"{module.removeprefix(prefix)}.weight"
        wanted = expected.get(name)
        if wanted is None or len(wanted.shape) != 2:
            spellings = (f"{module}.weight", name)
            left_out = any(rule.fullmatch(spelling) for rule in rules for spelling in spellings)
            if not left_out or name == _HEAD:  # a tied head is in use, by another name
                problems.append(f"{_OUTER}{module}: the model has no such matrix")
            continue
        pair = _pair(module, checkpoint, config, wanted.shape, problems)
        if pair is not None:
            pairs[name] = pair
    if not (pairs or problems):
        problems.append("it changes no weight of the model")
    if problems:
        shown = "\n  ".join(problems[:_MAX_LISTED]) + ("\n  …" * (len(problems) > _MAX_LISTED))
        raise WeightsError(
            f"the adapter in {directory} does not fit the model:\n  {shown}",
            "use the model that it was trained for, "
            f"{str(config.get('base_model_name_or_path') or 'which it does not name')!r:.120}",
        )
    return Adapter(directory, checkpoint, pairs, _digest(directory))


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise WeightsError(
            f"{directory} has no {CONFIG_NAME}",
            f"give the directory of a PEFT adapter: {CONFIG_NAME} and {WEIGHTS_NAME}",
        )
    if not (directory / WEIGHTS_NAME).is_file():
        raise WeightsError(
            f"{directory} has no {WEIGHTS_NAME}",
            "save the adapter as safetensors (pickle files are never opened)",
        )
    try:
        config = dict(read_json(path, "the adapter's config"))
    except ModelError as error:
        raise WeightsError(error.message, error.hint) from error
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise _refused(f"peft_type is {kind!r:.40}")
    for field, reason in _REFUSED:
        if config.get(field):
            raise _refused(f"{field}: {reason}")
    if config.get("bias", "none") != "none":
        raise _refused(f"bias is {config['bias']!r:.40}: these models have no biases")
    start = str(config.get("init_lora_weights"))
    if start.startswith(_BASE_CHANGED):
        raise _refused(f"init_lora_weights is {start!r:.40}, which changes the base weights too")
    return config


def _refused(reason: str) -> WeightsError:
    return WeightsError(
        f"this adapter is not supported: {reason}",
        "merge it into its base model with PEFT and give the merged model",
    )


def _modules(names: Iterable[str], problems: list[str]) -> list[str]:
    """Modules that have A or B, without the outer prefix; other names are problems."""
    found: dict[str, None] = {}
    for name in names:
        part = next((part for part in _PARTS if name.endswith(part)), None)
        if part is None or not name.startswith(_OUTER):
            problems.append(f"{name!r:.160} is not a LoRA matrix of a linear layer")
            continue
        found[name.removeprefix(_OUTER).removesuffix(part)] = None
    return list(found)


def _pair(
    module: str,
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    shape: tuple[int, ...],
    problems: list[str],
) -> Pair | None:
    """The pair of a weight [N, K], or None and a problem."""
    a, b = (f"{_OUTER}{module}{part}" for part in _PARTS)
    absent = [name for name in (a, b) if name not in checkpoint]
    if absent:
        problems.append(f"{absent[0]} is missing")
        return None
    rank = _of_module(config, "rank_pattern", module, config.get("r"))
    alpha = _of_module(config, "alpha_pattern", module, config.get("lora_alpha"))
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        problems.append(f"{module}: r is {rank!r:.20} and lora_alpha {alpha!r:.20}")
        return None
    wanted = {a: (rank, shape[1]), b: (shape[0], rank)}
    for name, size in wanted.items():
        spec = checkpoint.spec(name)
        if spec.shape != size or not spec.dtype.is_floating_point:
            kind = str(spec.dtype).removeprefix("torch.")
            problems.append(f"{name} is {kind} {list(spec.shape)}, expected {list(size)}")
            return None
    root = bool(config.get("use_rslora"))
    return Pair(a, b, rank, float(alpha) / (math.sqrt(rank) if root else rank))


def _of_module(config: Mapping[str, Any], patterns: str, module: str, default: Any) -> Any:
    """A setting of one module: the first pattern that its name ends with, as PEFT looks it up."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise _refused(f"{patterns} has {pattern!r:.60}: {error}") from error
    return default


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            with (directory / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise WeightsError(f"{directory / name} cannot be read: {error}", "check it") from error
    return digest.hexdigest()
