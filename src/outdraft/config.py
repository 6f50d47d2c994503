"""Every knob a user has over the engine, resolved once. Nothing below reads the environment."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from outdraft.errors import OutdraftError

SpecType = Literal[
    "auto", "off", "gemma4-assistant", "draft-model", "mtp", "ngram", "ngram+gemma4-assistant"
]
DType = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["auto", "cpu", "reference"]
Quant = Literal["auto", "bf16", "w8", "w4"]
KvDType = Literal["bf16", "int8", "fp32"]

DEFAULT_CTX_SIZE = 8192


CHOICES = (
    ("spec_type", SpecType),
    ("device", Device),
    ("backend", Backend),
    ("dtype", DType),
    ("quant", Quant),
    ("kv_dtype", KvDType),
)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is loaded and run.

    Attributes:
        spec_type: which drafter; `auto` takes the assistant that fits the target, or none; `ngram`
            repeats the text itself, `ngram+gemma4-assistant` does where a long match is found;
            `draft-model` is a smaller model of the same tokenizer, named by `assistant`; `mtp` is
            the head in the checkpoint.
        assistant: directory or name of the drafter; None looks beside and inside the target.
        adapter: directory or name of a LoRA adapter (PEFT) that is added to the target's weights.
        draft_n_max: most tokens drafted at once; None takes the drafter's published default.
        draft_n: draft this many every time; None chooses from 0 to `draft_n_max` each step, by
            measured costs and acceptance.
        draft_p_min: leave out a draft, and those behind it, that the drafter itself gives a smaller
            probability; 0 leaves that to the chosen lengths. Drawn drafts are never left out so.
        sample_drafts: at temperature > 0, draw drafts from the drafter's distribution instead of
            taking its most probable token. Requests with a seed take the most probable one where
            the length is chosen, so that measured times do not change their text.
        draft_vocab: ids that a native head drafts; None: all. No other token is drafted, and what
            is emitted does not change.
        draft_vocab_text: a file whose most frequent tokens are among them; the lowest ids else.
        device: `cuda` is one GPU through Triton; `auto` takes a GPU that can be used, unless a
            backend or a dtype is asked for.
        backend: `cpu` is the compiled kernels, `reference` plain PyTorch; `auto` takes the kernels
            unless a dtype is asked for, which only the reference has.
        dtype: of the reference's weights and activations; `auto` is the checkpoint's.
        quant: how the kernels store weights: bf16, 8 bits a row, or 4 bits a group of 32; `auto`
            keeps an int8 checkpoint at 8 bits and any other in bf16.
        kv_dtype: how the kernels store keys and values.
        ctx_size: longest sequence in tokens, prompt included; None is the model's, at most 8192.
        max_sequences: sequences in progress at once.
        max_queue: requests that may wait for their turn; more are refused (`QueueFull`).
        prefill_chunk: rows of a step that prompts may fill, those of decoding counted off.
        kv_cache_tokens: positions of keys and values that all sequences share; None is enough for
            four of the longest sequences, or for `max_sequences` if that is fewer. One sequence
            of `ctx_size` always fits.
        prefix_cache: keep keys and values for later prompts that begin alike.
        kept_states: of recurrent layers, how many states the prefix cache keeps at most, each
            behind a page of 64 tokens; None: as many bytes as keys and values take, at least 4.
        threads: CPU threads; None leaves PyTorch's choice.
        cache_dir: where the kernels' packed weights are kept for the next start; None: nowhere.
        cache_min_mb: models that take less than so many 10^6 bytes, packed, are not kept.
        cache_max_gb: of all files there, in 10^9 bytes; the least recently used are removed. None
            is no limit.
        learn: make the drafter fit what is generated, in a process that computes only while nothing
            else does (engine/learning.py). What is emitted does not change.
        learn_dir: where learned drafters are kept for the next start; None: nowhere.
        learn_mb: most memory for texts to learn from, in 10^6 bytes.
        learn_idle_s: seconds without a request after which learning goes on.

    Raises:
        OutdraftError: a value is outside its range.
    """

    spec_type: SpecType = "auto"
    assistant: str | None = None
    adapter: str | None = None
    draft_n_max: int | None = None
    draft_n: int | None = None
    draft_p_min: float = 0.0
    sample_drafts: bool = True
    draft_vocab: int | None = None
    draft_vocab_text: str | None = None
    device: Device = "auto"
    backend: Backend = "auto"
    dtype: DType = "auto"
    quant: Quant = "auto"
    kv_dtype: KvDType = "bf16"
    ctx_size: int | None = None
    max_sequences: int = 16
    max_queue: int = 1024
    prefill_chunk: int = 512
    kv_cache_tokens: int | None = None
    prefix_cache: bool = True
    kept_states: int | None = None
    threads: int | None = None
    cache_dir: str | None = None
    cache_min_mb: int = 0
    cache_max_gb: int | None = None
    learn: bool = False
    learn_dir: str | None = None
    learn_mb: int = 16
    learn_idle_s: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES:
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise OutdraftError(f"{name} is {value!r}", f"use one of {get_args(allowed)}")
        for name, low, high in (
            ("draft_n_max", 0, 64),
            ("draft_n", 0, 64),
            ("draft_vocab", 1, 2**31),
            ("ctx_size", 1, 2**31),
            ("max_sequences", 1, 4096),
            ("max_queue", 0, 2**20),
            ("prefill_chunk", 1, 2**20),
            ("kv_cache_tokens", 1, 2**40),
            ("kept_states", 0, 2**20),
            ("threads", 1, 4096),
            ("cache_min_mb", 0, 2**40),
            ("cache_max_gb", 0, 2**40),
            ("learn_mb", 1, 2**20),
            ("learn_idle_s", 0, 2**20),
        ):
            number = getattr(self, name)
            if number is not None and not low <= number <= high:
                raise OutdraftError(f"{name} is {number}", f"use {low} to {high}")
        if not 0 <= self.draft_p_min <= 1:
            raise OutdraftError(f"draft_p_min is {self.draft_p_min}", "use 0 to 1")
        if None not in (self.draft_n, self.draft_n_max) and self.draft_n != self.draft_n_max:
            raise OutdraftError(
                f"draft_n is {self.draft_n} and draft_n_max is {self.draft_n_max}",
                "give one of the two",
            )
        if self.spec_type in ("off", "ngram") and self.assistant is not None:
            raise OutdraftError(
                f"an assistant is given and spec_type is {self.spec_type}",
                "leave one of the two out",
            )
        if self.learn_dir is not None and not self.learn:
            raise OutdraftError("learn_dir is given and learn is off", "switch learn on, too")


def hub_cache() -> Path:
    """Where Hugging Face's tools keep what they download: the same variables, in their order.

    $HF_HUB_CACHE, $HF_HOME/hub, $XDG_CACHE_HOME/huggingface/hub, ~/.cache/huggingface/hub.
    """
    for name, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / below
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "huggingface" / "hub"
