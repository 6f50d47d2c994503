"""Grammars: what compiles, what is refused in time, and that memory stays flat."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from outdraft.errors import QueueFull, SamplingError
from outdraft.request import SamplingParams
from outdraft.sampling import grammar
from outdraft.sampling.compile_check import CompileCheck
from outdraft.sampling.grammar import Grammars
from tests import tiny

HOSTILE = {
    "endless": SamplingParams(json_schema={"type": "integer", "multipleOf": 1000003}),
    "crash": SamplingParams(
        grammar="start: r0\n"
        + "\n".join(f'r{i}: "x{i}" r{i + 1}' for i in range(3000))
        + '\nr3000: "y"'
    ),
}
FINE = SamplingParams(json_schema={"type": "object", "properties": {"a": {"type": "integer"}}})


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    root: Path = tmp_path_factory.mktemp("grammars")
    tiny.write_tokenizer(root)
    made = Grammars((root / "tokenizer.json").read_text(), tiny.VOCAB, [1])
    made._check.cpu_s = 1.0
    return made


def write(grammars: Grammars, params: SamplingParams, seed: int = 0, most: int = 3000) -> str:
    """A random text of a grammar, from the bytes of the tiny tokenizer."""
    state = grammars.start(params)
    rng = np.random.default_rng(seed)
    written = bytearray()
    for _ in range(most):
        if state.end_id() is not None:
            return written.decode()
        allowed = np.flatnonzero(state.allowed(tiny.VOCAB).numpy())
        token = int(rng.choice(allowed))
        if token == 1:
            return written.decode()
        written += BYTES[token]
        state.push(token)
    raise AssertionError(f"no end after {most} tokens: {written[:99]!r}")


def byte_table() -> dict[int, bytes]:
    """What the tokens behind the specials of the tiny tokenizer stand for (ByteLevel)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    letters = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    bytes_of = {6 + i: bytes([letters[c]]) for i, c in enumerate(sorted(letters))}
    return bytes_of | {262 + i: f"<unused{i}>".encode() for i in range(tiny.VOCAB - 262)}


BYTES = byte_table()


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_of_a_schema_are_valid_json(grammars: Grammars, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": -5, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "in": {
                "type": "object",
                "properties": {"x": {"type": "boolean"}},
                "required": ["x"],
                "additionalProperties": False,
            },
            "s": {"type": "string", "maxLength": 9},
        },
        "required": ["n", "tags", "in", "s"],
        "additionalProperties": False,
    }
    value = json.loads(write(grammars, SamplingParams(json_schema=schema), seed))
    assert -5 <= value["n"] <= 99 and set(value["tags"]) <= {"a", "b"}
    assert type(value["in"]["x"]) is bool


@pytest.mark.parametrize("name", HOSTILE)
def test_security_class_5_a_hostile_grammar_fails_alone_within_seconds(
    grammars: Grammars, name: str
) -> None:
    start = time.monotonic()
    with pytest.raises(SamplingError, match=r"to compile|ends the compiler"):
        grammars.start(HOSTILE[name])
    assert time.monotonic() - start < 60  # a bound on hanging, not on speed
    assert write(grammars, FINE).startswith("{")


def test_compiled_grammars_do_not_wait_for_a_hostile_one(grammars: Grammars) -> None:
    grammars.start(FINE)
    done: list[str] = []

    def hostile() -> None:
        with pytest.raises(SamplingError):
            grammars.start(HOSTILE["endless"])
        done.append("hostile")

    thread = threading.Thread(target=hostile)
    thread.start()
    grammars.start(FINE)
    done.append("fine")
    thread.join()
    assert done == ["fine", "hostile"]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(regex="(a"),
        SamplingParams(grammar="start: missing"),
        SamplingParams(json_schema={"type": "nothing"}),
        SamplingParams(json_schema="{"),
    ],
    ids=["regex", "lark", "schema", "json"],
)
def test_what_is_not_valid_is_refused(grammars: Grammars, params: SamplingParams) -> None:
    with pytest.raises(SamplingError):
        grammars.start(params)


