"""The losslessness ladder on a user's model and machine: each rung is one way to change a token.

Here: the rungs, from the target's passes up to what is sampled, and their report. Not here: the
options and the table (cli/verify.py), running and
comparing requests (verify_runs.py), and the theory of the distribution rung (speculate/proof.py).

Greedy rungs compare tokens and the logits behind them, every bit. The length of drafts is fixed in
all rungs, so that each length is seen. A rung that the model cannot be put to is skipped: `passed`
is None and the detail begins with `skipped:`.

Shapes: T rows, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from outdraft.bench import verify_sampling
from outdraft.bench.prompts import HELDOUT, choose_prompts, read_sources
from outdraft.bench.verify_runs import (
    N_NEW,
    Broken,
    Ladder,
    compare,
    emit,
    fixed_drafts,
    forget_prefixes,
    plain,
)
from outdraft.cache.memory import Span
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.ops.base import PAGE_SLOTS
from outdraft.request import SamplingParams
from outdraft.speculate.compose import NgramFirst
from outdraft.speculate.drafter import Drafter
from outdraft.speculate.ngram import NgramDrafter

CTX_SIZE = 1024  # past the sliding window of most models
MAX_SEQUENCES = 8
MAX_ROWS = 9
CHUNKS = (1, 37)  # prompt rows a step, beside whole prompts
SAMPLED_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Rung:
    """One check. `passed` is None if it was skipped."""

    name: str
    passed: bool | None
    detail: str


def config_for(config: EngineConfig) -> EngineConfig:
    """The user's configuration with a memory that the rungs can fill."""
    return replace(
        config,
        ctx_size=min(CTX_SIZE, config.ctx_size or CTX_SIZE),
        kv_cache_tokens=1,  # as little as holds one sequence
        max_sequences=MAX_SEQUENCES,
        prefix_cache=True,
    )


