"""Every knob a user has over the engine, resolved once. Nothing below reads the environment."""

from dataclasses import dataclass
from typing import Literal, get_args

from outdraft.errors import OutdraftError

SpecType = Literal["auto", "off", "gemma4-assistant"]
DType = Literal["auto", "bfloat16", "float16", "float32"]

DEFAULT_CTX_SIZE = 8192


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is loaded and run.

    Attributes:
        spec_type: which drafter; `auto` takes the one that fits the target, or none.
        assistant: directory or name of the drafter; None looks beside and inside the target.
        draft_n_max: most tokens drafted at once; None takes the drafter's published default.
        sample_drafts: at temperature > 0, draw drafts from the drafter's distribution instead of
            taking its most probable token.
        dtype: compute type of the weights; `auto` is the checkpoint's.
        ctx_size: longest sequence in tokens, prompt included; None is the model's, at most 8192.
        max_sequences: sequences in progress at once.
        prefill_chunk: most prompt tokens computed in one step.
        threads: CPU threads; None leaves PyTorch's choice.

    Raises:
        OutdraftError: a value is outside its range.
    """

    spec_type: SpecType = "auto"
    assistant: str | None = None
    draft_n_max: int | None = None
    sample_drafts: bool = True
    dtype: DType = "auto"
    ctx_size: int | None = None
    max_sequences: int = 4
    prefill_chunk: int = 512
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("spec_type", SpecType), ("dtype", DType)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise OutdraftError(f"{name} is {value!r}", f"use one of {get_args(allowed)}")
        for name, low, high in (
            ("draft_n_max", 0, 64),
            ("ctx_size", 1, 2**31),
            ("max_sequences", 1, 4096),
            ("prefill_chunk", 1, 2**20),
            ("threads", 1, 4096),
        ):
            number = getattr(self, name)
            if number is not None and not low <= number <= high:
                raise OutdraftError(f"{name} is {number}", f"use {low} to {high}")
        if self.spec_type == "off" and self.assistant is not None:
            raise OutdraftError(
                "an assistant is given and spec_type is off", "leave one of the two out"
            )
