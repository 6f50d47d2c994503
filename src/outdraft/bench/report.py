"""From measurements to figures: rates, ratios with their spread, acceptance, where time goes.

Here: plain data in, plain data out, as it goes into the JSON. Not here: measuring (run.py), the
picture (chart.py), the table (cli/bench.py).
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from outdraft.bench.run import AUTO, DRAFT, PLAIN, Measurement, Run
from outdraft.errors import OutdraftError
from outdraft.speculate.stats import DraftStats, StepTimes

HEADLINE_KIND = "code"


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Figures of plain decoding against drafting in one mode (greedy or sampled).

    Returns:
        `kinds`: kind -> its figures; `overall`: those of all prompts; `identical`: whether drafting
        gave the tokens of plain decoding in every run (expected of greedy decoding only).
    """
    kinds = list(dict.fromkeys(run.kind for run in runs))
    return {
        "kinds": {kind: _figures([run for run in runs if run.kind == kind]) for kind in kinds},
        "overall": _figures(runs),
        "identical": identical(runs, PLAIN, DRAFT) and identical(runs, PLAIN, AUTO),
    }


def headline(greedy: dict[str, Any]) -> dict[str, Any]:
    """The few figures on top of the JSON: greedy decoding of code, or of the first kind there is.

    `of` says which they are.
    """
    kinds = greedy["kinds"]
    kind = HEADLINE_KIND if HEADLINE_KIND in kinds else next(iter(kinds))
    return {
        "of": f"greedy decoding, prompts of kind {kind}; identical: of all kinds",
        "identical": greedy["identical"],
        "speedup": kinds[kind]["speedup"],
        "tokens_per_pass": kinds[kind]["tokens_per_pass"],
    }


def compare_peer(runs: Sequence[Run], plain: str, drafting: Sequence[str]) -> dict[str, Any]:
    """Figures of a peer's arms, and ours over theirs, by kind and overall.

    `best` is the arm, plain included, that is fastest over all prompts; `assisted` the fastest of
    those that draft. Both by the median of runs: one run that the machine disturbs decides nothing.
    """
    kinds = list(dict.fromkeys(run.kind for run in runs))
    rates = {arm: _median_rate(_of(runs, arm)) for arm in (plain, *drafting)}
    assisted = max(drafting, key=lambda arm: rates[arm])
    best = max(rates, key=lambda arm: rates[arm])
    arms = plain, assisted, best
    parts = {kind: [run for run in runs if run.kind == kind] for kind in kinds}
    return {
        "assisted": assisted,
        "best": best,
        "arms": {arm: _arm_figures(runs, plain, arm) for arm in rates},
        "kinds": {kind: _peer_figures(part, *arms) for kind, part in parts.items()},
        "overall": _peer_figures(runs, *arms),
    }


def identical(runs: Iterable[Run], one: str, other: str) -> bool:
    """Whether two arms gave the same tokens in every run."""
    return all(a.tokens == b.tokens for a, b in _pairs(runs, one, other).values())


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    pairs = _pairs(runs, PLAIN, DRAFT)
    plain, draft = [a for a, _ in pairs.values()], [b for _, b in pairs.values()]
    stats, times, plain_times = DraftStats(), StepTimes(), StepTimes()
    for result in draft:
        stats.merge(result.stats)
        _add(times, result.times)
    for result in plain:
        _add(plain_times, result.times)
    ratio, spread = _ratio(runs, PLAIN, DRAFT)
    auto = [run.result for run in runs if run.arm == AUTO]
    chosen = {}
    if auto:
        auto_ratio, auto_spread = _ratio(runs, PLAIN, AUTO)
        chosen = {
            "auto_tok_s": _rate(auto),
            "auto_speedup": auto_ratio,
            "auto_speedup_spread": auto_spread,
        }
    return {
        "n_prompts": len({run.prompt for run in runs}),
        "plain_tok_s": _rate(plain),
        "draft_tok_s": _rate(draft),
        "plain_tok_s_with_prompt": _rate_with_prompt(plain),
        "draft_tok_s_with_prompt": _rate_with_prompt(draft),
        "speedup": ratio,
        "speedup_spread": spread,
        "tokens_per_pass": stats.tokens_per_pass,
        "acceptance": stats.acceptance_by_position,
        "acceptance_conditional": stats.conditional_acceptance,
        "time_share": {
            "draft": _share(times.draft_s, times.total_s),
            "verify": _share(times.forward_s, times.total_s),
            "rest": _share(times.rest_s, times.total_s),
        },
        **chosen,
        **_costs(draft, stats, times, plain, plain_times),
    }


def _costs(
    draft: Sequence[Measurement],
    stats: DraftStats,
    times: StepTimes,
    plain: Sequence[Measurement],
    plain_times: StepTimes,
) -> dict[str, float]:
    """What a draft step and a verifying pass cost, in passes of plain decoding."""
    n_plain = sum(result.stats.n_passes - 1 for result in plain)  # without the prompt's pass
    n_verify = sum(result.stats.n_passes - 1 for result in draft)
    plain_pass_s = _share(plain_times.forward_s, n_plain)
    return {
        "draft_step_cost": _share(_share(times.draft_s, stats.n_drafted), plain_pass_s),
        "verify_cost": _share(_share(times.forward_s, n_verify), plain_pass_s),
    }


