"""The engine's end of a learner: it stops for requests, drafters change and tokens do not."""

import os
import shutil
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.engine import learned, learning
from outdraft.engine.learned import fingerprint, kept
from outdraft.engine.learning import Learning, NotLearning
from outdraft.engine.replay import LEAST_OUTPUT, OVERHEAD_BYTES, ReplayBuffer, ServedText
from outdraft.errors import OutdraftError
from outdraft.weights.loading import Loading
from tests import tiny

FAKE = Path(__file__).with_name("fake_learner.py")
PROMPT = [2, 9, 30, 41]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    target = tiny.tiny_target(root / "target")
    for seed, name in enumerate(("stock", "other", "third"), start=1):
        tiny.tiny_assistant(root / name, target, seed=seed)
    return root


@contextmanager
def learns(
    models: Path, monkeypatch: pytest.MonkeyPatch, *mode: str, **changes: object
) -> Iterator[LLM]:
    """An engine with a fake learner."""
    monkeypatch.setattr(learned, "COMMAND", (sys.executable, str(FAKE), *mode))
    given = {"learn_idle_s": 0.02, "draft_n": 3, **changes}
    config = EngineConfig(assistant=str(models / "stock"), learn=True, **given)  # type: ignore[arg-type]
    with LLM(str(models / "target"), config) as llm:
        yield llm


def process_of(llm: LLM) -> psutil.Process:
    own = llm.learning
    assert isinstance(own, Learning)
    until(lambda: own._process is not None)
    assert own._process is not None
    return psutil.Process(own._process.pid)


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stats(llm: LLM) -> learning.LearnStats:
    found = llm.stats().learn
    assert found is not None
    return found


def text(n: int, first: int = 0) -> ServedText:
    return ServedText(array("i", range(first, first + n)), 2)


