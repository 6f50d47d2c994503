"""Strict loading: names, prefixes, shapes, dtypes, int8, and every problem told at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from outdraft.errors import WeightsError
from outdraft.weights.checkpoint import SINGLE_NAME, Checkpoint
from outdraft.weights.load import (
    ExpectedTensor,
    IgnoredGroup,
    IgnoreRule,
    LoadReport,
    find_prefix,
    load_tensors,
)
from outdraft.weights.quantise import quantise_int8_channel

PREFIXES = ("model.language_model.", "model.")
EXPECTED = {
    "embed_tokens.weight": ExpectedTensor((6, 4)),
    "layers.0.q_proj.weight": ExpectedTensor((3, 4)),
    "layers.0.k_proj.weight": ExpectedTensor((2, 4), optional=True),
    "ordering": ExpectedTensor((6,), optional=True, dtype=torch.int64),
}
TENSORS = {
    "embed_tokens.weight": torch.randn(6, 4),
    "layers.0.q_proj.weight": torch.randn(3, 4),
}
RULES = (
    IgnoreRule(r"model\.vision_tower\..*", "vision is not supported yet"),
    IgnoreRule(r"layers\.1\.k_proj\.weight", "never used"),
)


def write(directory: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, directory / SINGLE_NAME)
    return Checkpoint.open(directory)


def load(checkpoint: Checkpoint, **options: Any) -> tuple[dict[str, torch.Tensor], LoadReport]:
    options = {"prefixes": PREFIXES, "dtype": torch.float32} | options
    return load_tensors(checkpoint, EXPECTED, RULES, **options)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_every_prefix_is_found(tmp_path: Path, prefix: str) -> None:
    tensors, report = load(write(tmp_path, prefixed(prefix)))
    assert sorted(tensors) == sorted(TENSORS)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert report == LoadReport(2, 36, report.params_by_dtype, ())
    assert report.params_by_dtype == {"float32": 36}


def test_the_first_prefix_holds_for_all_and_bare_names_are_found(tmp_path: Path) -> None:
    mixed = prefixed("model.language_model.") | {"ordering": torch.arange(1, 7)}
    assert "ordering" in load(write(tmp_path, mixed))[0]
    both = prefixed("model.language_model.") | {"model.layers.0.k_proj.weight": torch.ones(2, 4)}
    with pytest.raises(WeightsError, match=r"1 unexpected: model\.layers\.0\.k_proj\.weight"):
        load(write(tmp_path, both))
    assert find_prefix(list(both), EXPECTED, PREFIXES) == "model.language_model."
    assert find_prefix(list(both), EXPECTED, PREFIXES[::-1]) == "model."
    assert find_prefix(["other"], EXPECTED, PREFIXES) == ""


def test_a_name_twice_is_unexpected(tmp_path: Path) -> None:
    twice = prefixed("model.") | {"embed_tokens.weight": torch.ones(6, 4)}
    with pytest.raises(WeightsError, match=r"1 unexpected: embed_tokens\.weight"):
        load(write(tmp_path, twice))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_are_rounded_to_the_compute_dtype(
    tmp_path: Path, source: torch.dtype, dtype: torch.dtype
) -> None:
    files = {name: tensor.to(source) for name, tensor in prefixed("model.").items()}
    tensors, _ = load(write(tmp_path, files | {"ordering": torch.arange(6).int()}), dtype=dtype)
    for name in TENSORS:
        assert torch.equal(tensors[name], files["model." + name].to(dtype))
    assert tensors["ordering"].dtype == torch.int64


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    tensors, _ = load(write(tmp_path, prefixed("")))
    (tmp_path / SINGLE_NAME).write_bytes(b"\0" * (tmp_path / SINGLE_NAME).stat().st_size)
    tensors["embed_tokens.weight"][0] += 1
    assert torch.equal(tensors["embed_tokens.weight"][1:], TENSORS["embed_tokens.weight"][1:])


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    files = {
        "model.layers.0.q_proj.weight": torch.ones(4, 3),
        "model.layers.0.k_proj.weight": torch.ones(2, 4).to(torch.float8_e4m3fn),
        "model.ordering": torch.ones(6),
        "model.layers.1.k_proj.weight": torch.ones(2),
    } | {f"model.extra.{number}": torch.ones(1) for number in range(10)}
    with pytest.raises(WeightsError) as caught:
        load(write(tmp_path, files))
    message = caught.value.message
    assert "1 missing: model.embed_tokens.weight" in message
    assert "model.layers.0.q_proj.weight is [4, 3], expected [3, 4]" in message
    assert "model.layers.0.k_proj.weight is float8_e4m3fn, which is not supported" in message
    assert "model.ordering is float32, not int64" in message
    assert "10 unexpected: model.extra.0;" in message
    assert "model.extra.7; …" in message and "model.extra.8" not in message
    assert "model.layers.1" not in message


def test_what_is_ignored_is_reported_with_its_reason(tmp_path: Path) -> None:
    ignored = {
        "model.vision_tower.a": torch.ones(5),
        "model.vision_tower.b": torch.ones(3, dtype=torch.int8),
        "model.language_model.layers.1.k_proj.weight": torch.ones(2).half(),
    }
    _, report = load(write(tmp_path, prefixed("model.language_model.") | ignored))
    assert set(report.ignored) == {
        IgnoredGroup("vision is not supported yet", 2, 23, "model.vision_tower.a"),
        IgnoredGroup("never used", 1, 4, "model.language_model.layers.1.k_proj.weight"),
    }


def test_rules_match_whole_names_only(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"unexpected: model\.layers\.1\.k_proj\.weight_x"):
        load(
            write(tmp_path, prefixed("model.") | {"model.layers.1.k_proj.weight_x": torch.ones(1)})
        )


def test_an_expected_tensor_is_never_ignored(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, prefixed("model."))
    everything = (IgnoreRule(".*", "all"),)
    tensors, report = load_tensors(
        checkpoint, EXPECTED, everything, prefixes=PREFIXES, dtype=torch.float32
    )
    assert len(tensors) == 2 and report.ignored == ()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_multiplied_in_fp32_and_rounded_once(
    tmp_path: Path, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    files = quantise_int8_channel(prefixed("model."), ["model.layers.0.q_proj.weight"])
    name = "model.layers.0.q_proj.weight"
    files[name + "_scale"] = files[name + "_scale"].to(scale_dtype)
    tensors, report = load(write(tmp_path, files), dtype=dtype, int8_channel=True)
    exact = files[name].double() * files[name + "_scale"].double()
    assert torch.equal(tensors["layers.0.q_proj.weight"], exact.float().to(dtype))
    assert report.params_by_dtype == {"float32": 24, "int8": 12}


def test_int8_that_is_not_declared_or_incomplete(tmp_path: Path) -> None:
    name = "model.layers.0.q_proj.weight"
    files = quantise_int8_channel(prefixed("model."), [name])
    with pytest.raises(WeightsError, match="declares no quantization_config"):
        load(write(tmp_path, files))
    wrong = files | {name + "_scale": torch.ones(1, 3)}
    with pytest.raises(WeightsError, match=r"_scale is \[1, 3\]"):
        load(write(tmp_path, wrong), int8_channel=True)
    wrong = files | {name + "_scale": torch.ones(3, 1).int()}
    with pytest.raises(WeightsError, match="_scale is int32, expected floating point"):
        load(write(tmp_path, wrong), int8_channel=True)
    del files[name + "_scale"]
    with pytest.raises(WeightsError, match=r"1 missing: model\.layers\.0\.q_proj\.weight_scale"):
        load(write(tmp_path, files), int8_channel=True)


def test_a_scale_without_an_int8_weight_is_unexpected(tmp_path: Path) -> None:
    files = prefixed("model.") | {"model.layers.0.q_proj.weight_scale": torch.ones(3, 1)}
    with pytest.raises(WeightsError, match=r"1 unexpected: .*weight_scale"):
        load(write(tmp_path, files), int8_channel=True)
