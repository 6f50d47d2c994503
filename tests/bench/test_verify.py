"""`outdraft verify` passes on a right build, and names the rung on builds broken on purpose."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from outdraft.bench import verify, verify_sampling
from outdraft.bench.verify_runs import Ladder
from outdraft.cache.books import PageBooks
from outdraft.cli.main import app
from outdraft.config import EngineConfig
from outdraft.engine import decide
from outdraft.engine.engine import LLM
from outdraft.engine.runner import Runner
from outdraft.engine.scheduler import Scheduler
from outdraft.ops.reference import ReferenceOps
from outdraft.speculate import verify as rule
from outdraft.speculate.verify import Verdict, block_residual
from tests import tiny

ALL = [
    *("rows", "greedy", "drafters", "batch", "chunks"),
    *("prefix", "preemption", "seeded", "distribution"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tiny.tiny_target(tmp_path_factory.mktemp("verify") / "target", seed=31)
    tiny.tiny_assistant(target / "assistant", target, seed=32)
    return target


def load(pair: Path, **options: Any) -> LLM:
    config = EngineConfig(draft_n_max=3, ctx_size=300, **options)
    return LLM(str(pair), verify.config_for(config))


def climb(llm: LLM, names: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The report of some rungs, on one prompt of each kind."""
    monkeypatch.setattr(verify, "RUNGS", {name: verify.RUNGS[name] for name in names})
    return verify.verify_model(llm, n_prompts=1)


def outcome(report: dict[str, Any]) -> dict[str, bool | None]:
    return {rung["name"]: rung["passed"] for rung in report["rungs"]}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_right_build_passes(pair: Path, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(pair, backend=backend)
    names = ALL if backend == "cpu" else ["rows", "batch", "preemption"]
    report = climb(llm, names, monkeypatch)
    assert outcome(report) == dict.fromkeys(names, True), report["rungs"]
    assert report["passed"] and 0 <= report["worst_margin"] < 10
    assert not llm.scheduler.busy
    llm.check()


def test_without_a_drafter_drafting_is_skipped_and_the_rest_runs(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = climb(load(pair, spec_type="off"), ALL, monkeypatch)
    assert outcome(report) == dict.fromkeys(ALL, True) | {"greedy": None, "drafters": None}, report[
        "rungs"
    ]
    skipped = next(rung for rung in report["rungs"] if rung["passed"] is None)
    assert skipped["detail"] == "skipped: drafting is off: --spec-type off"
    assert report["passed"]


def test_a_stale_row_after_a_rejection_fails_the_greedy_rung(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Runner._keep_rows

    def forgetful(self: Runner, sequence: Any, n_rows: int, n_kept: int) -> None:
        keep(self, sequence, n_rows, n_kept)
        if n_rows > n_kept:  # the next row is written one slot too far
            store = next(iter(self.memory.groups["full_attention"].layers.values()))
            store.k_PGSD.copy_(store.k_PGSD.roll(1, dims=2))

    monkeypatch.setattr(Runner, "_keep_rows", forgetful)
    report = climb(load(pair), ["rows", "greedy"], monkeypatch)
    assert outcome(report) == {"rows": True, "greedy": False}
    assert not report["passed"] and "drafts" in report["rungs"][1]["detail"]


def test_a_linear_that_depends_on_other_rows_fails_the_rows_rung(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = ReferenceOps.linear

    def one_scale(self: ReferenceOps, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        """Activations in 8 bits with one scale for the whole call."""
        scale = x.abs().max().clamp(min=1e-9) / 127
        return linear(self, (x / scale).round() * scale, weight, *rest)

    monkeypatch.setattr(ReferenceOps, "linear", one_scale)
    report = climb(load(pair, backend="reference"), ["rows"], monkeypatch)
    assert outcome(report) == {"rows": False}
    assert "of a call of 2 rows" in report["rungs"][0]["detail"]


def test_a_drafter_whose_drafts_are_not_verified_fails_its_rung(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trusting(drafts: Any, draw: Any) -> Verdict:
        return Verdict(len(drafts), draw(len(drafts)))

    monkeypatch.setattr(decide, "verify_own", trusting)
    report = climb(load(pair), ["rows", "drafters"], monkeypatch)
    assert outcome(report) == {"rows": True, "drafters": False}


def whole_p(share: float, q_V: Tensor, p_V: Tensor) -> tuple[Tensor, float]:
    return p_V, block_residual(share, q_V, p_V)[1]


def test_a_wrong_residual_fails_the_distribution_rung(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "block_residual", whole_p)
    report = climb(load(pair), ["greedy", "distribution"], monkeypatch)
    assert outcome(report) == {"greedy": True, "distribution": False}
    assert "the rule's distribution" in report["rungs"][1]["detail"]


def test_samples_of_the_model_show_a_wrong_residual_too(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(pair)
    prompt = [2, 30, 41, 52, 63, 74]
    llm.set_draft_n_max(3)
    assert verify_sampling.check_samples(llm, prompt).problem is None

    def always_best(share: float, q_V: Tensor, p_V: Tensor) -> tuple[Tensor, float]:
        best_V = torch.nn.functional.one_hot(p_V.argmax(), len(p_V)).double()
        return best_V, block_residual(share, q_V, p_V)[1]

    monkeypatch.setattr(rule, "block_residual", always_best)
    assert "chi-square" in str(verify_sampling.check_samples(llm, prompt).problem)


def test_a_prefix_that_is_never_found_fails_its_rung(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PageBooks, "match", lambda *_: [])
    report = climb(load(pair), ["prefix"], monkeypatch)
    assert outcome(report) == {"prefix": False}


def test_a_preempted_request_that_loses_a_token_fails_its_rung(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempt = Scheduler._preempt

    def lossy(self: Scheduler, sequence: Any) -> None:
        preempt(self, sequence)
        if sequence.output:
            sequence.tokens[-1] ^= 1

    monkeypatch.setattr(Scheduler, "_preempt", lossy)
    report = climb(load(pair), ["preemption", "batch"], monkeypatch)
    assert outcome(report) == {"preemption": False, "batch": True}


def test_a_crash_is_the_failure_of_its_rung_alone(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(ladder: Ladder) -> str:
        ladder.llm.add([2, 5], None)
        raise RuntimeError("planted")

    monkeypatch.setitem(verify.RUNGS, "crash", ("to see", crash))
    report = climb(load(pair), ["crash", "rows"], monkeypatch)
    assert outcome(report) == {"crash": False, "rows": True}
    assert report["rungs"][0]["detail"] == "RuntimeError: planted"


@pytest.mark.parametrize("broken", [False, True])
def test_the_verb_prints_and_exits_by_the_verdict(
    pair: Path, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "RUNGS", {n: verify.RUNGS[n] for n in ("rows", "distribution")})
    if broken:
        monkeypatch.setattr(rule, "block_residual", whole_p)
    asked = ["verify", str(pair), "--spec-draft-n-max", "2", "--quant", "w8"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == int(broken) and report["passed"] is not broken
    assert set(report) == {"passed", "rungs", "worst_margin"}
    assert all(set(rung) == {"name", "passed", "detail"} for rung in report["rungs"])
    assert "rows: " in done.stderr
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == int(broken)
    assert ("NOT EXACT: distribution." in shown.stdout) == broken
