"""`outdraft generate`: prompts, streaming, JSON, colours, Ctrl-C, and what is said on stderr."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console

from outdraft.cli import streaming
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams, TokenEvent
from tests.cli.conftest import Invoke

N = 24


@pytest.fixture(scope="module")
def llm(pair: Path) -> LLM:
    return LLM(str(pair), EngineConfig(spec_type="off"))


def test_the_stream_is_the_text_of_the_engine(outdraft: Invoke, pair: Path, llm: LLM) -> None:
    want = llm.generate("abc", SamplingParams(max_tokens=N))
    result = outdraft("generate", pair, "--prompt", "abc", "--max-tokens", N)
    assert result.exit_code == 0
    assert result.stdout == want.text + "\n"
    assert f"model: {pair}" in result.stderr and "bf16" in result.stderr
    assert "drafts: gemma4-assistant: found inside the target" in result.stderr
    last = result.stderr.splitlines()[-1]
    for part in ("tokens/s", "tokens per pass", "drafts accepted", "kbit/s", "modem"):
        assert part in last
    off = outdraft("generate", pair, "--prompt", "abc", "--max-tokens", N, "--spec-type", "off")
    assert off.stdout == result.stdout
    assert "drafting is off: --spec-type off" in off.stderr


def test_json_is_one_object(outdraft: Invoke, pair: Path, llm: LLM) -> None:
    want = llm.generate([2, 17, 4], SamplingParams(max_tokens=N, ignore_eos=True))
    result = outdraft(
        *("generate", pair, "--prompt-tokens", "2,17, 4", "--max-tokens", N, "--ignore-eos"),
        *("--spec-draft-n", 3, "--json"),
    )
    found = json.loads(result.stdout)
    assert found["prompt_tokens"] == [2, 17, 4]
    assert found["tokens"] == want.tokens and len(found["tokens"]) == N
    assert found["text"] == want.text
    assert found["finish_reason"] == "length"
    assert found["spec_type"] == "gemma4-assistant"
    assert len(found["acceptance_by_position"]) == 3
    assert found["tokens_per_pass"] >= 1
    timings = found["timings"]
    assert timings["prompt_n"] == 3 and timings["predicted_n"] == N
    assert {"prompt_per_second", "predicted_per_second", "draft_n", "draft_n_accepted"} <= set(
        timings
    )
    off = outdraft("generate", pair, "--prompt", "a", "--json", "--spec-draft-n-max", 0)
    assert json.loads(off.stdout)["spec_type"] == "off"


def test_the_end_token_ends_unless_ignored(
    outdraft: Invoke, pair: Path, llm: LLM, tmp_path: Path
) -> None:
    tokens = llm.generate("abc", SamplingParams(max_tokens=N)).tokens
    model = Path(shutil.copytree(pair, tmp_path / "model"))
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    command = ("generate", model, "--prompt", "abc", "--max-tokens", N, "--json")
    found = json.loads(outdraft(*command).stdout)
    assert found["finish_reason"] == "stop"
    assert found["tokens"] == tokens[: tokens.index(end) + 1]
    assert json.loads(outdraft(*command, "--ignore-eos").stdout)["tokens"] == tokens


def test_a_seed_repeats_and_stop_strings_end(outdraft: Invoke, pair: Path) -> None:
    warm = ("generate", pair, "--prompt", "abc", "--max-tokens", N, "--temperature", 1.5)
    one = outdraft(*warm, "--seed", 3).stdout
    assert outdraft(*warm, "--seed", 3).stdout == one != outdraft(*warm, "--seed", 4).stdout
    stop = one[5]
    stopped = outdraft(*warm, "--seed", 3, "--stop", "\x00never", "--stop", stop)
    assert stopped.stdout == one[: one.index(stop)] + "\n"


def test_the_prompt_comes_from_a_file_or_a_pipe(
    outdraft: Invoke, pair: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompt"
    path.write_text("naïve\n", encoding="utf-8")
    command = ("generate", pair, "--json", "--max-tokens", 1)
    want = json.loads(outdraft(*command, "--prompt", "naïve\n").stdout)["prompt_tokens"]
    for options, piped in (
        (("--prompt-file", path), None),
        ((), "naïve\n"),
        (("--prompt", "-"), "naïve\n"),
        (("--prompt-file", "-"), "naïve\n"),
    ):
        found = json.loads(outdraft(*command, *options, input=piped).stdout)
        assert found["prompt_tokens"] == want


def test_the_demo_has_a_prompt_of_its_own(outdraft: Invoke) -> None:
    result = outdraft("generate", "demo", "--max-tokens", 2)
    assert result.exit_code == 0
    assert "prompt: the demo's own" in result.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_the_text(
    outdraft: Invoke, pair: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    whole = outdraft("generate", pair, "--prompt", "abc", "--spec-type", "off").stdout
    step, before = LLM.step, signal.getsignal(signal.SIGINT)
    n_steps = 0

    def interrupted(self: LLM) -> list[TokenEvent]:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 10:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(LLM, "step", interrupted)
    options = ["--json"] if as_json else []
    result = outdraft("generate", pair, "--prompt", "abc", "--spec-type", "off", *options)
    assert result.exit_code == 130 and n_steps == 10
    text = json.loads(result.stdout)["text"] if as_json else result.stdout[:-1]
    assert text and whole.startswith(text) and len(text) < len(whole) - 1
    assert as_json or "10 tokens" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), streaming.soft_interrupt() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        signal.raise_signal(signal.SIGINT)


def printed(no_color: bool) -> str:
    printer = streaming.Printer()
    printer.console = Console(force_terminal=True, color_system="standard", no_color=no_color)
    with printer.console.capture() as capture:
        printer.show(TokenEvent("r", 1, "own", False))
        printer.show(TokenEvent("r", 2, "draft\x1b[2J", True))
    return capture.get()


def test_accepted_drafts_are_green_and_control_characters_harmless() -> None:
    assert printed(no_color=False) == "own\x1b[32mdraft␛[2J\x1b[0m"
    assert "\x1b" not in printed(no_color=True)


@pytest.mark.parametrize(
    "bits_per_s,words",
    [(310, "a 300"), (15_000, "15.0 kbit/s (nearest: a 14.4k"), (1e6, "a 56k"), (0, "0 kbit/s")],
)
def test_modems(bits_per_s: float, words: str) -> None:
    assert words in streaming.modem(bits_per_s)
