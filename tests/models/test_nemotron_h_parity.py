"""Logits equal transformers' Nemotron-H, dense, with experts and with a latent, with and without a
cache."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from outdraft.cache.memory import Memory
from outdraft.errors import ModelError
from outdraft.models import nemotron_h
from outdraft.models.nemotron_h_config import NemotronHConfig
from outdraft.ops.cpu import CpuOps
from outdraft.ops.reference import ReferenceOps
from tests import tiny
from tests.models.parity import assert_parity, memory_of, run


def reference(raw: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """transformers' model with the same weights; it stacks experts."""
    given = {k: v for k, v in raw.items() if k != "architectures"}
    # It holds time steps above time_step_min in prompts only.
    config = transformers.NemotronHConfig(**given, time_step_min=1e-30)
    config._attn_implementation = "eager"
    model = transformers.NemotronHForCausalLM(config).eval()
    state = {n: t for n, t in weights.items() if n.startswith("lm_head")}
    for name, tensor in weights.items():
        if ".experts.0." in name:
            first, last = name.split(".experts.0.")
            parts = [weights[f"{first}.experts.{e}.{last}"] for e in range(8)]
            tensor, name = torch.stack(parts), f"{first}.experts.{last.removesuffix('.weight')}"
        if not name.startswith("lm_head"):
            state[f"model.{name}"] = tensor
    state = {n: t for n, t in state.items() if not n.removesuffix(".weight").endswith(UNSTACKED)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return model


UNSTACKED = tuple(f".experts.{e}.{name}_proj" for e in range(1, 8) for name in ("up", "down"))


def build(raw: dict[str, Any], weights: dict[str, Tensor]) -> tuple[nemotron_h.NemotronH, Memory]:
    config = NemotronHConfig.from_hf(raw)
    memory = memory_of(nemotron_h.memory_layers(config))
    return nemotron_h.NemotronH(config, weights, ReferenceOps()), memory


@pytest.mark.parametrize("shape", tiny.NEMOTRONS)
@torch.inference_mode()
def test_prefill_and_cached_decoding_equal_transformers(shape: str) -> None:
    """A prompt of several chunks of transformers' scan, then single tokens."""
    raw = tiny.target_config(shape)
    weights = tiny.target_weights(raw, seed=3)
    assert_parity(reference(raw, weights), lambda: build(raw, weights))