def _arm_figures(runs: Sequence[Run], plain: str, arm: str) -> dict[str, Any]:
    """One of a peer's ways of decoding, over all prompts."""
    results = _of(runs, arm)
    ratio, spread = _ratio(runs, plain, arm)
    n_drafted = sum(result.stats.n_drafted for result in results)
    return {
        "tok_s": _rate(results),
        "median_tok_s": _median_rate(results),
        "tok_s_with_prompt": _rate_with_prompt(results),
        "speedup": ratio,
        "speedup_spread": spread,
        "equals_its_plain": _n_equal(runs, plain, arm),
        "equals_ours": _n_equal(runs, arm, PLAIN),
        "accepted": _share(sum(result.stats.n_accepted for result in results), n_drafted),
    }


def _peer_figures(runs: Sequence[Run], plain: str, assisted: str, best: str) -> dict[str, Any]:
    assisted_ratio, assisted_spread = _ratio(runs, plain, assisted)
    figures = {
        "plain_tok_s": _rate(_of(runs, plain)),
        "plain_median_tok_s": _median_rate(_of(runs, plain)),
        "assisted_tok_s": _rate(_of(runs, assisted)),
        "assisted_median_tok_s": _median_rate(_of(runs, assisted)),
        "assisted_speedup": assisted_ratio,
        "assisted_speedup_spread": assisted_spread,
        "assisted_equals_its_plain": _n_equal(runs, plain, assisted),
        "its_plain_equals_ours": _n_equal(runs, plain, PLAIN),
    }
    compared = {
        "ours_over_its_plain": (plain, PLAIN),
        "ours_drafting_over_its_assisted": (assisted, DRAFT),
        "ours_drafting_over_its_best": (best, DRAFT),
        "ours_auto_over_its_best": (best, AUTO),
    }
    for name, (theirs, ours) in compared.items():
        if _of(runs, ours):
            figures[name], figures[f"{name}_spread"] = _ratio(runs, theirs, ours)
    return figures


def _n_equal(runs: Sequence[Run], one: str, other: str) -> str:
    """In how many runs two arms gave the same tokens, in words."""
    same = [a.tokens == b.tokens for a, b in _pairs(runs, one, other).values()]
    return f"{sum(same)} of {len(same)}"


def _of(runs: Sequence[Run], arm: str) -> list[Measurement]:
    return [run.result for run in runs if run.arm == arm]


def _pairs(
    runs: Iterable[Run], one: str, other: str
) -> dict[tuple[int, int], tuple[Measurement, Measurement]]:
    """(prompt, repeat) -> results of two arms that ran next to each other."""
    by_arm: dict[str, dict[tuple[int, int], Measurement]] = {one: {}, other: {}}
    for run in runs:
        if run.arm in by_arm:
            by_arm[run.arm][run.prompt, run.repeat] = run.result
    if not by_arm[other]:  # that arm was not run
        return {}
    return {key: (result, by_arm[other][key]) for key, result in by_arm[one].items()}


def _ratio(runs: Sequence[Run], slow: str, fast: str) -> tuple[float, dict[str, float]]:
    """Speed of one arm over another's: the median over prompts, and how far it spreads.

    A prompt's ratio is the median of its repeats; `q1` and `q3` are quartiles over prompts, `min`
    and `max` are of single runs.
    """
    by_prompt: dict[int, list[float]] = {}
    for (prompt, _), (one, other) in _pairs(runs, slow, fast).items():
        by_prompt.setdefault(prompt, []).append(_share(other.decode_tok_s, one.decode_tok_s))
    ratios = [median(repeats) for repeats in by_prompt.values()]
    single = [ratio for repeats in by_prompt.values() for ratio in repeats]
    if len(ratios) > 1:
        q1, _, q3 = quantiles(ratios, n=4, method="inclusive")
    else:
        q1 = q3 = ratios[0]
    return median(ratios), {"q1": q1, "q3": q3, "min": min(single), "max": max(single)}


def _rate(results: Sequence[Measurement]) -> float:
    """Tokens per second of decoding, all runs together."""
    n_tokens = sum(len(result.tokens) - 1 for result in results)
    return _share(n_tokens, sum(result.decode_s for result in results))


def _median_rate(results: Sequence[Measurement]) -> float:
    return median(result.decode_tok_s for result in results)


def _rate_with_prompt(results: Sequence[Measurement]) -> float:
    n_tokens = sum(len(result.tokens) for result in results)
    return _share(n_tokens, sum(result.total_s for result in results))


def _add(total: StepTimes, times: StepTimes) -> None:
    total.draft_s += times.draft_s
    total.forward_s += times.forward_s
    total.rest_s += times.rest_s


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a report; the file is there whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file by renaming a finished one.

    Raises:
        OutdraftError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as unfinished:
            try:
                unfinished.write(content)
                unfinished.close()
                Path(unfinished.name).chmod(0o644)
                os.replace(unfinished.name, path)
            except OSError:
                Path(unfinished.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutdraftError(
            f"{path} cannot be written: {error.strerror}",
            "choose another place, or free some space",
        ) from error