def verify_model(
    llm: LLM, progress: Callable[[str], None] = lambda _name: None, *, n_prompts: int = 2
) -> dict[str, Any]:
    """Climb the ladder. `llm` is loaded with `config_for`; a failing rung does not end the climb.

    Args:
        progress: called with each rung's name and what it does, before it.
        n_prompts: of each kind (bench/prompts.py).

    Returns:
        `passed`, `rungs` of `{name, passed, detail}`, `worst_margin` (None if no token was seen).
    """
    sources = read_sources(HELDOUT)
    most = max(2, llm.ctx_size // 4)
    chosen = choose_prompts(sources, n_prompts, llm.encode, seed=0)
    text = "".join("".join(source.lines) for source in sources[:4])
    long = list(llm.encode(text))
    ladder = Ladder(llm, [list(p.tokens[:most]) for p in chosen] or [long[:most]], long, {})
    rungs = []
    for name, (what, check) in RUNGS.items():
        progress(f"{name}: {what}")
        rungs.append(climb(ladder, name, check))
    margin = ladder.worst_margin
    return {
        "passed": all(rung.passed is not False for rung in rungs),
        "rungs": [{"name": r.name, "passed": r.passed, "detail": r.detail} for r in rungs],
        "worst_margin": margin if margin != float("inf") else None,
    }


def climb(ladder: Ladder, name: str, check: Callable[[Ladder], str]) -> Rung:
    """Run one rung; whatever it raises is its failure. The engine is idle afterwards."""
    try:
        with fixed_drafts(ladder.llm, [0]):
            detail = check(ladder)
        ladder.llm.check()
    except Broken as broken:
        return Rung(name, False, str(broken))
    except Exception as error:  # a crash in one rung must not hide the others
        return Rung(name, False, f"{type(error).__name__}: {error}")
    finally:
        ladder.llm.runner.logits_log = None
        ladder.llm.__exit__()
    return Rung(name, None if detail.startswith("skipped:") else True, detail)


def no_drafter(ladder: Ladder) -> str:
    """Why there is nothing to draft with."""
    return f"skipped: {ladder.llm.pairing.reason}"


# The rungs.


@torch.inference_mode()
def check_rows(ladder: Ladder) -> str:
    """Logits of 1 to 9 rows in one call against the same rows one call each."""
    tokens = (ladder.prompts[0] * MAX_ROWS)[: 16 + MAX_ROWS]
    head, rows = tokens[:16], tokens[16:]
    forget_prefixes(ladder.llm)
    one_by_one = row_logits(ladder.llm, head, [[token] for token in rows])
    for n in range(1, MAX_ROWS + 1):
        together = row_logits(ladder.llm, head, [rows[:n]])
        for i in range(n):
            if not torch.equal(together[i], one_by_one[i]):
                off = float((together[i] - one_by_one[i]).abs().max())
                raise Broken(f"row {i + 1} of a call of {n} rows is {off:.2g} off")
    n_logits = one_by_one.shape[1]
    return f"calls of 1 to {MAX_ROWS} rows: all {n_logits} logits of each row equal bit for bit"


def row_logits(llm: LLM, head: list[int], calls: list[list[int]]) -> Tensor:
    """Logits [T, V] of all rows of these calls, one after another behind `head`."""
    name, memory, found = "verify", llm.memory, []
    memory.open(name)
    try:
        length = 0
        for tokens in [head, *calls]:
            memory.reserve(name, len(tokens))
            span = Span(name, 0, len(tokens))
            done = llm.runner.target_pass.run(tokens, [span], list(range(len(tokens))))
            if length:
                found.append(done.logits_RV.clone())
            memory.advance(name, len(tokens))
            length += len(tokens)
        return torch.cat(found)
    finally:
        memory.close(name)


def check_greedy(ladder: Ladder) -> str:
    """Every draft length against plain decoding, one request at a time."""
    if not ladder.lengths:
        return no_drafter(ladder)
    for k in ladder.lengths:
        for i, prompt in enumerate(ladder.prompts):
            compare(
                emit(ladder, [prompt], [k])[0], plain(ladder, prompt), f"prompt {i}, {k} drafts"
            )
    tried = f"{ladder.lengths[0]} to {ladder.longest} drafts"
    return f"{len(ladder.prompts)} prompts, {N_NEW} tokens each, {tried}"


def check_drafters(ladder: Ladder) -> str:
    """Drafts from the text itself, alone and before the model's, against plain decoding."""
    if not ladder.lengths:
        return no_drafter(ladder)
    llm, own = ladder.llm, ladder.llm.runner.drafter
    assert own is not None
    prompts = [ladder.cut(24) * 3, ladder.prompts[0]]
    want = [plain(ladder, prompt) for prompt in prompts]
    tried: dict[str, int] = {}
    anything = NgramDrafter(min_match=1)  # drafts behind every token that was there before
    several: list[Drafter] = [anything]
    if not isinstance(own, (NgramDrafter, NgramFirst)):
        several.append(NgramFirst(NgramDrafter(min_match=1), own))
    for drafter in several:
        before = llm.stats().drafts.n_drafted
        llm.runner.drafter = drafter
        try:
            for i, got in enumerate(emit(ladder, prompts, [ladder.longest])):
                compare(got, want[i], f"prompt {i}, drafts by {drafter.name}")
        finally:
            llm.runner.drafter = own
        tried[drafter.name] = llm.stats().drafts.n_drafted - before
        if not tried[drafter.name]:
            raise Broken(f"{drafter.name} drafted nothing, so nothing was shown")
    return ", ".join(f"{name}: {n} drafts" for name, n in tried.items())


def check_batch(ladder: Ladder) -> str:
    """Mixed prompts together, drafts of no, of one, and of mixed lengths, against each alone."""
    batch = [
        *ladder.prompts,
        ladder.prompts[0][:1],
        ladder.cut(9),
        ladder.cut(ladder.llm.ctx_size // 4),
    ]
    longest = ladder.longest
    several = [[0], [longest], [*range(longest + 1)]] if longest else [[0]]
    for lengths in several:
        for i, got in enumerate(emit(ladder, batch, lengths)):
            compare(got, plain(ladder, batch[i]), f"prompt {i} of {len(batch)}, drafts {lengths}")
    sizes = [len(prompt) for prompt in batch]
    drafts = f"0, {longest} and mixed drafts" if longest else "no drafter"
    return f"{len(batch)} prompts of {min(sizes)} to {max(sizes)} tokens at once, {drafts}"


def check_chunks(ladder: Ladder) -> str:
    """A long prompt computed in parts against one that is computed in as few as possible."""
    llm = ladder.llm
    prompts = [ladder.cut(llm.ctx_size // 2), ladder.prompts[0]]
    want = [plain(ladder, prompt) for prompt in prompts]
    before = llm.scheduler.prefill_chunk
    try:
        for chunk in CHUNKS:
            llm.scheduler.prefill_chunk = chunk
            some = prompts if chunk > 1 else prompts[1:]  # row by row only the short one
            for got, right in zip(
                emit(ladder, some, [ladder.longest]), want[-len(some) :], strict=True
            ):
                compare(got, right, f"prompt in chunks of {chunk}")
    finally:
        llm.scheduler.prefill_chunk = before
    return (
        f"prompts of {len(prompts[0])} and {len(prompts[1])} tokens in chunks of {CHUNKS[1]} and 1"
    )


def check_prefix(ladder: Ladder) -> str:
    """A prompt whose beginning is cached against the same one computed whole."""
    size = ladder.llm.ctx_size // 2
    first = ladder.cut(size)
    second = [*first[: size * 9 // 10], *ladder.cut(size, 3)[1 : 1 + size // 10]]
    want = plain(ladder, second)
    for k in dict.fromkeys([0, ladder.longest]):
        emit(ladder, [first], [k])
        got = emit(ladder, [second], [k], cold=False)[0]
        if got.n_cached == 0:
            raise Broken(f"{k} drafts: nothing came from the cache")
        compare(got, want, f"behind a cached prefix, {k} drafts")
        n_cached = got.n_cached
    return f"{n_cached} of {len(second)} prompt tokens came from the cache"


def check_preemption(ladder: Ladder) -> str:
    """Requests that do not fit together, so that some lose their memory and compute it again."""
    scheduler = ladder.llm.scheduler
    n_pages = max(group.pool.n_pages for group in ladder.llm.memory.groups.values())
    size = max(2, n_pages // 4 * PAGE_SLOTS - N_NEW // 2)  # each grows into one page more
    prompts = [ladder.cut(size, which) for which in range(4)]
    want = [plain(ladder, prompt) for prompt in prompts]
    before, n_before = scheduler.horizon_tokens, scheduler.stats.n_preempted
    scheduler.horizon_tokens = 1  # admitted without room to grow
    try:
        for k in dict.fromkeys([0, ladder.longest]):
            for i, got in enumerate(emit(ladder, prompts, [k])):
                compare(got, want[i], f"request {i} of {len(prompts)} short of memory, {k} drafts")
    finally:
        scheduler.horizon_tokens = before
    n = scheduler.stats.n_preempted - n_before
    if n == 0:
        raise Broken("nothing was preempted, so nothing was shown")
    return f"{len(prompts)} requests of {size} tokens in {n_pages} pages: preempted {n} times"


def check_seeded(ladder: Ladder) -> str:
    """Sampling with a seed: the same in a batch as alone, with and without drafts."""
    llm = ladder.llm
    params = [
        SamplingParams(temperature=0.9, seed=seed, max_tokens=SAMPLED_TOKENS, ignore_eos=True)
        for seed in range(len(ladder.prompts))
    ]
    own: list[list[int]] = []
    for point_mass in (False, True):
        with verify_sampling.point_mass_drafts(llm.pairing.drafter, point_mass):
            for k in dict.fromkeys([0, ladder.longest]):
                with fixed_drafts(llm, [k]):
                    alone = [
                        llm.generate(p, q).tokens
                        for p, q in zip(ladder.prompts, params, strict=True)
                    ]
                    together = [c.tokens for c in llm.generate_all(ladder.prompts, params)]
                if together != alone:
                    raise Broken(
                        f"{k} drafts: a batch samples other tokens than each request alone"
                    )
                own = own or alone  # plain decoding comes first
                if point_mass and alone != own:
                    raise Broken(
                        f"{k} argmax drafts: other tokens than plain decoding with the seed"
                    )
    drafts = "argmax drafts give plain decoding's tokens" if ladder.longest else "no drafter"
    return f"{len(params)} seeds, the same alone and in a batch; {drafts}"


def check_distribution(ladder: Ladder) -> str:
    """The rule by enumeration, and then the model's own samples by chi-square."""
    rule = verify_sampling.check_rule()
    if rule.problem is not None:
        raise Broken(rule.problem)
    with fixed_drafts(ladder.llm, [ladder.longest]):
        forget_prefixes(ladder.llm)
        sampled = verify_sampling.check_samples(ladder.llm, ladder.prompts[-1])
    if sampled.problem is not None:
        raise Broken(sampled.problem)
    return f"{rule.detail}; {sampled.detail}"


RUNGS: dict[str, tuple[str, Callable[[Ladder], str]]] = {
    "rows": ("1 to 9 rows in one pass against one by one", check_rows),
    "greedy": ("every draft length against plain decoding", check_greedy),
    "drafters": ("drafts from the text itself against plain decoding", check_drafters),
    "batch": ("mixed prompts at once against each alone", check_batch),
    "chunks": ("prompts in parts against whole ones", check_chunks),
    "prefix": ("a cached prefix against a computed one", check_prefix),
    "preemption": ("requests short of memory against each alone", check_preemption),
    "seeded": ("seeded sampling, alone and in a batch", check_seeded),
    "distribution": ("what is sampled against the target's distribution", check_distribution),
}
