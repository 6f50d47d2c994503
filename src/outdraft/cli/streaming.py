"""One request in the terminal: loading, streamed text, Ctrl-C, the line of figures after it.

Here: what `generate` and `chat` share. Importing this module loads PyTorch; the verbs do it when
they run, so that their --help is quick.
"""

import gc
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from outdraft.cli.console import harmless, remark, remarks, results
from outdraft.cli.loading import loading_bar
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM, Completion, completion_of
from outdraft.request import SamplingParams, TokenEvent

DRAFT_STYLE = "green"
BITS_PER_CHARACTER = 10  # as on a serial line: start bit, eight bits, stop bit
MODEMS = {
    300: "300",
    1200: "1200",
    2400: "2400",
    9600: "9600",
    14_400: "14.4k",
    28_800: "28.8k",
    33_600: "33.6k",
    56_000: "56k",
}


def load(model: str, config: EngineConfig) -> LLM:
    """Load a model and say on stderr what runs, what drafts and why, and what was left out."""
    with loading_bar(model) as loading:
        llm = LLM(model, config, loading)
    gc.collect()
    gc.freeze()  # or a full collection would look at all that was loaded, in the middle of a step
    target = llm.target
    n_params = target.report.n_params
    remark(
        f"model: {target.path} ({n_params / 1e6:,.1f}M, {llm.describe()}, {llm.ctx_size} tokens)"
    )
    drafts = f"; up to {llm.pairing.n_draft_max} a step" if llm.pairing.drafter else ""
    remark(f"drafts: {llm.pairing.reason}{drafts}")
    for group in target.report.ignored:
        remark(f"left out: {group.count} tensors such as {group.example}: {group.reason}")
    return llm


class Printer:
    """Writes events to stdout as they come; in a terminal accepted drafts are coloured."""

    def __init__(self) -> None:
        self.console = results()

    def legend(self) -> None:
        """Say what the colour means, where there is one."""
        if self.console.is_terminal and not self.console.no_color:
            remarks().print("green", style=DRAFT_STYLE, end="")
            remark(": drafted and accepted; the rest is the model's own")

    def show(self, event: TokenEvent) -> None:
        """Write what an event made printable."""
        self.write(event.text, DRAFT_STYLE if event.drafted else None)

    def write(self, text: str, style: str | None = None) -> None:
        """Write to stdout; a file or pipe gets the text as it is."""
        if not text:
            return
        if self.console.is_terminal:
            self.console.out(harmless(text), style=style, end="", highlight=False)
        else:
            self.console.file.write(text)
        self.console.file.flush()


def stream(
    llm: LLM,
    prompt: str | Sequence[int],
    params: SamplingParams,
    show: Callable[[TokenEvent], None],
) -> Completion:
    """Run one request, each event passed to `show`.

    Ctrl-C ends it after the step in progress, with the finish reason `abort` and the text so far;
    a second one interrupts at once.

    Raises:
        PromptError: the prompt cannot be run.
    """
    sequence = llm.add(prompt, params)
    pieces: list[str] = []
    with soft_interrupt() as asked:
        try:
            while sequence.finish_reason is None:
                last = llm.abort(sequence.id) if asked.is_set() else None
                for event in llm.step() if last is None else [last]:
                    pieces.append(event.text)
                    show(event)
        finally:
            llm.abort(sequence.id)
    return completion_of(sequence, "".join(pieces))


@contextmanager
def soft_interrupt() -> Iterator[threading.Event]:
    """While the block runs, the first Ctrl-C sets the event and only the second one interrupts."""
    asked = threading.Event()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def summary(completion: Completion) -> str:
    """The line of figures after an answer; rates are those of decoding, without the prompt."""
    timings = completion.timings
    tokens_per_s = timings["predicted_per_second"]
    n_tokens = len(completion.tokens)
    parts = [f"{n_tokens} tokens, {tokens_per_s:.1f} tokens/s"]
    stats = completion.stats
    if stats.n_drafted:
        parts.append(f"{stats.tokens_per_pass:.2f} tokens per pass")
        parts.append(f"{stats.n_accepted} of {stats.n_drafted} drafts accepted")
    if n_tokens and tokens_per_s:
        characters_per_s = tokens_per_s * len(completion.text) / n_tokens
        parts.append(modem(characters_per_s * BITS_PER_CHARACTER))
    return " · ".join(parts)


def modem(bits_per_s: float) -> str:
    """A rate in the terms of telephone lines."""
    if bits_per_s <= 0:
        return "≈ 0 kbit/s"
    nearest = min(MODEMS, key=lambda rate: abs(math.log(rate / bits_per_s)))
    return f"≈ {bits_per_s / 1000:.1f} kbit/s (nearest: a {MODEMS[nearest]} modem)"
