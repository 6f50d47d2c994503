"""The compiled kernels' tests run on every instruction set here, with one and with two threads."""

from collections.abc import Iterator

import pytest
import torch

from outdraft import _core
from outdraft.ops.cpu import CpuOps

ISAS = _core.available_isas()


@pytest.fixture(params=[f"{isa}-{threads}" for isa in ISAS for threads in (1, 2)])
def ops(request: pytest.FixtureRequest) -> Iterator[CpuOps]:
    """Operations on one instruction set and number of threads."""
    isa, threads = request.param.rsplit("-", 1)
    _core.set_isa(isa)
    _core.set_threads(int(threads))
    yield CpuOps()
    _core.set_isa(ISAS[0])
    _core.set_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    """A new seed in every run: a result that depends on luck shows sooner or later."""
    generator = torch.Generator()
    print("seed", generator.seed())  # shown when the test fails
    return generator
