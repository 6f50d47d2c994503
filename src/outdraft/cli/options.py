"""Options that several verbs share, each declared once.

What they mean is said in config.py and, for those of sampling, in request.py.
"""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.config import Backend, Device, DType, EngineConfig, KvDType, Quant, SpecType
from outdraft.errors import OutdraftError, SamplingError
from outdraft.request import SamplingParams

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="demo, a model directory, or a downloaded id.", show_default=False
    ),
]
Assistant = Annotated[
    str | None,
    typer.Option(
        "--assistant",
        "--spec-draft-model",
        "-hfd",
        help="The drafter's directory or id; found by itself if not given.",
    ),
]
Adapter = Annotated[
    str | None, typer.Option(help="A LoRA adapter (PEFT) to add to the model's weights.")
]
Spec = Annotated[
    SpecType,
    typer.Option(
        "--spec-type",
        help="Which drafter: auto, off, gemma4-assistant, draft-model, mtp, ngram, or "
        "ngram+gemma4-assistant.",
    ),
]
SpecConfig = Annotated[
    str | None,
    typer.Option(
        "--speculative-config",
        help='The same as vLLM has it: {"method", "model", "num_speculative_tokens"}.',
    ),
]
DraftMax = Annotated[
    int | None,
    typer.Option(
        "--spec-draft-n-max", help="Most tokens drafted at once; 0 switches drafting off."
    ),
]
DraftFixed = Annotated[
    int | None,
    typer.Option(
        "--spec-draft-n", help="Draft this many every time, instead of as many as pay off."
    ),
]
DraftPMin = Annotated[
    float,
    typer.Option(
        "--spec-draft-p-min",
        help="Leave out drafts that the drafter gives less than this probability.",
    ),
]
DraftSample = Annotated[
    bool,
    typer.Option(
        "--spec-draft-sample/--no-spec-draft-sample",
        help="At temperature above 0, draw drafts instead of taking the most probable token.",
    ),
]
Card = Annotated[
    Device, typer.Option("--device", help="cpu, cuda (one GPU, through Triton), or auto.")
]
Kernels = Annotated[
    Backend,
    typer.Option("--backend", help="cpu (compiled), reference (PyTorch), or auto."),
]
Compute = Annotated[
    DType,
    typer.Option("--dtype", help="Type of the reference: auto, bfloat16, float16 or float32."),
]
Bits = Annotated[
    Quant, typer.Option("--quant", help="Weights of cpu and cuda: auto, bf16, w8 or w4.")
]
KvType = Annotated[KvDType, typer.Option("--kv-dtype", help="Keys and values of cpu.")]
CtxSize = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens; the model's, at most 8192.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; left to PyTorch if not given.")]
CacheDir = Annotated[
    str | None,
    typer.Option(
        help="Keep packed weights here; the user's cache, for large models, if not given."
    ),
]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep packed weights for the next start.")
]
CacheMax = Annotated[
    int, typer.Option("--cache-max-gb", help="Remove the least recently used beyond this.")
]
CACHE_MAX_GB = 100
CACHE_MIN_MB = 256  # packing less than that takes about a second
MaxSequences = Annotated[int, typer.Option("--max-sequences", help="Requests in progress at once.")]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", help="Requests that may wait; more are refused.")
]
KvCacheTokens = Annotated[
    int | None,
    typer.Option(
        "--kv-cache-tokens",
        help="Positions of keys and values for all requests together; four of the longest.",
    ),
]
DraftVocab = Annotated[
    int | None, typer.Option(min=1, help="Ids that a native head may draft; all if not given.")
]
DraftVocabText = Annotated[
    str | None, typer.Option(help="A file whose most frequent tokens are among these ids.")
]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token.")]
TopK = Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the tokens that make up this probability.")]
MinP = Annotated[float, typer.Option(help="Keep tokens above this share of the best one's.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. Can be repeated.")]
TopNSigma = Annotated[float, typer.Option(help="Keep logits within n deviations; 0 keeps all.")]
TypicalP = Annotated[
    float, typer.Option("--typical", help="Keep the most typical tokens of this mass.")
]
Presence = Annotated[
    float, typer.Option(help="Taken from logits of tokens that were written, -2 to 2.")
]
Frequency = Annotated[
    float, typer.Option(help="Taken once for each time a token was written, -2 to 2.")
]
Repeat = Annotated[
    float, typer.Option("--repeat-penalty", help="Divides logits of tokens in the text; 1 is off.")
]
RepeatLastN = Annotated[
    int, typer.Option(help="Tokens that penalties look back at; -1 all, 0 none.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(help="ID+BIAS or ID-BIAS, such as 29+5 or 29-inf. Can be repeated."),
]
BadWord = Annotated[
    list[str] | None, typer.Option("--bad-word", help="A text not to write. Can be repeated.")
]
MinTokens = Annotated[int, typer.Option(help="Fewest tokens before the end of sequence.")]
JsonSchema = Annotated[
    str | None, typer.Option("-j", "--json-schema", help="Write JSON of this schema, or @FILE.")
]
Regex = Annotated[str | None, typer.Option(help="Write a text that matches this expression.")]
Grammar = Annotated[str | None, typer.Option(help="Write a text of this Lark grammar, or @FILE.")]
Thinking = Annotated[
    int | None,
    typer.Option("--max-thinking-tokens", help="Close the reasoning block after so many tokens."),
]


METHODS: dict[str | None, SpecType] = {
    None: "auto",
    "draft_model": "draft-model",
    "ngram": "ngram",
}
"""vLLM's names of what drafts; those that end in mtp are `mtp`."""
ENGINE_NAMES = {
    "spec_draft_n_max": "draft_n_max",
    "spec_draft_n": "draft_n",
    "spec_draft_p_min": "draft_p_min",
    "spec_draft_sample": "sample_drafts",
    "spec_draft_vocab": "draft_vocab",
    "spec_draft_vocab_text": "draft_vocab_text",
}


def engine_config(given: dict[str, Any], **fixed: Any) -> EngineConfig:
    """The engine's configuration from a verb's options, those of them that it has.

    Args:
        fixed: fields that the verb itself decides.
    """
    named = {ENGINE_NAMES.get(name, name): value for name, value in given.items()}
    known = {field.name for field in fields(EngineConfig)}
    values = {name: value for name, value in named.items() if name in known}
    for name, value in speculative_config(given.get("speculative_config")).items():
        if values.get(name) not in (None, "auto"):
            raise OutdraftError(
                f"--speculative-config and another option both say {name}", "give one of them"
            )
        values[name] = value
    if "cache" in given:
        values |= cache_settings(given["cache"], given["cache_dir"], given["cache_max_gb"])
    return EngineConfig(**(values | fixed))


def speculative_config(text: str | None) -> dict[str, Any]:
    """What vLLM's JSON of that name says, as fields of `EngineConfig`.

    Raises:
        OutdraftError: it is not such JSON, or says what cannot be met here.
    """
    if text is None:
        return {}
    try:
        said = json.loads(text)
    except ValueError as error:
        raise OutdraftError(f"--speculative-config is not JSON: {error}", "check it") from error
    if not isinstance(said, dict):
        raise OutdraftError("--speculative-config is not an object", "write it in braces")
    unknown = sorted(said.keys() - {"method", "model", "num_speculative_tokens"})
    if unknown:
        raise OutdraftError(
            f"--speculative-config has {unknown[0]!r}, which is not known here",
            "known are method, model and num_speculative_tokens",
        )
    method, n = said.get("method"), said.get("num_speculative_tokens")
    kind = "mtp" if str(method).endswith("mtp") else dict(METHODS).get(method and str(method))
    if (
        kind is None
        or isinstance(n, bool)
        or not isinstance(n, int | None)
        or not isinstance(said.get("model"), str | None)
    ):
        raise OutdraftError(
            f"--speculative-config cannot be met: {text[:200]}",
            f"method is one of {', '.join(str(m) for m in METHODS if m)} or mtp; model is a text, "
            "num_speculative_tokens a number",
        )
    values = {"spec_type": kind, "assistant": said.get("model"), "draft_n_max": n}
    return {name: value for name, value in values.items() if value not in (None, "auto")}


def cache_settings(cache: bool, cache_dir: str | None, max_gb: int) -> dict[str, Any]:
    """What a verb's cache options say, as fields of `EngineConfig`.

    A directory that is named keeps models of any size; the user's cache only large ones.
    """
    if not cache:
        return {"cache_dir": None}
    return {
        "cache_dir": str(default_cache_dir()) if cache_dir is None else cache_dir,
        "cache_min_mb": CACHE_MIN_MB if cache_dir is None else 0,
        "cache_max_gb": max_gb,
    }


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/outdraft/packed, or ~/.cache/outdraft/packed."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    return root / "outdraft" / "packed"


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """Sampling parameters from a verb's options, those of them that it has.

    Args:
        given: values by the names of the verb's arguments (`typer.Context.params`).

    Raises:
        SamplingError: a value is not possible.
    """
    values = {f.name: given[f.name] for f in fields(SamplingParams) if f.name in given}
    for name in ("stop", "bad_words"):
        values[name] = tuple(values.get(name) or ())
    values["logit_bias"] = dict(_bias(text) for text in values.get("logit_bias") or ())
    for name in ("json_schema", "grammar"):
        text = values.get(name)
        if isinstance(text, str) and text.startswith("@"):
            values[name] = _read(name, Path(text[1:]))
    if values.get("json_schema") is not None:
        try:
            json.loads(values["json_schema"])
        except ValueError as error:
            raise SamplingError(f"the JSON schema is not JSON: {error}", "check it") from error
    return SamplingParams(**values)


def _bias(text: str) -> tuple[int, float]:
    """`29+5` or `29-inf`, as llama.cpp spells it."""
    at = max(text.find("+"), text.find("-"))
    try:
        return int(text[:at]), float(text[at:])
    except ValueError as error:
        raise SamplingError(
            f"the logit bias {text!r} is not ID+BIAS or ID-BIAS", "such as 29+5 or 29-inf"
        ) from error


def _read(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SamplingError(f"the file of {name} cannot be read: {error}", "check it") from error
