"""Trained models as Hugging Face directories that the engine loads, and back.

Here: names and types on disk. Not here: checkpoints of a run that goes on (checkpoint.py).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.models import gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.train.presets import DRAFT_DEFAULT
from outdraft.train.tokenizer import BOS_ID, END_OF_TURN_ID, EOS_ID, PAD_ID
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import CONFIG_NAME, read_config, read_json
from outdraft.weights.load import load_tensors
from outdraft.weights.save import new_directory, write_json, write_weights

_GENERATION = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_COPIED = (
    _GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_TOP_LEVEL = ("pre_projection.", "post_projection.", "masked_embedding.", "lm_head.")


def export_model(
    directory: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer_directory: Path,
) -> None:
    """Write a target or an assistant in bf16 with its tokenizer.

    Raises:
        TrainingError: the directory is there already, or cannot be written.
    """
    generation: dict[str, Any] = {
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, END_OF_TURN_ID],
        "pad_token_id": PAD_ID,
    }
    if "backbone_hidden_size" in config:
        generation["num_assistant_tokens"] = DRAFT_DEFAULT
    stored = {
        name if name.startswith(_TOP_LEVEL) else f"model.{name}": weight.to(torch.bfloat16)
        for name, weight in weights.items()
    }
    with new_directory(directory) as unfinished:
        write_json(unfinished / CONFIG_NAME, config)
        write_json(unfinished / "generation_config.json", generation)
        write_weights(unfinished, stored)
        for path in tokenizer_directory.iterdir():
            (unfinished / path.name).write_bytes(path.read_bytes())


def export_like(
    directory: Path,
    source: Path,
    weights: Mapping[str, Tensor],
    copied: Collection[str] = _COPIED,
) -> None:
    """Write new weights of the model in `source`, in bf16, with copies of its other files.

    Args:
        weights: by canonical name, all that the model has.
        copied: which files, where they are there.

    Raises:
        TrainingError: the directory is there already, or cannot be written.
    """
    config = read_config(source)
    config.pop("quantization_config", None)
    config["dtype"] = "bfloat16"
    _export(directory, source, config, weights, copied)


def export_new(
    directory: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    target: Path,
    n_draft: int,
) -> None:
    """Write a new assistant in bf16 with copies of its target's tokenizer.

    Args:
        n_draft: tokens it drafts where nothing else is asked for.

    Raises:
        TrainingError: the directory is there already, or cannot be written.
    """
    known = target / _GENERATION
    tokens = read_json(known, "generation config") if known.exists() else {}
    generation = {name: tokens[name] for name in _TOKENS if name in tokens}
    generation["num_assistant_tokens"] = n_draft
    copied = [name for name in _COPIED if name != _GENERATION]
    _export(directory, target, config, weights, copied, generation)


def _export(
    directory: Path,
    source: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    copied: Collection[str],
    generation: Mapping[str, Any] | None = None,
) -> None:
    stored = {
        name if name.startswith(_TOP_LEVEL) else f"model.{name}": _stored(weight)
        for name, weight in weights.items()
    }
    with new_directory(directory) as unfinished:
        for path in source.iterdir():
            if path.name in copied:
                (unfinished / path.name).write_bytes(path.read_bytes())
        if generation is not None:
            write_json(unfinished / _GENERATION, generation)
        write_json(unfinished / CONFIG_NAME, config)
        write_weights(unfinished, stored)


def _stored(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16) if weight.is_floating_point() else weight


def load_exported_target(
    directory: Path, config: Gemma4Config, device: torch.device
) -> dict[str, Tensor]:
    """The target's weights as they are served (rounded to bf16), in fp32, by canonical name."""
    weights, _ = load_tensors(
        Checkpoint.open(directory),
        gemma4.expected_tensors(config),
        gemma4.ignore_rules(config),
        prefixes=gemma4.PREFIXES,
        dtype=torch.float32,
    )
    return {name: weight.to(device) for name, weight in weights.items()}
