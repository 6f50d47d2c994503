"""`outdraft bench` from end to end on a tiny pair, with and without transformers beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from outdraft.bench.peers.transformers import sharing_modes
from outdraft.cli.main import app
from tests import tiny

KIND_KEYS = {
    "plain_tok_s",
    "draft_tok_s",
    "speedup",
    "speedup_spread",
    "tokens_per_pass",
    "acceptance",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "target"
    # every token ends a text, so that an engine which does not ignore it is seen
    ends = list(range(tiny.VOCAB))
    target = tiny.tiny_target(directory, "window", seed=31, eos_token_id=ends)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tiny.tiny_assistant(target / "assistant", target, seed=32)
    return target


def bench(*arguments: object) -> Result:
    command = ["bench", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def small(pair: Path, *arguments: object) -> Result:
    return bench(pair, "--prompts", 1, "--repeat", 1, "--max-tokens", 8, *arguments)


def test_the_report_and_its_chart(pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "bench.json"
    result = small(pair, "--json", path, "--spec-draft-n-max", 3)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["identical"] is True
    assert report["speedup"] > 0 and report["tokens_per_pass"] >= 1
    for kinds in (report["kinds"], report["sampled"]["kinds"]):
        assert list(kinds) == ["code", "json", "prose", "repetition"]
        for figures in kinds.values():
            assert set(figures) >= KIND_KEYS
            assert len(figures["acceptance"]) == 3
    assert "identical" not in report["sampled"]
    assert len(report["prompts"]) == 4
    assert report["settings"]["draft_n_max"] == 3 and report["settings"]["max_tokens"] == 8
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert {"commit", "date", "version"} <= set(report)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "identical to those without" in result.stdout
    _, first, *tables = result.stdout.splitlines()
    assert first.startswith(f"{pair} on ")
    assert max(len(line) for line in tables) <= 80


def test_transformers_beside_us_computes_the_same(pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = small(pair, "--json", path, "--peer", "transformers", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    peer = json.loads(path.read_text())["peers"]["transformers"]
    assert peer["name"] == "transformers" and peer["version"] and peer["patched"]
    assert set(peer["kinds"]) == {"code", "json", "prose", "repetition"}
    assert peer["overall"]["its_plain_equals_ours"] == "4 of 4"
    assert peer["overall"]["assisted_equals_its_plain"] == "4 of 4"
    assert peer["overall"]["ours_drafting_over_its_assisted"] > 0


def test_the_repair_stores_the_last_layer_of_each_kind() -> None:
    class Config:
        layer_types = (tiny.S, tiny.S, tiny.F, tiny.S, tiny.S, tiny.F)
        num_hidden_layers = 6
        num_kv_shared_layers = 0

    assert sharing_modes(Config) == [None, None, None, None, "store", "store"]
    Config.num_kv_shared_layers = 3
    assert sharing_modes(Config) == [None, "store", "store", "reuse", "reuse", "reuse"]
    Config.num_kv_shared_layers = 6
    assert sharing_modes(Config) == ["reuse"] * 6


def test_without_a_drafter_there_is_nothing_to_compare(pair: Path) -> None:
    result = small(pair, "--spec-draft-n-max", 0)
    assert result.exit_code == 2 and "nothing to compare" in result.stderr


def test_bad_options(pair: Path, tmp_path: Path) -> None:
    assert "temperature is 0" in small(pair, "--temperature", 0).stderr
    assert "no Python texts" in small(pair, "--prompt-dir", tmp_path).stderr
    (tmp_path / "short.py").write_text("x = 1\n")
    assert "too short" in small(pair, "--prompt-dir", tmp_path).stderr


def test_a_peer_that_is_not_installed(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    result = small(pair, "--peer", "transformers")
    assert result.exit_code == 2 and "pip install transformers" in result.stderr
