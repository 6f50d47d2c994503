"""`outdraft inspect`: what it finds in whole and in broken directories, without reading weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from outdraft.cli.checkup import examine
from outdraft.cli.inspect import size
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.models.heads import head_family
from outdraft.models.registry import family_of
from outdraft.ops.packed import PackedLinear
from tests import tiny
from tests.cli.conftest import Invoke


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers only: opening a file for its data fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("outdraft.weights.checkpoint.Checkpoint._read", refuse)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_parameters_and_memory_are_counted_as_the_engine_has_them(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny.tiny_target(tmp_path / "target", shape)
    found = examine(target)
    monkeypatch.undo()
    llm = LLM(str(target), EngineConfig(ctx_size=64))
    assert not found.problems
    assert found.n_params == llm.target.report.n_params
    assert sum(found.stored_params.values()) == found.n_params
    assert found.kv_bytes_per_token == {
        group: llm.memory.bytes_per_token(group) for group in llm.memory.groups
    }
    assert found.windows == {tiny.S: llm.target.config.sliding_window}
    assert found.n_bytes == 4 * found.n_params


def test_a_pair(outdraft: Invoke, pair: Path) -> None:
    result = outdraft("inspect", pair)
    assert result.exit_code == 0
    for words in ("gemma4_text", "found inside the target", "chat template", "KV of full"):
        assert words in result.stdout
    assert "It runs, drafting up to 4 tokens a step." in result.stdout
    found = json.loads(outdraft("inspect", pair, "--json").stdout)
    assert found["n_params"] == sum(found["params_by_group"].values())
    assert found["drafter"]["kind"] == "assistant" and not found["problems"]


def test_the_demo_is_int8(outdraft: Invoke) -> None:
    found = json.loads(outdraft("inspect", "demo", "--json").stdout)
    assert found["quantisation"] and found["n_params"] == 27_543_304
    assert found["drafter"]["n_params"] == 1_837_508
    assert found["stored_params"]["int8"] > 27_000_000


def test_packed_int4_is_read_as_the_engine_reads_it(
    outdraft: Invoke, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny.int4_target(tmp_path / "target", pair)
    result = outdraft("inspect", target)
    assert result.exit_code == 0 and "int4 (compressed-tensors), one scale for 32" in result.stdout
    found = examine(target)
    assert not found.problems and found.n_params == examine(pair).n_params
    monkeypatch.undo()
    assert LLM(str(target), EngineConfig(ctx_size=64)).target.report.n_params == found.n_params
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "other"
    (target / "config.json").write_text(json.dumps(config))
    problems = examine(target).problems
    assert [problem.where for problem in problems] == ["quantisation"]


def test_an_assistant_alone(outdraft: Invoke, pair: Path, tmp_path: Path) -> None:
    result = outdraft("inspect", pair / "assistant")
    assert result.exit_code == 0
    assert "(assistant)" in result.stdout and "target's hidden size" in result.stdout
    ordered = tiny.tiny_assistant(tmp_path / "ordered", pair, ordered=True)
    assert "16 centroids" in outdraft("inspect", ordered).stdout


def test_what_is_left_out_is_said(outdraft: Invoke, tmp_path: Path) -> None:
    config = tiny.target_config()
    weights = tiny.target_weights(config)
    weights["vision_tower.patch.weight"] = weights["norm.weight"].clone()
    target = tiny.write_model(tmp_path / "target", config, weights)
    result = outdraft("inspect", target)
    assert result.exit_code == 0
    assert "left out" in result.stdout and "vision tower" in result.stdout


def test_everything_that_can_be_said_of_a_broken_directory(outdraft: Invoke, pair: Path) -> None:
    broken = Path(shutil.copytree(pair, pair.parent / "broken"))
    (broken / "tokenizer.json").write_text("{")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-4])
    result = outdraft("inspect", broken)
    assert result.exit_code == 1
    for words in ("truncated", "tokenizer.json", "hidden size", "2 problems", "found inside"):
        assert words in result.stdout
    (broken / "config.json").unlink()
    (broken / "model.safetensors").write_bytes(weights)
    found = json.loads(outdraft("inspect", broken, "--json").stdout)
    assert [problem["where"] for problem in found["problems"]] == ["config", "tokenizer"]
    assert found["n_tensors"] and found["n_bytes"]


def test_missing_and_misshapen_tensors_are_named(outdraft: Invoke, tmp_path: Path) -> None:
    config = tiny.target_config()
    weights = tiny.target_weights(config)
    del weights["layers.1.self_attn.q_norm.weight"]
    weights["norm.weight"] = weights["norm.weight"][:-1]
    weights["stranger.weight"] = weights["norm.weight"].clone()
    result = outdraft("inspect", tiny.write_model(tmp_path / "target", config, weights))
    assert result.exit_code == 1
    for words in ("layers.1.self_attn.q_norm.weight", "stranger.weight", "[63], expected [64]"):
        assert words in result.stdout


def test_a_drafter_that_does_not_fit(outdraft: Invoke, pair: Path, tmp_path: Path) -> None:
    other = tiny.tiny_target(tmp_path / "other", head_dim=64)
    assistant = tiny.tiny_assistant(other / "assistant", other)
    result = outdraft("inspect", pair, "--assistant", assistant)
    assert result.exit_code == 1 and "head_dim of sliding_attention" in result.stdout
    alone = outdraft("inspect", tiny.tiny_target(tmp_path / "alone"))
    assert alone.exit_code == 0 and "It runs, without drafting: none found" in alone.stdout


def test_sizes() -> None:
    assert [size(n) for n in (12, 6_144, 27_700_000, 61_440_000_000)] == [
        "12 bytes",
        "6.14 kB",
        "27.7 MB",
        "61.44 GB",
    ]


@pytest.mark.parametrize("shape", ["moe", "e2b"])
def test_packed_sizes_and_files_are_those_of_the_engine(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch, outdraft: Invoke
) -> None:
    target = tiny.tiny_target(tmp_path / "target", shape, seed=4)
    tiny.tiny_assistant(target / "assistant", target, ordered=True)
    cache = tmp_path / "cache"

    def look() -> dict[str, Any]:
        done = outdraft("inspect", target, "--cache-dir", cache, "--json")
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    before = look()
    assert before["packed_files"] == before["drafter"]["packed_files"] == {}
    monkeypatch.undo()
    packed: list[int] = []
    of_memory = PackedLinear.of_memory

    def counted(*args: Any, **kwargs: Any) -> PackedLinear:
        made = of_memory(*args, **kwargs)
        packed.append(made.n_bytes)
        return made

    monkeypatch.setattr(PackedLinear, "of_memory", counted)
    LLM(str(target), EngineConfig(quant="w4", ctx_size=64, cache_dir=str(cache)))
    assert sum(packed) == before["packed_bytes"]["w4"] + before["drafter"]["packed_bytes"]["w8"]
    after = look()
    files = [*after["packed_files"].items(), *after["drafter"]["packed_files"].items()]
    assert [format for format, _ in files] == ["w4", "w8"]
    assert {Path(path) for _, path in files} == set(cache.iterdir())
    assert str(files[0][1]) in outdraft("inspect", target, "--cache-dir", cache).stdout.replace(
        "\n", ""
    ).replace(" ", "")


@pytest.mark.parametrize("shape", ["qwen3_5", "nemotron_h_latent"])
def test_a_hybrid_with_its_head(outdraft: Invoke, tmp_path: Path, shape: str) -> None:
    path = tiny.tiny_hybrid(tmp_path / "m", shape)
    result = outdraft("inspect", path)
    assert result.exit_code == 0, result.output
    assert "recurrent state" in result.stdout and "k + 2 of them" in result.stdout
    assert "kept for later prompts" in result.stdout
    assert "mtp: the head in the checkpoint" in result.stdout
    assert "drafting up to 3 tokens" in result.stdout
    raw = json.loads((path / "config.json").read_text())
    config = family_of(raw, path).read_config(raw)
    found = json.loads(outdraft("inspect", path, "--json").stdout)
    assert [group["reason"] for group in found["ignored"]] == [
        "the MTP head, which the drafter reads"
    ]
    head = found["drafter"]
    tensors = head_family(config).expected_tensors(config).values()
    assert head["n_params"] == sum(torch.Size(t.shape).numel() for t in tensors)


def test_a_hybrid_that_lost_its_head(outdraft: Invoke, tmp_path: Path) -> None:
    path = tiny.tiny_hybrid(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith("mtp.")}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    result = outdraft("inspect", path)
    assert result.exit_code == 0, result.output
    assert "without drafting" in result.stdout and "no mtp.* tensor" in result.stdout


@pytest.mark.parametrize("family", ["qwen3_5", "ministral3"])
def test_a_smaller_model_of_the_same_vocabulary(
    outdraft: Invoke, tmp_path: Path, family: str
) -> None:
    make = tiny.tiny_hybrid if family == "qwen3_5" else tiny.tiny_target
    target, small = make(tmp_path / "m", family), make(tmp_path / "small", family)
    result = outdraft("inspect", target, "--assistant", small)
    assert result.exit_code == 0, result.output
    assert "draft-model: named by you" in result.stdout and "up to 4 tokens" in result.stdout


@pytest.mark.parametrize("family", ["qwen3_5", "ministral3"])
def test_another_vocabulary_is_refused_by_its_first_difference(
    outdraft: Invoke, tmp_path: Path, family: str
) -> None:
    make = tiny.tiny_hybrid if family == "qwen3_5" else tiny.tiny_target
    target, small = make(tmp_path / "m", family), make(tmp_path / "small", family)
    text = (small / "tokenizer.json").read_text()
    (small / "tokenizer.json").write_text(text.replace("<unused9>", "<other9>"))
    want = "the vocabularies differ: token 271 is '<unused9>' for the target and '<other9>'"
    result = outdraft("inspect", target, "--assistant", small)
    assert result.exit_code == 1 and want in " ".join(result.stdout.split())
