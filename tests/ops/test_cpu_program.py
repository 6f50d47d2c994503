"""Recorded programs of the compiled core give the bits of the calls that they record."""

import threading

import pytest
import torch
from torch import Tensor

from outdraft import _core
from outdraft.ops.base import AttentionRows, KvPages, PageSlots, Rotary
from outdraft.ops.cpu import CpuOps
from outdraft.ops.packed import PackedLinear
from outdraft.ops.program import Program
from outdraft.ops.record import recording


class Layer:
    """A small decoder layer over static inputs, run or recorded through one function."""

    def __init__(self, n_rows: int, rng: torch.Generator) -> None:
        def weight(n: int, k: int, format: str) -> PackedLinear:
            return PackedLinear.pack(torch.randn(n, k, generator=rng) / k**0.5, format)

        self.tokens = torch.zeros(n_rows, dtype=torch.int32)
        self.position = torch.zeros(n_rows, dtype=torch.int32)
        self.page = torch.zeros(n_rows, dtype=torch.int32)
        self.lo = torch.zeros(n_rows, dtype=torch.int32)
        self.table = torch.arange(4, dtype=torch.int32)[None]
        self.start = torch.zeros(1, dtype=torch.int32)
        self.sequence = torch.zeros(n_rows, dtype=torch.int32)
        self.kv = KvPages(torch.zeros(4, 2, 64, 32), torch.zeros(4, 2, 64, 32))
        angles = torch.randn(256, 16, generator=rng)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.embedding = weight(100, 64, "w8")
        self.qkv = weight(8 * 32, 64, "w4")
        self.out = weight(64, 4 * 32, "bf16")
        self.norm = torch.rand(64, generator=rng) + 0.5

    def set_inputs(self, tokens: Tensor, position: int) -> None:
        n_rows = self.tokens.shape[0]
        self.tokens.copy_(tokens)
        self.position.copy_(torch.arange(position, position + n_rows))

    def forward(self, ops: CpuOps) -> Tensor:
        n_rows = self.tokens.shape[0]
        rotary = Rotary(self.cos, self.sin, self.position)
        x = ops.embed_into(self.embedding, self.tokens, 8.0, torch.empty(n_rows, 64))
        heads = ops.linear(ops.rms_norm(x, self.norm, 1e-6), self.qkv).view(n_rows, 8, 32)
        q = ops.norm_rope(heads[:, :4], None, rotary, 1e-6)
        slots = PageSlots(self.page, self.position)
        ops.write_heads(heads[:, 4:6], self.kv.k_PGSD, None, slots, None, rotary, eps=1e-6)
        ops.write_heads(heads[:, 6:], self.kv.v_PGSD, None, slots, None, None, eps=1e-6)
        rows = AttentionRows(self.table, self.start, self.sequence, self.lo, self.position)
        mixed = ops.attention(q, self.kv, rows, 1.0).view(n_rows, -1)
        x, after = ops.add_norm(ops.linear(mixed, self.out), x, self.norm, 1e-6)
        return ops.argmax(ops.softcap(ops.linear(after, self.embedding), 30.0))


@pytest.mark.parametrize("n_rows", [1, 3, 12])
def test_replay_gives_the_same_bits(ops: CpuOps, n_rows: int, rng: torch.Generator) -> None:
    layer = Layer(n_rows, rng)
    program = Program()
    recorded = layer.forward(CpuOps(program=program))
    assert len(program) > 10
    for position in (0, n_rows, 2 * n_rows):
        layer.set_inputs(torch.randint(0, 100, (n_rows,), generator=rng), position)
        expected = layer.forward(ops)
        keys, values = layer.kv.k_PGSD.clone(), layer.kv.v_PGSD.clone()
        layer.kv.k_PGSD[:, :, position:] = 7.0
        recorded.fill_(-1)
        program.replay()
        layer.kv.k_PGSD[:, :, position + n_rows :] = 0.0
        layer.kv.k_PGSD[1:] = 0.0
        assert torch.equal(recorded, expected)
        assert torch.equal(layer.kv.k_PGSD, keys)
        assert torch.equal(layer.kv.v_PGSD, values)


def test_fewer_rows_than_were_recorded(ops: CpuOps, rng: torch.Generator) -> None:
    layer = Layer(24, rng)
    program = Program()
    recorded = layer.forward(CpuOps(program=program))
    layer.set_inputs(torch.randint(0, 100, (24,), generator=rng), 0)
    expected = layer.forward(ops)
    for n_rows in (5, 24, 1, 17):
        program.resize(n_rows, 24)
        recorded.fill_(-1)
        layer.kv.k_PGSD.fill_(7.0)
        program.replay()
        assert torch.equal(recorded[:n_rows], expected[:n_rows])
        assert bool((layer.kv.k_PGSD[:, :, n_rows:] == 7.0).all())
    for n_rows, of in ((0, 24), (25, 24), (1, 48), (1, 7)):
        with pytest.raises(ValueError, match="rows"):
            program.resize(n_rows, of)


def test_programs_of_one_arena_use_the_same_memory(ops: CpuOps, rng: torch.Generator) -> None:
    layers = [Layer(n_rows, rng) for n_rows in (12, 1, 5, 12, 12)]
    expected = [layer.forward(ops).clone() for layer in layers]
    recorder, sizes, recorded = CpuOps(), [], []
    for layer in layers:
        with recording(recorder) as program:
            out = layer.forward(recorder)
        recorded.append((program, out))
        sizes.append(recorder.arena.n_bytes)
    assert len(set(sizes)) == 1
    for i in (0, 1, 2, 3, 4, 2, 0):
        program, out = recorded[i]
        program.replay()
        assert torch.equal(out, expected[i])


def test_programs_of_several_threads_do_not_mix(rng: torch.Generator) -> None:
    _core.set_threads(2)
    layers = [Layer(2, rng) for _ in range(3)]
    expected = [layer.forward(CpuOps()).clone() for layer in layers]
    programs = [Program() for _ in layers]
    outs = [layer.forward(CpuOps(program=p)) for layer, p in zip(layers, programs, strict=True)]
    assert all(len(program) > 10 for program in programs)
    workers = [
        threading.Thread(target=lambda p=p: [p.replay() for _ in range(200)]) for p in programs
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    _core.set_threads(1)
    for out, value in zip(outs, expected, strict=True):
        assert torch.equal(out, value)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set"):
        _core.set_isa("mmx")
    with pytest.raises(ValueError, match="at least one"):
        _core.set_threads(0)
    assert "runs on" in _core.isa_report()
