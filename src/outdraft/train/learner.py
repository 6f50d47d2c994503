"""The learner's process: `python -m outdraft.train.learner FD`.

The engine (engine/learning.py) starts it, stops it while requests run, and sends finished texts.
It makes the drafter fit them in rounds: some steps of training from the drafter in use, then both
are replayed over texts held out, with the kernels that serve them; the new one is handed over only
if it is better outside the noise (gate.py). New texts are replayed with the drafter in use and the
one before, before anything is learned from them; if the one before was better, the engine is told
to go back. Nothing is computed without new texts.

Here: the process and its decisions. Not here: texts (replay.py), states and losses (live.py).

Messages are lines of JSON. In: `load` (first), `text`, `live` (which drafter is in use, the answer
to the last two of these). Out: `progress`, `compared`, `candidate`, `rollback`.
"""

import contextlib
import json
import math
import os
import select
import shutil
import socket
import sys
import time
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.engine.learned import kept
from outdraft.engine.replay import ServedText
from outdraft.errors import TrainingError
from outdraft.speculate.build import load_assistant
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter
from outdraft.speculate.stats import DraftStats
from outdraft.train.export import export_like
from outdraft.train.gate import Measured, difference, is_better, tokens_per_pass
from outdraft.train.live import MAX_TOKENS, opened, piece_loss, replayed
from outdraft.train.optimiser import Optimiser, OptimiserConfig, schedule
from outdraft.train.replay import LEAST, Learned, Split
from outdraft.train.served import assistant_leaves
from outdraft.train.weights import compute_in, fastest_dtype, make_trainable, trainable
from outdraft.weights.save import write_json

STEPS, BATCH = 24, 6
"""Of a round: updates, and pieces of an update."""
FRESH_TOKENS = 1000
"""So many new ones to learn from, and another round begins."""
ENOUGH = 0.9
"""Share of all drafts accepted from which on there is nothing to gain."""
MOST_WATCHED = 64
"""New texts after which a drafter that came into use is no longer compared with the last one."""
KEPT = 2
NOTE_NAME = "learned.json"

_OPTIMISER = OptimiserConfig(muon_lr=0.005, adam_lr=5e-4, warmup=0.1)
_FROZEN = ("layer_scalar", "token_ordering", "centroids.weight")


@dataclass(frozen=True, slots=True)
class Version:
    """A drafter: its number, its weights in fp32, and itself as it is served."""

    number: int
    weights: dict[str, Tensor]
    drafter: Gemma4AssistantDrafter


@dataclass(slots=True)
class Round:
    """Training in progress: leaves, their optimiser, and updates done."""

    weights: dict[str, Tensor]
    optimiser: Optimiser
    step: int = 0
    n_pieces: int = 0


