"""Choosing an assistant by what counts: tokens per pass, decoding freely in the real engine.

The training loss does not tell: an objective that peeks has the lower loss and drafts worse. Here:
prompts from held-out text and the measurement. Not here: which checkpoints there are (recipe.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM, Completion
from outdraft.errors import TrainingError
from outdraft.request import SamplingParams
from outdraft.speculate.stats import DraftStats
from outdraft.train.tokenizer import BOS_ID

PLACES = (0.3, 0.6, 0.05, 0.8)
"""Where in a text a prompt begins, as a share of its length; later ones only if more are needed."""

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drafting:
    """What free greedy decoding of some prompts came to."""

    stats: DraftStats
    tokens: list[list[int]]


def distinct_share(drafting: Drafting) -> float:
    """Mean share of different tokens in a text. Low: it repeats itself, which is easy to draft."""
    shares = [len(set(tokens)) / len(tokens) for tokens in drafting.tokens]
    return sum(shares) / len(shares)


def heldout_prompts(
    tokenizer: tokenizers.Tokenizer, texts: Iterable[str], n_prompts: int, n_tokens: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Two disjoint sets of up to `n_prompts` prompts that begin at a line: to select by, to report.

    Raises:
        TrainingError: the texts are too short for a prompt in each.
    """
    found: list[Prompt] = []
    texts = list(texts)
    for place in PLACES:
        for text in texts:
            start = text.find("\n", int(place * len(text))) + 1
            ids = tokenizer.encode(text[start:], add_special_tokens=False).ids
            if start and len(ids) >= n_tokens - 1:
                found.append((BOS_ID, *ids[: n_tokens - 1]))
    found = found[: 2 * n_prompts]
    if len(found) < 2:
        raise TrainingError(
            f"the held-out text is too short for prompts of {n_tokens} tokens",
            "give more text with --data",
        )
    return found[0::2], found[1::2]


def complete(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> list[Completion]:
    """What `llm` makes of the prompts.

    Raises:
        TrainingError: a request ended in an error; its zeros would look like a measurement.
    """
    done = llm.generate_all(prompts, params)
    for one in done:
        if one.error is not None:
            raise TrainingError(f"the engine failed: {one.error}", "see `outdraft doctor`")
    return done


def measure_drafting(
    target: Path, assistant: Path | None, prompts: Sequence[Prompt], n_new: int, k: int
) -> Drafting:
    """Decode `n_new` tokens after each prompt, greedily, with drafts of k (None: plainly)."""
    if assistant is None:
        config = EngineConfig(spec_type="off")
    else:
        config = EngineConfig(assistant=str(assistant), draft_n=k)
    with LLM(str(target), config) as llm:
        params = SamplingParams(max_tokens=n_new, ignore_eos=True)
        completions = complete(llm, prompts, params)
    stats = DraftStats()
    for completion in completions:
        stats.merge(completion.stats)
    return Drafting(stats, [completion.tokens for completion in completions])
