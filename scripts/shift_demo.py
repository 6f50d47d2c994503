"""A target that has moved to another domain: a model, fine-tuned on C++ headers of PyTorch.

`python scripts/shift_demo.py OUT --steps N` writes OUT/target, and the text as JSONL with one file
a row: OUT/train.jsonl, which the target has learned, and OUT/heldout.jsonl, which it has not. It is
the example of docs/tuning.md. A run that was killed goes on from its last checkpoint. `--model` is
the demo or a hybrid of `outdraft pretrain`, whose head stays as it is.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.models.registry import GEMMA4, QWEN35, Family, open_weights
from outdraft.text.tokenizer import Tokenizer
from outdraft.train.checkpoint import CheckpointStore, fingerprint
from outdraft.train.export import export_like
from outdraft.train.mtp import HybridPretraining, MtpOptions
from outdraft.train.native_tune import has_own_head
from outdraft.train.optimiser import OptimiserConfig
from outdraft.train.pretrain import Pretraining
from outdraft.train.stitch import make_whole, write_stitched
from outdraft.train.tokenizer import EOS_ID
from outdraft.train.trainer import Phase, Progress, StopFlag, run_phase
from outdraft.train.weights import fastest_dtype, make_trainable
from outdraft.train.windows import Windows
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.find import resolve_model

CONTEXT, BATCH = 256, 8
HELDOUT_PART = 10  # one file in so many
MAX_FILE_CHARS = 20_000


def headers(by_hand: bool) -> tuple[list[str], list[str]]:
    """Texts of PyTorch's C++ headers: to learn, and held out by a hash of the text.

    Those in `ops` are generated, one like another; `by_hand` leaves them out.
    """
    train: dict[str, str] = {}
    heldout: dict[str, str] = {}
    for path in sorted((Path(torch.__file__).parent / "include").rglob("*.h")):
        text = path.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if by_hand and path.parent.name == "ops":
            continue
        if 1000 <= len(text) <= MAX_FILE_CHARS and text.isascii():
            (heldout if int(digest, 16) % HELDOUT_PART == 0 else train)[digest] = text
    return [train[d] for d in sorted(train)], [heldout[d] for d in sorted(heldout)]


def show(state: Progress) -> None:
    """A line now and then."""
    if state.loss is not None and state.step % 10 == 0:
        rate = f"{state.tokens_per_s:,.0f} tokens/s"
        print(f"step {state.step}/{state.n_steps}  loss {state.loss:.3f}  {rate}", flush=True)


def weights_of(source: Path, family: Family) -> tuple[Any, dict[str, Tensor]]:
    """A model's config and its weights in fp32, to be trained."""
    raw = read_config(source)
    config = family.read_config(raw)
    stored, _, _ = open_weights(
        Checkpoint.open(source),
        raw,
        family.expected_tensors(config),
        family.ignore_rules(config),
        prefixes=family.prefixes,
        dtype=torch.float32,
    )
    return config, make_trainable(dict(stored), torch.device("cpu"))


def gemma(source: Path, windows: Windows, dtype: torch.dtype) -> Pretraining:
    """Next-token prediction with a Gemma 4."""
    return Pretraining(*weights_of(source, GEMMA4), windows, BATCH, dtype)


def hybrid(source: Path, windows: Windows, dtype: torch.dtype) -> HybridPretraining:
    """The same with a hybrid, without its head."""
    headless = MtpOptions(depths=0, repeat=False)
    return HybridPretraining(*weights_of(source, QWEN35), windows, BATCH, headless, dtype)


def write_hybrid(out: Path, source: Path, weights: Mapping[str, Tensor]) -> None:
    """A copy of the directory with the trained tensors in it."""
    names = Checkpoint.open(source).names()
    own = {next(n for n in (f"model.{name}", name) if n in names): name for name in weights}
    write_stitched(out, source, {name: weights[mine] for name, mine in own.items()})
    make_whole(out)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--by-hand", action="store_true", help="without generated headers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    texts = dict(zip(("train", "heldout"), headers(given.by_hand), strict=True))
    for name, rows in texts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (given.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(rows)} files, {sum(map(len, rows)) / 1e6:.1f} MB", flush=True)
    source = resolve_model(given.model)
    tokenizer = Tokenizer.load(source)
    ids = [[*tokenizer.encode(t, add_special_tokens=False), EOS_ID] for t in texts["train"]]
    stream = torch.tensor([i for text in ids for i in text], dtype=torch.int32)
    windows = Windows(stream, CONTEXT, 0)
    dtype = fastest_dtype(torch.device("cpu"))
    print(f"{len(stream):,} tokens; products in {dtype}", flush=True)
    is_hybrid = has_own_head(source)
    objective = (hybrid if is_hybrid else gemma)(source, windows, dtype)
    settings = {"steps": given.steps, "model": str(source), "by_hand": given.by_hand}
    store = CheckpointStore(given.out / "phase", fingerprint(settings))
    optimiser = OptimiserConfig(muon_lr=0.01, adam_lr=1e-3)
    phase = Phase("target", given.steps, 25, store, optimiser, dtype)
    with StopFlag().installed() as stop:
        run_phase(phase, objective, show, stop)
    write = write_hybrid if is_hybrid else export_like
    write(given.out / "target", source, objective.all_weights)


if __name__ == "__main__":
    main()
