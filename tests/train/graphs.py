"""Tiny targets and assistants in training, in fp64."""

import torch
from torch import Tensor

from outdraft.models import gemma4, gemma4_assistant
from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config
from outdraft.ops.batched import BatchedOps
from tests import tiny

WINDOW = 5


def build(shape: str = "plain") -> tuple[Gemma4, Gemma4Assistant, dict[str, Tensor]]:
    """A random pair in fp64 with a window of 5, and the assistant's weights as leaves."""
    raw = tiny.target_config(shape, sliding_window=WINDOW)
    config = Gemma4Config.from_hf(raw)
    assistant_raw = tiny.assistant_config(raw)
    assistant_config = AssistantConfig.from_hf(assistant_raw)
    target = tiny.random_tensors(gemma4.expected_tensors(config), 3, torch.float64)
    weights = tiny.random_tensors(
        gemma4_assistant.expected_tensors(assistant_config), 4, torch.float64
    )
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    return (
        Gemma4(config, target, BatchedOps()),
        Gemma4Assistant(assistant_config, leaves, BatchedOps()),
        leaves,
    )
