"""Made-up weights are real packed weights, and a tiny shape goes through the whole measurement."""

from pathlib import Path

import pytest
import torch

from outdraft.bench import shape as bench
from outdraft.bench.forecast import forecast
from outdraft.bench.shape import Settings, measure_shape, weight_bytes
from outdraft.bench.shapes import Shape
from outdraft.bench.synthetic import (
    DISTINCT_ROWS,
    SyntheticOps,
    packed_bytes,
    synthetic_target,
    synthetic_weight,
)
from outdraft.errors import OutdraftError
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config
from outdraft.models.registry import family_of
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import Format
from tests import tiny

FORMATS: tuple[Format, ...] = ("bf16", "w8", "w4")
SETTINGS = Settings(context=150, n_tokens=3, rounds=2)


def tiny_shape(name: str, *, ordered: bool = False) -> Shape:
    target = tiny.target_config(name)
    if name in tiny.OTHERS:
        family = family_of(target, Path(name))
        config = family.read_config(target)
        drafter = config
        if name == "ministral3":
            drafter = family.read_config(tiny.target_config(name, num_hidden_layers=2))
        return Shape(name, config, drafter, 0, 0, family)
    assistant = AssistantConfig.from_hf(tiny.assistant_config(target, ordered=ordered))
    return Shape(name, Gemma4Config.from_hf(target), assistant, 0, 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(1, 600, 70), (1, 40, 64), (3, 48, 96)])
def test_bytes_are_known_before_a_weight_exists(format: Format, size: tuple[int, int, int]) -> None:
    assert synthetic_weight(format, *size).n_bytes == packed_bytes(format, *size)


@pytest.mark.parametrize("format", FORMATS)
def test_a_made_up_weight_repeats_its_rows(format: Format) -> None:
    n, k = 2 * DISTINCT_ROWS + 40, 96
    y = CpuOps().linear(torch.randn(5, k), synthetic_weight(format, 1, n, k))
    assert torch.equal(y[:, :DISTINCT_ROWS], y[:, DISTINCT_ROWS : 2 * DISTINCT_ROWS])
    assert torch.equal(y[:, :40], y[:, 2 * DISTINCT_ROWS :])
    assert 0.8 < float(y[:, :DISTINCT_ROWS].std()) < 1.2
    assert len(set(y[0, :DISTINCT_ROWS].tolist())) > DISTINCT_ROWS // 2


@pytest.mark.parametrize(
    "name", ["plain", "moe", "e2b", "ministral3", "qwen3_5", "qwen3_5_moe", "nemotron_h_latent"]
)
def test_the_bytes_of_a_model_are_those_that_were_planned(name: str) -> None:
    shape, ops = tiny_shape(name), SyntheticOps("w4")
    synthetic_target(shape.target, ops, 8, shape.family)
    planned = weight_bytes(shape, Settings(quant="w4"))
    assert 0 < sum(weight.n_bytes for weight in ops.weights) < planned


@pytest.mark.parametrize(
    ("name", "ordered"),
    [
        ("plain", False),
        ("moe", False),
        ("e2b", True),
        ("ministral3", False),
        ("qwen3_5", False),
        ("qwen3_5_moe", False),
        ("nemotron_h_latent", False),
    ],
)
def test_a_tiny_shape_is_measured(name: str, ordered: bool) -> None:
    report = measure_shape(tiny_shape(name, ordered=ordered), SETTINGS, [0.8, 0.7, 0.6])
    assert [row["rows"] for row in report["cost_by_rows"]] == list(range(1, 9))
    n_bytes = [row["bytes"] for row in report["cost_by_rows"]]
    assert n_bytes == sorted(n_bytes)
    # a pass of eight rows reads what one does, and more experts; it writes a state a row
    hybrid = name.startswith(("qwen", "nemotron"))
    assert (n_bytes[-1] > 1.1 * n_bytes[0]) == ("moe" in name or hybrid)
    assert n_bytes[-1] < report["packed_bytes"] + report["kv_bytes"]
    assert 0 < report["python_share"] < 1
    assert report["plain_tok_s"] > 0 and report["read_gb_s"] > 0 and report["draft_step_us"] > 0
    assert [entry["k"] for entry in report["drafting"]] == [1, 2, 3]
    assert report["draft_tok_s"] == max(entry["tok_s"] for entry in report["drafting"])
    parts = {"linear", "attention", "norms and the rest", "head"}
    assert set(report["time_by_part_us"]) == parts | ({"recurrence"} if hybrid else set())
    assert "made up" in report["synthetic"]


def test_without_an_acceptance_nothing_is_said_of_drafting() -> None:
    report = measure_shape(tiny_shape("plain"), SETTINGS, [])
    assert report["drafting"] == [] and report["draft_tok_s"] is None


def test_a_forecast_by_hand() -> None:
    one, two = forecast([0.5, 0.5, 0.5], 1.05, {1: 1.0, 2: 1.25, 3: 1.5}, 0.1)
    assert one["tokens_per_pass"] == 1.5 and one["tok_s"] == pytest.approx(1.5 / 1.4)
    assert two["tokens_per_pass"] == 1.75 and two["speedup"] == pytest.approx(1.75 / 1.75 * 1.05)


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "available_bytes", lambda: 1 << 20)
    with pytest.raises(OutdraftError, match="are free"):
        measure_shape(tiny_shape("plain"), SETTINGS, [])
