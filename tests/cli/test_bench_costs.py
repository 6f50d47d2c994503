"""`bench kernels` and `bench shape` from the command line, on tiny sizes."""

import json
from pathlib import Path

import pytest

from outdraft.bench import kernels, row_kernels, shapes
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config
from tests import tiny
from tests.cli.conftest import Invoke


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    target = tiny.target_config("moe")
    assistant = AssistantConfig.from_hf(tiny.assistant_config(target))
    made = shapes.Shape("tiny", Gemma4Config.from_hf(target), assistant, 0, 0)
    monkeypatch.setitem(shapes.SHAPES, "tiny", made)
    return made.name


def test_kernels(outdraft: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROWS", (1, 2, 20))
    monkeypatch.setattr(kernels, "cold_bytes", lambda: 1 << 16)
    monkeypatch.setattr(row_kernels, "CONTEXT", 128)
    path = tmp_path / "kernels.json"
    options = ("--peer", "torch", "--rounds", 1, "--size", "64x96")
    result = outdraft("bench", "kernels", "--json", path, *options)
    assert result.exit_code == 0, result.output
    assert "64 × 96" in result.stdout and "linear w4: row-invariant" in result.stdout
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {"read_gb_s", "rows", "row_invariant", "summary", "machine"} <= set(report)
    assert set(report["peers"]) == {"torch"}
    assert {row["backend"] for row in report["rows"]} == {"outdraft", "torch"}
    assert {"backend", "kernel", "rows", "n", "k", "us", "gb_s"} <= set(report["rows"][0])
    assert {row["kernel"] for row in report["others"]} == {"attention bf16", "norm"}
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("size", ["", "64", "64x", "64x97", "0x64", "64x-32", "64 x 96"])
def test_a_size_that_is_none_is_refused(outdraft: Invoke, size: str) -> None:
    result = outdraft("bench", "kernels", "--peer", "none", "--size", size)
    assert result.exit_code == 2 and "--size" in result.stderr


@pytest.mark.parametrize("peer", ["", "torch,", "ggml9", "none,torch"])
def test_an_unknown_library_is_refused(outdraft: Invoke, peer: str) -> None:
    result = outdraft("bench", "kernels", "--peer", peer, "--size", "64x96")
    assert result.exit_code == 2 and "--peer" in result.stderr


def test_shape(outdraft: Invoke, tmp_path: Path, tiny_shape: str) -> None:
    path = tmp_path / "shape.json"
    options = ("--context", 70, "--tokens", 2, "--rounds", 1, "--quant", "w8", "--json", path)
    result = outdraft("bench", "shape", tiny_shape, "--accept", ".8,.7,.6", *options)
    assert result.exit_code == 0, result.output
    assert "SYNTHETIC" in result.stdout and "best" in result.stdout
    report = json.loads(path.read_text(encoding="utf-8"))
    asked = "plain_tok_s draft_tok_s bytes_per_token read_gb_s share_of_bandwidth python_share"
    assert {*asked.split(), "peak_bytes", "cost_by_rows"} <= set(report)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("accept", ["", "a,b", ".5,1.5", ",".join(["1"] * 8)])
def test_an_acceptance_that_is_none_is_refused(
    outdraft: Invoke, tiny_shape: str, accept: str
) -> None:
    result = outdraft("bench", "shape", tiny_shape, "--accept", accept)
    assert result.exit_code == 2 and "--accept" in result.stderr


def test_an_unknown_shape_is_refused(outdraft: Invoke) -> None:
    result = outdraft("bench", "shape", "gemma-5")
    assert result.exit_code == 2 and "gemma-4-e2b" in result.stderr
