"""JSON-schema requests at temperature 1: are all valid, and what drafting gains.

Every mode answers the same requests (prompts, seeds); modes take turns in rounds. Without a seed of
the user's, drafts are drawn (--unseeded). The exit code is 1 if any answer is not valid.

    python scripts/grammar_bench.py demo --requests 1000 --concurrency 16
"""

import argparse
import json
import statistics
import sys
import time

from outdraft.bench.prompts import HELDOUT, choose_prompts, read_sources
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM, Completion
from outdraft.request import FinishReason, SamplingParams
from outdraft.speculate.stats import DraftStats, StepTimes

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "colour", "tags", "active"],
    "additionalProperties": False,
}


def valid(completion: Completion) -> bool:
    """Whether a text is JSON of the schema, checked by hand."""
    if completion.finish_reason is not FinishReason.STOP:
        return False
    value = json.loads(completion.text)
    return (
        list(value) == list(SCHEMA["properties"])
        and len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and value["colour"] in ("red", "green", "blue")
        and len(value["tags"]) <= 3
        and all(len(tag) <= 6 for tag in value["tags"])
        and type(value["active"]) is bool
    )


def main() -> None:
    """Run the modes and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--quant", default="w8")
    parser.add_argument("--modes", default="0,4,auto")
    parser.add_argument("--unseeded", action="store_true")
    asked = parser.parse_args()
    config = EngineConfig(quant=asked.quant, max_sequences=asked.concurrency, max_queue=2**20)
    llm = LLM(asked.model, config)
    prompts = [p.tokens for p in choose_prompts(read_sources(HELDOUT), 4, llm.encode, seed=0)]
    params = [
        SamplingParams(
            temperature=1.0,
            seed=None if asked.unseeded else i,
            json_schema=SCHEMA,
            max_tokens=asked.max_tokens,
        )
        for i in range(asked.requests)
    ]
    chosen = [prompts[i % len(prompts)] for i in range(asked.requests)]
    rates: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    n_invalid = 0
    for round_ in range(asked.rounds + 1):
        for mode in asked.modes.split(","):
            if mode == "auto":
                llm.set_draft_auto()
            else:
                llm.set_draft_n_max(int(mode))
            n = asked.requests if round_ else 2 * asked.concurrency  # the first round warms up
            start = time.perf_counter()
            done = llm.generate_all(chosen[:n], params[:n])
            seconds = time.perf_counter() - start
            if not round_:
                continue
            n_tokens = sum(len(c.tokens) for c in done)
            bad = [c for c in done if not valid(c)]
            n_invalid += len(bad)
            rates.setdefault(mode, []).append(n_tokens / seconds)
            texts[mode] = [c.text for c in done]
            stats, times = DraftStats(), StepTimes()
            for c in done:
                stats.merge(c.stats)
                times.draft_s += c.times.draft_s
                times.forward_s += c.times.forward_s
                times.rest_s += c.times.rest_s
            parts = [round(x / times.total_s, 2) for x in (times.draft_s, times.forward_s)]
            print(
                f"round {round_} {mode:>4}: {n} requests, {len(bad)} not valid, "
                f"{n_tokens / n:.1f} tokens each, {n_tokens / seconds:.0f} tokens/s, "
                f"{stats.tokens_per_pass:.2f} a pass, {stats.n_accepted} of {stats.n_drafted} "
                f"drafts, {stats.n_forced_accepted} of {stats.n_forced} forced, "
                f"draft and pass take {parts} of the time"
            )
            for c in bad[:3]:
                print("  not valid:", c.finish_reason, repr(c.text[:200]))
    medians = {mode: statistics.median(r) for mode, r in rates.items()}
    base = medians.get("0", max(medians.values()))
    for mode, rate in medians.items():
        same = sum(a == b for a, b in zip(texts[mode], texts.get("0", texts[mode]), strict=True))
        print(f"{mode:>4}: {rate:.0f} tokens/s, {rate / base:.2f} x plain, {same} texts as plain")
    sys.exit(n_invalid > 0)


if __name__ == "__main__":
    main()
