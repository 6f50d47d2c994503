"""Which drafter a target gets, and why. The only place that knows drafters by name."""

from dataclasses import dataclass
from pathlib import Path

from outdraft.config import EngineConfig
from outdraft.errors import ModelError, PairingError
from outdraft.models import gemma4_assistant
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.models.gemma4_config import ASSISTANT_TYPES, AssistantConfig
from outdraft.models.registry import Target, choose_ops, open_weights
from outdraft.ops.reference import ReferenceOps
from outdraft.speculate.compose import NgramFirst
from outdraft.speculate.drafter import Drafter
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter
from outdraft.speculate.ngram import NgramDrafter
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config, read_json
from outdraft.weights.find import find_assistant

NGRAM_DRAFTS = 8  # the most a step where --spec-draft-n-max is not given


@dataclass(frozen=True, slots=True)
class Pairing:
    """The drafter of a target, or None; `reason` says why in a sentence for people."""

    drafter: Drafter | None
    reason: str
    path: Path | None = None
    n_draft_max: int = 0


def build_drafter(target: Target, config: EngineConfig) -> Pairing:
    """Find, check and load the drafter.

    One that was found without being asked for and does not fit is passed over, with the reason; one
    that was asked for is an error.

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
        return _load_assistant(target, choice.path, choice.reason, config)
    except ModelError as error:
        if asked:
            raise
        return Pairing(None, f"drafting is off: {choice.path}: {error.message}", choice.path)


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


def _load_assistant(target: Target, path: Path, reason: str, config: EngineConfig) -> Pairing:
    assistant = read_assistant_config(path)
    gemma4_assistant.check_pair(target.config, assistant)
    weights, _, bits = open_weights(
        Checkpoint.open(path),
        read_config(path),
        gemma4_assistant.expected_tensors(assistant),
        gemma4_assistant.ignore_rules(assistant),
        prefixes=gemma4_assistant.PREFIXES,
        dtype=target.dtype,
    )
    ops = choose_ops(
        config, assistant.text, stored_bits=bits, weights=weights.matrices(), drafter=True
    )
    weights.stored, weights.device = not isinstance(ops, ReferenceOps), ops.device
    model = Gemma4Assistant(assistant, weights, ops, target.ctx_size)
    kv_layers: dict[str, int] = {
        kind: target.config.last_owner(kind) for kind in dict.fromkeys(assistant.text.layer_types)
    }
    drafter: Drafter = Gemma4AssistantDrafter(model, kv_layers, sample_drafts=config.sample_drafts)
    n_max = _first(config.draft_n, config.draft_n_max, assistant.n_draft_default)
    if config.spec_type == "ngram+gemma4-assistant":
        drafter = NgramFirst(NgramDrafter(), drafter)
        n_max = _first(
            config.draft_n, config.draft_n_max, max(assistant.n_draft_default, NGRAM_DRAFTS)
        )
    return Pairing(drafter, f"{drafter.name}: {reason}", path, n_max)


def _first(*numbers: int | None) -> int:
    return next(n for n in numbers if n is not None)
