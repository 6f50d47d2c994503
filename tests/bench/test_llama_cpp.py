"""llama.cpp as a peer, with a program in its place that answers as its server does."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from outdraft.bench.peers.gguf import LlamaCpp, adapt_tokenizer, find_llama_cpp
from outdraft.bench.peers.llama_cpp import build_peer, serve
from outdraft.cli.main import app
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams
from tests import tiny

FAKE = Path(__file__).with_name("fake_llama.py").read_text()
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True, seed=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tiny.tiny_target(tmp_path_factory.mktemp("pair") / "target", seed=51)
    tiny.tiny_assistant(target / "assistant", target, seed=52)
    return target


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A build in the places that the script makes."""
    programs = tmp_path / "build" / "bin"
    source = tmp_path / "source" / "vendor" / "llama.cpp"
    for directory in (programs, source):
        directory.mkdir(parents=True)
    for path in (
        programs / "llama-server",
        programs / "llama-quantize",
        source / "convert_hf_to_gguf.py",
    ):
        path.write_text(f"#!{sys.executable}\n{FAKE}")
        path.chmod(0o755)
    return programs / "llama-server"


def load(pair: Path, **settings: Any) -> LLM:
    return LLM(str(pair), EngineConfig(ctx_size=256, threads=1, **settings))


def test_arms_are_plain_and_one_to_four_drafts(pair: Path, server: Path) -> None:
    llm = load(pair, backend="cpu", quant="w4")
    with build_peer(llm, server) as peer:
        names = [arm.name for arm in peer.arms]
        assert names == ["llama.cpp plain", *(f"llama.cpp k={k}" for k in range(1, 5))]
        assert peer.about["version"] == "version: 7 (fake)"
        assert peer.about["target"] == "Q4_0" and peer.about["assistant"] == "Q8_0"
        assert peer.about["target_bytes"] == 1004
        for k, arm in enumerate(peer.arms):
            found = arm.measure([1, 2, 3], GREEDY)
            assert found.tokens == [6 + i + (k == 4) for i in range(5)]
            assert found.decode_tok_s == pytest.approx(100 + 10 * k)
            assert found.stats.n_drafted == (8 if k else 0)
            assert found.wall_s is not None and found.total_tok_s == 5 / found.wall_s
        with pytest.raises(OutdraftError, match="too long for the context"):
            peer.arms[0].measure([1] * 4001, GREEDY)
    with pytest.raises(OSError):  # nobody listens any more
        peer.arms[0].measure([1, 2, 3], GREEDY)


def test_beside_us_in_the_report(pair: Path, server: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = bench(pair, server, "--json", path, "--backend", "cpu", "--quant", "w8")
    assert result.exit_code == 0, result.stderr
    peer = json.loads(path.read_text())["peers"]["llama.cpp"]
    assert peer["target"] == "Q8_0" and peer["best"] == peer["assisted"] == "llama.cpp k=4"
    arms = peer["arms"]
    assert arms["llama.cpp k=4"]["equals_its_plain"] == "0 of 4"
    assert arms["llama.cpp k=3"]["equals_its_plain"] == "4 of 4"
    assert arms["llama.cpp k=3"]["accepted"] == pytest.approx(6 / 8)
    assert arms["llama.cpp k=3"]["tok_s"] == pytest.approx(130)
    assert "llama.cpp version: 7 (fake), greedy" in result.stdout
    assert path.with_suffix(".png").exists()
    _, _, *tables = result.stdout.splitlines()
    assert max(len(line) for line in tables) <= 80


def bench(pair: Path, server: Path, *arguments: object) -> Result:
    words = ["bench", pair, "--prompts", 1, "--repeat", 1, "--max-tokens", 8, "--threads", 1]
    words += ["--peer", "llama.cpp", "--llama-server", server, *arguments]
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_where_it_is_not_there(pair: Path, server: Path, tmp_path: Path) -> None:
    result = bench(pair, tmp_path / "llama-server")
    assert result.exit_code == 2
    assert "no llama.cpp server" in result.stderr and "scripts/build_llama_cpp.sh" in result.stderr
    found = find_llama_cpp(server)
    found.quantise.unlink()
    with pytest.raises(OutdraftError, match="no llama-quantize"):
        find_llama_cpp(server)
    found.quantise.touch()
    (found.source / "convert_hf_to_gguf.py").unlink()
    with pytest.raises(OutdraftError, match=r"no convert_hf_to_gguf\.py"):
        find_llama_cpp(server)


def test_what_a_program_said_last_is_told(pair: Path, server: Path, tmp_path: Path) -> None:
    llama = find_llama_cpp(server)
    llama.quantise.write_text(llama.quantise.read_text() + "\n# fail")
    with (
        pytest.raises(OutdraftError, match="this program fails"),
        build_peer(load(pair, backend="cpu", quant="w4"), server),
    ):
        pass
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot load this model; exit 3\n")
    broken.chmod(0o755)
    files: Any = type("Files", (), {"target": tmp_path, "assistant": tmp_path})
    with (
        pytest.raises(OutdraftError, match="cannot load this model"),
        serve(LlamaCpp(broken, broken, tmp_path), files, 0, 64, tmp_path),
    ):
        pass


def test_the_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    before = json.loads(path.read_text())
    adapt_tokenizer(path)
    after = json.loads(path.read_text())
    assert after["model"] == before["model"] | {"byte_fallback": True}
    assert after["decoder"]["type"] == "Sequence"
    adapt_tokenizer(path)
    assert json.loads(path.read_text())["decoder"] == after["decoder"]
