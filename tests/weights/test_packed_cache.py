"""Packed weights from a file: the bits of packing, and nothing but packing when a file is bad."""

import errno
import hashlib
import json
import os
import random
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import WeightsError
from outdraft.ops.packed import LAYOUT, PackedLinear
from outdraft.ops.stored import StoredWeight
from outdraft.request import SamplingParams
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter
from outdraft.weights import packed_cache, packed_file
from outdraft.weights.loading import Loading
from outdraft.weights.packed_cache import SUFFIX, PackedCache
from outdraft.weights.packed_file import PART, PackedFile, PackedWriter
from tests import tiny

KEY = "ab" * 32
PACKED_BYTES = {
    "panels of 16, 1": {
        "bf16": "bede8f29",
        "w8": "c2bee4c1",
        "w4": "24b49b5b",
    }
}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    target = tiny.tiny_target(tmp_path / "pair", "e2b", seed=3)
    tiny.tiny_assistant(target / "assistant", target, ordered=True)
    return target


def packed_weights(llm: LLM) -> Iterator[PackedLinear]:
    drafter = llm.pairing.drafter
    assert isinstance(drafter, Gemma4AssistantDrafter)
    assistant = drafter.model
    for model in (llm.target.model, assistant.text):
        yield model.embedding
        yield model.head
        for layer in model.layers:
            yield from layer.matrices.values()
    yield from (assistant.pre_projection, assistant.post_projection)
    if assistant.ordering_CN is not None:
        yield from (assistant.centroids, assistant.blocks)


def same(a: PackedLinear, b: PackedLinear) -> bool:
    parts = ("data", "scales", "zeros")
    return (a.format, a.n, a.k, a.group, a.n_blocks) == (
        b.format,
        b.n,
        b.k,
        b.group,
        b.n_blocks,
    ) and all(torch.equal(getattr(a, part), getattr(b, part)) for part in parts)


def stored(key: str, weight: torch.Tensor) -> StoredWeight:
    three = weight if weight.ndim == 3 else weight[None]
    return StoredWeight(
        key,
        tuple(weight.shape),
        torch.float32,
        "float",
        lambda e, first, n: three[e, first : first + n],
    )


def write_some(path: Path) -> dict[str, StoredWeight]:
    """A file of three weights."""
    torch.manual_seed(5)
    weights = {
        "a": stored("a", torch.randn(3, 19, 45)),
        "b": stored("b", torch.randn(700, 130)),
        "c": stored("c", torch.randn(33, 64)),
    }
    writer = PackedWriter(path, KEY, "a test")
    for (name, weight), format in zip(weights.items(), ("w4", "w8", "bf16"), strict=True):
        writer.add(name, packed_cache.pack_stored(weight, format, 1))  # type: ignore[arg-type]
    writer.finish()
    return weights


