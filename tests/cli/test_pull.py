"""`outdraft pull` and `-hf`, against a server that speaks the Hub's routes, in processes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outdraft.weights.find import DEMO_DIRECTORY, find_assistant, resolve_model
from tests.server.live import ROOT
from tests.weights.hub_server import COMMIT, Hub, hub_server

ID = "some-org/some-model"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """The demo and its assistant as repositories, with files beside them that nobody wants."""
    with hub_server() as hub:
        for name, part in ((ID, "target"), (f"{ID}-assistant", "assistant")):
            root = tmp_path / "hub" / name
            shutil.copytree(DEMO_DIRECTORY / part, root)
            hub.repositories[name] = root
        root = hub.repositories[ID]
        for unwanted in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "x.pkl"):
            (root / unwanted).write_bytes(b"do not take me")
        (root / "onnx").mkdir()
        (root / "onnx" / "model.safetensors").write_bytes(b"nor me")
        (root / "merges.txt").write_text("a b\n")
        yield hub


def outdraft(
    hub: Hub, home: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "outdraft", *arguments],
        cwd=ROOT,
        env={**kept, **own, "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_a_model_is_pulled_found_and_run(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = outdraft(hub, home, "pull", ID)
    assert done.returncode == 0, done.stderr
    found = resolve_model(ID, hub_cache=home / "hub")
    assert done.stdout.strip() == str(found)
    assert sorted(p.name for p in found.iterdir()) == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in found.iterdir():
        assert path.read_bytes() == (hub.repositories[ID] / path.name).read_bytes()
    assert f"{ID}-assistant drafts for it" in done.stderr
    assert "--with-assistant" in done.stderr and f"outdraft serve {ID}" in done.stderr
    n_asked = len(hub.asked)
    run = outdraft(
        hub, home, "generate", ID, "--prompt", "def", "--max-tokens", "1", HF_HUB_OFFLINE="1"
    )
    assert run.returncode == 0, run.stderr
    again = outdraft(hub, home, "pull", ID)
    assert "0 of 6 files to download" in again.stderr
    assert len(hub.asked) == n_asked  # no file a second time


def test_with_its_assistant_it_drafts(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = outdraft(hub, home, "pull", ID, "--with-assistant")
    assert done.returncode == 0, done.stderr
    target = resolve_model(ID, hub_cache=home / "hub")
    assistant = resolve_model(f"{ID}-assistant", hub_cache=home / "hub")
    assert find_assistant(target).path == assistant
    offline = outdraft(hub, home, "inspect", "-hf", ID, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and "It runs, drafting" in offline.stdout, offline.stderr


def test_a_broken_transfer_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.breaks["model.safetensors"] = 2
    done = outdraft(hub, tmp_path / "home", "pull", ID)
    assert done.returncode == 0, done.stderr
    n = (hub.repositories[ID] / "model.safetensors").stat().st_size
    first, *resumed = hub.gets("model.safetensors")
    begins = [int(line.removeprefix("bytes=").removesuffix("-")) for line in resumed]
    assert first == "" and len(begins) == 2 and 0 < begins[0] <= begins[1] < n
    pulled = resolve_model(ID, hub_cache=tmp_path / "home" / "hub") / "model.safetensors"
    assert pulled.read_bytes() == (hub.repositories[ID] / "model.safetensors").read_bytes()


def test_what_is_whole_is_kept_when_a_transfer_fails(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    hub.breaks["model.safetensors"] = 100
    done = outdraft(hub, home, "pull", ID)
    assert done.returncode == 2 and "files that are whole are kept" in done.stderr, done.stderr
    failed = outdraft(hub, home, "inspect", ID)
    assert failed.returncode == 1 and "It cannot run" in failed.stdout
    hub.breaks.clear()
    hub.asked.clear()
    done = outdraft(hub, home, "inspect", "-hf", ID)  # not whole: downloaded
    assert done.returncode == 0, done.stderr
    assert "1 of 6 files to download" in done.stderr
    assert {line.split()[1] for line in hub.asked} == {"model.safetensors"}


def test_other_verbs_download_what_hf_names(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = outdraft(hub, home, "inspect", "-hf", ID)
    assert done.returncode == 0, done.stderr
    assert "It runs, without drafting" in done.stdout
    assert f"outdraft pull {ID}-assistant" in done.stderr
    hub.asked.clear()
    again = outdraft(hub, home, "inspect", "-hf", ID)
    assert again.returncode == 0 and not hub.asked and "download" not in again.stderr


def test_a_revision_is_found_by_its_name(hub: Hub, tmp_path: Path) -> None:
    hub.revisions[ID] = ["v1.5"]
    home = tmp_path / "home"
    done = outdraft(hub, home, "pull", ID, "--revision", "v1.5")
    assert done.returncode == 0, done.stderr
    for name in (ID, f"{ID}@v1.5", f"{ID}@{COMMIT}"):
        assert resolve_model(name, hub_cache=home / "hub").name == COMMIT
    wrong = outdraft(hub, home, "pull", ID, "--revision", "v9")
    assert wrong.returncode == 2 and "no such revision" in wrong.stderr


@pytest.mark.parametrize(
    "status,code,said,todo",
    [
        (403, "GatedRepo", "is gated", "accept the terms at https://huggingface.co/some-org"),
        (401, "GatedRepo", "is gated", "hf auth login"),
        (401, "RepoNotFound", "may not be had, or is not there", "HF_TOKEN"),
        (404, "RepoNotFound", "the Hub has no model", "check the id"),
        (500, "", "could not be downloaded", "repeat the command"),
    ],
)
def test_what_may_not_be_had(
    hub: Hub, tmp_path: Path, status: int, code: str, said: str, todo: str
) -> None:
    hub.refused[ID] = (status, code)
    done = outdraft(hub, tmp_path / "home", "pull", ID)
    assert done.returncode == 2
    error, *hint = done.stderr.splitlines()
    assert error.startswith("error: ") and said in error and todo in " ".join(hint), done.stderr
    assert "Traceback" not in done.stderr


def test_offline_and_without_a_network(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = outdraft(hub, home, "pull", ID, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE forbids" in done.stderr
    done = outdraft(hub, home, "pull", ID, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and "check the connection" in done.stderr, done.stderr
    assert not hub.asked


def test_no_room_on_the_disk(hub: Hub, tmp_path: Path) -> None:
    hub.claimed["model.safetensors"] = 10**18
    done = outdraft(hub, tmp_path / "home", "pull", ID)
    assert done.returncode == 2 and "GB are missing and" in done.stderr, done.stderr
    assert not hub.asked  # seen before a byte is sent


def test_a_repository_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    (hub.repositories[ID] / "model.safetensors").unlink()
    (hub.repositories[ID] / "consolidated.safetensors").unlink()
    shutil.rmtree(hub.repositories[ID] / "onnx")
    done = outdraft(hub, tmp_path / "home", "pull", ID)
    assert done.returncode == 2 and "no safetensors files" in done.stderr


def test_a_model_is_named_once(hub: Hub, tmp_path: Path) -> None:
    for arguments in (["inspect"], ["inspect", "demo", "-hf", ID], ["chat", "-hf", f"{ID}:Q4_K_M"]):
        done = outdraft(hub, tmp_path, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
