"""Starting to learn, and drafters that were learned before, on disk.

A directory holds a folder for each pair of target and drafter, called after a digest of both, and
in it the newest drafters as Hugging Face directories with rising numbers; each is there whole or
not at all. Here: finding the one to begin with. Not here: who writes them (train/learner.py), the
process (learning.py).
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from outdraft.config import EngineConfig
from outdraft.engine.learning import Learning, NotLearning
from outdraft.errors import OutdraftError
from outdraft.models.registry import Target
from outdraft.speculate.build import Pairing
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import CONFIG_NAME
from outdraft.weights.loading import Loading

COMMAND = (sys.executable, "-m", "outdraft.train.learner")
MOST_DRAFTS = 8
"""Of a round in training and in comparisons."""
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def begin_learning(
    target: Target, pairing: Pairing, config: EngineConfig, loading: Loading
) -> Learning | NotLearning:
    """The engine's end of a learner, where one is asked for. A drafter kept before is taken.

    Raises:
        OutdraftError: there is no drafter here that can be exchanged.
    """
    if not config.learn:
        return NotLearning()
    renewal, stock = pairing.renewal, pairing.path
    if renewal is None or stock is None:
        raise OutdraftError(
            f"there is no drafter that can learn while serving ({pairing.reason})",
            "it needs the assistant of a Gemma 4 target; leave learning out",
        )
    if target.ops.device.type != "cpu":
        raise OutdraftError("learning while serving is for CPUs", "use --device cpu")
    own = replace(config, spec_type="off", assistant=None, draft_n=None, draft_n_max=None)
    own = replace(own, learn=False, learn_dir=None, device="cpu", max_sequences=1)
    order = {
        "model": str(target.path.absolute()),
        "config": asdict(own),
        "stock": str(stock.absolute()),
        "draft_n": min(max(1, pairing.n_draft_max), MOST_DRAFTS),
        "buffer_bytes": config.learn_mb * 10**6,
    }
    if config.learn_dir is not None:
        key = fingerprint(target.path, stock, target.adapter.key if target.adapter else "")
        folder = Path(config.learn_dir).expanduser().absolute() / key
        order["keep"] = str(folder)
    learning = Learning(
        COMMAND,
        order,
        renewal,
        stock.absolute(),
        max_bytes=config.learn_mb * 10**6,
        idle_s=config.learn_idle_s,
    )
    if config.learn_dir is not None:
        _take_kept(learning, folder, loading)
    return learning


def _take_kept(learning: Learning, folder: Path, loading: Loading) -> None:
    """Begin with the newest drafter that can be loaded."""
    for path in kept(folder):
        try:
            network = learning.renewal.load(path, Loading())
        except OutdraftError as error:
            loading.notes.append(f"a learned drafter is passed over: {error.message}")
            continue
        learning.begin_with(path, network)
        return


def kept(folder: Path) -> Iterator[Path]:
    """Drafters in a folder, the newest first."""
    found = [p for p in folder.glob("[0-9]*") if p.name.isdecimal() and p.is_dir()]
    yield from sorted(found, key=lambda p: int(p.name), reverse=True)


def fingerprint(target: Path, drafter: Path, adapter: str) -> str:
    """A digest of a target and a drafter: configs, headers, and parts of the data.

    All of the data would take long to read; a fine-tune changes nearly all of it.
    """
    digest = hashlib.sha256(adapter.encode())
    for directory in (target, drafter):
        digest.update((directory / CONFIG_NAME).read_bytes())
        for name in Checkpoint.open(directory).files():
            with (directory / name).open("rb") as file:
                size = file.seek(0, 2)
                digest.update(f"{name} {size} ".encode())
                for i in range(_SAMPLES):
                    file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