class Learner:
    """What the process holds. `work` does the next small thing there is to do."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        """Load the model as it is served, and the drafters."""
        config = EngineConfig(**order["config"])
        self.config = replace(
            config,
            ctx_size=MAX_TOKENS,
            prefill_chunk=MAX_TOKENS,
            kv_cache_tokens=MAX_TOKENS,
            prefix_cache=False,
        )
        self.llm = LLM(order["model"], self.config)
        self.stock, self.directory = Path(order["stock"]), Path(order["directory"])
        self.keep = Path(order["keep"]) if "keep" in order else None
        self.kept: dict[int, Path] = {}
        self.n_draft: int = order["draft_n"]
        self.assistant, _ = assistant_leaves(self.stock)
        self.live = self.read(Path(order["live"]), order["number"])
        if self.keep is not None and Path(order["live"]).parent == self.keep:
            self.kept[order["number"]] = Path(order["live"])
        before = order["previous"] if order["previous"] != order["live"] else None
        self.previous = None if before is None else self.read(Path(before), -1)
        self.candidate: Version | None = None
        self.count: int = order["number"]
        self.texts = Split(order["buffer_bytes"])
        self.unseen: list[Learned] = []
        self.watched: list[tuple[DraftStats, DraftStats]] = []
        self.training: dict[str, Tensor] | None = None  # where the last round ended
        self.round: Round | None = None
        self.again = False  # the last round was of use
        self.waiting = False  # for `live`
        self.dtype = fastest_dtype(torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(0)
        self.outgoing: list[dict[str, Any]] = []

    def read(self, path: Path, number: int) -> Version:
        """A drafter from its directory."""
        _, weights = assistant_leaves(path)
        return Version(number, weights, load_assistant(self.llm.target, path, self._plain()))

    def _plain(self) -> EngineConfig:
        return replace(self.config, cache_dir=None)

    def hear(self, message: Mapping[str, Any]) -> None:
        """A message of the engine."""
        if message["op"] == "text":
            tokens = array("i", message["tokens"])
            new = self.texts.add(ServedText(tokens, message["n_prompt"], message["version"]))
            if new is not None:
                self.unseen.append(new)
        elif message["op"] == "live":
            self.settle(message["number"])

    @property
    def busy(self) -> bool:
        """Whether there is something to do now."""
        return not self.waiting and bool(self.unseen or self.round or self._due())

    def work(self) -> None:
        """The next small thing: a text's replay, a piece's gradient, or a comparison."""
        if self.unseen:
            self.look(self.unseen.pop(0))
        elif self.round is None:
            self.begin()
        elif self.round.step < STEPS:
            self.train(self.round)
        else:
            self.compare(self.round)

    def _due(self) -> bool:
        if not self.texts.enough or not (self.again or self.texts.n_fresh >= FRESH_TOKENS):
            return False
        scores = [t.scores[self.live.number] for t in self.texts.newest_heldout() if self._seen(t)]
        if len(scores) < LEAST:
            return False
        return tokens_per_pass(scores).tokens_per_pass - 1 < ENOUGH * self.n_draft

    def _seen(self, text: Learned) -> bool:
        return self.live.number in text.scores

    def look(self, text: Learned) -> None:
        """Replay a new text with the drafter in use and the one before; go back if that is it."""
        self.score(text, self.live)
        if self.previous is None:
            return
        self.score(text, self.previous)
        scores = text.scores
        self.watched.append((scores[self.live.number], scores[self.previous.number]))
        if len(self.watched) < LEAST:
            return
        live, previous = zip(*self.watched, strict=True)
        if is_better(difference(previous, live)):
            self.round, self.waiting = None, True
            self.say("rollback")
        elif len(self.watched) >= MOST_WATCHED:
            self.previous = None

    def score(self, text: Learned, version: Version) -> None:
        """What a drafter would have done in a text."""
        total = DraftStats()
        for piece in text.pieces:
            with opened(self.llm, piece) as states:
                total.merge(replayed(states, version.drafter, self.n_draft))
        text.scores[version.number] = total

    def begin(self) -> None:
        """A round begins where the last one ended, or with the drafter in use."""
        start = self.training or self.live.weights
        floating = {k: v for k, v in start.items() if v.is_floating_point()}
        weights = make_trainable(floating, torch.device("cpu"))
        for name, weight in weights.items():
            weight.requires_grad_(not name.endswith(_FROZEN))
        weights |= {k: v for k, v in start.items() if not v.is_floating_point()}
        self.round = Round(weights, Optimiser(trainable(weights), _OPTIMISER, self.dtype))
        self.texts.n_fresh, self.again = 0, False

    def train(self, own: Round) -> None:
        """The gradient of one more piece, and the update when it was the last of its batch."""
        (piece,) = self.texts.draw(1, self.generator)
        kv_layers = self.live.drafter.kv_layers
        with opened(self.llm, piece) as states, compute_in(self.dtype, torch.device("cpu")):
            loss = piece_loss(
                states, self.llm, self.assistant, own.weights, kv_layers, self.n_draft
            )
        if loss is not None:
            if not math.isfinite(loss.item()):
                self.round = self.training = None
                return
            (loss / BATCH).backward()  # type: ignore[no-untyped-call]
        own.n_pieces += 1
        if own.n_pieces % BATCH == 0:
            for weight in own.optimiser.weights.values():
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            own.optimiser.step(own.step, schedule(own.step, STEPS, _OPTIMISER))
            own.step += 1
            self.say("progress", steps=1)

    def compare(self, own: Round) -> None:
        """The gate: the new drafter against the one in use, on the same texts held out."""
        self.round = None
        texts = [t for t in self.texts.newest_heldout() if self._seen(t)]
        if len(texts) < LEAST:  # forgotten meanwhile
            return
        self.count += 1
        weights = {name: weight.detach() for name, weight in own.weights.items()}
        path = self.directory / f"version-{self.count:06d}"
        export_like(path, self.stock, weights, copied=())
        candidate = self.read(path, self.count)
        for text in texts:
            self.score(text, candidate)
        new = [text.scores[candidate.number] for text in texts]
        old = [text.scores[self.live.number] for text in texts]
        change = difference(new, old)
        better = is_better(change)
        self.say(
            "compared",
            better=better,
            live=tokens_per_pass(old).tokens_per_pass,
            candidate=tokens_per_pass(new).tokens_per_pass,
        )
        self.training = weights if change.tokens_per_pass > 0 else None
        if better:
            self.candidate, self.waiting = replace(candidate, weights=weights), True
            self.say("candidate", number=self.count, path=str(path))
            self.note(path, change, len(texts))
            return
        shutil.rmtree(path, ignore_errors=True)
        for text in texts:
            del text.scores[candidate.number]

    def note(self, path: Path, change: Measured, n_texts: int) -> None:
        """What is known of a drafter, beside it."""
        known = {"change": change.tokens_per_pass, "standard_error": change.standard_error}
        write_json(path / NOTE_NAME, {**known, "texts": n_texts, "draft_length": self.n_draft})

    def settle(self, number: int) -> None:
        """The engine drafts with this drafter from now on."""
        self.waiting = False
        candidate, self.candidate = self.candidate, None
        if candidate is not None and candidate.number == number:
            self.previous, self.live = self.live, candidate
            self.watched, self.again = [], True
            self.store(candidate)
        elif self.previous is not None and number != self.live.number:
            shutil.rmtree(self.kept.pop(self.live.number, Path("/nonexistent")), ignore_errors=True)
            self.live = replace(self.previous, number=number)
            self.previous = self.training = None
            self.watched = []
            for text in [*self.texts.train, *self.texts.heldout]:
                text.scores.clear()
            self.unseen = [*self.texts.newest_heldout()]

    def store(self, version: Version) -> None:
        """Keep a drafter for the next start, where that is wanted."""
        if self.keep is None:
            return
        newest = next(kept(self.keep), None)
        path = self.keep / f"{1 if newest is None else int(newest.name) + 1:06d}"
        try:
            export_like(path, self.stock, version.weights)
        except TrainingError as error:  # a full disk keeps nothing, and costs nothing
            print(error, file=sys.stderr)
            return
        self.kept[version.number] = path
        for old in list(kept(self.keep))[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def say(self, op: str, **values: Any) -> None:
        """To the engine, behind what is being done."""
        self.outgoing.append({"op": op, **values})


class Orders:
    """Messages of a socket, line by line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lines: deque[bytes] = deque()
        self._rest = b""

    @property
    def there(self) -> bool:
        """Whether there is one, or the end of them, or the beginning of one."""
        return bool(self._lines or select.select([self.sock], [], [], 0)[0])

    def next(self) -> dict[str, Any] | None:
        """Waits for it; None at the end."""
        while not self._lines:
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines += lines
        order: dict[str, Any] = json.loads(self._lines.popleft())
        return order


def serve(sock: socket.socket) -> None:
    """Hear, work, report, until the engine is gone."""
    orders = Orders(sock)
    first = orders.next()
    if first is None:
        return
    learner = Learner(first)
    spent_s, told = 0.0, True
    while True:
        while not learner.busy or orders.there:
            order = orders.next()
            if order is None:
                return
            learner.hear(order)
        learner.work()
        now_s = time.process_time()
        busy = learner.busy
        if learner.outgoing or busy != told or now_s - spent_s > 1:
            told = busy
            report = {"op": "progress", "steps": 0, "seconds": now_s - spent_s, "busy": busy}
            spent_s = now_s
            for message in [*learner.outgoing, report]:
                sock.sendall(json.dumps(report | message).encode() + b"\n")
            learner.outgoing.clear()


def be_modest() -> None:
    """Run only where nothing else wants to, and be the first to go when memory is short."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """See the module."""
    be_modest()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
