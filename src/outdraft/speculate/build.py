"""Which drafter a target gets, and why. The only place that knows drafters by name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outdraft.cache.memory import Memory
from outdraft.config import EngineConfig
from outdraft.errors import ModelError, PairingError
from outdraft.models import gemma4_assistant
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.models.gemma4_config import ASSISTANT_TYPES, AssistantConfig, Gemma4Config
from outdraft.models.heads import has_heads
from outdraft.models.registry import TARGETS, Target, choose_ops, open_weights, packing
from outdraft.speculate.compose import NgramFirst
from outdraft.speculate.draft_model import ModelPass, load_draft_model
from outdraft.speculate.drafter import Drafter
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter
from outdraft.speculate.mtp import find_head, load_head
from outdraft.speculate.ngram import NgramDrafter
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config, read_json
from outdraft.weights.find import find_assistant, resolve_model
from outdraft.weights.loading import Loading

MODEL_DRAFTS = 4  # of a draft model, where --spec-draft-n-max is not given
HEAD_DRAFTS = 3  # of a native head
NGRAM_DRAFTS = 8  # the most a step where --spec-draft-n-max is not given


@dataclass(frozen=True, slots=True)
class Pairing:
    """The drafter of a target, or None; `reason` says why in a sentence for people."""

    drafter: Drafter | None
    reason: str
    path: Path | None = None
    n_draft_max: int = 0
    renewal: "Renewal | None" = None


@dataclass(frozen=True, slots=True)
class Renewal:
    """How the weights of a drafter without a state of its own are exchanged.

    Attributes:
        load: the network in a directory like the drafter's, ready to draft; told how far it is.
        exchange: draft with that network from the next step on; returns the one before.
    """

    load: Callable[[Path, Loading], Any]
    exchange: Callable[[Any], Any]


def build_drafter(
    target: Target,
    config: EngineConfig,
    make_pass: Callable[[Target, Memory], ModelPass],
    loading: Loading | None = None,
) -> Pairing:
    """Find, check and load the drafter.

    One that was found without being asked for and does not fit is passed over, with the reason; one
    that was asked for is an error.

    Args:
        make_pass: how a model with a memory of its own is run.

    Raises:
        ModelError: the drafter that was asked for is missing, damaged or another target's.
    """
    if config.spec_type == "off":
        return Pairing(None, "drafting is off: --spec-type off")
    if config.draft_n == 0:
        return Pairing(None, "drafting is off: --spec-draft-n 0")
    if config.draft_n_max == 0:
        return Pairing(None, "drafting is off: --spec-draft-n-max 0")
    if config.spec_type == "ngram":
        n_max = _first(config.draft_n, config.draft_n_max, NGRAM_DRAFTS)
        return Pairing(NgramDrafter(), "ngram: drafts from the text itself", None, n_max)
    if (pairing := _draft_model(target, config, make_pass, loading)) is not None:
        return pairing
    if has_heads(target.config) and config.spec_type in ("auto", "mtp"):
        return _native_head(target, config, loading)
    if config.spec_type == "mtp":
        raise PairingError(
            f"{target.path} is of a family without MTP heads", "use --spec-type auto"
        )
    if not isinstance(target.config, Gemma4Config):
        if config.assistant is None and config.spec_type == "auto":
            return Pairing(None, "drafting is off: no drafter was given (--assistant DIR)")
        raise PairingError(
            f"an assistant is for a Gemma 4 target, and {target.path} is none",
            "name a smaller model of the same tokenizer with --assistant",
        )
    asked = config.assistant is not None or config.spec_type != "auto"
    choice = find_assistant(target.path, config.assistant)
    if choice.path is None:
        if asked:
            raise PairingError(
                f"no assistant for {target.path}: {choice.reason}",
                "give its directory with --assistant, or leave --spec-type at auto",
            )
        return Pairing(None, f"drafting is off: {choice.reason}")
    try:
        return _load_assistant(target, choice.path, choice.reason, config, loading)
    except ModelError as error:
        if asked:
            raise
        return Pairing(None, f"drafting is off: {choice.path}: {error.message}", choice.path)


def _draft_model(
    target: Target,
    config: EngineConfig,
    make_pass: Callable[[Target, Memory], ModelPass],
    loading: Loading | None,
) -> Pairing | None:
    """A whole model that was named as the drafter, if one was."""
    if config.assistant is not None and config.spec_type in ("auto", "draft-model"):
        path = resolve_model(config.assistant)
        if read_config(path).get("model_type") in TARGETS:
            n_max = _first(config.draft_n, config.draft_n_max, MODEL_DRAFTS)
            model = load_draft_model(target, path, config, make_pass, n_max, loading)
            return Pairing(model, f"{model.name}: named by you", path, n_max)
    if config.spec_type == "draft-model":
        raise PairingError(
            "no draft model is given", "name a smaller model of the same tokenizer: --assistant DIR"
        )
    return None


def _native_head(target: Target, config: EngineConfig, loading: Loading | None) -> Pairing:
    """The head in the target's own checkpoint."""
    reason = find_head(target.path, target.config)
    if reason is not None and config.spec_type == "auto":
        return Pairing(None, f"drafting is off: there is no MTP head: {reason}")
    n_max = _first(config.draft_n, config.draft_n_max, HEAD_DRAFTS)
    head = load_head(target, config, n_max, loading)
    return Pairing(head, f"{head.name}: the head in the checkpoint", target.path, n_max)


