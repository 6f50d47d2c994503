"""Other libraries' kernels in processes of their own: the protocol, with a made-up library."""

import io
import json
import threading
from collections.abc import Iterator

import pytest

from outdraft.bench.peers import kernel_peers
from outdraft.bench.peers.kernel_peers import Library, PeerProcess, peer_backends
from outdraft.bench.peers.kernel_server import Server, serve
from outdraft.bench.stopwatch import settle
from outdraft.errors import OutdraftError
from tests.bench import fake_kernels

SIZE = (64, 96)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[kernel_peers.Backend]]:
    library = Library(("torch",), "tests.bench.fake_kernels")
    monkeypatch.setitem(kernel_peers.LIBRARIES, "fake", library)
    versions: dict[str, str] = {}
    with peer_backends(["fake"], 1, versions.__setitem__) as backends:
        assert versions == {"fake": "7.1"}
        yield backends


def test_a_library_is_measured_in_its_own_process(fake: list[kernel_peers.Backend]) -> None:
    alone, mixed, _ = fake
    assert [(b.name, b.kernel, b.bits) for b in (alone, mixed)] == [
        ("fake", "alone", 4),
        ("fake", "mixed", 4),
    ]
    for backend in (alone, mixed):
        backend.prepare(*SIZE, 10_000)
    case = alone.case(3)
    assert (case.n, case.k, case.rows, case.n_bytes) == (64, 96, 3, 64 * 96 // 2)
    assert case.seconds() > 0
    assert alone.row_invariant() and not mixed.row_invariant()


def test_a_process_that_dies_is_named(fake: list[kernel_peers.Backend]) -> None:
    with pytest.raises(OutdraftError, match="fake's kernels ended while asked to prepare"):
        fake[2].prepare(*SIZE, 10_000)
    with pytest.raises(OutdraftError, match="ended"):
        fake[0].prepare(*SIZE, 10_000)


def test_a_process_ends_with_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(("torch",), "tests.bench.fake_kernels")
    monkeypatch.setitem(kernel_peers.LIBRARIES, "fake", library)
    process = PeerProcess("fake", 1)
    process.close()
    assert process.process.returncode is not None


def test_what_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(("torch", "no_such_package"), "tests.bench.fake_kernels")
    monkeypatch.setitem(kernel_peers.LIBRARIES, "fake", library)
    assert "fake" not in kernel_peers.installed_peers()
    with (
        pytest.raises(OutdraftError, match="no_such_package"),
        peer_backends(["fake"], 1, lambda *_: None),
    ):
        pass


def test_lines_in_and_out() -> None:
    server = Server(fake_kernels.kernels(1), "7.1")
    prepare = {"do": "prepare", "kernel": "alone", "n": 64, "k": 96, "n_bytes": 10_000}
    requests = [{"do": "kernels"}, prepare, {"do": "time", "kernel": "alone", "rows": 2}]
    out = io.StringIO()
    serve(server, [json.dumps(request) for request in requests], out.write)
    kernels, prepared, timed = map(json.loads, out.getvalue().splitlines())
    assert kernels["kernels"][0] == {"name": "alone", "bits": 4}
    assert prepared == {"n_bytes": 3072}
    assert timed["calls"] == 4 and timed["seconds"] > 0


def test_torch_kernels_answer() -> None:
    process = PeerProcess("torch", 1)
    try:
        names = [kernel["name"] for kernel in process.ask("kernels")["kernels"]]
        assert names == ["int4 pack", "int8 pack", "bf16"]
        for name in names:
            assert process.ask("prepare", kernel=name, n=64, k=96, n_bytes=9000)["n_bytes"] > 3000
            assert process.ask("time", kernel=name, rows=2)["seconds"] > 0
            assert process.ask("agree", kernel=name)["agree"] in (True, False)
    finally:
        process.close()


def test_settling_waits_for_other_threads() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        assert not settle(limit_s=0.05)
    finally:
        stop.set()
        thread.join()
    assert settle()
