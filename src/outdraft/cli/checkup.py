"""What a model directory holds, found out from its JSON files and tensor headers alone.

Here: gathering facts, going on after a problem as far as possible. The checks are those of loading
itself, run over tensors without data. Not here: how the facts are shown (inspect.py).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from outdraft.bench.synthetic import (
    CountingOps,
    synthetic_assistant,
    synthetic_head,
    synthetic_target,
)
from outdraft.cache.memory import LayerMemory, kv_layers, plan_pages, plan_states
from outdraft.cache.recurrent import RecurrentLayer
from outdraft.cli.findings import Checkup
from outdraft.cli.headers import HeadersOnly, quantisation_of
from outdraft.config import DEFAULT_CTX_SIZE, EngineConfig
from outdraft.engine.fit import DEFAULT_SEQUENCES
from outdraft.errors import ModelError, PairingError
from outdraft.models import gemma4_assistant, gemma4_config
from outdraft.models.gemma4_config import ASSISTANT_TYPES, AssistantConfig, Gemma4Config
from outdraft.models.heads import has_heads, head_family
from outdraft.models.layers import TargetConfig
from outdraft.models.registry import (
    CANDIDATES,
    DTYPES,
    TARGETS,
    family_of,
    find_adapter,
    open_weights,
)
from outdraft.ops.packed import Format
from outdraft.speculate.build import HEAD_DRAFTS, MODEL_DRAFTS, read_assistant_config
from outdraft.speculate.draft_model import check_vocabularies
from outdraft.speculate.mtp import find_head
from outdraft.text.chat import ChatTemplate
from outdraft.text.tokenizer import Tokenizer
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.find import find_assistant, resolve_model
from outdraft.weights.load import ExpectedTensor, IgnoreRule
from outdraft.weights.packed_cache import PackedCache, packing_key

NOT_GEMMA = (
    "an assistant is for a Gemma 4 target, and this is none",
    "name a smaller model of the same tokenizer with --assistant",
)
KV_BYTES = 2  # keys and values are kept in bf16 unless asked otherwise

# First match wins: part of a tensor's name -> the group that its parameters are counted in.
PARAMETER_GROUPS = (
    ("embed_tokens_per_layer", "per-layer embeddings"),
    ("embed", "embedding"),
    ("lm_head", "head"),
    ("norm", "norms and scalars"),
    ("scal", "norms and scalars"),
    ("self_attn", "attention"),
    ("mlp", "MLP"),
    ("experts", "experts"),
    ("router", "router"),
    ("", "projections and the rest"),
)


def examine(
    path: Path,
    assistant: str | None = None,
    cache: PackedCache | None = None,
    adapter: str | None = None,
) -> Checkup:
    """Look at a target's or an assistant's directory.

    Args:
        assistant: the drafter to pair a target with; None looks for one.
        cache: where to look for its packed weights.
        adapter: what is to be added to the target's weights.
    """
    found = Checkup(path)
    raw = _read_config(found)
    checkpoint = _open_weights(found)
    if found.model_type in ASSISTANT_TYPES:
        config = _examine_assistant(found, raw, checkpoint)
        if config is not None and checkpoint is not None:
            note_packed(found, raw, checkpoint, _counter(config), config.text.dtype, cache)
        return found
    target = _examine_target(found, raw, checkpoint)
    if target is not None and checkpoint is not None:
        build = partial(synthetic_target, target, n_positions=1, family=family_of(raw, path))
        key = _examine_adapter(found, target, adapter)
        note_packed(found, raw, checkpoint, build, target.dtype, cache, key)
    _read_text(found)
    if target is not None:
        _find_drafter(found, target, assistant, cache)
    return found


def _counter(config: AssistantConfig) -> Callable[[CountingOps], object]:
    return partial(synthetic_assistant, config, n_positions=1)


def note_packed(
    found: Checkup,
    raw: Mapping[str, Any],
    checkpoint: Checkpoint,
    build: Callable[[CountingOps], object],
    dtype: str,
    cache: PackedCache | None,
    adapter: str | None = None,
) -> None:
    """Count what the kernels' weights take in each format, and look for their files."""
    is_drafter = found.kind in ("assistant", "native head")
    formats: tuple[Format, ...] = ("w8", "bf16") if is_drafter else ("w4", "w8", "bf16")
    for format in formats:
        ops = CountingOps(format)
        build(ops)
        found.packed_bytes[format] = ops.n_bytes
        if cache is None or found.problems or dtype not in DTYPES:
            continue
        key = packing_key(checkpoint, raw, format, CANDIDATES, DTYPES[dtype], adapter)
        path = cache.path(key)
        if path.exists():
            found.packed_files[format] = str(path)


