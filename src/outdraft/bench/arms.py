"""What throughput is measured with beside the usual: other drafters, other texts.

Here: an assistant of random weights, prompts that nothing predicts, edits, and one drafter against
another. Not here: the runs and their figures (throughput.py).
"""

import math
import random
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from outdraft.bench.prompts import Prompt
from outdraft.bench.throughput import CONTROLLER, PLAIN, Asked, Mode, own_modes
from outdraft.config import SpecType
from outdraft.engine.engine import LLM
from outdraft.errors import OutdraftError
from outdraft.models.gemma4_assistant import Gemma4Assistant, expected_tensors
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter

Text = Literal["mixed", "edits", "random"]

N_RANDOM_TOKENS = 64


def modes_of(llm: LLM, drafter: str, seed: int, load: Callable[[SpecType], LLM]) -> list[Mode]:
    """The modes to compare, with the model's own drafter, a random one, or n-grams beside it.

    Args:
        load: another engine with a drafter of this name.
    """
    if drafter == "ngram":
        return against_either(load, llm)
    if drafter == "random":
        forget_everything(llm, seed)
    return own_modes(llm)


def forget_everything(llm: LLM, seed: int) -> None:
    """Give the assistant random weights of its shapes, and measure costs again.

    Raises:
        OutdraftError: the drafter is not an assistant.
    """
    drafter = llm.pairing.drafter
    if not isinstance(drafter, Gemma4AssistantDrafter):
        raise OutdraftError("only an assistant can have random weights", "use --drafter own")
    config, generator = drafter.model.config, torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("token_ordering"):
            return torch.randperm(shape[0], generator=generator)
        if len(shape) < 2:
            return torch.ones(shape)
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    weights = {name: drawn(name, t.shape) for name, t in expected_tensors(config).items()}
    drafter.model = Gemma4Assistant(config, weights, drafter.model.ops, llm.ctx_size)
    drafter.recordings.clear()
    llm.lengths = None
    llm.set_draft_auto()


def random_requests(llm: LLM, n: int, max_tokens: int, seed: int) -> list[Asked]:
    """Prompts of tokens drawn one by one, with a request's usual range of answer lengths."""
    rng = random.Random(f"random text/{seed}")
    vocab = min(llm.target.config.vocab_size, llm.tokenizer.vocab_size)
    bos = llm.tokenizer.bos_id or 0
    return [
        Asked(
            (bos, *(rng.randrange(vocab) for _ in range(N_RANDOM_TOKENS))),
            rng.randint(max(1, max_tokens // 4), max_tokens),
        )
        for _ in range(n)
    ]


def of_text(prompts: list[Prompt], text: Text) -> list[Prompt]:
    """The prompts that a text is made of: for `edits` those that begin to repeat themselves."""
    return [p for p in prompts if text != "edits" or p.kind == "repetition"]


def against_either(load: Callable[[SpecType], LLM], llm: LLM) -> list[Mode]:
    """Plain, the assistant alone, n-grams alone, and both: lengths are chosen in each.

    Args:
        load: another engine with a drafter of this name.
        llm: the one that has the assistant.
    """
    ngram, both = load("ngram"), load("ngram+gemma4-assistant")
    return [
        Mode(PLAIN, llm, lambda: llm.set_draft_n_max(0)),
        Mode("assistant", llm, llm.set_draft_auto),
        Mode("ngram", ngram, ngram.set_draft_auto),
        Mode(CONTROLLER, both, both.set_draft_auto),
    ]
