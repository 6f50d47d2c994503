"""The engine behind asyncio: streams by request, closing aborts, errors reach who waits."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

import outdraft
from outdraft.config import EngineConfig
from outdraft.engine.aio import AsyncLLM
from outdraft.engine.engine import LLM
from outdraft.errors import OutdraftError, PromptError, QueueFull
from outdraft.request import FinishReason, SamplingParams
from tests import tiny

PROMPTS = [[5, 9, 80, 33], [2, 41, 90, 91, 92] * 11, [17]]
LONG = SamplingParams(max_tokens=800, ignore_eos=True)
SHORT = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    root = tmp_path_factory.mktemp("aio")
    target = tiny.tiny_target(root / "target", seed=21)
    tiny.tiny_assistant(root / "assistant", target)
    llm = LLM(str(target), EngineConfig(ctx_size=900, max_sequences=3, max_queue=2))
    llm.set_draft_n_max(4)
    return llm


def run(llm: LLM, body: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    """Run it with a fresh thread; nothing is left in the engine afterwards."""

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            await asyncio.wait_for(body(engine), 60)
        assert not engine._thread.is_alive() and not engine._mailboxes

    asyncio.run(main())
    assert not llm.scheduler.busy
    llm.check()


def test_it_is_part_of_the_public_interface() -> None:
    assert outdraft.AsyncLLM is AsyncLLM


def test_streams_side_by_side_are_those_of_running_alone(llm: LLM) -> None:
    alone = [llm.generate(p, SHORT) for p in PROMPTS]

    async def body(engine: AsyncLLM) -> None:
        async def collect(prompt: list[int]) -> tuple[list[int | None], str]:
            events = [e async for e in engine.astream(prompt, SHORT)]
            assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
            assert events[-1].finish_reason is FinishReason.LENGTH
            return [e.token for e in events], "".join(e.text for e in events)

        got = await asyncio.gather(*(collect(p) for p in PROMPTS))
        assert got == [(c.tokens, c.text) for c in alone]
        completion = await engine.agenerate(PROMPTS[1], SHORT)
        assert (completion.tokens, completion.text) == (alone[1].tokens, alone[1].text)

    run(llm, body)


def test_closing_a_stream_aborts_within_one_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[set[str]] = []
    step = llm.step

    def counted():  # type: ignore[no-untyped-def]
        steps.append({*llm.scheduler.running, *(s.id for s in llm.scheduler.waiting)})
        return step()

    monkeypatch.setattr(llm, "step", counted)

    async def body(engine: AsyncLLM) -> None:
        other = asyncio.create_task(engine.agenerate(PROMPTS[0], SHORT))
        async with aclosing(engine.astream(PROMPTS[1], LONG)) as stream:
            name = (await anext(stream)).request_id
        n_steps = len(steps)
        assert (await other).finish_reason is FinishReason.LENGTH
        await engine.agenerate(PROMPTS[2], SHORT)
        # One step may have begun while the stream was being closed.
        assert all(name not in present for present in steps[n_steps + 1 :])
        assert len(steps) > n_steps + 1

    run(llm, body)


def test_cancelling_who_waits_aborts(llm: LLM) -> None:
    async def body(engine: AsyncLLM) -> None:
        task = asyncio.create_task(engine.agenerate(PROMPTS[0], LONG))
        await anext(engine.astream(PROMPTS[2], SHORT))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.agenerate(PROMPTS[2], SHORT)
        assert all(s.limit < 800 for s in llm.scheduler.running.values())

    run(llm, body)


def test_an_abort_from_outside_ends_the_stream(llm: LLM) -> None:
    async def body(engine: AsyncLLM) -> None:
        events = []
        async for event in engine.astream(PROMPTS[0], LONG):
            events.append(event)
            if len(events) == 3:
                threading.Thread(target=engine.abort, args=(event.request_id,)).start()
        assert events[-1].finish_reason is FinishReason.ABORT

    run(llm, body)


def test_requests_that_cannot_run_are_refused(llm: LLM) -> None:
    async def body(engine: AsyncLLM) -> None:
        with pytest.raises(PromptError, match="empty"):
            await engine.agenerate([])
        results = await asyncio.gather(
            *(engine.agenerate([7, 8 + i], LONG) for i in range(40)), return_exceptions=True
        )
        refused = [r for r in results if isinstance(r, BaseException)]
        assert refused and all(isinstance(r, QueueFull) for r in refused)
        assert len(results) - len(refused) >= 3
        assert (await engine.agenerate(PROMPTS[0], SHORT)).finish_reason is FinishReason.LENGTH

    run(llm, body)


def test_closing_the_engine_ends_every_stream(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm)
        tasks = [asyncio.create_task(engine.agenerate(p, LONG)) for p in PROMPTS]
        while len(engine._mailboxes) < len(tasks):
            await asyncio.sleep(0.001)
        await engine.aclose()
        await engine.aclose()
        for task in tasks:
            assert (await task).finish_reason is FinishReason.ABORT
        with pytest.raises(OutdraftError, match="was closed"):
            await engine.agenerate(PROMPTS[0])

    asyncio.run(main())
    llm.check()


def test_an_error_of_the_thread_reaches_every_stream(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, go = llm.step, threading.Event()

    def broken():  # type: ignore[no-untyped-def]
        if go.is_set():
            raise RuntimeError("planted")
        return step()

    monkeypatch.setattr(llm, "step", broken)

    async def main() -> None:
        engine = AsyncLLM(llm)
        tasks = [asyncio.create_task(engine.agenerate(p, LONG)) for p in PROMPTS[:2]]
        await anext(engine.astream(PROMPTS[2], LONG))
        go.set()
        for task in tasks:
            with pytest.raises(OutdraftError, match="planted"):
                await asyncio.wait_for(task, 30)
        with pytest.raises(OutdraftError, match="planted"):
            await engine.agenerate(PROMPTS[0])
        await engine.aclose()

    asyncio.run(main())
    with llm:
        pass
    assert not llm.scheduler.busy
    llm.check()
