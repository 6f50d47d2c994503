"""The bench of kernels on one tiny size; its figures by hand."""

import pytest
import torch
from torch import Tensor

from outdraft.bench import hardware, kernels
from outdraft.bench.kernel_summary import summarise
from outdraft.bench.kernels import FORMATS, Case, OwnLinear, Timing, measure_kernels, rows_agree

SIZE = (64, 96)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cold_bytes", lambda: 1 << 16)


def test_every_backend_and_number_of_rows_is_in_the_report() -> None:
    backends = [OwnLinear(format) for format in FORMATS]
    report = measure_kernels(backends, [SIZE], [1, 3, 20], rounds=1)
    found = {(row["backend"], row["kernel"], row["rows"]) for row in report["rows"]}
    assert found == {(b.name, b.kernel, rows) for b in backends for rows in (1, 3, 20)}
    assert all(row["us"] > 0 and row["gb_s"] > 0 and row["n"] == 64 for row in report["rows"])
    assert {row["cost"] for row in report["rows"] if row["rows"] == 1} == {1.0}
    assert report["read_gb_s"] > 0
    assert all(report["row_invariant"][f"outdraft linear {format}"] for format in FORMATS)


def test_our_calls_go_through_all_copies() -> None:
    own = OwnLinear("w8")
    own.prepare(*SIZE, 18_000)
    assert len(own.weights) == 3
    assert [kernels.n_calls(3, rows) for rows in (1, 16, 256, 512)] == [3, 3, 2, 1]
    assert own.case(2).n_bytes == own.weights[0].n_bytes
    assert own.row_invariant()


def test_a_kernel_whose_rows_depend_on_others_is_found_out() -> None:
    weight = torch.randn(16, 32)

    def alone(x_TK: Tensor) -> Tensor:
        return torch.stack([weight @ row for row in x_TK])

    def together(x_TK: Tensor) -> Tensor:
        y = alone(x_TK)
        if x_TK.shape[0] == 7:
            y[3, 5] += 1e-5
        return y

    assert rows_agree(alone, 32)
    assert not rows_agree(together, 32)


def test_figures_by_hand() -> None:
    case = Case("outdraft", "w4", 1, 100, 1000, 50_000, lambda: 0.0)
    four = Case("outdraft", "w4", 4, 100, 1000, 50_000, lambda: 0.0)
    timings = [Timing(case, [1e-6, 2e-6, 9e-6]), Timing(four, [3e-6])]
    entry = kernels._entry(timings[1], timings, 50.0)
    assert entry["cost"] == pytest.approx(1.5)
    first = kernels._entry(timings[0], timings, 50.0)
    assert first["gb_s"] == pytest.approx(25.0) and first["share_of_read"] == pytest.approx(0.5)


def test_memory_and_caches_are_known_on_linux() -> None:
    assert hardware.last_level_cache_bytes() >= 1 << 16
    assert hardware.cold_bytes() >= hardware.MIN_COLD_BYTES
    assert hardware.peak_bytes() > 1 << 20
    assert hardware.read_gb_s([hardware.random_memory(1 << 16)], repeats=1) > 0


def test_beside_the_best_peer_of_the_same_kind() -> None:
    def row(backend: str, kernel: str, rows: int, us: float, cost: float) -> dict[str, object]:
        size = {"n": 64, "k": 96, "share_of_read": 0.9}
        return {"backend": backend, "kernel": kernel, "rows": rows, "us": us, "cost": cost, **size}

    report = {
        "rows": [
            row("outdraft", "linear w4", 1, 10.0, 1.0),
            row("outdraft", "linear w4", 4, 12.0, 1.2),
            row("outdraft", "linear w8", 4, 21.0, 1.1),
            row("outdraft", "linear w4", 512, 90.0, 9.0),
            row("a", "int4", 4, 24.0, 1.0),
            row("b", "int4", 4, 13.0, 1.0),
            row("b", "int8", 4, 14.0, 1.0),
            row("b", "int8", 512, 45.0, 1.0),
        ],
        "row_invariant": {"a int4": True, "b int4": False, "b int8": True},
        "bits": {"a int4": 4, "b int4": 4, "b int8": 8},
    }
    (entry,) = summarise(report)
    assert (entry["share_of_read"], entry["w4_cost"], entry["w8_cost"]) == (0.9, 1.2, 1.1)
    assert entry["verify"]["w4"] == {"peer": "a int4", "peer_us": 24.0, "ratio": 0.5}
    assert entry["prefill"]["w4"] == {"peer": "b int8", "peer_us": 45.0, "ratio": 2.0}
    assert entry["prefill"]["w8"] is None