@pytest.mark.parametrize("quant", ["w4", "w8", "bf16"])
@pytest.mark.parametrize("shape", ["moe", "e2b"])
def test_the_second_start_has_the_bits_of_the_first_and_packs_nothing(
    tmp_path: Path, shape: str, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny.tiny_target(tmp_path / "pair", shape, seed=3)
    tiny.tiny_assistant(target / "assistant", target, ordered=shape == "e2b")
    plain = EngineConfig(quant=quant, ctx_size=128, draft_n=3)
    cached = EngineConfig(quant=quant, ctx_size=128, draft_n=3, cache_dir=str(tmp_path / "cache"))
    without, first = LLM(str(target), plain), LLM(str(target), cached)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the target's and the assistant's

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was packed")

    monkeypatch.setattr(packed_cache, "pack_stored", refuse)
    second = LLM(str(target), cached)
    assert not first.loading.notes and not second.loading.notes
    for one, two, three in zip(*(packed_weights(x) for x in (without, first, second)), strict=True):
        assert same(one, two) and same(one, three)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    texts = [llm.generate([5, 6, 7], params).tokens for llm in (without, first, second)]
    assert texts[0] == texts[1] == texts[2]


def test_the_mapping_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / f"x{SUFFIX}"
    write_some(path)
    found = PackedFile.open(path, KEY)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    (line,) = [line for line in maps.read_text().splitlines() if line.endswith(str(path))]
    assert line.split()[1] == "r--s", found


def test_another_format_shape_or_name_is_packed_anew(tmp_path: Path) -> None:
    path = tmp_path / f"x{SUFFIX}"
    weights = write_some(path)
    found = PackedFile.open(path, KEY)
    packed = found.get(weights["a"], "w4")
    assert packed is not None
    assert same(packed, packed_cache.pack_stored(weights["a"], "w4", 1))
    assert found.get(weights["a"], "w8") is None
    assert found.get(stored("a", torch.randn(3, 20, 45)), "w4") is None
    assert found.get(stored("d", torch.randn(3, 19, 45)), "w4") is None


def test_a_change_of_the_checkpoint_is_seen(pair: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def files(**changes: object) -> set[str]:
        settings = {"quant": "w8", "spec_type": "off", "cache_dir": str(cache)} | changes
        LLM(str(pair), EngineConfig(ctx_size=64, **settings))  # type: ignore[arg-type]
        return {path.name for path in cache.iterdir()}

    seen = files()
    assert files() == seen
    assert len(files(quant="w4")) == 2
    weights = pair / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1000))
    assert len(files()) == 3
    config = json.loads((pair / "config.json").read_text())
    (pair / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert len(files()) == 4


def test_damage_anywhere_is_seen_or_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / f"x{SUFFIX}"
    weights = write_some(path)
    good = path.read_bytes()
    rng = random.Random(0)
    places = [*range(64), *range(4090, 4104), *range(len(good) - 40, len(good))]
    harmless = 0
    for place in [*places, *(rng.randrange(len(good)) for _ in range(150))]:
        changed = bytearray(good)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            found = PackedFile.open(path, KEY)
        except WeightsError:
            continue
        harmless += 1
        assert 56 <= place < 4096  # between the head and the first part
        assert found.get(weights["b"], "w8") is not None
    assert harmless >= 8
    for length in [0, 1, 40, 4095, 4096, 4097, len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(WeightsError):
            PackedFile.open(path, KEY)
    path.write_bytes(good + b"\0")
    with pytest.raises(WeightsError):
        PackedFile.open(path, KEY)
    path.write_bytes(good)
    PackedFile.open(path, KEY)
    with pytest.raises(WeightsError, match="other weights"):
        PackedFile.open(path, "cd" * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 0},
        {"n": -19},
        {"n": True},
        {"n": 19.0},
        {"n": 2**40},
        {"k": 65537},
        {"group": 0},
        {"group": 48},
        {"n_blocks": 2**31},
        {"n_blocks": 4},
        {"format": "w5"},
        {"format": ["w4"]},
        {"zero_points": 1},
        {"at": [4096, 4096, 4096]},
        {"at": [0, 8192, 12288]},
        {"at": [4096 + 32, 8192, 12288]},
        {"at": [2**40, 8192, 12288]},
        {"at": [4096, 8192]},
        {"at": None},
        {"more": 1},
        None,
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, change: dict[str, object] | None) -> None:
    path = tmp_path / f"x{SUFFIX}"
    write_some(path)
    raw = path.read_bytes()
    _, begin, _, _ = packed_file._HEAD.unpack_from(raw)
    header = json.loads(raw[begin:])
    header["weights"]["a"] = None if change is None else header["weights"]["a"] | change
    new = json.dumps(header).encode()
    head = packed_file._HEAD.pack(b"outdraft", begin, len(new), hashlib.sha256(new).digest())
    path.write_bytes(head + raw[len(head) : begin] + new)
    with pytest.raises(WeightsError, match=r"x\.packed"):
        PackedFile.open(path, KEY)


def test_a_bad_file_is_noted_and_replaced(pair: Path, tmp_path: Path) -> None:
    config = EngineConfig(
        ctx_size=64, quant="w8", spec_type="off", cache_dir=str(tmp_path / "cache")
    )
    LLM(str(pair), config)
    (path,) = (tmp_path / "cache").iterdir()
    good = path.read_bytes()
    for bad in (b"", b"not of ours", good[:-100]):
        path.write_bytes(bad)
        llm = LLM(str(pair), config)
        (note,) = llm.loading.notes
        assert str(path) in note and "packed again" in note
        assert path.read_bytes() == good
        assert not LLM(str(pair), config).loading.notes


@pytest.mark.parametrize("after", [0, 1, 7, 1000])
def test_a_full_disk_is_noted_and_leaves_nothing(
    pair: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, write = 0, PackedWriter._write

    def limited(self: PackedWriter, content: bytes | memoryview) -> None:
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, content)

    monkeypatch.setattr(PackedWriter, "_write", limited)
    cache = tmp_path / "cache"
    config = EngineConfig(ctx_size=64, quant="w8", spec_type="off", cache_dir=str(cache))
    llm = LLM(str(pair), config)
    if after < 1000:
        (note,) = llm.loading.notes
        assert "No space left" in note and not list(cache.iterdir())
    llm.generate([4, 5], SamplingParams(max_tokens=2))


def test_no_room_no_directory_and_limits(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(directory: Path, **settings: int) -> list[str]:
        config = EngineConfig(
            ctx_size=64, quant="w8", spec_type="off", cache_dir=str(directory), **settings
        )
        return LLM(str(pair), config).loading.notes

    (tmp_path / "file").touch()
    (note,) = load(tmp_path / "file" / "below")
    assert "not kept" in note
    assert not load(tmp_path / "none", cache_min_mb=1) and not (tmp_path / "none").exists()
    (note,) = load(tmp_path / "none", cache_max_gb=0)
    assert "limit" in note and not (tmp_path / "none").exists()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**29))
    (note,) = load(tmp_path / "none")
    assert "free" in note and not list((tmp_path / "none").iterdir())


