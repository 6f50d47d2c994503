"""The whole recipe on a tiny preset, its parts that need a target, and the command."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.cli.train import app
from outdraft.errors import TrainingError
from outdraft.models import gemma4
from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.ops.batched import BatchedOps
from outdraft.train import recipe, run
from outdraft.train.plot import smoothed
from outdraft.train.presets import TINY
from outdraft.train.pretrain import next_token_loss, run_target
from outdraft.train.recipe import Stages, train_demo
from outdraft.train.rollouts import TEMPERATURES, Rollouts
from outdraft.train.run import Run, Settings
from outdraft.train.trainer import Progress, StopFlag, TrainingStopped
from outdraft.train.weights import fresh_weights, make_trainable, trainable
from tests import tiny

CODE = "".join(
    f"def step_{i % 7}(value, other):\n    total = value * {i} + other\n    return total - {i}\n\n"
    for i in range(400)
)


def quiet(state: Progress) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def fp32() -> Iterator[None]:
    """Runs are compared to the bit, so the type must not hang on what else the machine does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "fastest_dtype", lambda device: torch.float32)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def settings(text: Path) -> Settings:
    return Settings(preset="tiny", steps=90, seed=1, data=(str(text),))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train_demo(out, settings, quiet)
    return out


def test_the_pair_loads_and_drafts_exactly(finished: Path) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with LLM(str(finished / "target"), EngineConfig(draft_n=3)) as drafting:
        assert drafting.pairing.path == finished / "assistant", drafting.pairing.reason
        drafted = drafting.generate("def step_3(value, other):\n", params)
    with LLM(str(finished / "target"), EngineConfig(spec_type="off")) as plain:
        assert plain.generate("def step_3(value, other):\n", params).tokens == drafted.tokens
    assert drafted.stats.n_drafted > 0


def test_report_and_plot(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["identical"] is True and report["steps"] == {"target": 90, "assistant": 90}
    assert report["tokens_per_pass"] > 1.1
    assert report["last_loss"]["target"] < 4 and report["heldout_nats_per_token"] < 4
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")
    best = max(report["candidates"].values())
    assert len(report["candidates"]) >= 2 and best > 1.1


def test_a_finished_run_is_not_trained_again(finished: Path, settings: Settings) -> None:
    before = (finished / "assistant" / "model.safetensors").stat().st_mtime_ns
    again = train_demo(finished, settings, quiet)
    assert again == json.loads((finished / "report.json").read_text())
    assert (finished / "assistant" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_stopped_in_every_stage_ends_the_same(
    tmp_path: Path, finished: Path, settings: Settings
) -> None:
    stages_seen: set[str] = set()
    for _ in range(8):
        stop = StopFlag()

        def report(state: Progress, stop: StopFlag = stop) -> None:
            if state.phase not in stages_seen and state.step >= state.n_steps // 2:
                stages_seen.add(state.phase)
                stop.requested = True

        stages = Stages(Run.open(tmp_path / "run", settings), report, stop)
        try:
            for stage in (stages.text, stages.target, stages.own_text, stages.assistant):
                stage()
            stages.selection()
        except TrainingStopped:
            continue
        break
    assert stages_seen >= {"text", "target", "own text", "assistant", "selection"}
    for name in ("target", "assistant"):
        path = Path(name) / "model.safetensors"
        assert (tmp_path / "run" / path).read_bytes() == (finished / path).read_bytes()


def test_other_settings_are_refused_and_fresh_starts_over(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    Run.open(out, Settings("tiny", steps=3, data=(str(text),)))
    (out / "mine.txt").write_text("keep me")
    (out / "data").mkdir()
    other = Settings("tiny", steps=4, data=(str(text),))
    with pytest.raises(TrainingError, match=r"steps = 3, not 4"):
        Run.open(out, other)
    Run.open(out, other, fresh=True)
    assert (out / "mine.txt").exists() and not (out / "data").exists()


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(TrainingError, match="not empty"):
        Run.open(tmp_path, Settings("tiny", steps=3), fresh=True)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "huge", "steps": 1},
        {"steps": None},
        {"steps": 1, "minutes": 1.0},
        {"steps": 0},
        {"minutes": float("nan")},
        {"steps": 1, "seed": -1},
        {"steps": 1, "device": "tpu"},
    ],
)
def test_impossible_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainingError):
        Settings(**wrong)  # type: ignore[arg-type]


