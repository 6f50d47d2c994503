"""Tuning through kills, full disks and data of no use: real processes, a real small disk."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from outdraft.bench.peers.transformers import sharing_modes
from outdraft.cli.tune import app
from outdraft.errors import PairingError, TrainingError
from outdraft.train import tune as tuning_run
from outdraft.train.trainer import Progress
from outdraft.train.tune import tune
from tests import adapters, tiny
from tests.train import tune_child

KILLS = 10


def quiet(state: Progress) -> None:
    pass


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Target, drafter and data."""
    root = tmp_path_factory.mktemp("given")
    target = tiny.tiny_target(root / "target")
    stock = tiny.tiny_assistant(root / "stock", target)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(6, 260, (120, 6), generator=generator).tolist()
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps({"tokens": [2, *row]}) + "\n" for row in rows))
    return str(target), str(stock), str(data)


def start(out: Path, given: tuple[str, str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.tune_child", str(out), *given],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.prove
def test_ten_kills_end_the_same_to_the_bit(tmp_path: Path, given: tuple[str, str, str]) -> None:
    """SIGKILL at ten random places, most of them training steps, each run going on from the last.

    A run that is killed before its next checkpoint begins again at the one before.
    """
    whole = start(tmp_path / "whole", given)
    seen = whole.stdout.read().splitlines() if whole.stdout else []
    assert whole.wait() == 0
    draw = random.Random(11)
    wanted = sorted(draw.sample(range(1, 40), KILLS - 2))
    places = ["writing 8", *(f"training {step}" for step in wanted), "selecting 2"]
    assert {"writing 8", "selecting 2"} <= set(seen)
    for place in places:
        run = start(tmp_path / "cut", given)
        assert run.stdout is not None
        for line in run.stdout:
            if reached(line, place):
                run.send_signal(signal.SIGKILL)
                break
        assert run.wait() == -signal.SIGKILL, place
        assert not (tmp_path / "cut").exists()
    last = start(tmp_path / "cut", given)
    assert last.communicate() and last.returncode == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def reached(line: str, place: str) -> bool:
    phase, step = place.split()
    name, at = line.split()
    return name == phase and int(at) >= int(step)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, given: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_run, "is_better", lambda change: True)
    settings = tune_child.settings(*given)
    with pytest.raises(TrainingError, match="could not be written") as raised:
        tune(small_disk / "tuned", settings, quiet)
    assert "No space left" in raised.value.message and raised.value.hint
    work = small_disk / ".tuned.tuning"
    assert not (small_disk / "tuned").exists()
    halves = [p for p in work.rglob("*") if "unfinished" in p.name or p.stat().st_size == 0]
    assert not [p for p in halves if p.is_file()], halves
    grow = ["mount", "-o", "remount,size=64m", str(small_disk)]
    subprocess.run(grow, check=True)
    assert tune(small_disk / "tuned", settings, quiet)["steps"] == 40
    assert not work.exists()


def test_useless_data_leaves_the_stock_drafter(tmp_path: Path, given: tuple[str, str, str]) -> None:
    """The drafter fits the target already, on everything that there is to learn from."""
    target, stock, data = given
    fitting = tmp_path / "fitting"
    settings = replace(tune_child.settings(target, stock, data), steps=100, samples=96)
    tune(fitting, replace(settings, n_heldout=24, new_tokens=32), quiet)
    useless = tmp_path / "useless.jsonl"
    row = json.dumps({"tokens": [2, *[7] * 7]})
    rows = "".join(json.dumps({"tokens": [2, 7, 7, 7, 7, i]}) + "\n" for i in range(6, 12))
    useless.write_text(row + "\n" + rows)
    before = sorted(p.name for p in tmp_path.iterdir())
    options = ["--data", str(useless), "--heldout", data, "--assistant", str(fitting)]
    options += ["--out", str(tmp_path / "tuned"), "--steps", "30", "--samples", "16"]
    options += ["--prompt-tokens", "8", "--new-tokens", "32", "--spec-draft-n", "2", "--force"]
    done = CliRunner().invoke(app, [target, *options])
    assert done.exit_code == 3, done.output
    said = " ".join(done.stderr.split())
    assert "kept the stock drafter" in said
    assert "not better outside the noise" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_new_drafter_for_a_target_without_one(
    tmp_path: Path, given: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(tune_child.settings(*given), assistant="new", steps=60, samples=64)
    settings = replace(settings, n_heldout=24, new_tokens=24)
    report = tune(tmp_path / "made", settings, quiet)
    assert report["before"]["tokens_per_pass"] == 1.0
    assert report["change"]["tokens_per_pass"] > 2 * report["change"]["standard_error"]
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["model_type"] == "gemma4_assistant"
    assert config["backbone_hidden_size"] == 64
    generation = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert generation["num_assistant_tokens"] == 2
    modes = property(sharing_modes)
    monkeypatch.setattr(transformers.Gemma4TextConfig, "kv_sharing_modes", modes)
    model, info = transformers.Gemma4AssistantForCausalLM.from_pretrained(
        tmp_path / "made", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values())
    stored = load_file(tmp_path / "made" / "model.safetensors")["post_projection.weight"]
    assert torch.equal(model.state_dict()["post_projection.weight"].float(), stored.float())


def test_an_adapted_target_is_what_is_learned_from(
    tmp_path: Path, given: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, training and measuring all see the adapter, as they would a merged target."""
    monkeypatch.setattr(tuning_run, "is_better", lambda change: True)
    target, stock, data = given
    modules = ("q_proj", "v_proj", "down_proj")
    adapter = adapters.write_adapter(tmp_path / "adapter", Path(target), modules)
    whole = adapters.merge_into(tmp_path / "merged", Path(target), adapter)
    settings = tune_child.settings(target, stock, data)
    ours = tune(tmp_path / "a", replace(settings, adapter=str(adapter)), quiet)
    theirs = tune(tmp_path / "b", replace(settings, target=str(whole)), quiet)
    tune(tmp_path / "c", settings, quiet)
    assert ours["before"] == theirs["before"]
    found = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    apart = [max(float((f[n] - found[1][n]).float().abs().max()) for n in found[1]) for f in found]
    assert apart[0] < 0.05 * apart[2]


@pytest.mark.parametrize("kind,said", [("qwen3_5", "head in its checkpoint"), ("moe", "experts")])
def test_targets_that_a_new_drafter_is_not_made_for(
    tmp_path: Path, given: tuple[str, str, str], kind: str, said: str
) -> None:
    target = tiny.tiny_target(tmp_path / "target", kind)
    settings = replace(tune_child.settings(str(target), "new", given[2]))
    with pytest.raises((PairingError, TrainingError), match=said):
        tune(tmp_path / "made", settings, quiet)
    assert not (tmp_path / "made").exists()