def test_the_process_comes_back_after_it_was_killed(grammars: Grammars) -> None:
    check = grammars._check
    check.check(grammar._source(FINE))
    assert check._process is not None
    check._process.kill()
    check._process.wait()
    check.check(grammar._source(FINE))
    check.close()
    assert check._process is None


def test_who_waits_too_long_for_others_is_sent_away(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars._check, "wall_s", 0.02)
    with grammars._check._lock, pytest.raises(QueueFull):
        grammars.start(SamplingParams(regex="[ab]{2}never"))
    assert not grammars._check._lock.locked()


def test_a_grammar_may_take_its_seconds_of_a_core_not_of_the_clock(grammars: Grammars) -> None:
    """A process that gets no core for a while has not used its time up."""
    check = grammars._check
    check.check(grammar._source(FINE))
    process = check._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(check.check, grammar._source(SamplingParams(regex="[ab]{3}late")))
        with pytest.raises(TimeoutError):
            asked.result(2.5 * check.cpu_s)
        process.send_signal(signal.SIGCONT)
        asked.result(60)
    assert check._process is process


def test_a_grammar_that_computes_too_long_ends_by_its_seconds(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the clock's help."""
    check = grammars._check
    monkeypatch.setattr(check, "wall_s", 300.0)
    check.check(grammar._source(FINE))
    process = check._process
    assert process is not None
    with pytest.raises(SamplingError, match="too long to compile"):
        check.check(grammar._source(HOSTILE["endless"]))
    assert process.returncode == -signal.SIGXCPU
    check.check(grammar._source(FINE))


def test_a_process_that_is_stuck_is_killed_by_the_clock(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = grammars._check
    check.check(grammar._source(FINE))
    process = check._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(check, "wall_s", 0.3)
    with pytest.raises(SamplingError, match="too long to compile"):
        check.check(grammar._source(SamplingParams(regex="[ab]{3}stuck")))
    assert process.returncode == -signal.SIGKILL
    monkeypatch.undo()
    check.check(grammar._source(FINE))


def test_the_process_ends_with_who_asked(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    check = CompileCheck((tmp_path / "tokenizer.json").read_text(), tiny.VOCAB, [1], {})
    check.check(grammar._source(FINE))
    process = check._process
    assert process is not None and process.poll() is None
    del check
    assert process.poll() is not None


def test_the_regex_that_runs_out_of_fuel_fails_at_a_token(grammars: Grammars) -> None:
    """Compiled at once, then too dear for some token; the next request gets it afresh."""
    params = SamplingParams(regex="((a{1,500}){1,500}){1,500}b")
    a_id = next(token for token, text in BYTES.items() if text == b"a")
    for _ in range(2):
        state = grammars.start(params)
        with pytest.raises(SamplingError, match="cannot be followed"):
            for _ in range(200):
                assert state.allowed(tiny.VOCAB)[a_id]
                state.push(a_id)
        assert grammar._source(params) not in grammars._compiled


def many_schemas(grammars: Grammars, n: int) -> None:
    for i in range(n):
        properties = {f"field{i}_{j}": {"type": "string", "maxLength": j + 1} for j in range(4)}
        state = grammars.start(SamplingParams(json_schema={"properties": properties}))
        state.allowed(tiny.VOCAB)
        assert grammars._n_bytes <= grammar.KEPT_BYTES
    assert grammars._n_bytes == sum(grammar._size(s) for s in grammars._compiled)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_security_class_6_few_grammars_stay_compiled(grammars: Grammars) -> None:
    many_schemas(grammars, 120)
    assert 10 < len(grammars._compiled) < 70


@pytest.mark.prove
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_security_class_6_ten_thousand_schemas_leave_memory_flat(grammars: Grammars) -> None:
    many_schemas(grammars, 1_000)
    before = resident_bytes()
    many_schemas(grammars, 10_000)
    assert resident_bytes() - before < 30 * 2**20
