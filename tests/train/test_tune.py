"""Tuning on tiny models: data, the gate, losses, weights as served, resuming, the export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.bench.peers.transformers import sharing_modes
from outdraft.cli.tune import app
from outdraft.errors import TrainingError
from outdraft.speculate.stats import DraftStats
from outdraft.train import tune as tuning_run
from outdraft.train import work
from outdraft.train.gate import difference, is_better, tokens_per_pass
from outdraft.train.losses import DRAFT_LOSSES, draft_loss
from outdraft.train.served import served_target
from outdraft.train.trainer import Progress, TrainingStopped
from outdraft.train.tune import NothingGained, tune
from outdraft.train.tune_settings import TuneSettings
from outdraft.train.tuning import Texts, anchors
from outdraft.train.tuning_data import read_prompts, split_by_hash
from tests import tiny


def quiet(state: Progress) -> None:
    pass


class Letters:
    """An encoder without a model."""

    def encode(self, prompt: object) -> tuple[int, ...]:
        return (2, *(ord(c) % 300 for c in str(prompt)))

    def render_chat(self, messages: list[dict[str, object]]) -> tuple[int, ...]:
        return self.encode("".join(f"{m['role']}:{m['content']};" for m in messages))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    target = tiny.tiny_target(root / "target")
    return target, tiny.tiny_assistant(root / "stock", target)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(6, 260, (120, 6), generator=generator).tolist()
    path.write_text("".join(json.dumps({"tokens": [2, *row]}) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(pair: tuple[Path, Path], data: Path) -> TuneSettings:
    return TuneSettings(
        target=str(pair[0]),
        assistant=str(pair[1]),
        data=(str(data),),
        steps=12,
        samples=16,
        draft_n=2,
        n_heldout=16,
        prompt_tokens=8,
        new_tokens=12,
    )


def test_rows_of_every_format(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "no"}]
    shared = [{"from": "human", "value": "cd"}, {"from": "gpt", "value": "no"}]
    rows = [{"messages": turns}, {"tokens": [2, 7, 9]}, {"prompt": "xy"}, {"text": "hello"}]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": shared}]))
    (tmp_path / "c.txt").write_text("plain text\n")
    paths = [jsonl, tmp_path / "b.json", tmp_path / "c.txt"]
    prompts, bad = read_prompts(paths, Letters(), 300, 40)
    encode = Letters().encode
    assert not bad
    assert prompts[:5] == [
        encode("user:ab;"),
        (2, 7, 9),
        encode("xy"),
        encode("hello"),
        encode("user:cd;"),
    ]
    assert len(prompts) == 6


@pytest.mark.parametrize(
    "row,reason",
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"tokens": [2, 300]}', "300 is not an id"),
        ('{"tokens": [2, true]}', "True is not an id"),
        ('{"tokens": [2]}', "at least two"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no question"),
        ('{"messages": [{"role": "user"}]}', "a turn has no"),
        ('{"conversations": "x"}', "not a list of turns"),
        ('{"text": "  "}', "it has no messages"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: str, reason: str) -> None:
    good = "".join(f'{{"tokens": [2, {i}, 5]}}\n' for i in range(20))
    path = tmp_path / "rows.jsonl"
    path.write_text(good + row + "\n")
    prompts, (bad,) = read_prompts([path], Letters(), 300, 40)
    assert len(prompts) == 20 and bad.startswith(f"{path}:21: ") and reason in bad
    path.write_text((row + "\n") * 30)
    with pytest.raises(TrainingError, match="30 of 30 rows") as raised:
        read_prompts([path], Letters(), 300, 40)
    assert raised.value.message.count("rows.jsonl:") == 3


def test_the_split_does_not_hang_on_the_order() -> None:
    prompts = [(2, i, 3 * i) for i in range(100)]
    train, heldout = split_by_hash(prompts, 10)
    assert split_by_hash(prompts[::-1], 10) == (train, heldout)
    assert len(heldout) == 10 and set(train).isdisjoint(heldout)
    assert len(split_by_hash(prompts, 50)[1]) == 20


def stats(pairs: list[tuple[int, int]]) -> list[DraftStats]:
    return [DraftStats(n_passes=passes, n_emitted=emitted) for emitted, passes in pairs]


def test_the_gate_sees_a_small_gain_in_pairs_and_no_gain_in_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(20, 60, (24,), generator=generator).tolist()
    old = stats([(64, passes) for passes in base])
    better = stats([(64, passes - 2 - i % 2) for i, passes in enumerate(base)])
    change = difference(better, old)
    assert is_better(change) and change.standard_error < tokens_per_pass(old).standard_error / 3
    noisy = stats([(64, passes + (6 if i % 2 else -6)) for i, passes in enumerate(base)])
    assert not is_better(difference(noisy, old))
    assert not is_better(difference(old, old)) and not is_better(difference(old, better))


@pytest.mark.parametrize("kind", DRAFT_LOSSES)
def test_losses_against_their_formulas(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    p = torch.softmax(2 * torch.randn(7, 9, generator=generator, dtype=torch.float64), -1).float()
    head = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    rows = []
    for h, p_V in zip(hidden @ head, p.double(), strict=True):
        q_V = h.exp() / h.exp().sum()
        kl = sum(a * (a / b).log() for a, b in zip(p_V, q_V, strict=True))
        alpha = sum(min(a, b) for a, b in zip(p_V, q_V, strict=True))
        w = torch.exp(-3 * alpha.detach())
        rows.append(
            {
                "kl": kl,
                "ce": -q_V[int(p_V.argmax())].log(),
                "nla": -alpha.log(),
                "lk": w * kl + (1 - w) * (1 - alpha),
            }[kind]
        )
    expected = torch.stack(rows).mean()
    found = draft_loss(kind, hidden, p, lambda x: x @ head)
    assert float((found - expected).abs().detach()) < 1e-6
    (a,), (b,) = (torch.autograd.grad(x, [hidden]) for x in (found, expected))
    assert float((a - b).norm() / b.norm()) < 1e-5


def test_anchors_are_the_rounds_of_the_continuation() -> None:
    texts = Texts.of([([2, 5, 6, 7, 8, 9, 10], 3), ([2, 5, 6, 7, 8], 2)])
    found = [row.nonzero().flatten().tolist() for row in anchors(texts, 2)]
    # Token t + 1 is the newest: at index 3 first; the target's word after the draft's last input
    # token t + K must be within the text.
    assert found == [[2, 3, 4], [1, 2]]


@pytest.mark.parametrize("quant", ["bf16", "w8", "w4"])
def test_the_target_has_the_values_that_are_served(pair: tuple[Path, Path], quant: str) -> None:
    config = EngineConfig(quant=quant, device="cpu", spec_type="off")  # type: ignore[arg-type]
    target = served_target(pair[0], config)
    with LLM(str(pair[0]), config) as llm:
        for index, layer in enumerate(llm.target.model.layers):  # type: ignore[attr-defined]
            for name, packed in layer.matrices.items():
                ours = target.layers[index].matrices[name]
                x = torch.eye(ours.shape[1])
                theirs = torch.cat([llm.target.ops.linear(row[None], packed) for row in x]).T
                scale = float(ours.abs().max())
                assert float((theirs - ours).abs().max()) < 0.01 * scale, (index, name)
    stored = load_file(pair[0] / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    change = float((target.layers[0].matrices["mlp.down_proj"] - stored).norm() / stored.norm())
    low, high = {"bf16": (1e-4, 3e-3), "w8": (2e-3, 0.02), "w4": (0.03, 0.2)}[quant]
    assert low < change < high


def test_a_tuned_drafter_loads_and_changes_no_token(
    tmp_path: Path, pair: tuple[Path, Path], settings: TuneSettings
) -> None:
    out = tmp_path / "tuned"
    stronger = replace(settings, steps=100, samples=96, n_heldout=24, new_tokens=32)
    report = tune(out, stronger, quiet)
    assert report["change"]["tokens_per_pass"] > 2 * report["change"]["standard_error"]
    assert json.loads((out / "report.json").read_text())["steps"] == 100
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".tuned*"))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    tokens = {}
    for name in (pair[1], out):
        with LLM(str(pair[0]), EngineConfig(assistant=str(name), draft_n=2)) as llm:
            done = llm.generate([2, 9, 30, 41], params)
            assert done.stats.n_drafted > 0
            tokens[name] = done.tokens
    assert tokens[pair[1]] == tokens[out]


def test_the_export_loads_in_transformers(
    tmp_path: Path, pair: tuple[Path, Path], settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Gemma4AssistantForCausalLM"):
        pytest.skip("this transformers has no Gemma 4 assistant")
    # Its release 5.23.0 cannot build any assistant; see bench/peers/transformers.py.
    modes = property(sharing_modes)
    monkeypatch.setattr(transformers.Gemma4TextConfig, "kv_sharing_modes", modes)
    monkeypatch.setattr(tuning_run, "is_better", lambda change: True)
    out = tmp_path / "tuned"
    tune(out, settings, quiet)
    model, info = transformers.Gemma4AssistantForCausalLM.from_pretrained(
        out, output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    stored = load_file(out / "model.safetensors")
    loaded = model.state_dict()
    assert torch.equal(
        loaded["pre_projection.weight"].float(), stored["pre_projection.weight"].float()
    )


def test_the_gate_refuses_and_leaves_nothing(
    tmp_path: Path, settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    useless = replace(settings, steps=1)  # one step at a rate near zero learns nothing
    monkeypatch.setattr(tuning_run.OptimiserConfig, "__init__", _idle(tuning_run.OptimiserConfig))
    with pytest.raises(NothingGained, match="not better outside the noise"):
        tune(tmp_path / "tuned", useless, quiet)
    assert not list(tmp_path.iterdir())


def _idle(kind: type) -> object:
    original = kind.__init__

    def init(self: object, **values: object) -> None:
        original(self, **(values | {"muon_lr": 0.0, "adam_lr": 0.0}))

    return init


def test_a_good_drafter_is_left_alone(
    tmp_path: Path, settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_run, "ENOUGH", 0.0)
    with pytest.raises(NothingGained, match="nothing to gain"):
        tune(tmp_path / "tuned", settings, quiet)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("phase", ["writing", "training", "selecting"])
def test_a_stopped_run_ends_the_same(
    tmp_path: Path, settings: TuneSettings, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr(tuning_run, "is_better", lambda change: True)
    monkeypatch.setattr(work, "fastest_dtype", lambda device: torch.float32)
    monkeypatch.setattr(tuning_run, "_CHUNK", 8)
    tune(tmp_path / "whole", settings, quiet)

    def stop(state: Progress) -> None:
        if state.phase == phase and state.step >= state.n_steps // 3:
            raise TrainingStopped

    with pytest.raises(TrainingStopped):
        tune(tmp_path / "cut", settings, stop)
    assert not (tmp_path / "cut").exists()
    tune(tmp_path / "cut", settings, quiet)
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_command_says_why_nothing_was_written(
    tmp_path: Path, settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_run, "ENOUGH", 0.0)
    options = ["--data", *settings.data, "--assistant", str(settings.assistant)]
    options += ["--n-heldout", "16", "--new-tokens", "8", "--out", str(tmp_path / "tuned")]
    done = CliRunner().invoke(app, [settings.target, *options])
    assert done.exit_code == 3, done.output
    assert "nothing to gain" in done.stderr
    assert not list(tmp_path.iterdir())


def test_another_runs_directory_is_refused(tmp_path: Path, settings: TuneSettings) -> None:
    def stop(state: Progress) -> None:
        if state.phase == "training":
            raise TrainingStopped

    with pytest.raises(TrainingStopped):
        tune(tmp_path / "tuned", settings, stop)
    with pytest.raises(TrainingError, match="other settings or data"):
        tune(tmp_path / "tuned", replace(settings, seed=9), quiet)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(TrainingError, match="exists already"):
        tune(tmp_path / "full", settings, quiet)