def test_the_buffer_is_bounded_and_keeps_the_newest() -> None:
    buffer = ReplayBuffer(10_000)
    for i in range(200):
        gone = buffer.add(text(10 + i % 90, i))
        assert buffer.n_bytes == sum(t.n_bytes for t in buffer.texts) <= 10_000
        assert buffer.n_tokens == sum(len(t.tokens) for t in buffer.texts)
        assert all(t not in buffer.texts for t in gone)
    assert [t.tokens[0] for t in buffer.texts] == list(range(200 - len(buffer.texts), 200))
    assert len(buffer.since(195)) == 5 and len(buffer.since(0)) == len(buffer.texts)
    assert buffer.since(200) == []
    assert buffer.add(text((10_000 - OVERHEAD_BYTES) // 4 + 1)) == () and buffer.n_added == 200


def test_off_there_is_nothing(models: Path) -> None:
    before = psutil.Process().children()
    with LLM(str(models / "target"), EngineConfig(assistant=str(models / "stock"))) as llm:
        llm.generate(PROMPT, PARAMS)
        assert isinstance(llm.learning, NotLearning) and llm.stats().learn is None
        assert all(t.name != "learning" for t in threading.enumerate())
        assert psutil.Process().children() == before


def test_without_an_assistant_it_is_refused(models: Path) -> None:
    for config in (
        EngineConfig(learn=True, spec_type="ngram"),
        EngineConfig(learn=True, draft_n=0),
    ):
        with pytest.raises(OutdraftError, match="no drafter that can learn"):
            LLM(str(models / "target"), config)
    with pytest.raises(OutdraftError, match="learn is off"):
        EngineConfig(learn_dir="x")


def test_a_request_stops_the_learner_and_idleness_lets_it_go_on(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with learns(models, monkeypatch, "compute") as llm:
        llm.generate(PROMPT, PARAMS)
        process = process_of(llm)
        until(lambda: process.cpu_times().user > 0.1)
        for _ in range(3):
            llm.add(PROMPT, PARAMS)
            llm.step()
            until(lambda: process.status() == psutil.STATUS_STOPPED)
            spent = process.cpu_times().user
            time.sleep(0.1)  # far longer than it waits when idle
            assert process.cpu_times().user == spent and stats(llm).state == "paused"
            while llm.scheduler.busy:
                llm.step()
            until(lambda spent=spent: process.cpu_times().user > spent)
            assert stats(llm).state == "learning"
        aborted = llm.add(PROMPT, PARAMS)
        llm.step()
        until(lambda: process.status() == psutil.STATUS_STOPPED)
        llm.abort(aborted.id)
        until(lambda: process.status() != psutil.STATUS_STOPPED)
    until(lambda: not process.is_running())


def test_what_may_not_be_stored_is_not(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with learns(models, monkeypatch, "listen") as llm:
        for store, n in ((False, 24), (True, LEAST_OUTPUT - 1), (True, 24)):
            params = SamplingParams(max_tokens=n, ignore_eos=True)
            llm.scheduler.add(llm.prepare(PROMPT, params, store=store))
            while llm.scheduler.busy:
                llm.step()
        aborted = llm.add(PROMPT, PARAMS)
        llm.step()
        llm.abort(aborted.id)
        assert stats(llm).n_texts == 1 and stats(llm).n_tokens == len(PROMPT) + 24


def test_tokens_are_the_same_across_exchanges(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned drafters come into use while the engine is idle, and one goes back."""
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    plain = plain_tokens(models, params)
    with learns(models, monkeypatch, "back", str(models / "other"), str(models / "third")) as llm:
        assert llm.generate(PROMPT, params).tokens == plain
        assert stats(llm).version == 0
        until(lambda: stats(llm).n_rollbacks == 1)
        found = stats(llm)
        assert (found.n_swaps, found.n_candidates, found.version) == (2, 2, 1)
        assert (found.live, found.candidate, found.n_steps) == (1.0, 2.0, 1)
        drafts, tokens = drafts_and_tokens(llm, params)
        assert tokens == plain and llm.runner.faults.n_drafter == 0
        for name in ("stock", "other"):
            config = EngineConfig(assistant=str(models / name), draft_n=3)
            with LLM(str(models / "target"), config) as alone:
                found = drafts_and_tokens(alone, params)
            assert found[1] == plain and (found[0] == drafts) is (name == "other")


def drafts_and_tokens(llm: LLM, params: SamplingParams) -> tuple[list[list[int]], list[int]]:
    """All drafts of a request, and what was emitted."""
    drafter: Any = llm.pairing.drafter
    drafts: list[list[int]] = []
    own = drafter.propose

    def propose(view: object, k: int) -> Any:
        draft = own(view, k)
        drafts.extend(draft.tokens_BK.tolist())
        return draft

    drafter.propose = propose
    tokens = llm.generate(PROMPT, params).tokens
    del drafter.propose
    return drafts, tokens


def plain_tokens(models: Path, params: SamplingParams) -> list[int]:
    with LLM(str(models / "target"), EngineConfig(spec_type="off")) as llm:
        return llm.generate(PROMPT, params).tokens


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("spec", ["gemma4-assistant", "ngram+gemma4-assistant"])
def test_an_exchange_between_any_two_steps_changes_no_token(
    models: Path, backend: str, spec: str
) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    config = EngineConfig(assistant=str(models / "stock"), draft_n=3, backend=backend)  # type: ignore[arg-type]
    config = replace(config, spec_type=spec)
    with LLM(str(models / "target"), replace(config, spec_type="off", assistant=None)) as llm:
        plain = llm.generate(PROMPT, params).tokens
    with LLM(str(models / "target"), config) as llm:
        renewal = llm.pairing.renewal
        assert renewal is not None
        network = renewal.load(models / "other", Loading())
        one = llm.add(PROMPT, params)
        while one.finish_reason is None:
            network = renewal.exchange(network)
            llm.step()
        assert one.tokens[len(PROMPT) :] == plain and one.stats.n_drafted > 0
        assert llm.runner.faults.n_drafter == 0


def test_loading_gives_way_to_requests(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with learns(models, monkeypatch, "offer", str(models / "other")) as llm:
        own = llm.learning
        assert isinstance(own, Learning)
        loaded: list[int] = []

        def load(path: Path, progress: Loading) -> object:
            progress.begin("", 40)
            for i in range(40):
                time.sleep(0.005)
                progress.advance(1)
                loaded.append(i)
            return llm.pairing.renewal.load(path, Loading())  # type: ignore[union-attr]

        own.renewal = replace(own.renewal, load=load)
        llm.generate(PROMPT, PARAMS)
        until(lambda: len(loaded) > 3)
        llm.add(PROMPT, PARAMS)
        llm.step()
        time.sleep(0.05)
        n = len(loaded)
        time.sleep(0.1)
        assert len(loaded) == n < 40 and stats(llm).version == 0
        while llm.scheduler.busy:
            llm.step()
        until(lambda: stats(llm).version == 1)
        assert len(loaded) == 40


def test_a_drafter_that_cannot_be_loaded_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(models / "other", bad)
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with learns(models, monkeypatch, "offer", str(bad), str(models / "other")) as llm:
        llm.generate(PROMPT, PARAMS)
        until(lambda: stats(llm).n_swaps == 1)
        assert stats(llm).n_refused == 1 and "model.safetensors" in stats(llm).last_error


def test_a_killed_learner_comes_back_and_nobody_notices(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "FIRST_PAUSE_S", 0.01)
    plain = plain_tokens(models, PARAMS)
    with learns(models, monkeypatch, "compute") as llm:
        for n in range(3):
            assert llm.generate(PROMPT, PARAMS).tokens == plain
            process = process_of(llm)
            until(lambda process=process: process.cpu_times().user > 0.1)
            if n == 1:  # while it is stopped
                llm.add(PROMPT, PARAMS)
                llm.step()
            process.kill()
            while llm.scheduler.busy:
                llm.step()
            until(lambda n=n: stats(llm).n_restarts == n + 1)
            until(lambda process=process: process_of(llm).pid != process.pid)
        assert stats(llm).n_texts == 4  # which the new one was sent again


def test_one_that_always_dies_is_left_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(learning, "MOST_DEATHS", 3)
    with learns(models, monkeypatch, "die") as llm:
        own = llm.learning
        assert isinstance(own, Learning)
        left = own.directory / "version-000001"  # of one that died; the next takes the same name
        left.mkdir()
        llm.generate(PROMPT, PARAMS)
        until(lambda: stats(llm).state == "failed")
        assert not left.exists()
        assert stats(llm).n_restarts == 2
        assert llm.generate(PROMPT, PARAMS).error is None
        assert stats(llm).n_texts == 2


def test_it_ends_with_an_engine_that_is_killed_while_it_is_stopped(models: Path) -> None:
    code = f"""
import sys, time
from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.engine import learned
learned.COMMAND = (sys.executable, {str(FAKE)!r}, "compute")
config = EngineConfig(assistant={str(models / "stock")!r}, learn=True, learn_idle_s=0.01)
llm = LLM({str(models / "target")!r}, config)
llm.generate({PROMPT}, SamplingParams(max_tokens=20, ignore_eos=True))
while llm.learning._process is None: time.sleep(0.01)
time.sleep(0.3)
llm.add({PROMPT})
llm.step()
print(llm.learning._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as engine:
        assert engine.stdout is not None
        process = psutil.Process(int(engine.stdout.readline()))
        until(lambda: process.status() == psutil.STATUS_STOPPED)
        engine.kill()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_it_begins_with_the_newest_drafter_that_is_whole(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / fingerprint(models / "target", models / "stock", "")
    shutil.copytree(models / "other", place / "000009")
    shutil.copytree(models / "third", place / "000010")
    (place / "000010" / "config.json").write_text("{")
    shutil.copytree(models / "third", place / ".000011.x" / "unfinished")  # killed while writing
    assert [p.name for p in kept(place)] == ["000010", "000009"]
    with learns(models, monkeypatch, "back", learn_dir=str(tmp_path)) as llm:
        assert stats(llm).version == 1
        assert "passed over" in llm.loading.notes[-1]
        first = drafts_and_tokens(llm, PARAMS)
        with LLM(
            str(models / "target"), EngineConfig(assistant=str(models / "other"), draft_n=3)
        ) as alone:
            assert drafts_and_tokens(alone, PARAMS) == first
        until(lambda: stats(llm).n_rollbacks == 1)  # to the one that was loaded
        assert stats(llm).version == 0
    other = fingerprint(models / "target", models / "third", "")
    assert other != place.name


def test_a_fine_tune_has_another_fingerprint(models: Path, tmp_path: Path) -> None:
    target, stock = models / "target", models / "stock"
    moved = tmp_path / "moved"
    shutil.copytree(target, moved)
    os.utime(moved / "model.safetensors", (1, 1))
    assert fingerprint(moved, stock, "") == fingerprint(target, stock, "")
    assert fingerprint(target, stock, "a") != fingerprint(target, stock, "")
    shutil.rmtree(moved)
    tiny.tiny_target(moved, seed=7)
    assert fingerprint(moved, stock, "") != fingerprint(target, stock, "")
