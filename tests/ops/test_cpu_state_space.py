"""Kernels of Mamba 2 layers and of routing by sigmoids: close to fp64, and a row's bits do not
depend on its call, its place in a program or the number of threads."""

import pytest
import torch
from torch import Tensor

from outdraft.ops import recurrent_reference as reference
from outdraft.ops.base import SigmoidRouter
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import PackedLinear
from outdraft.ops.record import record
from outdraft.ops.recurrent_base import StateRows, StateSpace
from outdraft.ops.reference import ReferenceOps
from tests.ops.test_cpu_recurrent import rows_of

H, G, N, P, WIDTH = 6, 2, 32, 80, 4
CHANNELS = H * P + 2 * G * N


def make(n: int, n_states: int, rng: torch.Generator) -> dict[str, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    return {
        "x": random(n, CHANNELS),
        "dt": random(n, H) - 1,
        "gate": random(n, G, H * P // G),
        "conv": random(WIDTH, CHANNELS) / 2,
        "conv_bias": random(CHANNELS),
        "decay": -random(H).exp(),
        "bias": random(H),
        "skip": random(H),
        "weight": 1 + 0.2 * random(G, H * P // G),
        "inputs": random(n_states, WIDTH - 1, CHANNELS),
        "state": random(n_states, H, N, P) / 4,
    }


def through(ops: object, p: dict[str, Tensor], rows: StateRows) -> tuple[Tensor, ...]:
    """Outputs and what became of the states."""
    inputs, state = p["inputs"].clone(), p["state"].clone()
    return (*layer(ops, p, rows, inputs, state), inputs, state)


def layer(
    ops: object, p: dict[str, Tensor], rows: StateRows, inputs: Tensor, state: Tensor
) -> tuple[Tensor, ...]:
    """Convolution, recurrence and norm; the limits cut some steps off."""
    space = StateSpace(
        p["conv"], p["conv_bias"], p["decay"], p["bias"], p["skip"], G, limits=(0.1, 1.5)
    )
    x = ops.short_conv(p["x"], p["conv"], inputs, rows, p["conv_bias"])  # type: ignore[attr-defined]
    out = ops.scan(x, p["dt"], space, state, rows)  # type: ignore[attr-defined]
    grouped = out.view(p["gate"].shape)
    return x, out, ops.group_norm(grouped, p["gate"], p["weight"], 1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 4], [17]])
def test_equal_to_the_reference_in_fp64(
    ops: CpuOps, lengths: list[int], rng: torch.Generator
) -> None:
    n_states = 8 + sum(lengths)
    parts = make(sum(lengths), n_states, rng)
    rows = rows_of(lengths, [2, -1, 5], n_states)
    got = through(ops, parts, rows)
    want = through(reference, {k: v.double() for k, v in parts.items()}, rows)
    for ours, exact in zip(got, want, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=5e-5, atol=5e-5)


def test_the_reference_is_the_closed_form(rng: torch.Generator) -> None:
    """y_t = sum of (c_t b_s) exp(decay (d_s+1 + .. + d_t)) d_s x_s over s <= t, and skip x_t."""
    n = 11
    p = {k: v.double() for k, v in make(n, 1, rng).items()}
    space = StateSpace(p["conv"], None, p["decay"], p["bias"], p["skip"], G, (0.0, float("inf")))
    index = torch.zeros(n, dtype=torch.int32)
    got = reference.scan(p["x"], p["dt"], space, p["state"], StateRows(index, index - 1, index - 1))
    x = p["x"][:, : H * P].view(n, H, P)
    b, c = p["x"][:, H * P :].view(n, 2, G, N).repeat_interleave(H // G, dim=2).unbind(1)
    d = torch.nn.functional.softplus(p["dt"] + p["bias"])
    total = (d * p["decay"]).cumsum(0)
    want = torch.zeros(n, H, P, dtype=torch.float64)
    for t in range(n):
        for s in range(t + 1):
            near = (c[t] * b[s]).sum(-1) * (total[t] - total[s]).exp() * d[s]
            want[t] += near[:, None] * x[s]
        want[t] += p["skip"][:, None] * x[t]
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)


def test_a_row_has_the_same_bits_in_any_call(ops: CpuOps, rng: torch.Generator) -> None:
    """All rows at once, one after another through the states, and recorded."""
    rows_alone_equal_all_rows(ops, rng)


def test_a_row_of_the_reference_has_the_same_bits_in_any_call(rng: torch.Generator) -> None:
    rows_alone_equal_all_rows(ReferenceOps(), rng)


def rows_alone_equal_all_rows(ops: CpuOps | ReferenceOps, rng: torch.Generator) -> None:
    n = 9
    p = make(n, 40, rng)
    index = torch.arange(n, dtype=torch.int32)
    whole = through(ops, p, StateRows(index * 0, index * 0 + 4, index + 20))
    inputs, state = p["inputs"].clone(), p["state"].clone()
    at = [torch.zeros(1, dtype=torch.int32) for _ in range(3)]
    one = {k: v[:1].clone() if k in ("x", "dt", "gate") else v for k, v in p.items()}
    call = lambda: layer(ops, one, StateRows(*at), inputs, state)
    replayed = record(call, ops) if isinstance(ops, CpuOps) else None
    for t in range(n):
        for key in ("x", "dt", "gate"):
            one[key].copy_(p[key][t : t + 1])
        for tensor, value in zip(at, (7, 4 if t == 0 else 19 + t, 20 + t), strict=True):
            tensor.fill_(value)
        outputs = call()
        for ours, all_rows in zip(outputs, whole[:3], strict=True):
            assert torch.equal(ours[0], all_rows[t])
        if replayed is not None:
            replayed[0].replay()
            for ours, again in zip(replayed[1], outputs, strict=True):
                assert torch.equal(ours, again)
    assert torch.equal(state[20 : 20 + n], whole[4][20 : 20 + n])
    assert torch.equal(inputs[20 : 20 + n], whole[3][20 : 20 + n])


ROUTERS = [(1, 1, True), (4, 2, True), (5, 3, False), (10, 1, True)]


@pytest.mark.parametrize(("n_groups", "top_groups", "normalise"), ROUTERS)
def test_experts_by_sigmoid_are_those_of_fp64(
    ops: CpuOps, n_groups: int, top_groups: int, normalise: bool, rng: torch.Generator
) -> None:
    scores = 3 * torch.randn(7, 40, generator=rng)
    bias = 0.3 * torch.randn(40, generator=rng)
    router = SigmoidRouter(bias, 4, n_groups, top_groups, normalise, 2.5)
    exact = SigmoidRouter(bias.double(), 4, n_groups, top_groups, normalise, 2.5)
    want_ids, want = reference.route_sigmoid(scores.double(), exact)
    for which in (ops, ReferenceOps()):
        ids, weights = which.route_sigmoid(scores, router)
        assert torch.equal(ids, want_ids)
        assert torch.allclose(weights.double(), want, rtol=1e-5)
    alone = [ops.route_sigmoid(row[None], router)[1] for row in scores]
    assert torch.equal(torch.cat(alone), ops.route_sigmoid(scores, router)[1])


def test_of_equal_experts_the_first_are_taken(ops: CpuOps) -> None:
    router = SigmoidRouter(torch.zeros(12), 3, 4, 2, True, 1.0)
    for which in (ops, ReferenceOps()):
        ids, weights = which.route_sigmoid(torch.zeros(2, 12), router)
        assert ids.tolist() == [[0, 1, 2]] * 2
        assert torch.allclose(weights, torch.full((2, 3), 1 / 3))


def test_experts_without_gates_square_what_is_above_zero(ops: CpuOps, rng: torch.Generator) -> None:
    up, down = torch.randn(5, 48, 64, generator=rng) / 8, torch.randn(5, 64, 48, generator=rng) / 7
    x, ids = torch.randn(3, 64, generator=rng), torch.tensor([[0, 3], [4, 1], [3, 2]]).int()
    weights = torch.rand(3, 2, generator=rng)
    packed = [PackedLinear.pack(w, "bf16") for w in (up, down)]
    up, down = (w.bfloat16().double() for w in (up, down))
    want = torch.zeros(3, 64, dtype=torch.float64)
    for t in range(3):
        for e, w in zip(ids[t].tolist(), weights[t], strict=True):
            want[t] += w * (down[e] @ (up[e] @ x[t].double()).relu().square())
    got = ops.experts(x, *packed, ids, weights, "relu")
    plain = ReferenceOps().experts(x, up.float(), down.float(), ids, weights, "relu")
    spread = float(want.max() - want.min())
    assert float((plain - want).abs().max()) <= 1e-5 * spread
    assert float((got - want).abs().max()) <= 0.02 * spread
