"""A checkpoint is there completely or not at all."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from outdraft.errors import TrainingError
from outdraft.weights import save
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.save import new_directory, save_checkpoint

CONFIG = {"model_type": "tiny", "name": "é"}


def random_tensors() -> dict[str, torch.Tensor]:
    shared = torch.randn(6, 4)
    return {
        "a": shared,
        "b": shared.T,  # neither contiguous nor of its own storage
        "c": torch.randn(3, dtype=torch.bfloat16),
        "d": torch.randint(-9, 9, (5,), dtype=torch.int8),
        "e": torch.nn.Parameter(torch.randn(2, 2)),
    }


def check_saved(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(directory)
    assert sorted(checkpoint.names()) == sorted(tensors)
    assert all(torch.equal(checkpoint.get(name), tensors[name]) for name in tensors)
    assert read_config(directory) == CONFIG


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    tensors = random_tensors()
    (tmp_path / "tokenizer.json").write_text("{}")
    extra = [tmp_path / "tokenizer.json"]
    save_checkpoint(tmp_path / "runs" / "one", tensors, CONFIG, extra_files=extra)
    check_saved(tmp_path / "runs" / "one", tensors)
    assert sorted(path.name for path in (tmp_path / "runs" / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    modes = {path.stat().st_mode for path in (tmp_path / "runs" / "one").iterdir()}
    assert len(modes) == 1
    assert os.listdir(tmp_path / "runs") == ["one"]


def test_large_checkpoints_are_sharded(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_checkpoint(tmp_path / "model", tensors, CONFIG, max_shard_bytes=100)
    check_saved(tmp_path / "model", tensors)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"].values()) == {
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    }


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    tensors = random_tensors()
    (tmp_path / "model").mkdir()
    save_checkpoint(tmp_path / "model", tensors, CONFIG)
    with pytest.raises(TrainingError, match="exists already"):
        save_checkpoint(tmp_path / "model", random_tensors(), CONFIG)
    check_saved(tmp_path / "model", tensors)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="exists already"):
        save_checkpoint(tmp_path / "file", tensors, CONFIG)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("bug")])
def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = 0
    save_file = save.save_file

    def failing(*args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        save_file(*args, **options)

    monkeypatch.setattr(save, "save_file", failing)
    expected = TrainingError if isinstance(error, OSError) else KeyError
    with pytest.raises(expected) as caught:
        save_checkpoint(tmp_path / "model", random_tensors(), CONFIG, max_shard_bytes=100)
    if expected is TrainingError:
        assert "No space left" in str(caught.value) and "free some space" in str(caught.value)
    assert os.listdir(tmp_path) == []


def run_limited(directory: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, in which a save can be limited or killed."""
    head = """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from outdraft.errors import TrainingError
        from outdraft.weights import save
        directory = Path(sys.argv[1])
        save.save_checkpoint(directory / "step-1", {"a": torch.ones(10)}, {"model_type": "tiny"})
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path: Path) -> None:
    done = run_limited(
        tmp_path,
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            save.save_checkpoint(directory / "step-2", {"a": torch.ones(10_000)}, {})
        except TrainingError as error:
            print(error)
        """,
    )
    assert "step-2 could not be written" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["step-1"]
    assert torch.equal(Checkpoint.open(tmp_path / "step-1").get("a"), torch.ones(10))


def test_a_kill_while_saving_leaves_the_last_checkpoint_alone(tmp_path: Path) -> None:
    done = run_limited(
        tmp_path,
        """
        import os
        save._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        save.save_checkpoint(directory / "step-2", {"a": torch.ones(10)}, {})
        """,
    )
    assert done.returncode == -signal.SIGKILL
    names = [name for name in os.listdir(tmp_path) if not name.startswith(".")]
    assert names == ["step-1"]
    assert torch.equal(Checkpoint.open(tmp_path / "step-1").get("a"), torch.ones(10))
    save_checkpoint(tmp_path / "step-2", {"a": torch.ones(10)}, CONFIG)


def test_the_directory_appears_at_the_end_only(tmp_path: Path) -> None:
    with new_directory(tmp_path / "model") as unfinished:
        (unfinished / "state").write_text("x")
        assert not (tmp_path / "model").exists()
        assert unfinished.parent.parent == tmp_path  # the same file system, so a rename suffices
    assert (tmp_path / "model" / "state").read_text() == "x"
