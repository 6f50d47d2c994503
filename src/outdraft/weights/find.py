"""From what a user calls a model to its directory, and from a target to its assistant.

Here: the packaged demo, paths, the local Hugging Face cache, the search for an assistant. Not here:
downloading (hub.py), and whether a pair really fits (speculate/ checks every dimension).
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from outdraft.config import hub_cache as default_hub_cache
from outdraft.errors import ModelError
from outdraft.weights.config import CONFIG_NAME, model_directories, read_config

DEMO_NAME = "demo"
ASSISTANT_NAME = "assistant"
DEMO_DIRECTORY = Path(__file__).parent.parent / "models_data" / "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_PREFIX = "models--"
_SNAPSHOTS = "snapshots"
_ASSISTANT_TYPE_SUFFIX = "_assistant"


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


def resolve_model(name: str, *, hub_cache: Path | None = None) -> Path:
    """The directory that `name` stands for: "demo", a path, or a cached Hugging Face id "org/name".

    A local directory called demo is reached as "./demo", another revision as "org/name@revision".

    Raises:
        ModelError: nothing of that name is on this machine.
    """
    if name == DEMO_NAME:
        return DEMO_DIRECTORY / "target"
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not is_id(name):
        found = ", ".join(str(directory) for directory in model_directories(path.parent)[:4])
        hint = f"did you mean one of these: {found}" if found else "check the path"
        raise ModelError(f"there is no model at {name}", hint)
    repository, revision = split_id(name)
    cache = default_hub_cache() if hub_cache is None else hub_cache
    snapshot = _cached_snapshot(hub_directory(cache, repository), revision)
    if snapshot is None:
        raise ModelError(
            f"{name} is neither a directory nor in the Hugging Face cache of this machine",
            f"download it with: outdraft pull {name}",
        )
    return snapshot


def find_assistant(
    target: Path, explicit: str | None = None, *, hub_cache: Path | None = None
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


def is_id(name: str) -> bool:
    """Whether a name is spelled like an id of the Hub, with or without a revision."""
    return _HUB_ID.fullmatch(name) is not None


def split_id(name: str) -> tuple[str, str | None]:
    """The repository and the revision of an id.

    Raises:
        ModelError: it is not spelled like one.
    """
    if not is_id(name):
        raise ModelError(f"{name} is not an id of the Hub", "such as google/gemma-4-E2B-it")
    repository, _, revision = name.partition("@")
    return repository, revision or None


def hub_directory(cache: Path, repository: str) -> Path:
    """Where the Hub's cache has a repository."""
    return cache.expanduser() / (_HUB_PREFIX + repository.replace("/", "--"))


def _cached_snapshot(repository: Path, revision: str | None = None) -> Path | None:
    """The snapshot of a revision; without one that of refs/main, or the only one there is."""
    snapshots = repository / _SNAPSHOTS
    if revision is not None and _COMMIT.fullmatch(revision):
        commit = revision
    else:
        try:
            commit = (
                (repository / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
            )
        except (OSError, ValueError):
            commit = ""
    if _COMMIT.fullmatch(commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    if revision is not None:
        return None
    there = [path for path in snapshots.glob("*") if path.is_dir()]
    return there[0] if len(there) == 1 else None


def _candidates(target: Path) -> Iterator[_Candidate]:
    """Directories that look like an assistant by name or by their config's model_type."""
    for path in model_directories(target):
        if path.name == ASSISTANT_NAME or _is_assistant(path):
            rank = 0 if path.name == ASSISTANT_NAME else 1
            yield _candidate(target.name, path, "inside the target", rank)
    repository = _hub_repository(target)
    if repository is not None:
        snapshot = _cached_snapshot(repository.with_name(f"{repository.name}-{ASSISTANT_NAME}"))
        if snapshot is not None and (snapshot / CONFIG_NAME).is_file():
            yield _candidate(target.name, snapshot, "in the Hugging Face cache", 2)
        return
    ranks = {f"{target.name}-{ASSISTANT_NAME}": 2, ASSISTANT_NAME: 3}
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
    return f"none found: looked inside {target} and for the same id with -{ASSISTANT_NAME}"


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