def test_a_model_that_does_not_build_leaves_no_file(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise WeightsError("gone")

    monkeypatch.setattr("outdraft.models.gemma4.rotary_table", fail)
    cache = tmp_path / "cache"
    with pytest.raises(WeightsError):
        LLM(str(pair), EngineConfig(quant="w8", ctx_size=64, cache_dir=str(cache)))
    assert not list(cache.iterdir())


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / f"{name}{SUFFIX}"
        path.write_bytes(bytes(100))
        os.utime(path, (time.time() - 100 * age, time.time() - 100 * age))
    dead, alive = tmp_path / f".dead{PART}", tmp_path / f".alive{PART}"
    for path in (dead, alive, tmp_path / "somebody else's"):
        path.write_bytes(bytes(500))
    os.utime(dead, (0, 0))
    cache = PackedCache(tmp_path, max_bytes=250)
    cache.make_room(keep=tmp_path / f"new{SUFFIX}")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"new{SUFFIX}", f"middle{SUFFIX}", alive.name, "somebody else's"}
    PackedCache(tmp_path, max_bytes=50).make_room(keep=tmp_path / f"middle{SUFFIX}")
    assert {p.name for p in tmp_path.glob(f"*{SUFFIX}")} == {f"middle{SUFFIX}"}


def test_use_counts_as_recent(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path)
    write_some(cache.path(KEY))
    os.utime(cache.path(KEY), (0, 0))
    assert cache.open(KEY, Loading()) is not None
    assert time.time() - cache.path(KEY).stat().st_mtime < 60


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / f"x{SUFFIX}"
    packed = PackedLinear.pack(torch.randn(400, 90), "w4")
    failures: list[Exception] = []

    def write() -> None:
        try:
            for _ in range(20):
                writer = PackedWriter(path, KEY, "")
                writer.add("a", packed)
                writer.finish()
                PackedFile.open(path, KEY)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_progress_reaches_the_end(pair: Path, tmp_path: Path) -> None:
    config = EngineConfig(quant="w4", ctx_size=64, cache_dir=str(tmp_path / "cache"))
    for what in ("packing weights", "reading packed weights"):
        seen: list[tuple[str, int, int]] = []
        LLM(str(pair), config, Loading(lambda *now: seen.append(now)))  # noqa: B023
        assert {name for name, _, _ in seen} == {what}
        assert seen[0][1] == 0 and seen[-1][1] == seen[-1][2]


@pytest.mark.parametrize("format", ["bf16", "w8", "w4"])
def test_a_new_layout_has_a_new_name(format: str) -> None:
    """Change `kPackedLayout` (csrc/core/pack.h) and this table together."""
    ids = torch.arange(40 * 70)
    weight = ((ids * 2654435761 % 1009).float() / 1009 - 0.5).view(40, 70)
    packed = PackedLinear.pack(weight, format)  # type: ignore[arg-type]
    content = b"".join(
        part.view(torch.uint8).numpy().tobytes()
        for part in (packed.data, packed.scales, packed.zeros)
    )
    assert hashlib.sha256(content).hexdigest()[:8] == PACKED_BYTES[LAYOUT][format]
