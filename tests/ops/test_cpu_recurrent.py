"""Kernels of recurrent layers: close to fp64, and a row's bits do not depend on its call."""

import pytest
import torch
from torch import Tensor

from outdraft.ops import recurrent_reference as reference
from outdraft.ops.cpu import CpuOps
from outdraft.ops.recurrent_base import DeltaGates, StateRows

N_K, N_V, K, V, WIDTH = 2, 6, 32, 48, 4
CHANNELS = 2 * N_K * K + N_V * V


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(lengths: list[int], reads: list[int], n_states: int) -> StateRows:
    """Sequences one after another; each row's state goes to a place of its own."""
    sequence = [s for s, n in enumerate(lengths) for _ in range(n)]
    read = [reads[s] for s in sequence]
    first = n_states - len(sequence)
    write = [first + t if t % 3 else -1 for t in range(len(sequence))]
    write = [first + t if t + 1 == len(sequence) else w for t, w in enumerate(write)]
    return StateRows(*(torch.tensor(x, dtype=torch.int32) for x in (sequence, read, write)))


def make(n: int, n_states: int, seed: int) -> dict[str, Tensor]:
    return {
        "x": random(n, CHANNELS, seed=seed),
        "a": random(n, N_V, seed=seed + 1),
        "b": random(n, N_V, seed=seed + 2),
        "conv": random(WIDTH, CHANNELS, seed=seed + 3) / 2,
        "decay": -random(N_V, seed=seed + 4).exp(),
        "bias": random(N_V, seed=seed + 5),
        "inputs": random(n_states, WIDTH - 1, CHANNELS, seed=seed + 6),
        "state": random(n_states, N_V, K, V, seed=seed + 7) / 4,
        "weight": 1 + 0.2 * random(V, seed=seed + 8),
        "gate": random(n, N_V, V, seed=seed + 9),
    }


def through(ops: object, p: dict[str, Tensor], rows: StateRows) -> tuple[Tensor, ...]:
    """Outputs and what became of the states."""
    inputs, state = p["inputs"].clone(), p["state"].clone()
    qkv = ops.short_conv(p["x"], p["conv"], inputs, rows)  # type: ignore[attr-defined]
    gates = DeltaGates(p["decay"], p["bias"])
    out = ops.delta_rule(qkv, p["a"], p["b"], gates, state, rows, N_K)  # type: ignore[attr-defined]
    normed = ops.gated_norm(out, p["gate"], p["weight"], 1e-6)  # type: ignore[attr-defined]
    return qkv, out, normed, inputs, state


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 4], [17]])
def test_equal_to_the_reference_in_fp64(lengths: list[int]) -> None:
    n_states = 8 + sum(lengths)
    parts = make(sum(lengths), n_states, seed=sum(lengths))
    rows = rows_of(lengths, [2, -1, 5], n_states)
    got = through(CpuOps(), parts, rows)
    want = through(reference, {k: v.double() for k, v in parts.items()}, rows)
    for ours, exact in zip(got, want, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_a_row_has_the_same_bits_in_any_call(which: str) -> None:
    """All rows at once, one after another through the states, and beside another sequence."""
    ops = CpuOps() if which == "cpu" else reference
    n = 9
    parts = make(n, 40, seed=3)
    index = torch.arange(n, dtype=torch.int32)
    whole = through(ops, parts, StateRows(index * 0, index * 0 + 4, index + 20))
    inputs, state = parts["inputs"].clone(), parts["state"].clone()
    read = 4
    for t in range(n):
        one = {
            k: v[t : t + 1] if v.shape[0] == n and k in "xabgate" else v for k, v in parts.items()
        }
        one |= {"inputs": inputs, "state": state}
        at = [torch.tensor([v], dtype=torch.int32) for v in (7, read, 20 + t)]
        *outputs, inputs, state = through(ops, one, StateRows(*at))
        for ours, all_rows in zip(outputs, whole, strict=False):
            assert torch.equal(ours[0], all_rows[t])
        read = 20 + t
    assert torch.equal(state[20 : 20 + n], whole[4][20 : 20 + n])
    assert torch.equal(inputs[20 : 20 + n], whole[3][20 : 20 + n])