def _examine_adapter(found: Checkup, config: TargetConfig, name: str | None) -> str | None:
    """Check an adapter against the target; the digest of its files."""
    try:
        family = TARGETS[str(found.model_type)]
        adapter = find_adapter(EngineConfig(adapter=name), family, config)
    except ModelError as error:
        found.note("adapter", error)
        return None
    if adapter is None:
        return None
    ranks = ", ".join(map(str, adapter.ranks))
    found.adapter = f"{adapter.directory}: LoRA of rank {ranks} on {len(adapter.pairs)} matrices"
    return adapter.key


def _read_config(found: Checkup) -> Mapping[str, Any]:
    try:
        raw = read_config(found.path)
    except ModelError as error:
        found.note("config", error)
        return {}
    found.model_type = raw.get("model_type")
    try:
        found.quantisation = quantisation_of(raw)
    except ModelError as error:
        found.note("quantisation", error)
    return raw


def _open_weights(found: Checkup) -> Checkpoint | None:
    try:
        checkpoint = HeadersOnly.open(found.path)
    except ModelError as error:
        found.note("weights", error)
        return None
    specs = [checkpoint.spec(name) for name in checkpoint.names()]
    stored: Counter[str] = Counter()
    for spec in specs:
        stored[_short(spec.dtype)] += spec.n_params
    found.n_tensors, found.n_bytes = len(specs), checkpoint.n_bytes
    found.stored_params = dict(stored)
    return checkpoint


def _examine_target(
    found: Checkup, raw: Mapping[str, Any], checkpoint: Checkpoint | None
) -> TargetConfig | None:
    if not raw:
        return None
    try:
        family = family_of(raw, found.path)
        config = family.read_config(raw)
        layers = family.memory_layers(config)
    except ModelError as error:
        found.note("config", error)
        return None
    found.shape = family.describe(config)
    _count_memory(found, layers)
    n_tokens = min(config.max_position_embeddings, DEFAULT_CTX_SIZE)
    least = DEFAULT_SEQUENCES * n_tokens
    pages = plan_pages(layers, DEFAULT_SEQUENCES, n_tokens, 1, least, prefix_cache=True)
    found.kept_states = plan_states(layers, pages, torch.bfloat16)
    _check_tensors(
        found,
        checkpoint,
        family.expected_tensors(config),
        family.ignore_rules(config),
        family.prefixes,
        raw,
    )
    return config


def _examine_assistant(
    found: Checkup, raw: Mapping[str, Any], checkpoint: Checkpoint | None
) -> AssistantConfig | None:
    found.kind = "assistant"
    try:
        config = read_assistant_config(found.path)
    except ModelError as error:
        found.note("config", error)
        return None
    found.n_draft_default = config.n_draft_default
    head = f"ordered, {config.n_centroids} centroids" if config.ordered else "dense"
    found.shape = {
        **gemma4_config.describe(config.text),
        "target's hidden size": config.backbone_hidden_size,
        "head": head,
    }
    _check_tensors(
        found,
        checkpoint,
        gemma4_assistant.expected_tensors(config),
        gemma4_assistant.ignore_rules(config),
        gemma4_assistant.PREFIXES,
        raw,
    )
    return config


def _check_tensors(
    found: Checkup,
    checkpoint: Checkpoint | None,
    expected: Mapping[str, ExpectedTensor],
    ignore: Sequence[IgnoreRule],
    prefixes: Sequence[str],
    raw: Mapping[str, Any],
) -> None:
    """Load without data: the same errors, and the same report."""
    groups: Counter[str] = Counter()
    for name, tensor in expected.items():
        group = next(label for part, label in PARAMETER_GROUPS if part in name)
        groups[group] += torch.Size(tensor.shape).numel()
    found.params_by_group = dict(groups.most_common())
    if checkpoint is None or any(p.where == "quantisation" for p in found.problems):
        return
    try:
        _, report, _ = open_weights(
            checkpoint, raw, expected, ignore, prefixes=prefixes, dtype=torch.float32
        )
    except ModelError as error:
        found.note("weights", error)
        return
    found.ignored = [
        {"count": g.count, "bytes": g.n_bytes, "example": g.example, "reason": g.reason}
        for g in report.ignored
    ]


