"""`outdraft generate`: continue one prompt."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outdraft.cli import options
from outdraft.cli.console import remark
from outdraft.config import EngineConfig
from outdraft.errors import PromptError
from outdraft.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from outdraft.engine.engine import LLM, Completion

INTERRUPTED = 130
DEMO_PROMPT = '''class Histogram:
    """Counts how often each value was seen."""

    def __init__(self, values=()):
        self.counts = {}
        for value in values:
            self.add(value)

    def add(self, value):'''

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    ctx: typer.Context,
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help="The text; - reads it from stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the text from a file.")] = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="Token ids, such as 2,17,4.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 256,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.")] = False,
    stop: options.Stop = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    top_n_sigma: options.TopNSigma = 0.0,
    typical_p: options.TypicalP = 1.0,
    presence_penalty: options.Presence = 0.0,
    frequency_penalty: options.Frequency = 0.0,
    repetition_penalty: options.Repeat = 1.0,
    repeat_last_n: options.RepeatLastN = -1,
    logit_bias: options.LogitBias = None,
    bad_words: options.BadWord = None,
    min_tokens: options.MinTokens = 0,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.Grammar = None,
    max_thinking_tokens: options.Thinking = None,
    seed: options.Seed = None,
    assistant: options.Assistant = None,
    adapter: options.Adapter = None,
    spec_type: options.Spec = "auto",
    spec_draft_n_max: options.DraftMax = None,
    spec_draft_n: options.DraftFixed = None,
    spec_draft_p_min: options.DraftPMin = 0.0,
    spec_draft_sample: options.DraftSample = True,
    spec_draft_vocab: options.DraftVocab = None,
    spec_draft_vocab_text: options.DraftVocabText = None,
    device: options.Card = "auto",
    backend: options.Kernels = "auto",
    dtype: options.Compute = "auto",
    quant: options.Bits = "auto",
    kv_dtype: options.KvType = "bf16",
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    cache: options.Cache = True,
    cache_dir: options.CacheDir = None,
    cache_max_gb: options.CacheMax = options.CACHE_MAX_GB,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Continue a text, streaming, with accepted drafts in colour."""
    params = options.sampling_params(ctx.params)
    config = options.engine_config(ctx.params, max_sequences=1)
    asked = read_prompt(model, prompt, prompt_file, prompt_tokens)
    completion = run(model, config, asked, params, as_json=as_json)
    if completion.finish_reason is FinishReason.ABORT:
        raise typer.Exit(INTERRUPTED)


def run(
    model: str,
    config: EngineConfig,
    prompt: str | list[int],
    params: SamplingParams,
    *,
    as_json: bool,
) -> "Completion":
    """Load, generate, print."""
    from outdraft.cli.streaming import Printer, load, stream, summary

    llm = load(model, config)
    if as_json:
        completion = stream(llm, prompt, params, lambda event: None)
        print(json.dumps(as_object(llm, completion), ensure_ascii=False))
        return completion
    printer = Printer()
    if llm.pairing.drafter is not None:
        printer.legend()
    if isinstance(prompt, str) and printer.console.is_terminal:
        printer.write(prompt, "dim")
    completion = stream(llm, prompt, params, printer.show)
    print(flush=True)
    remark(summary(completion))
    return completion


def as_object(llm: "LLM", completion: "Completion") -> dict[str, object]:
    """What --json prints. Rates are per second, times in milliseconds."""
    drafter, stats = llm.pairing.drafter, completion.stats
    return {
        "prompt_tokens": completion.prompt_tokens,
        "tokens": completion.tokens,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "spec_type": "off" if drafter is None else drafter.name,
        "spec_reason": llm.pairing.reason,
        "tokens_per_pass": stats.tokens_per_pass,
        "acceptance_by_position": stats.acceptance_by_position,
        "timings": completion.timings,
    }


def read_prompt(
    model: str, text: str | None, file: Path | None, tokens: str | None
) -> str | list[int]:
    """The prompt from the one option that is given, else from a pipe; the demo has one of its own.

    Raises:
        PromptError: several are given, or none, or it cannot be read.
    """
    if sum(given is not None for given in (text, file, tokens)) > 1:
        raise PromptError(
            "more than one prompt is given", "use one of --prompt, --prompt-file, --prompt-tokens"
        )
    if tokens is not None:
        return parse_tokens(tokens)
    if file is not None and str(file) != "-":
        return read_file(file)
    if text is not None and text != "-":
        return text
    wanted = text is not None or file is not None
    piped = read_stdin() if wanted or not sys.stdin.isatty() else ""
    if piped or wanted:
        return piped
    if model == "demo":
        remark("prompt: the demo's own, as none is given")
        return DEMO_PROMPT
    raise PromptError("there is no prompt", "give --prompt TEXT, --prompt-file FILE, or pipe it in")


def parse_tokens(text: str) -> list[int]:
    """Token ids separated by commas or spaces.

    Raises:
        PromptError: something else is among them.
    """
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise PromptError(
            f"--prompt-tokens {text!r:.80} is not a list of token ids", "write them as 2,17,4"
        ) from None


def read_file(path: Path) -> str:
    """A prompt file.

    Raises:
        PromptError: it cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(
            f"the prompt file {path} cannot be read: {error.strerror}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the prompt file {path} is not UTF-8", "save it as UTF-8 text"
        ) from error


def read_stdin() -> str:
    """What is piped in.

    Raises:
        PromptError: it is not UTF-8.
    """
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError("the prompt on stdin is not UTF-8", "convert it to UTF-8") from error
