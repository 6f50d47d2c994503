"""Whether drafting samples from the target's distribution: the rule, and the model's own samples.

Here: short checks for `outdraft verify`. Not here: the other rungs (verify.py), and the methods
(speculate/proof.py).

Shapes: V vocabulary, N samples, T tokens of a sample.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.bench.quality import log_probs
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams
from outdraft.sampling.logits import distribution
from outdraft.speculate import proof, verify
from outdraft.speculate.compose import NgramFirst
from outdraft.speculate.drafter import Drafter
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter

EXACT = 1e-9  # enumeration integrates numerically to about 1e-13
SIGNIFICANCE = 1e-4  # how often a right build would fail
N_SAMPLES = 400
N_TOKENS = 3
TOP_K = 3
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0)
MOST_OF_ONE = 0.4  # probability of a beginning
RULES = [SamplingParams(1.0), SamplingParams(0.8, top_p=0.85), SamplingParams(1.5, top_k=2)]


@dataclass(frozen=True, slots=True)
class Found:
    """What a check saw; `problem` is None if all is well."""

    detail: str
    problem: str | None = None


@contextmanager
def point_mass_drafts(drafter: Drafter | None, on: bool) -> Iterator[None]:
    """While the block runs, a model drafter takes its most probable token and draws nothing."""
    if isinstance(drafter, NgramFirst):
        drafter = drafter.other
    if not on or not isinstance(drafter, Gemma4AssistantDrafter):
        yield
        return
    before = drafter.sample_drafts
    drafter.sample_drafts = False
    try:
        yield
    finally:
        drafter.sample_drafts = before


def check_rule() -> Found:
    """Enumerate blocks of two drafts over three tokens, every random number integrated."""
    vocab, k, worst = 3, 2, 0.0
    target = proof.logits_table(vocab, 5)
    resembling = proof.mixed(target, proof.logits_table(vocab, 6), 0.5)
    for params in RULES:
        p, q = proof.table(target, params), proof.table(resembling, params)
        right = proof.continuation(p, (), vocab, k + 1)
        for name, drafts in (("drawn", proof.sampled_drafts), ("argmax", proof.argmax_drafts)):
            decoder = proof.Decoder(p, drafts(q), verify.verify_block)
            joint = proof.block_distribution(decoder, p, vocab, k)
            off = float((joint - right).abs().max())
            worst = max(worst, off)
            if off > EXACT:
                return Found("", f"{name} drafts: the rule's distribution is {off:.2g} off")
    return Found(f"rule within {worst:.0e} by enumeration")


def check_samples(llm: LLM, prompt: list[int]) -> Found:
    """Chi-square of sampled beginnings against what the target's logits say.

    The engine drafts as it is set. The first token comes behind the prompt, the others from
    verified blocks. The temperature is the lowest that spreads the samples.
    """
    for temperature in TEMPERATURES:  # a distribution that is one token could not show anything
        params = SamplingParams(temperature, top_k=TOP_K, max_tokens=N_TOKENS + 2, ignore_eos=True)
        expected = beginnings(llm, prompt, params)
        if max(expected.values()) < MOST_OF_ONE:
            break
    cells = {tokens: i for i, tokens in enumerate(expected)}
    observed = torch.zeros(len(cells), dtype=torch.float64)
    sequences = [llm.add(prompt, params) for _ in range(N_SAMPLES)]
    for seed, sequence in enumerate(sequences):  # repeatable, yet drawn as without a user's seed
        sequence.seed = seed
    while llm.scheduler.busy:
        llm.step()
    for sequence in sequences:
        begin = tuple(sequence.output[:N_TOKENS])
        if begin not in cells:
            return Found("", f"sampled {begin}, which top-{TOP_K} excludes ({sequence.error})")
        observed[cells[begin]] += 1
    means = torch.tensor(list(expected.values()), dtype=torch.float64) * N_SAMPLES
    p_value = proof.chi_square_p_value(observed, means)
    if p_value < SIGNIFICANCE:
        return Found(
            "", f"{N_SAMPLES} samples of {N_TOKENS} tokens: chi-square gives p = {p_value:.2g}"
        )
    return Found(
        f"{N_SAMPLES} samples at temperature {temperature:g}: chi-square p = {p_value:.2f}"
    )


def beginnings(llm: LLM, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every possible beginning of `N_TOKENS` tokens with its probability."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(N_TOKENS):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, share in found.items():
            p_V = next_distribution(llm, [*prompt, *tokens], params)
            for token in torch.nonzero(p_V).flatten().tolist():
                longer[(*tokens, token)] = share * float(p_V[token])
        found = longer
    return found


def next_distribution(llm: LLM, tokens: list[int], params: SamplingParams) -> Tensor:
    """fp64 [V], of what follows: log-probabilities are logits up to a constant."""
    rows_TV = log_probs(llm, [*tokens, tokens[-1]])  # the last one is not scored
    return distribution(rows_TV[-1:], params)[0]