def _count_memory(found: Checkup, layers: Sequence[LayerMemory]) -> None:
    for layer in layers:
        if isinstance(layer, RecurrentLayer):
            found.state_bytes += layer.n_bytes
    for index, layer in kv_layers(layers).items():
        if layer.source == index:
            n_bytes = 2 * layer.n_kv_heads * layer.head_dim * KV_BYTES
            before = found.kv_bytes_per_token.get(layer.group, 0)
            found.kv_bytes_per_token[layer.group] = before + n_bytes
        if layer.window is not None:
            found.windows[layer.group] = layer.window


def _read_text(found: Checkup) -> None:
    try:
        tokenizer = Tokenizer.load(found.path)
        template = ChatTemplate.load(found.path)
    except ModelError as error:
        found.note("tokenizer", error)
        return
    found.tokenizer = {
        "tokens": tokenizer.vocab_size,
        "bos": tokenizer.bos_id,
        "eos": sorted(tokenizer.eos_ids),
        "chat template": template is not None,
    }


def _find_drafter(
    found: Checkup, config: TargetConfig, asked: str | None, cache: PackedCache | None
) -> None:
    if has_heads(config) and asked is None:
        _examine_head(found, config, cache)
        return
    if asked is not None and _examine_draft_model(found, asked, cache):
        return
    if not isinstance(config, Gemma4Config):
        found.drafter_reason = (
            "assistants are made for Gemma 4; give a smaller model by --assistant"
        )
        if asked is not None:
            found.note("drafter", PairingError(*NOT_GEMMA))
        return
    try:
        choice = find_assistant(found.path, asked)
    except ModelError as error:
        found.note("drafter", error)
        return
    found.drafter_reason = choice.reason
    if choice.path is None:
        return
    drafter = Checkup(choice.path)
    found.drafter = drafter
    raw, checkpoint = _read_config(drafter), _open_weights(drafter)
    assistant = _examine_assistant(drafter, raw, checkpoint)
    if assistant is not None and checkpoint is not None:
        note_packed(drafter, raw, checkpoint, _counter(assistant), config.dtype, cache)
    if assistant is not None:
        try:
            gemma4_assistant.check_pair(config, assistant)
        except ModelError as error:
            drafter.note("pairing", error)


def _examine_draft_model(found: Checkup, asked: str, cache: PackedCache | None) -> bool:
    """A whole model that was named as the drafter; False if it is something else."""
    try:
        path = resolve_model(asked)
        if read_config(path).get("model_type") not in TARGETS:
            return False
    except ModelError:
        return False
    found.drafter_reason = "draft-model: named by you"
    drafter = found.drafter = Checkup(path, "draft model", n_draft_default=MODEL_DRAFTS)
    raw, checkpoint = _read_config(drafter), _open_weights(drafter)
    config = _examine_target(drafter, raw, checkpoint)
    if config is not None and checkpoint is not None:
        build = partial(synthetic_target, config, n_positions=1, family=family_of(raw, path))
        note_packed(drafter, raw, checkpoint, build, config.dtype, cache)
    _read_text(drafter)
    try:
        check_vocabularies(Tokenizer.load(found.path), Tokenizer.load(path))
    except ModelError as error:
        drafter.note("pairing", error)
    return True


def _examine_head(found: Checkup, config: TargetConfig, cache: PackedCache | None) -> None:
    """The MTP head in a target's own checkpoint, if all of it is there."""
    try:
        missing = find_head(found.path, config)
    except ModelError as error:
        found.note("drafter", error)
        return
    if missing is not None:
        found.drafter_reason = f"there is no MTP head: {missing}"
        return
    found.drafter_reason = "mtp: the head in the checkpoint"
    head = found.drafter = Checkup(found.path, "native head")
    raw, checkpoint = _read_config(head), _open_weights(head)
    head.n_draft_default = HEAD_DRAFTS
    family = head_family(config)
    _count_memory(head, family.memory_layers(config))
    tensors = family.expected_tensors(config)
    _check_tensors(head, checkpoint, tensors, family.ignored, family.prefixes, raw)
    head.ignored, head.n_tensors = [], None  # those of the target
    if checkpoint is not None:
        build = partial(synthetic_head, config, n_positions=1)
        note_packed(head, raw, checkpoint, build, config.dtype, cache)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
