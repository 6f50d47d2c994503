"""bench throughput on a tiny model: the loop, the figures, the picture."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outdraft.bench.arms import random_requests
from outdraft.bench.throughput import Answered, Asked, Run, answer_all, percentile, summarise
from outdraft.cli.main import app
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from tests.tiny import tiny_assistant, tiny_target

FAST = ["--threads", "1", "--max-tokens", "8", "--rounds", "1", "--concurrency", "1,3"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("pair")
    target = tiny_target(path / "target")
    return target, tiny_assistant(path / "assistant", target)


def run_of(mode: str, concurrency: int, index: int, wall_s: float, token: int = 5) -> Run:
    return Run(mode, concurrency, index, wall_s, [Answered([token] * 10, 1.0, 9.0)])


def test_closed_loop_answers_every_request_with_no_more_at_once(pair: tuple[Path, Path]) -> None:
    target, assistant = pair
    config = EngineConfig(
        assistant=str(assistant), max_sequences=4, prefix_cache=False, threads=1, draft_n_max=2
    )
    with LLM(str(target), config) as llm:
        asked = [Asked((2, *range(10, 20 + 7 * i)), 3 + 2 * i) for i in range(5)]
        alone = [llm.generate(one.prompt, _params(one)).tokens for one in asked]
        step, most = llm.step, 0

        def counted() -> list:  # type: ignore[type-arg]
            nonlocal most
            most = max(most, len(llm.scheduler.running) + len(llm.scheduler.waiting))
            return step()

        llm.step = counted  # type: ignore[method-assign]
        _, answers = answer_all(llm, asked, 2)
        llm.check()
    assert most == 2
    assert [answer.tokens for answer in answers] == alone
    assert all(a.ttft_ms > 0 and a.decode_ms >= 0 for a in answers)


def _params(one: Asked):  # type: ignore[no-untyped-def]
    from outdraft.request import SamplingParams

    return SamplingParams(max_tokens=one.max_tokens, ignore_eos=True)


def test_the_figures_are_medians_of_rounds_and_of_paired_ratios() -> None:
    walls = {"plain": (2.0, 4.0, 2.0), "k=1": (1.0, 2.0, 1.0), "controller": (1.0, 1.0, 2.0)}
    runs = [run_of(m, 1, i, w) for m, ws in walls.items() for i, w in enumerate(ws)]
    runs += [run_of(m, 4, i, w / 4) for m, ws in walls.items() for i, w in enumerate(ws)]
    report = summarise(runs)
    first = report["summary"]["by_concurrency"][0]
    assert first["controller_over_plain"] == {"ratio": 2.0, "min": 1.0, "max": 4.0}
    assert first["best_other"] == "k=1"
    assert first["controller_over_best_other"]["ratio"] == 1.0
    together = report["summary"]["together_over_one_after_another"]
    assert together["controller"]["ratio"] == 4.0
    row = report["rows"][0]
    assert (row["mode"], row["tok_s"], row["tok_s_min"], row["tpot_ms_p50"]) == ("plain", 5, 2.5, 1)
    assert report["identical"]


def test_one_different_token_is_told() -> None:
    runs = [run_of(mode, 1, 0, 1.0) for mode in ("plain", "k=1")]
    assert not summarise([*runs, run_of("controller", 1, 0, 1.0, token=6)])["identical"]


def test_percentiles_of_none_one_and_many() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([float(i) for i in range(101)], 99) == 99.0


def test_the_command_writes_report_and_chart(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target, assistant = pair
    file = tmp_path / "report.json"
    command = ["bench", "throughput", str(target), "--assistant", str(assistant), *FAST]
    done = CliRunner().invoke(app, [*command, "--spec-draft-n-max", "2", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "identical over all modes" in done.output
    report = json.loads(file.read_text())
    assert report["identical"]
    assert [(r["concurrency"], r["mode"]) for r in report["rows"]] == [
        (c, mode) for c in (1, 3) for mode in ("plain", "k=1", "k=2", "controller")
    ]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_concurrency_is_refused(pair: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(app, ["bench", "throughput", str(pair[0]), "--concurrency", "0,x"])
    assert done.exit_code == 2


@pytest.mark.parametrize(
    "arm", [["--drafter", "random"], ["--drafter", "ngram", "--text", "edits"]]
)
def test_other_drafters_and_texts_give_the_same_tokens(
    pair: tuple[Path, Path], tmp_path: Path, arm: list[str]
) -> None:
    file = tmp_path / "report.json"
    command = ["bench", "throughput", str(pair[0]), "--assistant", str(pair[1]), *FAST, *arm]
    done = CliRunner().invoke(app, [*command, "--spec-draft-n-max", "2", "--json", str(file)])
    assert done.exit_code == 0, done.output
    report = json.loads(file.read_text())
    assert report["identical"] and report["settings"]["drafts"] == arm[1]
    assert {row["mode"] for row in report["rows"]} >= {"plain", "controller"}


def test_random_prompts_are_of_the_vocabulary(pair: tuple[Path, Path]) -> None:
    config = EngineConfig(assistant=str(pair[1]), max_sequences=2, threads=1)
    with LLM(str(pair[0]), config) as llm:
        asked = random_requests(llm, 5, 8, seed=1)
        assert asked == random_requests(llm, 5, 8, seed=1) != random_requests(llm, 5, 8, seed=2)
        _, answers = answer_all(llm, asked, 2)
    assert all(2 <= len(a.tokens) <= 8 for a in answers)
