"""Tuning a target's own head: the graph, the stitched copy, the whole run on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.cache.attend import CausalCall
from outdraft.cache.memory import Span
from outdraft.cli.tune import app
from outdraft.errors import OutdraftError, PairingError, TrainingError
from outdraft.models import mtp
from outdraft.models.mtp import MtpHead
from outdraft.models.qwen3_5 import Qwen35
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.batched import BatchedOps
from outdraft.ops.reference import ReferenceOps
from outdraft.train import native_tune
from outdraft.train import tune as tuning_run
from outdraft.train.native import HeadTuning, States, round_results, target_states
from outdraft.train.stitch import head_tensors, make_whole, write_stitched
from outdraft.train.trainer import Progress
from outdraft.train.tune import TuneSettings, tune
from outdraft.train.tuning import Texts
from outdraft.weights.header import read_header
from tests import tiny
from tests.models.parity import memory_of

RAW = tiny.target_config("qwen3_5", mtp_num_hidden_layers=1)
CONFIG = Qwen35Config.from_hf(RAW)
K = 3


def quiet(state: Progress) -> None:
    pass


def random_states(n_texts: int, length: int) -> States:
    generator = torch.Generator().manual_seed(5)

    def drawn(width: int) -> Tensor:
        return torch.randn(n_texts, length, width, generator=generator, dtype=torch.float64)

    probs = drawn(CONFIG.vocab_size).softmax(dim=-1)
    return States(drawn(CONFIG.hidden_size), drawn(CONFIG.hidden_size), probs)


def one_round(head: MtpHead, states: States, text: int, anchor: int) -> list[Tensor]:
    """Rows 1 .. K of one round over keys in memory, as drafting computes them."""
    memory = memory_of(list(mtp.memory_layers(CONFIG)))

    def rows(embedded_TK: Tensor, hidden_TK: Tensor) -> Tensor:
        n = embedded_TK.shape[0]
        memory.reserve("s", n)
        call = CausalCall.prepare(memory, head.ops, [Span("s", 0, n)], [0] * n)
        done = head.forward(embedded_TK, hidden_TK, call.position_T, call.attend)
        memory.advance("s", n)
        return done

    embedded, hidden = states.embedded_BSK[text].float(), states.hidden_BSK[text].float()
    state = rows(embedded[1 : anchor + 2], hidden[: anchor + 1])[-1:]
    found = [state]
    for k in range(2, K + 1):
        state = rows(embedded[anchor + k : anchor + k + 1], state)
        found.append(state)
    return found


def test_rounds_are_those_of_drafting() -> None:
    """Every round against one of its own, row after row, in the engine's memory."""
    states = random_states(2, 12)
    weights = tiny.random_tensors(mtp.expected_tensors(CONFIG), 4)
    wide = {name: weight.double() for name, weight in weights.items()}
    got = round_results(MtpHead(CONFIG, wide, BatchedOps(), 64), states, K)
    served = MtpHead(CONFIG, weights, ReferenceOps(), 64)
    with torch.inference_mode():
        for text in range(2):
            for anchor in range(12 - K):
                for mine, theirs in zip(got, one_round(served, states, text, anchor), strict=True):
                    row = mine.view(2, 12 - K, -1)[text, anchor]
                    torch.testing.assert_close(row.float(), theirs[0], rtol=2e-4, atol=2e-4)


