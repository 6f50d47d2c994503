"""The header of one safetensors file, checked completely before any data is touched.

Here: `read_header`, from bytes to `TensorSpec`s. Not here: several files as one checkpoint
(checkpoint) and reading the data.

Format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian N, N bytes of
JSON {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}, then the data,
to which the offsets are relative and which they must cover without holes or overlap.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outdraft.errors import WeightsError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
METADATA_KEY = "__metadata__"
DOWNLOAD_AGAIN = "the file is damaged or incomplete: download it again"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of one tensor.

    `file` is the name of its file, without the directory; `begin` the byte where its data begins.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    begin: int

    @property
    def n_params(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size in the file, bytes."""
        return self.n_params * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorSpec]:
    """All tensors of one file, in the order of its header.

    Raises:
        WeightsError: the file cannot be read, or its header or size is inconsistent in any way.
    """
    try:
        with path.open("rb") as stream:
            file_bytes = path.stat().st_size
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            _check_length(path, length, file_bytes)
            raw = stream.read(length)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {error.strerror}", "check that it exists and is readable"
        ) from error
    entries = _parse_json(path, raw)
    entries.pop(METADATA_KEY, None)
    specs: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        specs[name], begin, end = _parse_entry(path, name, entry, LENGTH_BYTES + length)
        spans.append((begin, end, name))
    _check_spans(path, spans, data_bytes=file_bytes - LENGTH_BYTES - length)
    return specs


def _damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path}: {what}", DOWNLOAD_AGAIN)


def _check_length(path: Path, length: int, file_bytes: int) -> None:
    if file_bytes < LENGTH_BYTES:
        raise _damaged(path, f"only {file_bytes} bytes long, not a safetensors file")
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > file_bytes:
        raise _damaged(
            path, f"the header claims {length} bytes, but the file has only {file_bytes}"
        )


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _damaged(path, "the header names a tensor or field twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
    except WeightsError:
        raise
    except (ValueError, RecursionError):
        raise _damaged(path, "the header is not valid JSON") from None
    if not isinstance(value, dict):
        raise _damaged(path, "the header is not a JSON object")
    return value


def _parse_entry(path: Path, name: str, entry: Any, data_begin: int) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise WeightsError(
            f"{path}: tensor {name!r} has the unknown dtype {dtype_name!r}",
            f"supported are {', '.join(DTYPES)}; use another version of the model",
        )
    if not _sizes(shape):
        raise _damaged(path, f"tensor {name!r} has the impossible shape {shape!r:.80}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has impossible data offsets {offsets!r:.80}")
    begin, end = offsets
    spec = TensorSpec(tuple(shape), DTYPES[dtype_name], path.name, data_begin + begin)
    if end - begin != spec.n_bytes:
        raise _damaged(
            path, f"tensor {name!r} needs {spec.n_bytes} bytes, its offsets hold {end - begin}"
        )
    return spec, begin, end


def _sizes(value: Any) -> bool:
    """True for a list of integers from 0 to 2^63 - 1 (JSON's true is no integer)."""
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in value
    )


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """The tensors must follow each other without holes or overlap and end with the file."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            how = "overlaps the one before it" if begin < position else "leaves a hole before it"
            raise _damaged(path, f"tensor {name!r} {how} (begins at {begin}, not {position})")
        position = end
    if position != data_bytes:
        what = "truncated" if data_bytes < position else "too long"
        raise _damaged(path, f"{what}: {position} bytes of data expected, {data_bytes} found")
