"""Our weights for another engine: dequantised, under transformers' names.

Here: whatever the engine reads (bf16, int8 rows, packed int4), as floating tensors in memory or as
a Hugging Face directory. Not here: what a peer does with them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, dtype

from outdraft.models import gemma4_assistant
from outdraft.models.registry import Target, open_weights
from outdraft.speculate.build import read_assistant_config
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.load import Weights
from outdraft.weights.save import save_checkpoint

ASSISTANT_OWN = ("pre_projection.", "post_projection.", "masked_embedding.", "lm_head.")
EXTRA_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def target_state(target: Target) -> dict[str, Tensor]:
    """The target's weights, typed as ours are."""
    raw = read_config(target.path)
    weights, _, _ = open_weights(
        Checkpoint.open(target.path),
        raw,
        target.family.expected_tensors(target.config),
        target.family.ignore_rules(target.config),
        prefixes=target.family.prefixes,
        dtype=target.dtype,
    )
    return {
        name if name.startswith("lm_head.") else f"model.{name}": tensor
        for name, tensor in _floats(weights).items()
    }


def assistant_state(path: Path, dtype: dtype) -> dict[str, Tensor]:
    """An assistant's weights in this type."""
    config = read_assistant_config(path)
    weights, _, _ = open_weights(
        Checkpoint.open(path),
        read_config(path),
        gemma4_assistant.expected_tensors(config),
        gemma4_assistant.ignore_rules(config),
        prefixes=gemma4_assistant.PREFIXES,
        dtype=dtype,
    )
    return {
        name if name.startswith(ASSISTANT_OWN) else f"model.{name}": tensor
        for name, tensor in _floats(weights).items()
    }


def write_directory(source: Path, state: Mapping[str, Tensor], directory: Path) -> None:
    """A Hugging Face directory with these weights and the source's config and tokenizer.

    Raises:
        TrainingError: it cannot be written.
    """
    config = {k: v for k, v in read_config(source).items() if k != "quantization_config"}
    extra = [source / name for name in EXTRA_FILES if (source / name).exists()]
    save_checkpoint(directory, state, config, extra_files=extra)


def _floats(weights: Weights) -> dict[str, Tensor]:
    tensors: dict[str, Any] = {name: weights[name] for name in weights}
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values()), "not opened as stored"
    return tensors
