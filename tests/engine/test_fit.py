"""Which device is taken, what fits on it, and what is said where it does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import outdraft
from outdraft import device
from outdraft.cache.memory import Memory, memory_bytes
from outdraft.config import EngineConfig
from outdraft.device import CPU, find_device
from outdraft.engine import fit
from outdraft.errors import OutdraftError
from outdraft.models import registry
from outdraft.models.registry import load_target
from tests import tiny


def test_a_gpu_is_taken_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_missing", lambda: "there is none")
    assert find_device("auto") == find_device("cpu") == CPU
    with pytest.raises(OutdraftError, match="there is none"):
        find_device("cuda")
    monkeypatch.setattr(device, "_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 0)
    assert find_device("auto", cpu_only="a dtype") == find_device("cpu") == CPU
    with pytest.raises(OutdraftError, match="a dtype"):
        find_device("cuda", cpu_only="a dtype")


@pytest.mark.parametrize(
    "options", [{"backend": "reference"}, {"dtype": "float32"}, {"kv_dtype": "int8"}]
)
def test_what_only_a_cpu_has_keeps_a_gpu_away(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_missing", lambda: None)
    assert registry.card(EngineConfig(**options)) is None
    with pytest.raises(OutdraftError):
        registry.card(EngineConfig(device="cuda", **options))


class Card:
    """Operations that say they are on a GPU."""

    device = torch.device("cuda", 0)
    kv_dtype = torch.bfloat16


def test_keys_and_values_take_what_a_gpu_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(backend="reference", ctx_size=512, max_sequences=8)
    target = load_target(tiny.tiny_target(tmp_path / "target"), config)
    on_card: Any = replace(target, ops=Card())
    layers = target.family.memory_layers(target.config)
    same: dict[str, Any] = {
        "max_sequences": 8,
        "max_tokens": 512,
        "max_rows": 512,
        "dtype": torch.bfloat16,
        "prefix_cache": True,
    }
    made: dict[str, Any] = {}
    monkeypatch.setattr(fit, "Memory", lambda layers, **options: made.update(options))
    spare = fit.SPARE_BYTES + fit.pass_bytes(on_card.config, config.prefill_chunk)
    sizes = {n: memory_bytes(layers, pool_tokens=n, **same) for n in (512, 1024, 2048, 4096)}
    for n, n_bytes in sizes.items():
        monkeypatch.setattr(fit, "free_bytes", lambda _, room=n_bytes: (spare + room, 80 * 10**9))
        fit.build_memory(on_card, config, 512, 0)
        assert made["pool_tokens"] == n and made["device"] == Card.device
        assert n_bytes == Memory(layers, pool_tokens=n, **same).n_bytes
    few = sizes[512] - 1
    monkeypatch.setattr(fit, "free_bytes", lambda _: (spare + few, 80 * 10**9))
    with pytest.raises(OutdraftError, match=r"512 tokens need 0\.00 GB .* 80\.0 GB left"):
        fit.build_memory(on_card, config, 512, 0)


def test_without_the_compiled_core_only_its_use_fails() -> None:
    core = outdraft._AbsentCore()
    core.set_threads(3)
    assert core.threads() == 1 and core.available_isas() == []
    assert core.Weight | None
    with pytest.raises(OutdraftError, match="not installed"):
        core.Weight("w8", 1, 2)
