"""Distilling a teacher into a student: its traces first, then the student's own answers.

Every stage leaves its result in a directory beside the output, so a run that was killed goes on; it
is removed at the end, and the output appears whole or not at all. Here: the order and what is
handed on. Not here: rows of conversations (traces.py), the objectives (distilling.py).
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import TrainingError
from outdraft.models import gemma4
from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.models.registry import open_weights
from outdraft.ops.batched import BatchedOps
from outdraft.request import SamplingParams
from outdraft.train.checkpoint import CheckpointStore, fingerprint, replace_json
from outdraft.train.distill_settings import (
    LEAST_HELDOUT,
    DistillSettings,
    check_pair,
    digest_of,
)
from outdraft.train.distilling import Answering, Following, Student, heldout_loss
from outdraft.train.export import export_like
from outdraft.train.optimiser import OptimiserConfig
from outdraft.train.plot import plot_losses
from outdraft.train.run import PLOT_NAME, REPORT_NAME
from outdraft.train.select import complete
from outdraft.train.served import served_target
from outdraft.train.traces import (
    Conversation,
    Trace,
    Writer,
    read_conversations,
    traces_of,
)
from outdraft.train.trainer import (
    Phase,
    Progress,
    Report,
    StopFlag,
    read_log,
    run_phase,
    seconds_per_step,
)
from outdraft.train.weights import make_trainable
from outdraft.train.work import decided_dtype, keep_decided, open_work, work_beside
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.find import resolve_model

HELDOUT_SHARE = 10  # at most one question in so many
LEAST_TRAIN = 16
_CPU = torch.device("cpu")
_CHUNK = 64  # questions answered at once
_SEQUENCE_SHARE = 0.6  # of the time for training, where answers of its own follow
_SPARE = 0.85  # of all time; the rest is for reading, measuring and writing
_WRITING = 0.3  # of a round of own answers, at most


class Distill:
    """One run: its settings, its directory of work, and what was decided once."""

    def __init__(
        self, out: Path, settings: DistillSettings, report: Report, stop: StopFlag, *, fresh: bool
    ) -> None:
        self.out, self.settings, self.report, self.stop = out, settings, report, stop
        self.work = work_beside(out, "distilling")
        self.start = time.monotonic()
        self.student = resolve_model(settings.student)
        self.teacher = resolve_model(settings.teacher) if settings.teacher else None
        self.writer = Writer.load(self.student)
        if self.teacher is not None:
            check_pair(self.teacher, self.student)
        self.config, self.weights = student_weights(self.student)
        wanted = asdict(settings) | {"digest": digest_of(settings)}
        self.decided = open_work(self.work, wanted, fresh=fresh, steps={}, written={})
        self.dtype = decided_dtype(self.decided)

    def decide(self) -> None:
        """Keep what was decided."""
        keep_decided(self.work, self.decided)

    def rows(self) -> tuple[list[Conversation], list[Conversation]]:
        """Conversations to learn from, and those held out; no question is in both."""
        settings = self.settings
        given, bad = read_conversations(map(Path, settings.data))
        if settings.heldout:
            heldout, worse = read_conversations(map(Path, settings.heldout))
            bad += worse
            heldout = sorted(heldout, key=lambda row: row.digest)[: settings.n_heldout]
            known = {row.digest for row in heldout}
            train = [row for row in given if row.digest not in known]
        else:
            digests = sorted({row.digest for row in given})
            n = min(settings.n_heldout, len(digests) // HELDOUT_SHARE)
            known = set(digests[:n])
            heldout = [row for row in given if row.digest in known]
            train = [row for row in given if row.digest not in known]
        if len(heldout) < LEAST_HELDOUT or len(train) < LEAST_TRAIN:
            raise TrainingError(
                f"{len(train)} conversations to learn from and {len(heldout)} held out are too few",
                f"give at least {LEAST_HELDOUT * HELDOUT_SHARE} different questions",
            )
        self.decided["bad_rows"] = bad[:20]
        return train, heldout

    def traces(self, rows: Sequence[Conversation], name: str) -> list[Trace]:
        """What is to be learned: answers of the data, or the teacher's."""
        settings = self.settings
        answered = [row for row in rows if row.has_answer]
        silent = [row for row in rows if not row.has_answer]
        if settings.traces == "teacher":
            answered, silent = [], list(rows)
        elif settings.traces == "data":
            silent = []
        if silent and self.teacher is None:
            raise TrainingError(
                f"{len(silent)} conversations have no answer, and there is no teacher",
                "give --teacher, or --traces data to pass over them",
            )
        traces, bad = traces_of(answered, self.writer, settings.max_tokens)
        self.decided["bad_rows"] = (self.decided["bad_rows"] + bad)[:20]
        if silent:
            assert self.teacher is not None
            traces += self.answers(self.teacher, silent, f"{name} traces", None)
        if not traces:
            why = bad[0] if bad else "no row has an answer"
            raise TrainingError(f"nothing can be learned from: {why}", "see docs/distilling.md")
        return traces

    def answers(
        self, model: Path, rows: Sequence[Conversation], name: str, seconds: float | None
    ) -> list[Trace]:
        """What `model` answers, as it is served, in parts that are kept, until time is up.

        Without a time it is greedy and complete; with one it is drawn at temperature 1.
        """
        parts: list[list[tuple[list[int], int]]] = self.decided["written"].setdefault(name, [])
        began = time.monotonic()
        todo = [p for row in rows if len(p := self.writer.prompt(row)) <= self.settings.max_tokens]
        if self.decided.get(f"done {name}"):
            todo = todo[: sum(map(len, parts))]
        with self.engine(model) as llm:
            while (n := sum(map(len, parts))) < len(todo):
                self.stop.check()
                self.report(Progress(name, n, len(todo)))
                over = seconds is not None and time.monotonic() - began > seconds
                if over and n >= self.settings.batch:
                    break
                parts.append(self._answer(llm, todo[n : n + _CHUNK], n, drawn=seconds is not None))
                self.decide()
        self.decided[f"done {name}"] = True
        self.decide()
        self.report(Progress(name, n, n))
        return [
            Trace(tuple(ids), (*[False] * given, *[True] * (len(ids) - given)))
            for part in parts
            for ids, given in part
            if len(ids) > given
        ]

    def engine(self, model: Path) -> LLM:
        """A model as it is served, drafting by itself from what is in the prompt."""
        config = EngineConfig(quant=self.settings.quant, device="cpu", spec_type="ngram")
        return LLM(str(model), config)

    def _answer(
        self, llm: LLM, prompts: Sequence[tuple[int, ...]], first: int, *, drawn: bool
    ) -> list[tuple[list[int], int]]:
        params = [
            SamplingParams(
                max_tokens=self.settings.new_tokens,
                temperature=1.0 if drawn else 0.0,
                seed=self.settings.seed + first + i,
            )
            for i in range(len(prompts))
        ]
        done = complete(llm, prompts, params)
        return [([*one.prompt_tokens, *one.tokens], len(one.prompt_tokens)) for one in done]

    def train(
        self, name: str, make: Any, seconds: float, source: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[float]]:
        """One stage from `source`: the weights after it, and its losses."""

        def objective() -> Student:
            found = make(make_trainable(source, _CPU))
            assert isinstance(found, Student)
            return found

        steps: dict[str, int] = self.decided["steps"]
        if name not in steps:
            n = self.settings.steps
            if n is None:
                each = seconds_per_step(objective(), self.phase(name, 1000))
                n = max(1, int(seconds / each))
            steps[name] = n
            self.decide()
        phase = self.phase(name, steps[name])
        trained = objective()
        run_phase(phase, trained, self.report, self.stop)
        weights = {key: value.detach() for key, value in trained.all_weights.items()}
        return weights, read_log(phase.log_path)

    def phase(self, name: str, n_steps: int) -> Phase:
        """A stage of training with this many steps."""
        known = {"settings": self.decided["settings"], "name": name, "n_steps": n_steps}
        store = CheckpointStore(self.work / name.replace(" ", "-"), fingerprint(known))
        lr = self.settings.lr if name == "traces" else self.settings.lr / 4
        optimiser = OptimiserConfig(muon_lr=10 * lr, adam_lr=lr)
        return Phase(name, n_steps, max(1, n_steps // 10), store, optimiser, self.dtype)

    def export(self, path: Path, weights: Mapping[str, Tensor]) -> Path:
        """The student with these weights as a directory that the engine loads."""
        if not path.exists():
            export_like(path, self.student, weights)
        return path


def student_weights(path: Path) -> tuple[Gemma4Config, dict[str, Tensor]]:
    """A dense Gemma 4's config and its weights in fp32 by canonical name.

    Raises:
        ModelError: it cannot be read, or is no Gemma 4.
        TrainingError: it has experts.
    """
    raw = read_config(path)
    config = Gemma4Config.from_hf(raw)
    expected = gemma4.expected_tensors(config)
    if any("experts" in name for name in expected):
        raise TrainingError("a student with experts cannot be trained yet", "use a dense one")
    stored, _, _ = open_weights(
        Checkpoint.open(path),
        raw,
        expected,
        gemma4.ignore_rules(config),
        prefixes=gemma4.PREFIXES,
        dtype=torch.float32,
    )
    return config, {name: torch.as_tensor(stored[name]) for name in stored}


def distill(
    out: Path, settings: DistillSettings, report: Report, *, fresh: bool = False
) -> dict[str, Any]:
    """Teach a student, and write it to `out`.

    Returns:
        The contents of report.json.

    Raises:
        PairingError: vocabulary or template of teacher and student differ.
        TrainingStopped: SIGINT or SIGTERM arrived; the same call goes on from there.
        TrainingError: settings, data or directory cannot be used, the disk is full, or the student
            has not learned anything; there is no `out`.
    """
    with StopFlag().installed() as stop:
        run = Distill(out, settings, report, stop, fresh=fresh)
        result = _stages(run)
        shutil.rmtree(run.work)
        return result


def _stages(run: Distill) -> dict[str, Any]:
    settings = run.settings
    train_rows, heldout_rows = run.rows()
    heldout = run.traces(heldout_rows, "held-out")
    traces = run.traces(train_rows, "training")
    on_policy = settings.rounds if run.teacher is not None else 0
    seconds = _SPARE * 60 * settings.minutes - (time.monotonic() - run.start)
    common: dict[str, Any] = {"batch": settings.batch, "seed": settings.seed, "dtype": run.dtype}
    before = heldout_loss(Gemma4(run.config, run.weights, BatchedOps()), heldout, settings.batch)
    weights, curve = run.train(
        "traces",
        lambda leaves: Following(run.config, leaves, traces, **common),
        seconds * (_SEQUENCE_SHARE if on_policy else 1.0),
        run.weights,
    )
    curves = {"traces": curve}
    each = seconds * (1 - _SEQUENCE_SHARE) / max(1, on_policy)
    if on_policy:
        assert run.teacher is not None
        teacher = served_target(run.teacher, EngineConfig(quant=settings.quant, device="cpu"))
    for number in range(on_policy):
        name = f"own answers {number + 1}"
        written = run.export(run.work / f"student-{number}", weights)
        rows = _turned(train_rows, number, on_policy)
        own = run.answers(written, rows, name, each * _WRITING)
        weights, curves[name] = run.train(
            name,
            lambda leaves, own=own: Answering(
                teacher, settings.beta, run.config, leaves, own, **common
            ),
            each * (1 - _WRITING),
            weights,
        )
    after = heldout_loss(Gemma4(run.config, weights, BatchedOps()), heldout, settings.batch)
    if not after < before:
        raise TrainingError(
            f"the student has learned nothing: {after:.3f} nats a token on held-out answers, "
            f"{before:.3f} before",
            "give more time or data, or another --lr; nothing was written",
        )
    result = {
        "settings": run.decided["settings"],
        "bad_rows": run.decided["bad_rows"],
        "conversations": {"train": len(traces), "heldout": len(heldout)},
        "steps": run.decided["steps"],
        "heldout_nats": {"before": before, "after": after},
        "seconds": time.monotonic() - run.start,
    }
    best = run.export(run.work / "result", weights)
    plot_losses(best / PLOT_NAME, curves)
    replace_json(best / REPORT_NAME, result)
    best.rename(run.out)
    return result


def _turned(rows: Sequence[Conversation], number: int, n: int) -> list[Conversation]:
    """The same from another place on, so that rounds meet different questions first."""
    at = len(rows) * number // max(1, n)
    return [*rows[at:], *rows[:at]]
