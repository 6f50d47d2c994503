"""Opening checkpoints: single file, shards, and everything that can be wrong with them."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from outdraft.errors import WeightsError
from outdraft.weights.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from outdraft.weights.header import DTYPES, MAX_HEADER_BYTES, read_header

TENSORS = {
    "a.weight": torch.randn(3, 5).bfloat16(),
    "b": torch.randn(7, dtype=torch.float64),
    "c.ids": torch.arange(1, 5),
    "d": torch.randn(()),
    "e": torch.zeros(0, 4, dtype=torch.int8),
}
Header = dict[str, Any]


def write_shards(directory: Path, *shards: dict[str, torch.Tensor]) -> dict[str, str]:
    """Shards and their index; returns its weight_map."""
    weight_map = {}
    for number, shard in enumerate(shards):
        save_file(shard, directory / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"part-{number}.safetensors")
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def split_file(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_file(path: Path, header: object, data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def check_contents(checkpoint: Checkpoint) -> None:
    assert sorted(checkpoint.names()) == sorted(TENSORS)
    assert checkpoint.n_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        spec = checkpoint.spec(name)
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert name in checkpoint
        assert torch.equal(checkpoint.get(name), tensor)
        assert checkpoint.get(name).dtype == tensor.dtype
    assert "nothing" not in checkpoint


@pytest.mark.parametrize("name", [SINGLE_NAME, "other.safetensors"])
def test_one_file(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name, metadata={"format": "pt"})
    check_contents(Checkpoint.open(tmp_path))


def test_shards(tmp_path: Path) -> None:
    names = list(TENSORS)
    write_shards(tmp_path, *({n: TENSORS[n] for n in part} for part in (names[:2], names[2:])))
    checkpoint = Checkpoint.open(tmp_path)
    check_contents(checkpoint)
    assert checkpoint.spec("b").file != checkpoint.spec("d").file


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "0a1b")
    (tmp_path / "model" / SINGLE_NAME).symlink_to("../blobs/0a1b")
    check_contents(Checkpoint.open(tmp_path / "model"))


def test_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no safetensors weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"config\.json but no weights"):
        Checkpoint.open(tmp_path)
    for name in ("x.safetensors", "y.safetensors"):
        save_file(TENSORS, tmp_path / name)
    with pytest.raises(WeightsError, match=r"2 safetensors files but no .*index"):
        Checkpoint.open(tmp_path)


class _Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_class_1_pickle_files_are_never_opened(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(_Canary(canary)))
    with pytest.raises(WeightsError, match=r"pickle files .* never opened"):
        Checkpoint.open(tmp_path)
    (tmp_path / name).rename(tmp_path / SINGLE_NAME)
    with pytest.raises(WeightsError):
        Checkpoint.open(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "..",
        "",
        ".safetensors",
        "x.bin",
        "x\0.safetensors",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_class_12_the_index_names_only_plain_files(tmp_path: Path, file: object) -> None:
    save_file(TENSORS, tmp_path.parent / "x.safetensors")
    write_index(tmp_path, dict.fromkeys(TENSORS, file))
    with pytest.raises(WeightsError, match="not a plain"):
        Checkpoint.open(tmp_path)


def test_an_index_that_does_not_agree_with_its_shards(tmp_path: Path) -> None:
    one, two = {"x": torch.ones(2)}, {"y": torch.ones(3)}
    weight_map = write_shards(tmp_path, one, two)
    write_index(tmp_path, weight_map | {"z": "part-0.safetensors"})
    with pytest.raises(WeightsError, match=r"lists 'z' in part-0\.safetensors, which does not"):
        Checkpoint.open(tmp_path)
    write_index(tmp_path, {"x": "part-0.safetensors", "y": "part-0.safetensors"})
    with pytest.raises(WeightsError, match="'y'"):
        Checkpoint.open(tmp_path)
    write_shards(tmp_path, one | {"v": torch.ones(1)}, two | one)
    with pytest.raises(WeightsError, match=r"part-0\.safetensors holds 'x', but .* lists it in"):
        Checkpoint.open(tmp_path)
    write_shards(tmp_path, one | two, {"w": torch.ones(1)})
    write_index(tmp_path, {"x": "part-0.safetensors", "w": "part-1.safetensors"})
    with pytest.raises(WeightsError, match=r"holds 'y', but .* does not list it"):
        Checkpoint.open(tmp_path)
    write_shards(tmp_path, one, two)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"shard .*part-1\.safetensors is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(WeightsError) as caught:
        Checkpoint.open(tmp_path)
    assert INDEX_NAME in caught.value.message
    assert caught.value.hint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / SINGLE_NAME
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 0.3, 0.9, -1])
def test_truncated_files(tmp_path: Path, good: Path, keep: float) -> None:
    raw = good.read_bytes()
    path = tmp_path / SINGLE_NAME
    path.write_bytes(raw[: int(len(raw) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(WeightsError) as caught:
        Checkpoint.open(tmp_path)
    assert SINGLE_NAME in caught.value.message
    assert "download it again" in caught.value.hint


def test_too_long_files(tmp_path: Path, good: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(good.read_bytes() + b"\0")
    with pytest.raises(WeightsError, match="too long"):
        Checkpoint.open(tmp_path)


def _edit(name: str, **fields: object) -> Callable[[Header], object]:
    return lambda header: header[name].update(fields)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_edit("b", dtype="F4"), "unknown dtype"),
        (_edit("b", dtype=["F32"]), "unknown dtype"),
        (_edit("b", dtype="F32"), "needs 28 bytes, its offsets hold 56"),
        (_edit("b", shape=[8]), "needs 64 bytes"),
        (_edit("b", shape=[-7]), "impossible shape"),
        (_edit("b", shape=[7.0]), "impossible shape"),
        (_edit("b", shape=[True]), "impossible shape"),
        (_edit("b", shape=7), "impossible shape"),
        (_edit("b", shape=[2**63]), "impossible shape"),
        (_edit("b", shape=[2**62, 2**62]), "needs"),
        (_edit("b", data_offsets=[0]), "impossible data offsets"),
        (_edit("b", data_offsets=[-56, 0]), "impossible data offsets"),
        (_edit("b", data_offsets=[56, 0]), "its offsets hold -56"),
        (_edit("b", data_offsets=[10**9, 10**9 + 56]), "hole"),
        (_edit("b", extra=1), "not described"),
        (lambda header: header["b"].pop("shape"), "not described"),
        (lambda header: header.update(f=header["b"]), "overlaps"),
        (lambda header: header.pop("b"), "hole|too long"),
        (lambda header: header.update(f=None), "not described"),
    ],
)
def test_headers_that_contradict_themselves(
    tmp_path: Path, good: Path, edit: Callable[[Header], object], words: str
) -> None:
    header, data = split_file(good)
    edit(header)
    write_file(tmp_path / SINGLE_NAME, header, data)
    with pytest.raises(WeightsError, match=words) as caught:
        Checkpoint.open(tmp_path)
    assert SINGLE_NAME in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, NaN]}}',
        b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        b' "a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_headers_that_are_no_headers(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / SINGLE_NAME
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(WeightsError) as caught:
        Checkpoint.open(tmp_path)
    caught.value.message.encode()


def test_a_header_length_far_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    for length in (2**64 - 1, MAX_HEADER_BYTES + 1, 3):
        (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(WeightsError, match="header claims"):
            Checkpoint.open(tmp_path)


def test_a_file_that_changes_after_opening(tmp_path: Path, good: Path) -> None:
    path = tmp_path / SINGLE_NAME
    path.write_bytes(good.read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    path.write_bytes(b"\0" * 4)
    with pytest.raises(WeightsError, match="cannot be read"):
        checkpoint.get("b")
    path.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        checkpoint.get("b")


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from(sorted(DTYPES)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(
    max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_class_12_mutated_headers_give_only_a_clean_error(
    tmp_path: Path, good: Path, data: st.DataObject
) -> None:
    path = tmp_path / SINGLE_NAME
    if data.draw(st.booleans()):
        raw = bytearray(good.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if len(raw) % 3 else raw)
    else:
        header, body = split_file(good)
        name = data.draw(st.sampled_from(sorted(TENSORS)))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        header[name][field] = data.draw(VALUES)
        write_file(path, header, body)
    try:
        specs = read_header(path)
    except WeightsError as error:
        error.message.encode()
        assert error.hint
    else:  # a mutation can leave a valid file: then every tensor can be read
        checkpoint = Checkpoint(tmp_path, specs)
        for name, spec in specs.items():
            assert checkpoint.get(name).shape == spec.shape
