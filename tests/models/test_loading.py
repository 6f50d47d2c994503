"""Loading: int8 is taken over bit for bit, and the unpacked model is never in memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from outdraft.config import EngineConfig
from outdraft.models import gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.models.registry import load_target
from outdraft.ops.packed import PackedLinear
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.find import DEMO_DIRECTORY
from tests import tiny

CHILD = """
import sys
from pathlib import Path
from outdraft.config import EngineConfig
from outdraft.models.registry import load_target
def peak():
    # not getrusage: its peak outlives exec, so a child begins with that of its parent
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
load_target(Path(sys.argv[1]), EngineConfig(backend="cpu", quant="w4"))
before = peak()
target = load_target(Path(sys.argv[2]), EngineConfig(backend="cpu", quant="w4", ctx_size=64))
model = target.model
packed = [model.embedding, *(w for layer in model.layers for w in layer.matrices.values())]
print(peak() - before, sum(w.n_bytes for w in packed))
"""


def test_int8_rows_are_taken_over() -> None:
    path = DEMO_DIRECTORY / "target"
    model = load_target(path, EngineConfig(backend="cpu")).model
    checkpoint = Checkpoint.open(path)
    name = "model.layers.2.mlp.down_proj.weight"
    rows, scales = checkpoint.get(name), checkpoint.get(name + "_scale")
    direct = PackedLinear.empty("w8", *rows.shape)
    direct.put_w8(rows, scales[:, 0])
    packed = model.layers[2].matrices["mlp.down_proj"]
    assert packed.format == "w8" and rows.dtype == torch.int8
    for part in ("data", "scales", "zeros"):
        assert torch.equal(getattr(packed, part), getattr(direct, part))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory_is_that_of_the_packed_weights(tmp_path: Path) -> None:
    small = tiny.tiny_target(tmp_path / "small")
    sizes = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 8}
    kinds = [tiny.S, tiny.F] * 4
    config = tiny.target_config(layer_types=kinds, dtype="bfloat16", **sizes)
    expected = gemma4.expected_tensors(Gemma4Config.from_hf(config))
    tensors = tiny.random_tensors(expected, 0, torch.bfloat16)
    big = tiny.write_model(tmp_path / "big", config, tensors)
    del tensors
    command = [sys.executable, "-c", CHILD, str(small), str(big)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, packed = (int(number) for number in done.stdout.split())
    assert packed > 80e6
    assert growth < 1.1 * packed  # what is being unpacked is about 3 MiB
