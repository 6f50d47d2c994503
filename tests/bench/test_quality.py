"""What quantising costs: sums against plain formulas, and the command on a tiny pair."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from outdraft.bench.quality import (
    Sums,
    compare_windows,
    log_probs,
    read_texts,
    text_figures,
    windows,
)
from outdraft.cli.main import app
from outdraft.config import EngineConfig, Quant
from outdraft.engine.engine import LLM
from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams
from tests import tiny

TEXTS = ["def one():\n    return 1\n" * 6, "", "some prose that is a little longer " * 4]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tiny.tiny_target(tmp_path_factory.mktemp("quality") / "target", seed=41)
    tiny.tiny_assistant(target / "assistant", target, seed=42)
    return target


def load(pair: Path, quant: Quant, chunk: int = 256) -> LLM:
    config = EngineConfig(backend="cpu", ctx_size=256, prefill_chunk=chunk, threads=1)
    return LLM(str(pair), replace(config, quant=quant))


def test_sums_are_those_of_the_formulas() -> None:
    rng = torch.Generator().manual_seed(1)
    sums, nll, base_nll, kl, same, n = Sums(), 0.0, 0.0, 0.0, 0, 0
    differences = []
    for length in (5, 9):
        p = torch.softmax(torch.randn(length, 7, generator=rng, dtype=torch.float64), 1)
        q = torch.softmax(torch.randn(length, 7, generator=rng, dtype=torch.float64), 1)
        after = torch.randint(0, 7, (length,), generator=rng)
        sums.add(p.log(), q.log(), after)
        own = [-math.log(float(q[t, after[t]])) for t in range(length)]
        base = [-math.log(float(p[t, after[t]])) for t in range(length)]
        nll, base_nll, n = nll + sum(own), base_nll + sum(base), n + length
        differences.append((sum(own) - sum(base)) / length)
        for t in range(length):
            kl += sum(float(p[t, v]) * math.log(float(p[t, v] / q[t, v])) for v in range(7))
            same += int(p[t].argmax() == q[t].argmax())
    found = text_figures(sums)
    assert found["n_tokens"] == n == 14
    assert found["perplexity"] == pytest.approx(math.exp(nll / n))
    assert found["bf16_perplexity"] == pytest.approx(math.exp(base_nll / n))
    assert found["perplexity_change"] == pytest.approx(math.exp((nll - base_nll) / n) - 1)
    assert found["kl"] == pytest.approx(kl / n)
    assert found["top1_agreement"] == pytest.approx(same / n)
    spread = abs(differences[0] - differences[1]) / 2  # of the mean of two
    assert found["nll_standard_error"] == pytest.approx(spread)


def test_windows_take_all_texts_in_turn_and_never_overlap(pair: Path) -> None:
    llm = load(pair, "w8")
    one, other = (list(llm.encode(text)) for text in (TEXTS[0], TEXTS[2]))
    found = list(windows(llm, TEXTS, 50, 10_000))
    assert all(window[0] == one[0] for window in found)
    assert found[0][1:] == one[1:51] and found[1][1:] == other[1:51]
    assert found[2][1:] == one[51:101] and found[3][1:] == other[51:101]
    limited = list(windows(llm, TEXTS, 50, 120))
    assert [len(window) - 1 for window in limited] == [50, 50, 20]


def test_log_probs_are_those_of_a_prompt(pair: Path) -> None:
    llm = load(pair, "w8")
    tokens = list(llm.encode(TEXTS[0]))[:40]
    rows = log_probs(llm, tokens)
    assert torch.allclose(rows.exp().sum(1), torch.ones(39, dtype=torch.float64))
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    told = llm.generate(tokens, params).prompt_logprobs
    for t, entry in enumerate(told[1:]):
        assert entry is not None
        assert entry.token == pytest.approx(float(rows[t, tokens[t + 1]]), abs=1e-5)
    assert torch.equal(rows, log_probs(load(pair, "w8", chunk=7), tokens))
    assert llm.memory.lengths == {}


def test_a_model_against_itself_differs_in_nothing(pair: Path) -> None:
    one, other = load(pair, "bf16"), load(pair, "bf16")
    found = text_figures(compare_windows(one, other, list(windows(one, TEXTS, 32, 64))))
    assert found["kl"] == 0 and found["perplexity_change"] == 0 and found["top1_agreement"] == 1


def test_the_command(pair: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(TEXTS):
        (texts / f"{i}.txt").write_text(text)
    path = tmp_path / "quality.json"
    words = ["bench", "quality", str(pair), "--text", str(texts), "--tokens", "128"]
    words += ["--window", "64", "--continued", "2", "--max-tokens", "4", "--json", str(path)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    report = json.loads(path.read_text())
    assert list(report["quants"]) == ["w8", "w4"]
    for row in report["quants"].values():
        assert row["n_tokens"] == 128 and row["kl"] > 0
        assert list(row["acceptance"]) == ["heldout", "continued"]
        assert row["acceptance"]["continued"]["n_positions"] == 2 * (4 + 1)
        assert len(row["acceptance"]["heldout"]["conditional_change"]) == 4
    assert report["quants"]["w8"]["kl"] < report["quants"]["w4"]["kl"]
    assert "text that bf16 wrote" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_bad_input(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(OutdraftError, match="no text"):
        read_texts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(OutdraftError, match="cannot be read"):
        read_texts(tmp_path)
    for words, said in (
        (["--quant", "w5"], "'w5'"),
        (["--window", "9999"], "too long"),
        (["--text", str(tmp_path / "none")], "no text"),
    ):
        result = CliRunner().invoke(app, ["bench", "quality", str(pair), *words])
        assert result.exit_code == 2 and said in result.stderr
