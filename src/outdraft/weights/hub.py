"""Fetching a model from the Hugging Face Hub into the cache where `find` looks.

Here: what of a repository is taken, whether the disk has room, the transfer, and its failures in
words. Not here: the transfer itself (the library huggingface_hub, an extra), nor any use of it that
was not asked for: only `pull` and `-hf` come here.

Taken are data only, by an allow-list of names: weights as safetensors, JSON, the chat template,
the tokenizer, plain text. Nothing that Python could execute or unpickle.
"""

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from outdraft.config import hub_cache
from outdraft.errors import ModelError, OutdraftError
from outdraft.weights.config import read_config
from outdraft.weights.find import ASSISTANT_NAME, hub_directory, resolve_model, split_id

ALLOWED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
MAIN = "main"
WEIGHTS = "*.safetensors"
DOUBLE = "consolidated*.safetensors"
"""The same weights once more, in another layout, where a repository has both."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SPARE_BYTES = 256 << 20
"""Left free on the disk."""

Told = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository on the Hub, as far as it is taken.

    Attributes:
        revision: the branch, tag or commit that was asked for.
        sizes: bytes of each file that is taken, by name.
        missing: names of those that are not here yet.
    """

    id: str
    revision: str
    commit: str
    sizes: dict[str, int]
    missing: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Of all files that are taken."""
        return sum(self.sizes.values())

    @property
    def missing_bytes(self) -> int:
        """Of those that are not here yet."""
        return sum(self.sizes[name] for name in self.missing)


def look_up(name: str) -> Remote:
    """What the Hub has under an id, "org/name" or "org/name@revision".

    Raises:
        ModelError: there is nothing that can be run, or it may not be had, or not now.
    """
    repository, revision = split_id(name)
    hub = _library()
    revision = revision or MAIN
    try:
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        raise _explained(error, name) from error
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    sizes = {file: sizes[file] for file in wanted(list(sizes))}
    if not any(fnmatchcase(file, WEIGHTS) for file in sizes):
        raise ModelError(
            f"{repository} has no safetensors files",
            "take a repository in Hugging Face's format, not one of GGUF or pickled files",
        )
    snapshot = hub_directory(hub_cache(), repository) / "snapshots" / str(info.sha)
    missing = tuple(file for file in sizes if not (snapshot / file).is_file())
    return Remote(repository, revision, str(info.sha), sizes, missing)


def wanted(names: list[str]) -> list[str]:
    """Those of a repository's files that are taken: data in its root and of a drafter inside."""
    found = []
    for name in names:
        path = PurePosixPath(name)
        allowed = any(fnmatchcase(path.name, pattern) for pattern in ALLOWED)
        if allowed and path.parts[:-1] in ((), (ASSISTANT_NAME,)) and not path.is_absolute():
            found.append(name)
    single = [n for n in found if fnmatchcase(n, WEIGHTS) and not fnmatchcase(n, DOUBLE)]
    return [n for n in found if not (single and fnmatchcase(n, DOUBLE))]


def is_whole(name: str) -> bool:
    """Whether an id can be run from what is here; asks nobody."""
    from outdraft.weights.checkpoint import Checkpoint  # brings torch, which pulling needs not

    try:
        path = resolve_model(name)
        Checkpoint.open(path)
        read_config(path)
    except ModelError:
        return False
    return any((path / tokenizer).is_file() for tokenizer in TOKENIZERS)


def check_room(remotes: list[Remote]) -> None:
    """Whether the disk takes what is still missing.

    Raises:
        OutdraftError: it does not.
    """
    place = hub_cache()
    while not place.exists():
        place = place.parent
    needed, free = sum(r.missing_bytes for r in remotes), shutil.disk_usage(place).free
    if needed and needed + SPARE_BYTES > free:
        raise OutdraftError(
            f"{needed / 1e9:.2f} GB are missing and {free / 1e9:.2f} GB are free in {place}",
            "free some, or set HF_HUB_CACHE to a directory on a larger disk",
        )


def fetch(remote: Remote, told: Told) -> Path:
    """Download what is missing; a transfer that breaks goes on where it was.

    Files that are whole are kept, whatever happens, and not downloaded again.

    Args:
        told: called with each number of bytes that has arrived, from any thread.

    Returns:
        The model's directory.

    Raises:
        OutdraftError: the transfer failed for good.
    """
    hub = _library()
    try:
        return Path(
            hub.snapshot_download(
                remote.id,
                revision=remote.revision,
                cache_dir=hub_cache(),
                allow_patterns=[escape(name) for name in remote.sizes],
                tqdm_class=_bar_class(told),
            )
        )
    except Exception as error:
        raise _explained(error, remote.id) from error


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise OutdraftError(
            "downloading needs the library huggingface_hub",
            "install it with: pip install 'outdraft[hub]'",
        ) from error
    return huggingface_hub


def _bar_class(told: Told) -> Any:
    """What the library takes for a progress bar: shows nothing, passes bytes on."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **named: Any) -> None:
            # of its three bars, the one whose unit is bytes on the disk
            self.counts = str(named.get("desc", "")).startswith("Reconstructing")
            super().__init__(*args, **{**named, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts:
                told(int(n or 0))
            return None

    return Bar


def _explained(error: BaseException, name: str) -> OutdraftError:
    """A failure while the library was at work, in words."""
    from huggingface_hub import errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    page = f"https://huggingface.co/{name.partition('@')[0]}"
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return ModelError(
            f"{name} is not here, and HF_HUB_OFFLINE forbids to download it",
            "unset HF_HUB_OFFLINE, or copy the model's directory here and give its path",
        )
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return ModelError(
            f"{name} is gated: its authors want to be asked first",
            f"accept the terms at {page}, then log in with `hf auth login` or set HF_TOKEN",
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return ModelError(f"{name} has no such revision", f"see {page}/tree/main for those it has")
    status = [e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)]
    if status and status[0] in (401, 403):
        return ModelError(
            f"{name} may not be had, or is not there (the Hub says {status[0]})",
            "check the id; for a private model log in with `hf auth login` or set HF_TOKEN",
        )
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return ModelError(
            f"the Hub has no model {name}",
            "check the id; for a private model log in with `hf auth login` or set HF_TOKEN",
        )
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return OutdraftError(
            f"the disk is full: {name} is not whole",
            "free some and repeat the command: files that are whole are kept",
        )
    denied = next((e for e in chain if isinstance(e, PermissionError)), None)
    if denied is not None:
        return OutdraftError(
            f"{denied.filename or hub_cache()} cannot be written",
            "check its rights, or set HF_HUB_CACHE to a directory of yours",
        )
    return OutdraftError(
        f"{name} could not be downloaded: {type(error).__name__}: {str(error).splitlines()[:1]}",
        "check the connection and repeat the command: files that are whole are kept",
    )