def read_assistant_config(path: Path) -> AssistantConfig:
    """The assistant's config, checked.

    Raises:
        ModelError: it is not an assistant's or cannot be used.
    """
    raw = read_config(path)
    if raw.get("model_type") not in ASSISTANT_TYPES:
        raise PairingError(
            f"{path} holds a {raw.get('model_type')!r} model, not an assistant",
            f"an assistant's model_type is one of {', '.join(ASSISTANT_TYPES)}",
        )
    generation = path / "generation_config.json"
    extra = read_json(generation, "generation config") if generation.exists() else None
    return AssistantConfig.from_hf(raw, extra)


def _load_assistant(
    target: Target, path: Path, reason: str, config: EngineConfig, loading: Loading | None
) -> Pairing:
    base = load_assistant(target, path, config, loading)
    assistant = base.model.config
    drafter: Drafter = base
    n_max = _first(config.draft_n, config.draft_n_max, assistant.n_draft_default)
    if config.spec_type == "ngram+gemma4-assistant":
        drafter = NgramFirst(NgramDrafter(), drafter)
        n_max = _first(
            config.draft_n, config.draft_n_max, max(assistant.n_draft_default, NGRAM_DRAFTS)
        )

    def load(other: Path, progress: Loading) -> Gemma4Assistant:
        kept = replace(config, cache_dir=None)  # weights of an hour
        return load_assistant(target, other, kept, progress).model

    renewal = Renewal(load, base.exchange)
    return Pairing(drafter, f"{drafter.name}: {reason}", path, n_max, renewal)


def load_assistant(
    target: Target, path: Path, config: EngineConfig, loading: Loading | None = None
) -> Gemma4AssistantDrafter:
    """The drafter in a directory, alone.

    Raises:
        ModelError: it is damaged, or another target's.
    """
    raw, assistant = read_config(path), read_assistant_config(path)
    own = target.config
    if not isinstance(own, Gemma4Config):
        raise PairingError(f"an assistant is for a Gemma 4 target, and {target.path} is none")
    gemma4_assistant.check_pair(own, assistant)
    weights, _, bits = open_weights(
        Checkpoint.open(path),
        raw,
        gemma4_assistant.expected_tensors(assistant),
        gemma4_assistant.ignore_rules(assistant),
        prefixes=gemma4_assistant.PREFIXES,
        dtype=target.dtype,
    )
    ops = choose_ops(
        config, assistant.text, stored_bits=bits, weights=weights.matrices(), drafter=True
    )
    with packing(ops, weights, raw, config, loading):
        model = Gemma4Assistant(assistant, weights, ops, target.ctx_size)
    kv_layers: dict[str, int] = {
        kind: own.last_owner(kind) for kind in dict.fromkeys(assistant.text.layer_types)
    }
    return Gemma4AssistantDrafter(model, kv_layers, sample_drafts=config.sample_drafts)


def _first(*numbers: int | None) -> int:
    return next(n for n in numbers if n is not None)
