"""Our weights as GGUF files, made by llama.cpp's own script and quantiser.

Here: finding llama.cpp, converting. Not here: running its server (llama_cpp.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from outdraft.bench.peers.weights import assistant_state, target_state, write_directory
from outdraft.errors import OutdraftError
from outdraft.models.registry import Target

HOME = Path(".cache") / "outdraft" / "llama.cpp"  # where scripts/build_llama_cpp.sh builds
SERVER = Path("build") / "bin" / "llama-server"
CONVERT = "convert_hf_to_gguf.py"
VENDORED = Path("source") / "vendor" / "llama.cpp"
GGUF_TYPES = {"bf16": "BF16", "w8": "Q8_0", "w4": "Q4_0"}
ASSISTANT_TYPES = {"bf16": "BF16", "w8": "Q8_0", "w4": "Q8_0"}  # ours has 8 bits beside w4
_TAIL = 600  # characters of a program's last words


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A build: its programs and the sources that they were built from."""

    server: Path
    quantise: Path
    source: Path


@dataclass(frozen=True, slots=True)
class Files:
    """A converted pair, and what its files are called in llama.cpp's terms."""

    target: Path
    assistant: Path
    target_type: str
    assistant_type: str


def find_llama_cpp(server: Path | None) -> LlamaCpp:
    """The build that a server belongs to; by default the one that our script makes.

    Raises:
        OutdraftError: it is not there, or not whole.
    """
    path = server if server is not None else Path.home() / HOME / SERVER
    hint = "build it with scripts/build_llama_cpp.sh, or give it with --llama-server PATH"
    if not os.access(path, os.X_OK):
        raise OutdraftError(f"there is no llama.cpp server at {path}", hint)
    path = path.resolve()
    quantise = path.with_name("llama-quantize")
    if not quantise.exists():
        raise OutdraftError(f"there is no llama-quantize beside {path}", hint)
    for parent in path.parents:
        for source in (parent, parent / VENDORED):
            if (source / CONVERT).exists():
                return LlamaCpp(path, quantise, source)
    raise OutdraftError(f"there is no {CONVERT} in a directory above {path}", hint)


def convert_pair(
    llama: LlamaCpp, target: Target, assistant: Path, quant: str, directory: Path
) -> Files:
    """Write both models as GGUF into a directory, in the type that has as many bits as `quant`.

    Raises:
        OutdraftError: converting failed; the message has what the program said last.
    """
    types = GGUF_TYPES[quant], ASSISTANT_TYPES[quant]
    states = {
        "target": (target.path, target_state(target)),
        "assistant": (assistant, assistant_state(assistant, target.dtype)),
    }
    paths = []
    for (name, (source, state)), kind in zip(states.items(), types, strict=True):
        paths.append(_convert(llama, source, state, kind, directory / name))
    return Files(paths[0], paths[1], *types)


def _convert(
    llama: LlamaCpp, source: Path, state: dict[str, Tensor], kind: str, directory: Path
) -> Path:
    write_directory(source, state, directory)
    adapt_tokenizer(directory / "tokenizer.json")
    whole = directory.with_suffix(".bf16.gguf")
    command = [sys.executable, str(llama.source / CONVERT), str(directory)]
    run([*command, "--outfile", str(whole), "--outtype", "bf16"])
    if kind == "BF16":
        return whole
    packed = directory.with_suffix(f".{kind.lower()}.gguf")
    run([str(llama.quantise), str(whole), str(packed), kind])
    whole.unlink()
    return packed


def adapt_tokenizer(path: Path) -> None:
    """Make the converter accept a tokenizer of bytes; ids and token texts stay.

    It takes Gemma 4's own kind alone: BPE with `byte_fallback` and a sequence of decoders. Prompts
    and answers are compared as token ids, so it does not matter how llama.cpp would split text.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    found["model"]["byte_fallback"] = True
    if found["decoder"]["type"] != "Sequence":
        found["decoder"] = {"type": "Sequence", "decoders": [found["decoder"]]}
    path.write_text(json.dumps(found), encoding="utf-8")


def run(command: Sequence[str]) -> None:
    """Run a program to its end.

    Raises:
        OutdraftError: it failed.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        name = next((Path(word).name for word in command if word.endswith(CONVERT)), command[0])
        raise OutdraftError(
            f"{name} failed:\n{done.stdout[-_TAIL:].strip()}",
            "use the sources of llama-cpp-python 0.3.36, as scripts/build_llama_cpp.sh does",
        )
