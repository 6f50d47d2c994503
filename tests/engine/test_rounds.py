"""The numbers that rounds with drawn drafts read, in the engine itself: none is read twice."""

from collections import Counter

import pytest

from outdraft.config import EngineConfig
from outdraft.engine import decide
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams
from outdraft.sampling.sampler import Purpose, uniform
from outdraft.speculate import chain
from tests import tiny

Name = tuple[int, int, Purpose, int | None]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    root = tmp_path_factory.mktemp("rounds")
    target = tiny.tiny_target(root / "target", seed=21)
    tiny.tiny_assistant(root / "assistant", target)
    config = EngineConfig(draft_n=4, ctx_size=256, max_sequences=4, kv_cache_tokens=320)
    return LLM(str(target), config)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[Name]:
    """How often each number was read."""
    names: Counter[Name] = Counter()

    def counted(seed: int, at: int, why: Purpose, start: int | None = None) -> float:
        names[seed, at, why, start] += 1
        return uniform(seed, at, why, start)

    for module in (decide, chain):
        monkeypatch.setattr(module, "uniform", counted)
    return names


def test_no_number_is_read_twice_where_drafts_are_drawn(llm: LLM, read: Counter[Name]) -> None:
    """With requests that are preempted: what is computed again is not decided again."""
    llm.scheduler.horizon_tokens = 8
    params = SamplingParams(temperature=1.5, max_tokens=60, ignore_eos=True)
    sequences = [llm.add([3 + s, *range(10, 115)], params) for s in range(4)]
    while llm.scheduler.busy:
        llm.step()
    assert llm.stats().n_preempted > 0 and llm.stats().drafts.n_accepted > 0
    assert max(read.values()) == 1
    by_seed = Counter(seed for seed, *_ in read)
    assert set(by_seed) == {s.seed for s in sequences}
    again = Counter((seed, at, why) for seed, at, why, _ in read)
    assert max(again.values()) > 1, "a position was drafted again, with other numbers"


def test_point_masses_read_the_number_of_the_position(llm: LLM, read: Counter[Name]) -> None:
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=40, ignore_eos=True)
    got = llm.generate([5, 9, 80], params)
    assert got.stats.n_drafted > 0
    assert set(read) == {(5, at, Purpose.TARGET, None) for at in range(3, 43)}
    assert max(read.values()) == 1
