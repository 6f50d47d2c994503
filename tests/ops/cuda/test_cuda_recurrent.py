"""Kernels of gated delta nets on a GPU, else under Triton's interpreter: fp64, row-invariance."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this machine")

from outdraft.device import has_dependent_launch
from outdraft.ops import recurrent_reference as reference
from outdraft.ops.cuda.ops import CudaOps
from outdraft.ops.recurrent_base import DeltaGates, StateRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CARD = DEVICE.type == "cuda"
N_K, N_V, K, V, WIDTH, STATES = 2, 4, 32, 64, 4, 24
CHANNELS = 2 * N_K * K + N_V * V


@pytest.fixture
def ops() -> CudaOps:
    return CudaOps(DEVICE, pdl=ON_CARD and has_dependent_launch(DEVICE))


def rows_of(lengths: list[int], reads: list[int]) -> StateRows:
    sequence = [s for s, n in enumerate(lengths) for _ in range(n)]
    write = [8 + t if t % 3 != 1 else -1 for t in range(len(sequence))]
    numbers = (sequence, [reads[s] for s in sequence], write)
    return StateRows(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in numbers))


def make(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    return {
        "x": random(n, CHANNELS + 8)[:, :CHANNELS],
        "ab": random(n, 2 * N_V),
        "conv": random(WIDTH, CHANNELS) / 2,
        "decay": -random(N_V).exp(),
        "bias": 3 * random(N_V),
        "inputs": random(STATES, WIDTH - 1, CHANNELS),
        "state": random(STATES, N_V, K, V) / 4,
        "weight": 1 + 0.2 * random(V),
        "gate": random(n, N_V, V),
    }


def through(ops: object, p: dict[str, Tensor], rows: StateRows) -> tuple[Tensor, ...]:
    """Outputs and what became of the states."""
    inputs, state = p["inputs"].clone(), p["state"].clone()
    call: Callable[[str], Callable[..., Tensor]] = lambda name: getattr(ops, name)
    qkv = call("short_conv")(p["x"], p["conv"], inputs, rows)
    a, b = p["ab"][:, :N_V], p["ab"][:, N_V:]
    gates = DeltaGates(p["decay"], p["bias"])
    out = call("delta_rule")(qkv, a, b, gates, state, rows, N_K)
    normed = call("gated_norm")(out, p["gate"], p["weight"], 1e-6)
    return qkv, out, inputs, state, normed


@pytest.mark.parametrize("lengths", [[1], [4], [3, 1, 4]])
def test_equal_to_the_reference_in_fp64(ops: CudaOps, lengths: list[int]) -> None:
    parts, rows = make(sum(lengths)), rows_of(lengths, [2, -1, 5])
    got = through(ops, parts, rows)
    want = through(reference, {name: part.double() for name, part in parts.items()}, rows)
    for x, y in zip(got[:4], want[:4], strict=True):
        assert float((x - y).norm() / y.norm()) < 2e-6
    assert float((got[4] - want[4]).norm() / want[4].norm()) < 4e-3  # bf16


def test_a_row_has_the_bits_it_has_alone(ops: CudaOps) -> None:
    lengths = [3, 1, 4]
    parts, rows = make(8), rows_of(lengths, [2, -1, 5])
    whole = through(ops, parts, rows)
    first = 0
    for s, n in enumerate(lengths):
        own = {name: part[first : first + n] for name, part in parts.items() if len(part) == 8}
        inputs, state = parts["inputs"].clone(), parts["state"].clone()
        read = [2, -1, 5][s]
        for i in range(n):  # one row a call: each begins where the last one has written
            one = {name: part[i : i + 1] for name, part in own.items()}
            numbers = ([s], [read], [8])
            alone = StateRows(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in numbers))
            held = parts | one | {"inputs": inputs, "state": state}
            got = through(ops, held, alone)
            inputs, state, read = got[2], got[3], 8
            for x, y in zip((got[0], got[1], got[4]), (whole[0], whole[1], whole[4]), strict=True):
                assert torch.equal(x[0], y[first + i])
        first += n


def test_gates(ops: CudaOps) -> None:
    generator = torch.Generator().manual_seed(3)
    x, gate = (torch.randn(n, generator=generator).to(DEVICE) for n in ((5, 70), (5, 1)))
    want = torch.sigmoid(gate.double()) * x.double()
    assert float((ops.gate_rows(x, gate) - want).norm() / want.norm()) < 1e-6
    wide = torch.randn(5, 140, generator=generator).to(DEVICE)
    got, up = ops.gated(wide[:, :70], wide[:, 70:], "sigmoid"), wide[:, 70:].double()
    want = torch.sigmoid(wide[:, :70].double()) * up
    assert float((got - want).norm() / want.norm()) < 4e-3
