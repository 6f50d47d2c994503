"""From a model's name to its directory, and from a target to its assistant."""

import json
from pathlib import Path

import pytest

from outdraft.config import hub_cache
from outdraft.errors import ModelError
from outdraft.weights.find import AssistantChoice, find_assistant, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_target(directory: Path, *, nested: bool = False, hidden: int = 64) -> Path:
    text = {"hidden_size": hidden, "vocab_size": 100}
    config = {"model_type": "gemma4", "text_config": text} if nested else text
    return write(directory, config)


def make_assistant(directory: Path, *, hidden: int = 64, vocab: int = 100) -> Path:
    config = {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": hidden,
        "text_config": {"vocab_size": vocab, "hidden_size": 8},
    }
    return write(directory, config)


def write(directory: Path, config: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def hub_snapshot(cache: Path, name: str, commit: str = COMMIT, *, ref: bool = True) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    if ref:
        (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def test_demo_is_in_the_package() -> None:
    target = resolve_model("demo")
    assert (target / "config.json").is_file()
    assert find_assistant(target).path == target.parent / "assistant"


def test_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_target(tmp_path / "org" / "name")
    for name in ("org/name", "./org/name", str(tmp_path / "org" / "name")):
        assert resolve_model(name, hub_cache=tmp_path / "none").samefile(tmp_path / "org" / "name")


def test_nothing_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model at") as caught:
        resolve_model(str(tmp_path / "modle"))
    assert caught.value.hint == "check the path"
    make_target(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        resolve_model(str(tmp_path / "modle"))
    assert str(tmp_path / "model") in caught.value.hint


def test_a_cached_id(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a directory nor in the") as caught:
        resolve_model("org/name", hub_cache=tmp_path)
    assert caught.value.hint == "download it with: outdraft pull org/name"
    snapshot = hub_snapshot(tmp_path, "org/name")
    assert resolve_model("org/name", hub_cache=tmp_path) == snapshot
    hub_snapshot(tmp_path, "org/name", "f" * 40, ref=False)
    assert resolve_model("org/name", hub_cache=tmp_path) == snapshot


def test_a_cache_without_a_main_ref(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, "org/name", ref=False)
    assert resolve_model("org/name", hub_cache=tmp_path) == snapshot
    (tmp_path / "models--org--name" / "refs" / "main").write_text("../../../elsewhere")
    assert resolve_model("org/name", hub_cache=tmp_path) == snapshot
    hub_snapshot(tmp_path, "org/name", "f" * 40, ref=False)
    with pytest.raises(ModelError):
        resolve_model("org/name", hub_cache=tmp_path)


@pytest.mark.parametrize("name", ["../..", "a/../b", "org/na me", "a/b/c", "/x/y", "o/..", ""])
def test_class_12_only_ids_are_looked_up_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    try:
        assert resolve_model(name, hub_cache=tmp_path) == Path(name)
    except ModelError as error:
        assert "there is no model at" in error.message


def test_the_named_assistant_wins(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    make_assistant(tmp_path / "assistant")
    other = make_assistant(tmp_path / "other", hidden=1)
    assert find_assistant(target, str(other)) == AssistantChoice(other, "named by you")
    with pytest.raises(ModelError):
        find_assistant(target, str(tmp_path / "missing"))


@pytest.mark.parametrize("nested", [False, True])
def test_the_plainest_place_wins(tmp_path: Path, nested: bool) -> None:
    target = make_target(tmp_path / "gemma", nested=nested)
    assert find_assistant(target).path is None
    order = [
        tmp_path / "a-drafter",
        tmp_path / "assistant",
        tmp_path / "gemma-assistant",
        target / "drafter",
        target / "assistant",
    ]
    for directory in order:
        make_assistant(directory)
        choice = find_assistant(target)
        assert choice.path == directory
        place = "inside" if directory.parent == target else "beside"
        assert choice.reason == f"found {place} the target: {directory}"


def test_of_equals_the_closest_in_name_is_taken(tmp_path: Path) -> None:
    target = make_target(tmp_path / "gemma-4-12b")
    for name in ("gemma-4-31b-mtp", "gemma-4-12b-mtp", "zzz"):
        make_assistant(tmp_path / name)
    choice = find_assistant(target)
    assert choice.path == tmp_path / "gemma-4-12b-mtp"
    assert "the closest in name of 3 that fit" in choice.reason


def test_assistants_of_other_targets_are_passed_over_with_the_reason(tmp_path: Path) -> None:
    target = make_target(tmp_path / "gemma")
    make_assistant(tmp_path / "gemma-assistant", hidden=32)
    make_assistant(tmp_path / "mtp", vocab=99)
    write(tmp_path / "assistant", {"model_type": "llama"})
    choice = find_assistant(target)
    assert choice.path is None
    assert "none found: looked inside" in choice.reason
    assert "gemma-assistant: it is for a target of hidden size 32, this one has 64" in choice.reason
    assert "mtp: its vocabulary has 99 tokens, the target's 100" in choice.reason
    assert "assistant: it is a llama, not an assistant" in choice.reason
    good = make_assistant(tmp_path / "zzz")
    choice = find_assistant(target)
    assert choice.path == good
    assert "passed over" in choice.reason


def test_unrelated_and_damaged_neighbours_are_no_obstacle(tmp_path: Path) -> None:
    target = make_target(tmp_path / "gemma")
    make_target(tmp_path / "other")
    write(tmp_path / "list", [])
    (tmp_path / "assistant").mkdir()
    (tmp_path / "assistant" / "config.json").write_text("{")
    choice = find_assistant(target)
    assert choice.path is None
    assert "not valid JSON" in choice.reason


def test_a_target_is_not_its_own_assistant(tmp_path: Path) -> None:
    target = make_target(tmp_path / "assistant")
    assert "passed over" not in find_assistant(target).reason


def test_a_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target(tmp_path / "gemma")
    make_assistant(tmp_path / "gemma-assistant")
    monkeypatch.chdir(target)
    assert find_assistant(Path()).path == tmp_path / "gemma-assistant"


def test_a_cached_target_finds_its_cached_assistant(tmp_path: Path) -> None:
    snapshot = make_target(hub_snapshot(tmp_path, "google/gemma"))
    make_assistant(snapshot.with_name("f" * 40))  # another revision is no neighbour
    choice = find_assistant(snapshot)
    assert choice.path is None
    assert "-assistant" in choice.reason
    assistant = make_assistant(hub_snapshot(tmp_path, "google/gemma-assistant"))
    choice = find_assistant(snapshot)
    assert choice == AssistantChoice(assistant, f"found in the Hugging Face cache: {assistant}")


def test_the_cache_is_where_the_hubs_tools_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_cache() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub_cache() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert hub_cache() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert hub_cache() == tmp_path
    snapshot = hub_snapshot(tmp_path, "org/name")
    assert resolve_model("org/name") == snapshot


def test_a_revision_of_an_id(tmp_path: Path) -> None:
    main = hub_snapshot(tmp_path, "org/name")
    other = hub_snapshot(tmp_path, "org/name", "f" * 40, ref=False)
    (other.parents[1] / "refs" / "v2").write_text("f" * 40)
    assert resolve_model("org/name", hub_cache=tmp_path) == main
    for name in ("org/name@v2", f"org/name@{'f' * 40}"):
        assert resolve_model(name, hub_cache=tmp_path) == other
    with pytest.raises(ModelError, match="neither a directory nor"):
        resolve_model("org/name@v3", hub_cache=tmp_path)
    with pytest.raises(ModelError):
        resolve_model("org/name@../../x", hub_cache=tmp_path)
