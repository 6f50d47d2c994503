"""`outdraft fit`: its table, its JSON, and that the command it says runs as it is."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from outdraft.cli.main import app
from outdraft.config import EngineConfig


def fit(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["fit", *arguments], catch_exceptions=False)


def test_it_fits_and_the_command_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = fit("demo", "--memory-gb", "0.64", "--ctx-size", "2048", "--json", "--device", "cpu")
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert said["memory"]["free_bytes"] == 640_000_000 and said["ctx_size"] == 2048
    assert [f["quant"] for f in said["formats"]] == ["bf16", "w8", "w4"]
    weights = [f["weight_bytes"] for f in said["formats"]]
    inspected = CliRunner().invoke(app, ["inspect", "demo", "--json"])
    assert weights == list(json.loads(inspected.output)["packed_bytes"].values())[::-1]
    assert said["choice"]["quant"] == said["stored"] == "w8"
    seen: list[EngineConfig] = []
    monkeypatch.setattr("outdraft.server.run.serve", lambda model, config, *_: seen.append(config))
    program, *words = shlex.split(said["choice"]["command"])
    assert program == "outdraft"
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert (seen[0].quant, seen[0].ctx_size) == ("w8", 2048)
    assert seen[0].kv_cache_tokens == said["choice"]["kv_tokens"]


def test_it_does_not_fit() -> None:
    done = fit("demo", "--memory-gb", "0.3", "--device", "cpu")
    assert done.exit_code == 1
    assert "It does not fit: 0.3" in done.output and "none" in done.output
    said = json.loads(fit("demo", "--memory-gb", "0.3", "--json").output)
    assert said["choice"] is None and all(f["short_bytes"] > 0 for f in said["formats"])


def test_what_is_free_is_looked_up() -> None:
    done = fit("demo", "--device", "cpu", "--parallel", "3")
    assert done.exit_code == 0 and "GB free" in done.output
    assert "outdraft serve demo --device cpu --quant w8 --ctx-size 4096 --parallel 3" in done.output


def test_what_cannot_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["fit", str(tmp_path)])
    assert done.exit_code == 2 and "error: " in done.stderr
