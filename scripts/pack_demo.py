"""Packs a trained demo pair into the package: int8 weights, tokenizer, held-out text.

    python scripts/pack_demo.py --target DIR --assistant DIR --heldout DIR --out DIR

Weight matrices (the embedding among them) become int8 with one scale a row, everything else stays
as it is. `target`, `assistant` and `heldout` under --out are replaced; other files there are kept.
"""

import argparse
import shutil
from pathlib import Path

from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.quantise import int8_channel_config, quantise_int8_channel
from outdraft.weights.save import save_checkpoint

MAX_TOTAL_BYTES = 32_000_000
EXTRA_NAMES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def pack_model(source: Path, out: Path) -> None:
    """Writes the int8 copy of one model directory to `out`."""
    checkpoint = Checkpoint.open(source)
    tensors = {name: checkpoint.get(name) for name in checkpoint.names()}
    matrices = [
        name
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and tensor.is_floating_point() and name.endswith(".weight")
    ]
    config = read_config(source) | {"quantization_config": int8_channel_config()}
    shutil.rmtree(out, ignore_errors=True)
    save_checkpoint(
        out,
        quantise_int8_channel(tensors, matrices),
        config,
        extra_files=[source / name for name in EXTRA_NAMES],
    )


def pack_heldout(source: Path, out: Path) -> None:
    """Copies the held-out texts."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in sorted(source.glob("*.txt")):
        shutil.copyfile(path, out / path.name)


def main() -> None:
    """Packs all three parts and checks the size of the whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("target", "assistant", "heldout", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    pack_model(arguments.target, arguments.out / "target")
    pack_model(arguments.assistant, arguments.out / "assistant")
    pack_heldout(arguments.heldout, arguments.out / "heldout")
    total_bytes = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {total_bytes / 1e6:.1f} MB")
    if total_bytes > MAX_TOTAL_BYTES:
        raise SystemExit(f"more than {MAX_TOTAL_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
