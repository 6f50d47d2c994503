"""Microseconds to form p and draw from it, by vocabulary and options, one thread.

Logits are those of a peaked distribution, as models give: normal scores plus a few large ones.

    python scripts/sampling_bench.py --repeat 200
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from outdraft.request import SamplingParams
from outdraft.sampling.logits import candidates, distribution
from outdraft.sampling.sampler import Purpose, sample, uniform

VOCABS = (4096, 32768, 262144)
OPTIONS = {
    "temperature": SamplingParams(0.8),
    "top-k 64": SamplingParams(0.8, top_k=64),
    "top-p 0.95": SamplingParams(0.8, top_p=0.95),
    "top-k 64, top-p 0.95": SamplingParams(1.0, top_k=64, top_p=0.95),
    "min-p 0.05": SamplingParams(0.8, min_p=0.05),
}


def median_us(call: Callable[[], object], repeat: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=100)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    number = median_us(lambda: uniform(7, 100, Purpose.TARGET), 1000)
    print(f"a random number: {number:.1f} us")
    for vocab in VOCABS:
        generator = torch.Generator().manual_seed(1)
        rows_RV = 2 * torch.randn(5, vocab, generator=generator)
        rows_RV[:, torch.randperm(vocab, generator=generator)[:100]] += 12
        rows_RV[:, 7] += 16
        for name, params in OPTIONS.items():

            def own(params: SamplingParams = params, row_V: torch.Tensor = rows_RV[0]) -> int:
                ids_C, probs_C = candidates(row_V, params)
                at = sample(probs_C, 0.37)
                return at if ids_C is None else int(ids_C[at])

            block = median_us(lambda p=params, x=rows_RV: distribution(x, p), repeat)
            print(
                f"{vocab:>7} {name:<22} one row and its token {median_us(own, repeat):8.0f} us, "
                f"p of five rows {block:8.0f} us"
            )


if __name__ == "__main__":
    main()
