"""The loop: the same losses and weights to the bit whatever happens to the process in between."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from outdraft.errors import TrainingError
from outdraft.train import checkpoint
from outdraft.train.checkpoint import CheckpointStore
from outdraft.train.trainer import (
    LOG_NAME,
    Progress,
    StopFlag,
    TrainingStopped,
    read_log,
    run_phase,
)
from outdraft.weights import save
from tests.train.child import N_STEPS, objective, phase

ROOT = Path(__file__).parents[2]
SHORT = 16


def quiet(state: Progress) -> None:
    pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    run_phase(phase(directory), objective(), quiet, StopFlag())
    return directory


def same_result(directory: Path, expected: Path) -> bool:
    """Whether losses and last checkpoints are the same bytes."""
    last = f"step-{N_STEPS:08d}/model.safetensors"
    return (directory / LOG_NAME).read_bytes() == (expected / LOG_NAME).read_bytes() and (
        directory / last
    ).read_bytes() == (expected / last).read_bytes()


def start_child(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.train.child", directory], cwd=ROOT)


def wait_for_steps(directory: Path, n: int) -> None:
    deadline = time.monotonic() + 60
    while len(read_log(directory / LOG_NAME)) < n and time.monotonic() < deadline:
        time.sleep(0.005)


def test_losses_fall(undisturbed: Path) -> None:
    losses = read_log(undisturbed / LOG_NAME)
    assert len(losses) == N_STEPS and losses[-1] < losses[0] - 0.05


def test_a_killed_run_resumes_to_the_bit(tmp_path: Path, undisturbed: Path) -> None:
    directory = tmp_path / "killed"
    child = start_child(directory)
    wait_for_steps(directory, random.randint(8, N_STEPS - 15))
    child.kill()
    child.wait()
    assert len(read_log(directory / LOG_NAME)) < N_STEPS, "it was killed too late"
    run_phase(phase(directory), objective(), quiet, StopFlag())
    assert same_result(directory, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_last_step(
    tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    directory = tmp_path / "stopped"
    stop = StopFlag()

    def report(state: Progress) -> None:
        if state.step == 10:
            signal.raise_signal(number)

    with stop.installed(), pytest.raises(TrainingStopped):
        run_phase(phase(directory), objective(), report, stop)
    # It came after step 10: the step in progress is the last, and it is saved.
    assert phase(directory).store.steps() == [7, 11]
    assert len(read_log(directory / LOG_NAME)) == 11
    run_phase(phase(directory), objective(), quiet, StopFlag())
    assert same_result(directory, undisturbed)


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "full"
    really_save = save.save_file

    def full(tensors: object, path: Path, **options: object) -> None:
        if len(list(directory.glob("step-*"))) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        really_save(tensors, path, **options)

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(TrainingError, match=r"step-00000021.*No space left"):
        run_phase(phase(directory), objective(), quiet, StopFlag())
    assert phase(directory).store.steps() == [7, 14]
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    run_phase(phase(directory), objective(), quiet, StopFlag())
    assert same_result(directory, undisturbed)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run_phase(phase(tmp_path, 3), objective(), quiet, StopFlag())
    with pytest.raises(TrainingError, match="other settings"):
        run_phase(phase(tmp_path, 4), objective(), quiet, StopFlag())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run_phase(phase(tmp_path, 3), objective(), quiet, StopFlag())
    path = tmp_path / "step-00000003" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TrainingError, match=r"step-00000003 is damaged"):
        run_phase(phase(tmp_path, 3), objective(), quiet, StopFlag())


def test_a_cut_off_log_line_is_written_again(tmp_path: Path, undisturbed: Path) -> None:
    directory = tmp_path / "cut"
    stop = StopFlag()

    def report(state: Progress) -> None:
        stop.requested = state.step == 9

    with pytest.raises(TrainingStopped):
        run_phase(phase(directory), objective(), report, stop)
    with (directory / LOG_NAME).open("a") as log:
        log.write('{"step": 11, "lo')
    run_phase(phase(directory), objective(), quiet, StopFlag())
    assert same_result(directory, undisturbed)


def test_old_checkpoints_go_but_the_kept_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "same", keep_every=4)
    for step in range(1, 12):
        store.save(step, {"w": torch.full((2,), float(step))})
    assert store.steps() == [4, 8, 10, 11] and store.kept_steps() == [4, 8, 11]
    assert float(store.load(8)["w"][0]) == 8.0
    assert load_file(store.path(11) / "model.safetensors")["w"].tolist() == [11.0, 11.0]


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    broken = objective()
    with torch.no_grad():
        broken.weights["norm.weight"].fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1"):
        run_phase(phase(tmp_path), broken, quiet, StopFlag())


def test_replacing_a_json_file_is_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    checkpoint.replace_json(path, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left"):
        checkpoint.replace_json(path, {"new": 2})
    assert path.read_text() == '{\n  "old": 1\n}\n'