def test_minutes_become_steps_once(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings("tiny", minutes=2.0, data=(str(text),))
    monkeypatch.setattr(run, "seconds_per_step", lambda *_: 0.5)
    opened = Run.open(tmp_path / "run", settings)
    n_steps = opened.n_steps("target", lambda: None)  # type: ignore[arg-type, return-value]
    assert n_steps == round(0.4 * 120 * (1 - 0.4) / 0.5)
    monkeypatch.setattr(run, "seconds_per_step", lambda *_: 0.1)
    resumed = Run.open(tmp_path / "run", settings)
    assert resumed.n_steps("target", lambda: None) == n_steps  # type: ignore[arg-type, return-value]


def test_most_of_a_long_run_is_training() -> None:
    assert run.training_seconds(20) == pytest.approx(960)
    assert run.training_seconds(2) == pytest.approx(48)


def test_own_text_is_what_the_target_says() -> None:
    """Greedy rows of the cached sampler continue as whole-sequence passes do, past the window."""
    raw = tiny.target_config("e2b", sliding_window=6)
    config = Gemma4Config.from_hf(raw)
    weights = tiny.random_tensors(gemma4.expected_tensors(config), 2)
    given = torch.randint(3, config.vocab_size, (5, 24))
    written = Rollouts(config, weights, torch.float32).write(given, 9, lambda: None)
    assert torch.equal(written, Rollouts(config, weights, torch.float32).write(given, 9, int))
    model = Gemma4(config, weights, BatchedOps())
    hidden, _ = run_target(model, written)
    best = model.logits(hidden).argmax(-1).view(5, 24)
    for row, temperature in enumerate(TEMPERATURES):
        differs = (written[row] != given[row]).nonzero()
        first = int(differs[0]) if len(differs) else 24
        assert 1 < first <= 24 // 4 + 1
        if temperature == 0:
            assert torch.equal(written[row, first:], best[row, first - 1 : -1])


def test_products_in_bf16_change_loss_and_gradients_little() -> None:
    config = Gemma4Config.from_hf(TINY.target_config())
    fresh = fresh_weights(gemma4.expected_tensors(config), 0)
    ids = torch.randint(3, config.vocab_size, (3, 40))
    losses, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):
        weights = make_trainable(fresh, torch.device("cpu"))
        loss = next_token_loss(config, weights, ids, dtype)
        loss.backward()
        learning = trainable(weights).values()
        losses.append(float(loss.detach()))
        grads.append(torch.cat([w.grad.flatten() for w in learning if w.grad is not None]))
    assert grads[1].dtype == torch.float32 and losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 0.05


def test_smoothing_starts_at_the_first_value() -> None:
    assert smoothed([4.0, 4.0]) == pytest.approx([4.0, 4.0])
    assert smoothed([4.0, 0.0])[1] == pytest.approx(0.95 * 0.05 * 4 / (1 - 0.95**2))


def test_the_command(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stand_in(
        out: Path, settings: Settings, report: object, *, fresh: bool
    ) -> dict[str, object]:
        asked.append((out, settings, fresh))
        assert callable(report)
        report(Progress("target", 1, 2, 3.0, 100.0))
        if fresh:
            raise TrainingStopped
        return {
            "acceptance_by_position": [0.5],
            "identical": True,
            "heldout_nats_per_token": 3.0,
            "heldout_bits_per_byte": 1.0,
            "tokens_per_pass": 2.0,
            "draft_length": 4,
        }

    monkeypatch.setattr(recipe, "train_demo", stand_in)
    arguments = ["demo", "--out", str(tmp_path), "--data", str(text), "--preset", "tiny"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "2.00 tokens per pass" in done.stderr
    assert asked[0][1] == Settings("tiny", minutes=20.0, data=(str(text),))
    stopped = CliRunner().invoke(app, [*arguments, "--steps", "5", "--fresh"])
    assert stopped.exit_code == 130 and "same command" in stopped.stderr
