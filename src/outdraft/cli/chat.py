"""`outdraft chat`: a conversation in the terminal."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from outdraft.cli import options
from outdraft.cli.console import complain, remark
from outdraft.config import EngineConfig
from outdraft.errors import PromptError
from outdraft.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from outdraft.engine.engine import LLM

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"

app = typer.Typer(add_completion=False)


@app.command()
def chat(
    ctx: typer.Context,
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="Instructions before the talk.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens an answer.")] = 1024,
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
) -> None:
    """Talk to a model in the terminal.

    /reset forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer and keeps it.
    """
    params = options.sampling_params(ctx.params)
    config = options.engine_config(ctx.params, max_sequences=1)
    start(model, config, params, system)


def start(model: str, config: EngineConfig, params: SamplingParams, system: str | None) -> None:
    """Load the model and begin."""
    from outdraft.cli.streaming import load

    llm = load(model, config)
    if llm.template is None:
        raise PromptError(
            f"{llm.target.path} has no chat template", "use `outdraft generate` with plain text"
        )
    remark(HELP)
    talk(llm, params, system)


def talk(llm: "LLM", params: SamplingParams, system: str | None) -> None:
    """Read lines and answer them until the end of input."""
    start = [{"role": "system", "content": system}] if system else []
    history = list(start)
    while (line := read_line()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            history = list(start)
            remark("the conversation is forgotten")
        elif line.startswith("/"):
            remark(HELP)
        elif line:
            history = answer(llm, params, [*history, {"role": "user", "content": line}])


def answer(
    llm: "LLM", params: SamplingParams, history: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Answer the last message; the conversation with the answer, or without it all on an error."""
    from outdraft.cli.streaming import Printer, stream, summary

    try:
        completion = stream(llm, llm.render_chat(history), params, Printer().show)
    except PromptError as error:  # too long by now, or the template refuses it: the talk goes on
        complain(error.message, f"{error.hint}, or start again with /reset")
        return history[:-1]
    print(flush=True)
    stopped = "stopped · " if completion.finish_reason is FinishReason.ABORT else ""
    remark(stopped + summary(completion))
    return [*history, {"role": "assistant", "content": completion.text}]


def read_line() -> str | None:
    """The next line without surrounding spaces, None at the end of input."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with suppress(ImportError):
            import readline  # noqa: F401  input() edits lines and recalls earlier ones with it
    try:
        return input(prompt).strip()
    except EOFError:
        return None
