"""Tuning a drafter to a target as it is served: measure, write, train, select, compare, export.

Every stage leaves its result in a directory beside the output, so a run that was killed goes on. It
is removed when the run has ended; the output appears only if the new drafter is better. Here: the
order and the decisions. Not here: the objective (tuning.py), the comparison (gate.py).
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import PairingError, TrainingError
from outdraft.request import SamplingParams
from outdraft.speculate.stats import DraftStats
from outdraft.train import native_tune
from outdraft.train.checkpoint import CheckpointStore, fingerprint, replace_json
from outdraft.train.export import export_like
from outdraft.train.first import write_first
from outdraft.train.gate import difference, in_words, is_better, summed, tokens_per_pass
from outdraft.train.optimiser import OptimiserConfig
from outdraft.train.plot import plot_tuning
from outdraft.train.presets import DRAFT_DEFAULT
from outdraft.train.rollouts import TEMPERATURES
from outdraft.train.run import PLOT_NAME, REPORT_NAME
from outdraft.train.select import complete
from outdraft.train.served import assistant_leaves, check_target, served_target
from outdraft.train.stitch import make_whole
from outdraft.train.trainer import (
    Objective,
    Phase,
    Progress,
    Report,
    StopFlag,
    run_phase,
    seconds_per_step,
)
from outdraft.train.tune_settings import LEAST_HELDOUT, TuneSettings, data_digest
from outdraft.train.tuning import Texts, Tuning
from outdraft.train.tuning_data import (
    Prompt,
    by_hash,
    read_passages,
    read_prompts,
    split_by_hash,
)
from outdraft.train.weights import make_trainable
from outdraft.train.work import decided_dtype, keep_decided, open_work, work_beside
from outdraft.weights.find import find_assistant, resolve_model

ENOUGH = 0.9
"""Share of all drafts accepted from which on there is nothing to gain."""

BATCH = 12
CANDIDATES = 3
FIRST_NAME = "first"
_WRITING_SHARE = 0.3  # of the time left when it begins
_NEW_WRITING_SHARE = 0.15  # text of the data is there beside
_LEAD_SHARE = 0.6  # of the steps: a new drafter's on text of the data
_OPTIMISER = OptimiserConfig(muon_lr=0.005, adam_lr=5e-4)
_NEW_OPTIMISER = OptimiserConfig(muon_lr=0.02, adam_lr=4e-3)
_TRAINING_SHARE = 0.8  # the rest is for selection
_CHUNK = 32  # prompts continued at once
_FROZEN = ("layer_scalar", "token_ordering", "centroids.weight")


class NothingGained(Exception):
    """There was nothing to gain, or nothing was gained; nothing was written. Says why."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """To learn from, to select by, and to compare by; no two of them share a prompt."""

    train: list[Prompt]
    select: list[Prompt]
    compare: list[Prompt]


class Tune:
    """One run: its settings, its directory of work, and what was decided once."""

    def __init__(
        self, out: Path, settings: TuneSettings, report: Report, stop: StopFlag, *, fresh: bool
    ) -> None:
        self.out, self.settings, self.report, self.stop = out, settings, report, stop
        self.work = work_beside(out, "tuning")
        self.start = time.monotonic()
        self.target = resolve_model(settings.target)
        check_target(self.target)
        self.native = native_tune.has_own_head(self.target)
        self.stock = self._find_stock()
        wanted = asdict(settings) | {"digest": data_digest(settings)}
        self.decided = open_work(self.work, wanted, fresh=fresh)
        self.dtype = decided_dtype(self.decided)

    def _find_stock(self) -> Path:
        """The drafter to start from; a new one will be in the directory of work."""
        if self.native:
            return native_tune.find_own_head(self.target, self.settings.assistant)
        if self.settings.new:
            return self.work / FIRST_NAME
        choice = find_assistant(self.target, self.settings.assistant)
        if choice.path is None:
            raise PairingError(
                f"no drafter to start from: {choice.reason}",
                "give --assistant, its directory or new",
            )
        return choice.path

    def engine(self, assistant: Path | None, n: int | None = None) -> LLM:
        """The target as it is served, with a drafter and a fixed draft length, or plainly."""
        config = EngineConfig(
            adapter=self.settings.adapter, quant=self.settings.quant, device="cpu"
        )
        if assistant is None:
            config = replace(config, spec_type="off", max_sequences=_CHUNK)
        elif self.native:
            return native_tune.head_engine(assistant, config, n or DRAFT_DEFAULT)
        else:
            config = replace(config, assistant=str(assistant), draft_n=n or DRAFT_DEFAULT)
        return LLM(str(self.target), config)

    def read(self, llm: LLM) -> Prompts:
        """The data, split."""
        settings = self.settings
        vocab, n = llm.target.config.vocab_size, settings.prompt_tokens
        given, bad = read_prompts(map(Path, settings.data), llm, vocab, n)
        if settings.heldout:
            heldout, worse = read_prompts(map(Path, settings.heldout), llm, vocab, n)
            bad += worse
            heldout = by_hash(heldout)[: settings.n_heldout]
            train = sorted(set(given) - set(heldout))
        else:
            train, heldout = split_by_hash(given, settings.n_heldout)
        if len(heldout) < 2 * LEAST_HELDOUT:
            raise TrainingError(
                f"{len(heldout)} different prompts are held out, too few to compare by",
                f"give more data: {2 * LEAST_HELDOUT} held out are needed, a fifth of --data",
            )
        self.decided["bad_rows"] = bad[:20]
        order = torch.randperm(
            len(train), generator=torch.Generator().manual_seed(settings.seed)
        ).tolist()
        return Prompts([train[i] for i in order], heldout[0::2], heldout[1::2])

    def passages(self, llm: LLM, prompts: Prompts) -> list[Prompt]:
        """Text of the data for a new drafter to begin with."""
        settings = self.settings
        lengths = settings.prompt_tokens, settings.prompt_tokens + settings.new_tokens
        heldout = {*prompts.select, *prompts.compare}
        vocab = llm.target.config.vocab_size
        found = read_passages(map(Path, settings.data), llm, vocab, lengths, heldout)
        order = torch.randperm(
            len(found), generator=torch.Generator().manual_seed(settings.seed)
        ).tolist()
        return [found[i] for i in order]

    def measure(self, llm: LLM, prompts: Sequence[Prompt]) -> list[DraftStats]:
        """Free greedy decoding of each prompt: what drafting came to."""
        params = SamplingParams(max_tokens=self.settings.new_tokens)
        return [done.stats for done in complete(llm, prompts, params)]

    def write(self, llm: LLM, prompts: Sequence[Prompt]) -> None:
        """Let the served target continue prompts, in parts that are kept, until time is up."""
        began = time.monotonic()
        share = _NEW_WRITING_SHARE if self.settings.new else _WRITING_SHARE
        budget = share * (60 * self.settings.minutes - (began - self.start))
        wanted = self.settings.samples
        parts: list[Any] = self.decided.setdefault("texts", [])
        total = wanted or max(len(prompts), _CHUNK)
        while not self.decided.get("written"):
            self.stop.check()
            n = sum(map(len, parts))
            self.report(Progress("writing", min(n, total), total))
            over = wanted is None and n and time.monotonic() - began > budget
            if over or n >= (wanted or 4 * len(prompts)):
                self.decided["written"] = True
            else:
                size = min(_CHUNK, (wanted or n + _CHUNK) - n)
                parts.append(self._continue(llm, prompts, n, size))
            self._decide()
        self.report(Progress("writing", total, total))

    def _continue(
        self, llm: LLM, prompts: Sequence[Prompt], first: int, size: int
    ) -> list[tuple[list[int], int]]:
        chosen = [prompts[i % len(prompts)] for i in range(first, first + size)]
        params = [
            SamplingParams(
                max_tokens=self.settings.new_tokens,
                temperature=TEMPERATURES[(first + i) % len(TEMPERATURES)],
                seed=self.settings.seed + first + i,
            )
            for i in range(size)
        ]
        done = complete(llm, chosen, params)
        return [([*one.prompt_tokens, *one.tokens], len(one.prompt_tokens)) for one in done]

    def train(self, n_draft: int, passages: Sequence[Prompt]) -> Phase:
        """Fine-tune from the stock weights; checkpoints are the candidates.

        A new drafter reads `passages` of the data first, then what the target wrote.
        """
        texts = [(t, g) for part in self.decided["texts"] for t, g in part if len(t) - g > n_draft]
        if not texts:
            raise TrainingError(
                "the target ends all its answers after a few tokens", "give other prompts"
            )
        engine = EngineConfig(
            adapter=self.settings.adapter, quant=self.settings.quant, device="cpu"
        )
        if self.native:
            return self._run(
                native_tune.head_objective(
                    self.target, engine, texts, BATCH, n_draft, self.settings, self.dtype
                )
            )
        target = served_target(self.target, engine)
        if self.settings.new and not self.stock.exists():
            write_first(self.stock, target, self.target, passages, n_draft)
        config, stock = assistant_leaves(self.stock)
        lead = Texts.of([(p, 1) for p in passages if len(p) > n_draft + 1] or texts)

        def objective() -> Tuning:
            n_lead = int(_LEAD_SHARE * self.decided.get("steps", 0)) if self.settings.new else 0
            weights = make_trainable(
                {k: v for k, v in stock.items() if v.is_floating_point()}, torch.device("cpu")
            )
            for name, weight in weights.items():
                weight.requires_grad_(not name.endswith(_FROZEN))
            weights |= {k: v for k, v in stock.items() if not v.is_floating_point()}
            return Tuning(
                target,
                config,
                weights,
                Texts.of(texts),
                batch=BATCH,
                n_steps=n_draft,
                loss=self.settings.loss,
                seed=self.settings.seed,
                dtype=self.dtype,
                lead=(lead, n_lead),
            )

        return self._run(objective)

    def _run(self, objective: Callable[[], Objective]) -> Phase:
        """Train what `objective` makes for as many steps as were asked for, or as fit."""
        if "steps" not in self.decided:
            steps = self.settings.steps
            if steps is None:
                left = 60 * self.settings.minutes - (time.monotonic() - self.start)
                each = seconds_per_step(objective(), self.phase(1000))
                steps = max(10, int(_TRAINING_SHARE * left / each))
            self.decided["steps"] = steps
            self._decide()
        phase = self.phase(self.decided["steps"])
        run_phase(phase, objective(), self.report, self.stop)
        return phase

    def phase(self, n_steps: int) -> Phase:
        """The training with this many steps."""
        every = max(1, n_steps // CANDIDATES)
        known = {"settings": self.decided["settings"], "n_steps": n_steps}
        store = CheckpointStore(self.work / "phase", fingerprint(known), every)
        optimiser = _NEW_OPTIMISER if self.settings.new else _OPTIMISER
        save_every = max(1, every // 5)
        store = replace(store, keep_every=save_every * max(1, every // save_every))
        return Phase("training", n_steps, save_every, store, optimiser, self.dtype)

    def export(self, phase: Phase, step: int) -> Path:
        """A candidate as a directory that the engine loads."""
        path = self.work / f"step-{step:08d}"
        if not path.exists() and self.native:
            native_tune.export_head(path, self.target, phase.store.load(step))
        elif not path.exists():
            _, stock = assistant_leaves(self.stock)
            stored = phase.store.load(step)
            export_like(path, self.stock, {k: stored.get(k, v) for k, v in stock.items()})
        return path

    def _decide(self) -> None:
        keep_decided(self.work, self.decided)


def tune(
    out: Path, settings: TuneSettings, report: Report, *, fresh: bool = False
) -> dict[str, Any]:
    """Make a drafter for a target in `out`, if it is better than the stock one.

    Returns:
        The contents of report.json.

    Raises:
        NothingGained: the stock drafter is good enough, or the new one is not better; there is no
            `out`.
        TrainingStopped: SIGINT or SIGTERM arrived; the same call goes on from there.
        TrainingError: settings, data or directory cannot be used, or the disk is full.
    """
    with StopFlag().installed() as stop:
        run = Tune(out, settings, report, stop, fresh=fresh)
        try:
            result = _stages(run)
        except NothingGained:
            shutil.rmtree(run.work)
            raise
        shutil.rmtree(run.work)
        return result


def _stages(run: Tune) -> dict[str, Any]:
    settings = run.settings
    llm = run.engine(None if settings.new else run.stock, settings.draft_n)
    n_draft = settings.draft_n or llm.pairing.n_draft_max or DRAFT_DEFAULT
    prompts = run.read(llm)
    run.report(Progress("measuring", 0, 1))
    if settings.new:  # without a drafter a pass gives one token
        before = [DraftStats(n_passes=1, n_emitted=1) for _ in prompts.compare]
    else:
        before = run.measure(llm, prompts.compare)
    stock = tokens_per_pass(before)
    run.report(Progress("measuring", 1, 1))
    if stock.tokens_per_pass - 1 >= ENOUGH * n_draft and not settings.force:
        raise NothingGained(
            f"nothing to gain: {in_words(stock)} tokens per pass of at most {n_draft + 1}"
        )
    passages = run.passages(llm, prompts) if settings.new else []
    run.write(llm, prompts.train)
    del llm
    phase = run.train(n_draft, passages)
    scores = {}
    steps = phase.store.kept_steps()
    for index, step in enumerate(steps):
        run.stop.check()
        run.report(Progress("selecting", index, len(steps)))
        with run.engine(run.export(phase, step), n_draft) as candidate:
            found = tokens_per_pass(run.measure(candidate, prompts.select))
        scores[step] = found.tokens_per_pass
    run.report(Progress("selecting", len(steps), len(steps)))
    best = run.export(phase, max(scores, key=lambda step: (scores[step], step)))
    with run.engine(best, n_draft) as candidate:
        after = run.measure(candidate, prompts.compare)
    tuned, change = tokens_per_pass(after), difference(after, before)
    if not is_better(change):
        raise NothingGained(
            f"the new drafter is not better outside the noise: {in_words(tuned)} tokens per pass, "
            f"{in_words(stock)} before, a difference of {in_words(change)}"
        )
    report = {
        "settings": run.decided["settings"],
        "bad_rows": run.decided["bad_rows"],
        "prompts": {"train": len(prompts.train), "compare": len(prompts.compare)},
        "texts": sum(map(len, run.decided["texts"])),
        "steps": run.decided["steps"],
        "candidates": {str(step): score for step, score in scores.items()},
        "draft_length": n_draft,
        "before": asdict(stock) | {"by_position": summed(before).acceptance_by_position},
        "after": asdict(tuned) | {"by_position": summed(after).acceptance_by_position},
        "change": asdict(change),
        "seconds": time.monotonic() - run.start,
    }
    make_whole(best)
    plot_tuning(
        best / PLOT_NAME,
        report["before"]["by_position"],  # type: ignore[index]
        report["after"]["by_position"],  # type: ignore[index]
    )
    replace_json(best / REPORT_NAME, report)
    best.rename(run.out)
    return report
