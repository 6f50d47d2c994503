"""`outdraft pretrain` from text to a directory that the engine and transformers load."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.cli.pretrain import app
from outdraft.errors import TrainingError
from outdraft.models import mtp, qwen3_5
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.reference import ReferenceOps
from outdraft.train import work
from outdraft.train.hybrid_presets import TINY, find_preset
from outdraft.train.hybrid_run import PretrainRun, PretrainSettings, pretrain
from outdraft.train.mtp import MtpOptions
from outdraft.train.trainer import Progress, StopFlag, TrainingStopped
from tests.models.parity import memory_of, run

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
        patch.setattr(work, "fastest_dtype", lambda device: torch.float32)
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PretrainSettings:
    path = tmp_path_factory.mktemp("text") / "code.py"
    path.write_text(CODE)
    return PretrainSettings("hybrid-tiny", steps=40, seed=1, data=(str(path),))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: PretrainSettings) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(out, settings, quiet)
    return out


def test_it_loads_and_its_head_drafts_exactly(finished: Path) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with LLM(str(finished), EngineConfig(draft_n=3)) as llm:
        assert llm.pairing.drafter is not None and llm.pairing.drafter.name == "mtp"
        drafted = llm.generate("def step_3(value, other):\n", params)
    with LLM(str(finished), EngineConfig(spec_type="off")) as llm:
        assert llm.generate("def step_3(value, other):\n", params).tokens == drafted.tokens
    assert drafted.stats.n_accepted > 0
    report = json.loads((finished / "report.json").read_text())
    assert report["identical"] is True and report["tokens_per_pass"] > 1.2
    assert list(report["heldout"]) == ["1", "2", "3"] and report["heldout"]["1"] < 4
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.parent.glob(".*"))


@torch.inference_mode()
def test_transformers_reads_it_to_the_same_logits(finished: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    tokens = torch.randint(6, 320, (90,), generator=torch.Generator().manual_seed(4))
    want = theirs.eval()(tokens[None]).logits[0]
    stored = load_file(finished / "model.safetensors")
    config = Qwen35Config.from_hf(TINY.config)
    head = {f"mtp.{name}" for name in mtp.expected_tensors(config)}
    body = {f"model.{name}" for name in qwen3_5.expected_tensors(config)}
    assert set(stored) == head | body
    weights = {n.removeprefix("model."): t.float() for n, t in stored.items()}
    model = qwen3_5.Qwen35(config, weights, ReferenceOps())
    got = run(model, memory_of(list(qwen3_5.memory_layers(config))), tokens.tolist())
    assert float((got - want).abs().max()) <= 1e-4 * float(want.max() - want.min())


def test_a_run_stopped_on_its_way_ends_the_same(
    tmp_path: Path, finished: Path, settings: PretrainSettings
) -> None:
    stopped_at: set[tuple[str, int]] = set()
    out = tmp_path / "run"
    for _ in range(6):
        stop = StopFlag()

        def report(state: Progress, stop: StopFlag = stop) -> None:
            here = state.phase, state.step
            if state.step in (1, 7, 30) and here not in stopped_at:
                stopped_at.add(here)
                stop.requested = True

        try:
            work = PretrainRun(out, settings, report, stop, fresh=False)
            work.text()
            work.train()
        except TrainingStopped:
            continue
        break
    assert ("training", 30) in stopped_at
    stored = (work.model / "model.safetensors").read_bytes()
    assert stored == (finished / "model.safetensors").read_bytes()


def test_separate_layers_train_and_the_first_is_kept(
    tmp_path: Path, settings: PretrainSettings
) -> None:
    options = MtpOptions(depths=2, repeat=False, detach=True)
    own = PretrainSettings("hybrid-tiny", steps=2, data=settings.data, mtp=options)
    report = pretrain(tmp_path / "out", own, quiet)
    assert report["identical"] is True
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in stored if name.startswith(("mtp2", "model.mtp"))]


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    raw = dict(TINY.config) | {"vocab_size": 400, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for name in (tmp_path, tmp_path / "config.json"):
        preset = find_preset(str(name))
        assert preset.shape.vocab_size == 400 and preset.context == 127
    for change, words in (
        ({"model_type": "llama"}, "'llama' model"),
        ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
          "shared_expert_intermediate_size": 8}, "has experts"),
        ({"vocab_size": 40}, "vocabulary of 40"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(TrainingError, match=words):
            find_preset(str(tmp_path))
    with pytest.raises(TrainingError, match="no preset"):
        find_preset("gigantic")


@pytest.mark.parametrize(
    "wrong",
    [{}, {"steps": 2, "minutes": 1.0}, {"steps": 0}, {"steps": 2, "seed": -1},
     {"steps": 2, "mtp": MtpOptions(depths=0)}, {"steps": 2, "mtp": MtpOptions(scale=0.0)}],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainingError):
        PretrainSettings("hybrid-tiny", **wrong)  # type: ignore[arg-type]


def test_other_settings_are_refused(tmp_path: Path, settings: PretrainSettings) -> None:
    out = tmp_path / "run"
    PretrainRun(out, settings, quiet, StopFlag(), fresh=False)
    other = PretrainSettings("hybrid-tiny", steps=41, seed=1, data=settings.data)
    with pytest.raises(TrainingError, match=r"steps = 40, not 41"):
        PretrainRun(out, other, quiet, StopFlag(), fresh=False)
    PretrainRun(out, other, quiet, StopFlag(), fresh=True)


def test_the_command(tmp_path: Path, settings: PretrainSettings) -> None:
    given = ["hybrid-tiny", "--data", settings.data[0], "--steps", "2", "--mtp-depths", "2"]
    result = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "identical to plain decoding" in result.output.replace("\n", " ").replace("  ", " ")
    assert (tmp_path / "out" / "config.json").exists()