def test_gradients_are_those_of_one_round_after_another() -> None:
    """All rounds at once against an explicit loop over anchors, in fp64."""
    states = random_states(2, 10)
    weights = tiny.random_tensors(mtp.expected_tensors(CONFIG), 4, torch.float64)
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    head = MtpHead(CONFIG, leaves, BatchedOps(), 64)
    towards = torch.randn(K, 2 * (10 - K), CONFIG.hidden_size, dtype=torch.float64)
    together = (torch.stack(round_results(head, states, K)) * towards).sum()
    alone = torch.zeros((), dtype=torch.float64)
    for text in range(2):
        for anchor in range(10 - K):
            # A text that ends with this round has it as its last anchor.
            end = slice(0, anchor + K + 1)
            part = States(*(x[text : text + 1, end] for x in (
                states.embedded_BSK, states.hidden_BSK, states.probs_BSV)))  # fmt: skip
            rows = torch.stack([done[-1] for done in round_results(head, part, K)])
            alone = alone + (rows * towards[:, text * (10 - K) + anchor]).sum()
    names = list(leaves)
    first = torch.autograd.grad(together, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(alone, list(leaves.values()))
    for name, mine, theirs in zip(names, first, second, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9, msg=name)


def test_the_target_of_a_step_is_what_the_target_says_there() -> None:
    """Row k is compared with the target behind x_{t+k}, by cross-entropy with its best token."""
    body = tiny.target_weights(RAW, seed=3)
    target = Qwen35(CONFIG, body, BatchedOps())
    leaves = tiny.random_tensors(mtp.expected_tensors(CONFIG), 4)
    leaves = {name: weight.requires_grad_() for name, weight in leaves.items()}
    tokens = torch.randint(6, tiny.VOCAB, (15,), generator=torch.Generator().manual_seed(1))
    texts = Texts.of([(tokens.tolist(), 4)])
    made = HeadTuning(
        target, leaves, texts, batch=1, n_steps=2, loss="ce", seed=0, dtype=torch.float32
    )
    got = made.loss(0)
    states = target_states(target, tokens[None], torch.float32)
    rows = round_results(MtpHead(CONFIG, leaves, BatchedOps(), 15), states, 2)
    best = states.probs_BSV[0].argmax(dim=-1)
    want = torch.zeros(())
    for weight, k in ((1 / 1.8, 1), (0.8 / 1.8, 2)):
        anchors = range(3, 13)
        scores = target.logits(rows[k - 1][list(anchors)])
        want = want + weight * F.cross_entropy(scores, best[[t + k for t in anchors]])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Body and head in files of their own, as large checkpoints have them."""
    root = tmp_path_factory.mktemp("target")
    whole = load_file(tiny.tiny_hybrid(root / "whole") / "model.safetensors")
    path = root / "sharded"
    path.mkdir()
    for file in (root / "whole").iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    names = {n: f"model-0000{1 + n.startswith('mtp.')}-of-00002.safetensors" for n in whole}
    for shard in sorted(set(names.values())):
        part = {n: t for n, t in whole.items() if names[n] == shard}
        save_file(part, path / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(6, 260, (120, 6), generator=generator).tolist()
    path.write_text("".join(json.dumps({"tokens": [2, *row]}) + "\n" for row in rows))
    return path


def test_a_stitched_copy_differs_in_the_heads_bytes_alone(tmp_path: Path, target: Path) -> None:
    names = head_tensors(target)
    assert set(names) == set(mtp.expected_tensors(CONFIG))
    stored = load_file(target / "model-00002-of-00002.safetensors")
    new = {name: torch.randn(tensor.shape) for name, tensor in stored.items()}
    out = tmp_path / "out"
    write_stitched(out, target, new)
    assert (out / "model-00001-of-00002.safetensors").is_symlink()
    make_whole(out)
    for file in target.iterdir():
        copy = out / file.name
        assert not copy.is_symlink()
        before, after = file.read_bytes(), copy.read_bytes()
        if file.name != "model-00002-of-00002.safetensors":
            assert before == after
            continue
        specs = read_header(file).values()
        begin = min(spec.begin for spec in specs)
        assert before[:begin] == after[:begin] and len(before) == len(after)
    for name, tensor in load_file(out / "model-00002-of-00002.safetensors").items():
        assert torch.equal(tensor, new[name].to(tensor.dtype))


def test_one_file_keeps_every_other_byte(tmp_path: Path) -> None:
    source = tiny.tiny_hybrid(tmp_path / "whole")
    file = "model.safetensors"
    name = "mtp.fc.weight"
    spec = read_header(source / file)[name]
    write_stitched(tmp_path / "out", source, {name: torch.zeros(spec.shape)})
    before, after = (source / file).read_bytes(), (tmp_path / "out" / file).read_bytes()
    end = spec.begin + spec.n_bytes
    assert after[spec.begin : end] == bytes(spec.n_bytes) != before[spec.begin : end]
    assert before[: spec.begin] == after[: spec.begin] and before[end:] == after[end:]


def settings_of(target: Path, data: Path, **changes: object) -> TuneSettings:
    return TuneSettings(
        str(target), (str(data),), steps=40, samples=16, draft_n=2, n_heldout=16,
        prompt_tokens=8, new_tokens=12, **changes,  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_head_is_tuned_and_stitched_in(
    tmp_path: Path, target: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a random target's random head nothing is accepted; what counts here is the run.
    monkeypatch.setattr(tuning_run, "is_better", lambda change: True)
    out = tmp_path / "tuned"
    report = tune(out, settings_of(target, data), quiet)
    assert report["before"]["tokens_per_pass"] <= report["after"]["tokens_per_pass"]
    body = "model-00001-of-00002.safetensors"
    assert (out / body).read_bytes() == (target / body).read_bytes()
    assert not any(path.is_symlink() for path in out.iterdir())
    head = "model-00002-of-00002.safetensors"
    old, new = load_file(target / head), load_file(out / head)
    assert all(not torch.equal(new[name], old[name]) for name in old if old[name].ndim == 2)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with LLM(str(target), EngineConfig(spec_type="off")) as plain:
        tokens = plain.generate((2, 7, 9, 11), params).tokens
    with LLM(str(out), EngineConfig(draft_n=2)) as tuned:
        assert tuned.generate((2, 7, 9, 11), params).tokens == tokens


def test_training_brings_a_head_to_its_target(target: Path, data: Path) -> None:
    texts = [(torch.randint(6, 260, (24,)).tolist(), 4) for _ in range(4)]
    make = native_tune.head_objective(
        target, EngineConfig(), texts, 4, 2, settings_of(target, data), torch.float32
    )
    objective = make()
    first = float(objective.loss(0).detach())
    optimiser = torch.optim.Adam(objective.weights.values(), lr=3e-3)
    for _ in range(20):
        optimiser.zero_grad()
        objective.loss(0).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert float(objective.loss(0).detach()) < 0.8 * first


def test_a_head_that_is_not_there_is_named(tmp_path: Path, target: Path, data: Path) -> None:
    path = tiny.tiny_hybrid(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    body = {n: t for n, t in tensors.items() if not n.startswith("mtp.")}
    save_file(body, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PairingError, match=r"claims 1 MTP layer and no mtp"):
        tune(tmp_path / "out", settings_of(path, data), quiet)
    with pytest.raises(PairingError, match="the head in its checkpoint"):
        tune(tmp_path / "out", settings_of(target, data, assistant="new"), quiet)
    coarse = {n: t.to(torch.int8) if n == "mtp.fc.weight" else t for n, t in tensors.items()}
    save_file(coarse, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"mtp.fc.weight .* is stored as torch.int8"):
        tune(tmp_path / "out", settings_of(path, data), quiet)
    assert not (tmp_path / "out").exists()


def test_experts_are_refused(tmp_path: Path, data: Path) -> None:
    path = tiny.tiny_hybrid(tmp_path / "m", "qwen3_5_moe")
    with pytest.raises(OutdraftError, match="experts"):
        tune(tmp_path / "out", settings_of(path, data), quiet)


def test_the_command_says_why_nothing_was_written(tmp_path: Path, target: Path, data: Path) -> None:
    given = [str(target), "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "1"]
    more = ["--samples", "8", "--n-heldout", "16", "--prompt-tokens", "8", "--new-tokens", "8"]
    result = CliRunner().invoke(app, [*given, *more, "--spec-draft-n", "2"])
    assert result.exit_code == 3 and "Nothing was written" in result.output
    assert not (tmp_path / "out").exists()
