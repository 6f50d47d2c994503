"""Text for the demo's target: `python scripts/python_texts.py OUT` writes Python source as JSONL.

OUT/train.jsonl has a file a row, of this interpreter's library and of installed packages, and
OUT/heldout.jsonl the texts that come with the package, which no training here ever sees.
"""

import argparse
import json
from pathlib import Path

from outdraft.train.corpus import python_corpus

MAX_BYTES = 30_000_000


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    corpus = python_corpus(MAX_BYTES)
    for name, texts in (("train", corpus.train), ("heldout", corpus.heldout)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts.values())
        (given.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(texts)} files, {len(lines) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
