"""What block verification gains: tokens per block of both rules for drawn drafts.

Every block of a sampled run is scored by both rules, on the same drafts: the expected number of
accepted drafts given the drafts, with the acceptance numbers integrated. So the difference has no
noise of its own.

    python scripts/block_gain.py demo --temperature 0.8 --drafts 4
"""

import argparse

import torch
from torch import Tensor

from outdraft.bench.prompts import HELDOUT, choose_prompts, read_sources
from outdraft.config import EngineConfig
from outdraft.engine import decide
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams
from outdraft.speculate.verify import Verdict, block_residual, block_shares


def expected_by_token(draft_ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> float:
    """Mean accepted drafts where each is tested by itself: at least i with prod min(1, p / q)."""
    index_K1 = draft_ids_K[:, None]
    ratio_K1 = p_RV[:-1].gather(-1, index_K1).double() / q_KV.gather(-1, index_K1).double()
    return float(ratio_K1.clamp(max=1).cumprod(0).sum())


def expected_by_block(draft_ids_K: Tensor, q_KV: Tensor, p_RV: Tensor) -> float:
    """Mean accepted drafts of `verify_block`: at least i unless all tests from i on fail."""
    shares = block_shares(draft_ids_K, q_KV, p_RV)
    n = draft_ids_K.shape[0]
    chances = [block_residual(shares[i], q_KV[i], p_RV[i])[1] for i in range(1, n)] + [shares[n]]
    none_later, total = 1.0, 0.0
    for chance in reversed(chances):
        none_later *= 1 - chance
        total += 1 - none_later
    return total


def main() -> None:
    """Run the prompts and print a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--max-tokens", type=int, default=128)
    asked = parser.parse_args()
    llm = LLM(asked.model, EngineConfig(draft_n=asked.drafts, quant="w8", max_sequences=1))
    means: list[tuple[float, float]] = []
    verify = decide.verify_block

    def scored(ids_K: Tensor, q_KV: Tensor | None, p_RV: Tensor, *numbers: list[float]) -> Verdict:
        if q_KV is not None and len(ids_K):
            means.append(
                (expected_by_token(ids_K, q_KV, p_RV), expected_by_block(ids_K, q_KV, p_RV))
            )
        return verify(ids_K, q_KV, p_RV, *numbers)

    decide.verify_block = scored
    prompts = choose_prompts(read_sources(HELDOUT), asked.prompts, llm.encode, seed=0)
    params = SamplingParams(
        asked.temperature, top_p=asked.top_p, max_tokens=asked.max_tokens, ignore_eos=True
    )
    for prompt in prompts:
        llm.generate(prompt.tokens, params)
    by_token, by_block = torch.tensor(means, dtype=torch.float64).T
    gain = by_block - by_token
    error = float(gain.std() / len(gain) ** 0.5)
    print(
        f"{asked.model} temperature {asked.temperature} top-p {asked.top_p} k {asked.drafts}: "
        f"{len(gain)} blocks, tokens a block {1 + by_token.mean():.3f} -> "
        f"{1 + by_block.mean():.3f}, gain {gain.mean():.4f} +- {error:.4f}, "
        f"smallest {gain.min():.2g}, largest {gain.max():.3f}"
    )


if __name__ == "__main__":
    main()
