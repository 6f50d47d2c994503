"""What drafting gives at an acceptance that is put in, from costs that were measured."""

from collections.abc import Sequence as Seq
from itertools import accumulate
from operator import mul


def forecast(
    acceptance: Seq[float], plain_s: float, pass_s: dict[int, float], draft_s: float,
    steps: dict[int, float] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Speed at every draft length, from measured costs and a given conditional acceptance.

    A step of k drafts takes k draft steps, a pass of k + 1 rows and what the engine does beside
    it, and gives one token and the drafts accepted with all before them: 1 + a1 + a1 a2 + ...

    Args:
        plain_s: a step of plain decoding; pass_s: number of rows -> a pass.
        draft_s: a draft step.
        steps: number of drafts -> a whole step of the engine, where it was measured as one.
    """
    found = []
    rest_s = max(0.0, plain_s - pass_s[1])
    for k, standing in enumerate(accumulate(accumulate(acceptance, mul)), start=1):
        if k + 1 not in pass_s:
            break
        tokens, seconds = 1 + standing, pass_s[k + 1] + k * draft_s + rest_s
        seconds = (steps or {}).get(k, seconds)
        found.append(
            {
                "k": k,
                "tokens_per_pass": tokens,
                "tok_s": tokens / seconds,
                "speedup": tokens / seconds * plain_s,
            }
        )
    return found
