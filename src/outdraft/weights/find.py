"""From what a user calls a model to its directory, and from a target to its assistant.

Here: the packaged demo, paths, the local Hugging Face cache, the search for an assistant. Not here:
downloading (never done), and whether a pair really fits (speculate/ checks every dimension).
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from outdraft.errors import ModelError
from outdraft.weights.config import CONFIG_NAME, model_directories, read_config

DEMO_NAME = "demo"
DEMO_DIRECTORY = Path(__file__).parent.parent / "models_data" / "demo"
HUB_CACHE = Path("~/.cache/huggingface/hub")  # Hugging Face's default, where `hf download` puts it

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_PREFIX = "models--"
_SNAPSHOTS = "snapshots"
_ASSISTANT_TYPE_SUFFIX = "_assistant"
_ASSISTANT_NAME = "assistant"


@dataclass(frozen=True, slots=True)
class AssistantChoice:
    """The assistant's directory, or None; `reason` is a sentence for the user."""

    path: Path | None
    reason: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    path: Path
    place: str  # "inside the target" or "beside the target"
    rank: int  # how plainly its name says that it belongs to the target; lower is plainer
    similarity: float  # of its name to the target's, 0 to 1


def resolve_model(name: str, *, hub_cache: Path = HUB_CACHE) -> Path:
    """The directory that `name` stands for: "demo", a path, or a cached Hugging Face id "org/name".

    A local directory called demo is reached as "./demo".

    Raises:
        ModelError: nothing of that name is on this machine.
    """
    if name == DEMO_NAME:
        return DEMO_DIRECTORY / "target"
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(name):
        found = ", ".join(str(directory) for directory in model_directories(path.parent)[:4])
        hint = f"did you mean one of these: {found}" if found else "check the path"
        raise ModelError(f"there is no model at {name}", hint)
    snapshot = _cached_snapshot(hub_cache.expanduser() / (_HUB_PREFIX + name.replace("/", "--")))
    if snapshot is None:
        raise ModelError(
            f"{name} is neither a directory nor in the Hugging Face cache of this machine",
            f"download it with: hf download {name}",
        )
    return snapshot


def find_assistant(
    target: Path, explicit: str | None = None, *, hub_cache: Path = HUB_CACHE
) -> AssistantChoice:
    """The assistant to use with the target in directory `target`.

    `explicit` wins. Else it is looked for inside the target's directory, then beside it (for a
    target in the Hugging Face cache: the repository named like it with "-assistant"). Only an
    assistant of the target's hidden size and vocabulary is taken; the plainest name wins.

    Raises:
        ModelError: `explicit` is not on this machine, or the target has no readable config.
    """
    if explicit is not None:
        return AssistantChoice(resolve_model(explicit, hub_cache=hub_cache), "named by you")
    target = Path(os.path.abspath(target))
    wanted = _text_config(read_config(target))
    fitting: list[_Candidate] = []
    passed_over: list[str] = []
    for candidate in _candidates(target):
        misfit = _misfit(candidate.path, wanted)
        if misfit is None:
            fitting.append(candidate)
        else:
            passed_over.append(f"passed over {candidate.path}: {misfit}")
    if not fitting:
        return AssistantChoice(None, "; ".join([_nothing_found(target), *passed_over]))
    best = min(fitting, key=lambda found: (found.rank, -found.similarity, found.path.name))
    reason = f"found {best.place}: {best.path}"
    equals = sum(found.rank == best.rank for found in fitting)
    if equals > 1:
        reason += f" (the closest in name of {equals} that fit)"
    return AssistantChoice(best.path, "; ".join([reason, *passed_over]))


def _cached_snapshot(repository: Path) -> Path | None:
    """The snapshot that refs/main names, or the only one there is."""
    try:
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = ""
    snapshots = repository / _SNAPSHOTS
    if _COMMIT.fullmatch(commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    there = [path for path in snapshots.glob("*") if path.is_dir()]
    return there[0] if len(there) == 1 else None


def _candidates(target: Path) -> Iterator[_Candidate]:
    """Directories that look like an assistant by name or by their config's model_type."""
    for path in model_directories(target):
        if path.name == _ASSISTANT_NAME or _is_assistant(path):
            rank = 0 if path.name == _ASSISTANT_NAME else 1
            yield _candidate(target.name, path, "inside the target", rank)
    repository = _hub_repository(target)
    if repository is not None:
        snapshot = _cached_snapshot(repository.with_name(f"{repository.name}-{_ASSISTANT_NAME}"))
        if snapshot is not None and (snapshot / CONFIG_NAME).is_file():
            yield _candidate(target.name, snapshot, "in the Hugging Face cache", 2)
        return
    ranks = {f"{target.name}-{_ASSISTANT_NAME}": 2, _ASSISTANT_NAME: 3}
    for path in model_directories(target.parent):
        if path != target and (path.name in ranks or _is_assistant(path)):
            yield _candidate(target.name, path, "beside the target", ranks.get(path.name, 4))


def _candidate(target_name: str, path: Path, place: str, rank: int) -> _Candidate:
    similarity = SequenceMatcher(a=target_name, b=path.name, autojunk=False).ratio()
    return _Candidate(path, place, rank, similarity)


def _hub_repository(target: Path) -> Path | None:
    """The cache's directory of the repository that `target` is a snapshot of, if it is one."""
    repository = target.parent.parent
    in_cache = target.parent.name == _SNAPSHOTS and repository.name.startswith(_HUB_PREFIX)
    return repository if in_cache else None


def _nothing_found(target: Path) -> str:
    if _hub_repository(target) is None:
        return f"none found: looked inside {target} and beside it"
    return f"none found: looked inside {target} and for the same id with -{_ASSISTANT_NAME}"


def _is_assistant(directory: Path) -> bool:
    try:
        model_type = read_config(directory).get("model_type")
    except ModelError:
        return False
    return isinstance(model_type, str) and model_type.endswith(_ASSISTANT_TYPE_SUFFIX)


def _misfit(directory: Path, target: Mapping[str, Any]) -> str | None:
    """Why the model in `directory` cannot be the assistant of `target`, or None."""
    try:
        config = read_config(directory)
    except ModelError as error:
        return error.message
    if not _is_assistant(directory):
        return f"it is a {config.get('model_type')}, not an assistant"
    hidden, wanted_hidden = config.get("backbone_hidden_size"), target.get("hidden_size")
    if hidden != wanted_hidden:
        return f"it is for a target of hidden size {hidden}, this one has {wanted_hidden}"
    vocabulary, wanted_vocabulary = _text_config(config).get("vocab_size"), target.get("vocab_size")
    if vocabulary != wanted_vocabulary:
        return f"its vocabulary has {vocabulary} tokens, the target's {wanted_vocabulary}"
    return None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of a multimodal or assistant config."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config
