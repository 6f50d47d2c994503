"""Weights for other engines: whatever is stored, they get what ours computes with."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from outdraft.bench.peers.weights import assistant_state, target_state, write_directory
from outdraft.config import EngineConfig
from outdraft.models.registry import load_target
from outdraft.weights.find import DEMO_DIRECTORY
from tests import tiny


def test_packed_int4_is_unpacked(tmp_path: Path) -> None:
    source = tiny.tiny_target(tmp_path / "source", seed=5)
    packed = tiny.int4_target(tmp_path / "packed", source)
    target = load_target(packed, EngineConfig(backend="reference"))
    state = target_state(target)
    floats = load_file(source / "model.safetensors")
    assert state.keys() == floats.keys()
    for name, x in floats.items():
        step = x.float().unflatten(-1, (-1, 32)).abs().amax(-1) / 7 if "_proj." in name else 0 * x
        bound = step.repeat_interleave(32, -1) / 2 if "_proj." in name else step
        assert bool(((state[name] - x).abs() <= bound * 1.0001).all()), name
    name = "layers.1.mlp.down_proj.weight"
    held = target.model.layers[1].matrices["mlp.down_proj"]
    assert torch.equal(held, state[f"model.{name}"])  # the reference multiplies by the same floats


def test_a_directory_that_any_loader_reads(tmp_path: Path) -> None:
    path = DEMO_DIRECTORY / "assistant"
    state = assistant_state(path, torch.bfloat16)
    write_directory(path, state, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], x) for name, x in state.items())
    assert {x.dtype for x in written.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "gemma4_assistant"
    assert (tmp_path / "out" / "tokenizer.json").exists()
