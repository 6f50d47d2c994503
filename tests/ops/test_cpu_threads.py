"""What is computed does not depend on which threads get a processor, nor when."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.base import AttentionRows, KvPages
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import PackedLinear
from outdraft.ops.program import Program

ABSENT, LATE = 1, 2  # core/thread_pool.h


@pytest.fixture(params=[(n, kind) for n in (2, 3, 5) for kind in (0, ABSENT, LATE)])
def disturbed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several threads, some of which never work or fall asleep at their work."""
    n_threads, kind = request.param
    _core.set_threads(n_threads)
    _core.disturb_threads(kind)
    yield
    _core.set_threads(1)


class Step:
    """Shared and serial calls, each of which needs all of the one before."""

    def __init__(self, rng: torch.Generator) -> None:
        self.x = torch.randn(37, 96, generator=rng)
        self.weights = [
            PackedLinear.pack(torch.randn(96, 96, generator=rng) / 96**0.5, format)
            for format in ("w4", "bf16", "w8")
        ]
        self.kv = KvPages(*torch.randn(2, 20, 2, 64, 16, generator=rng))
        hi = torch.randint(1000, 1280, (37,), generator=rng, dtype=torch.int32)
        zeros = torch.zeros(37, dtype=torch.int32)
        table = torch.randperm(20, generator=rng).to(torch.int32)[None]
        self.rows = AttentionRows(table, zeros[:1].clone(), zeros, zeros.clone(), hi)

    def forward(self, ops: CpuOps) -> Tensor:
        x = self.x
        for weight in self.weights:
            x = ops.linear(ops.rms_norm(x, None, 1e-6), weight)
            x = ops.attention(x.view(37, 6, 16), self.kv, self.rows, 0.3).view(37, 96)
            x = ops.softcap(x, 30.0)
        return x


@pytest.mark.usefixtures("disturbed")
def test_a_replay_gives_the_same_bits_whoever_works(rng: torch.Generator) -> None:
    step = Step(rng)
    program = Program()
    recorded = step.forward(CpuOps(program=program))
    program.replay()
    threads = _core.threads()
    _core.set_threads(1)
    expected = step.forward(CpuOps())
    assert torch.equal(recorded, expected)
    assert threads > 1


@pytest.mark.usefixtures("disturbed")
def test_many_replays_finish(rng: torch.Generator) -> None:
    steps = [Step(rng) for _ in range(2)]
    programs = [Program() for _ in steps]
    outs = [step.forward(CpuOps(program=p)) for step, p in zip(steps, programs, strict=True)]
    first = []
    for program, out in zip(programs, outs, strict=True):
        program.replay()
        first.append(out.clone())
    callers = [
        threading.Thread(target=lambda p=p: [p.replay() for _ in range(5)]) for p in programs
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(out, value) for out, value in zip(outs, first, strict=True))


@pytest.mark.usefixtures("disturbed")
def test_packing_gives_the_same_bytes_whoever_works(rng: torch.Generator) -> None:
    weight = torch.randn(130, 96, generator=rng)
    packed = PackedLinear.pack(weight, "w4")
    _core.set_threads(1)
    assert torch.equal(packed.data, PackedLinear.pack(weight, "w4").data)


def test_a_pool_can_be_given_up_while_its_threads_keep_away() -> None:
    for _ in range(3):
        _core.set_threads(4)
        _core.disturb_threads(LATE)
        CpuOps().softcap(torch.randn(64, 512), 30.0)
        _core.set_threads(1)
