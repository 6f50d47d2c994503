"""What quantising a target costs in quality: perplexity and distance to bf16.

Here: figures from two loaded models, and the texts. Not here: acceptance of drafts (acceptance.py),
the options and the table (cli/bench_quality.py).

Every token of a window is scored in one pass after `<bos>`. KL is that of the whole vocabulary,
KL(bf16 || quantised), in nats a token.

Shapes: T tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.cache.memory import Span
from outdraft.engine.engine import LLM
from outdraft.errors import OutdraftError

MIN_WINDOW = 16  # tokens: a shorter rest of a file is left out


@dataclass(slots=True)
class Sums:
    """Added up over tokens; all fp64."""

    n_tokens: int = 0
    nll: float = 0.0
    base_nll: float = 0.0
    kl: float = 0.0
    same_top: int = 0
    nll_differences: list[float] = field(default_factory=list)  # a window, nats a token

    def add(self, log_p_TV: Tensor, log_q_TV: Tensor, next_T: Tensor) -> None:
        """One window: log-probabilities of bf16 and of the quantised model, and what came next."""
        at = next_T[:, None]
        base, own = -log_p_TV.gather(1, at).sum(), -log_q_TV.gather(1, at).sum()
        self.n_tokens += len(next_T)
        self.base_nll += float(base)
        self.nll += float(own)
        self.kl += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
        self.same_top += int((log_p_TV.argmax(1) == log_q_TV.argmax(1)).sum())
        self.nll_differences.append(float(own - base) / len(next_T))


def read_texts(path: Path) -> list[str]:
    """A file's text, or those of the *.txt and *.py files in a directory.

    Raises:
        OutdraftError: there is nothing to read.
    """
    files = [path] if path.is_file() else sorted([*path.glob("*.txt"), *path.glob("*.py")])
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, ValueError) as error:
        raise OutdraftError(f"{path} cannot be read as text: {error}", "give UTF-8") from error
    if not any(texts):
        raise OutdraftError(f"there is no text in {path}", "give a text file, or --text DIRECTORY")
    return texts


def windows(llm: LLM, texts: Sequence[str], size: int, most: int) -> Iterator[list[int]]:
    """Token ids of windows without overlap, `<bos>` first; at most `most` tokens in all.

    The first windows of all texts come before their second ones.
    """
    encoded = [llm.encode(text) for text in texts if text]
    left = most
    for start in range(1, max(len(ids) for ids in encoded), size):
        for ids in encoded:
            window = [ids[0], *ids[start : start + min(size, left)]]
            if len(window) > MIN_WINDOW:
                left -= len(window) - 1
                yield window
            if left < MIN_WINDOW:
                return


@torch.inference_mode()
def log_probs(llm: LLM, tokens: Sequence[int]) -> Tensor:
    """fp64 log-probabilities [T - 1, V] of what follows each token but the last."""
    name, memory = "quality", llm.memory
    memory.open(name)
    try:
        rows, step = [], llm.config.prefill_chunk
        for first in range(0, len(tokens) - 1, step):
            part = list(tokens[first : min(first + step, len(tokens) - 1)])
            memory.reserve(name, len(part))
            span = Span(name, 0, len(part))
            done = llm.runner.target_pass.run(part, [span], list(range(len(part))))
            memory.advance(name, len(part))
            memory.trim(name)
            rows.append(torch.log_softmax(done.logits_RV.double(), -1))
        return torch.cat(rows)
    finally:
        memory.close(name)


def compare_windows(base: LLM, quantised: LLM, windows: Sequence[list[int]]) -> Sums:
    """Score the same windows with both."""
    sums = Sums()
    for window in windows:
        sums.add(log_probs(base, window), log_probs(quantised, window), torch.tensor(window[1:]))
    return sums


def text_figures(sums: Sums) -> dict[str, Any]:
    """Perplexities and distances; `nll_standard_error` is of the mean difference over windows."""
    n = sums.n_tokens
    differences = torch.tensor(sums.nll_differences, dtype=torch.float64)
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {
        "n_tokens": n,
        "perplexity": math.exp(sums.nll / n),
        "bf16_perplexity": math.exp(sums.base_nll / n),
        "perplexity_change": math.exp((sums.nll - sums.base_nll) / n) - 1,
        "nll_standard_error": error,
        "kl": sums.kl / n,
        "top1_agreement": sums.same_top / n,
    }
