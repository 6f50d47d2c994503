"""What a model of a published shape costs on this machine, with made-up weights at true size.

Here: plain decoding through the recorded pass, passes of 1 to 8 rows, draft steps, bytes touched,
and what drafting would give at an acceptance that is put in. Weights and acceptance are synthetic
and every report says so. The rows of a pass are drawn at random, so experts are hit more widely
than by real text. Not here: the weights (synthetic.py), tables (cli/bench_shape.py).
"""

import random
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from outdraft.bench.drafting import Rounds, count_drafter, synthetic_drafter, synthetic_vocab
from outdraft.bench.forecast import forecast
from outdraft.bench.hardware import available_bytes, peak_bytes, read_seconds
from outdraft.bench.made_up import (
    FILL_ROWS,
    SEQUENCE,
    NoText,
    as_target,
    fill_context,
    made_up_ops,
)
from outdraft.bench.shapes import Shape
from outdraft.bench.stopwatch import Stopwatch, clock
from outdraft.bench.synthetic import CountingOps, synthetic_target
from outdraft.bench.touched import memory_touched, weights_touched
from outdraft.cache.attend import CausalCall
from outdraft.cache.memory import Memory, Span
from outdraft.device import CPU, free_bytes
from outdraft.engine.graphs import Pass
from outdraft.engine.plan import StepPlan, Work
from outdraft.engine.runner import Runner
from outdraft.engine.sequence import Sequence
from outdraft.errors import OutdraftError
from outdraft.models.layers import TargetConfig, TargetModel
from outdraft.ops.packed import Format
from outdraft.request import Request
from outdraft.speculate.drafter import Drafter, ReadsStates
from outdraft.speculate.mtp import MtpDrafter
from outdraft.text.stream import StopStrings

MAX_ROWS = 8
READ_BYTES = 1 << 30
SPARE_BYTES = 1 << 30  # PyTorch, Python and activations
FIRST_TOKEN = 2
WARM_STEPS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured: format of the weights, filled context, decoded tokens, rounds."""

    quant: Format = "w4"
    context: int = 1024
    n_tokens: int = 16
    rounds: int = 5
    draft_steps: int = 4
    draft_vocab: int | None = None
    device: torch.device = CPU

    @property
    def draft_format(self) -> Format:
        """As the engine stores drafters: with at least 8 bits."""
        return "w8" if self.quant == "w4" else self.quant

    def peak_bytes(self) -> int:
        """The most memory that was held on the device."""
        if self.device.type == "cpu":
            return peak_bytes()
        return torch.cuda.max_memory_allocated(self.device)

    @property
    def n_positions(self) -> int:
        """The longest sequence that is run."""
        return self.context + self.n_tokens + FILL_ROWS


def measure_shape(shape: Shape, settings: Settings, acceptance: Seq[float]) -> dict[str, Any]:
    """Build a model of this shape, measure it, and give the report as it goes into the JSON.

    Args:
        acceptance: of each position of a draft, given that all before it were accepted.

    Raises:
        OutdraftError: the model does not fit into memory.
    """
    base = settings.peak_bytes()
    rig = Rig.build(shape, settings)
    plain = rig.decode(settings.n_tokens)
    rows, read_gb_s = rig.time_rows(settings.rounds)
    draft_s = rig.time_draft_step(settings.draft_steps, settings.rounds)
    pass_s = {int(row["rows"]): row["us"] / 1e6 for row in rows}
    steps = {}
    if settings.device.type != "cpu":
        steps = {k: rig.time_drafting(k, settings.rounds) for k in range(1, len(acceptance) + 1)}
    drafting = forecast(acceptance, plain.seconds, pass_s, draft_s, steps)
    part_s = rig.time_part(shape, settings)
    best = max(drafting, key=lambda entry: float(entry["tok_s"]), default=None)
    bytes_per_token = rows[0]["bytes"]
    return {
        "synthetic": "weights are made up, and so is the acceptance; only costs are measured",
        "shape": shape.name,
        "computes": rig.ops.describe(),
        "quant": settings.quant,
        "context": settings.context,
        "plain_tok_s": 1 / plain.seconds,
        "draft_tok_s": None if best is None else best["tok_s"],
        "best_k": None if best is None else best["k"],
        "speedup": None if best is None else best["speedup"],
        "bytes_per_token": bytes_per_token,
        "read_gb_s": read_gb_s,
        "share_of_bandwidth": bytes_per_token / plain.seconds / 1e9 / read_gb_s,
        "python_share": plain.python_share,
        "packed_bytes": rig.packed_bytes,
        "kv_bytes": rig.memory.n_bytes,
        "base_bytes": base,
        "peak_bytes": settings.peak_bytes(),
        "cost_by_rows": rows,
        "draft_step_us": draft_s * 1e6,
        "draft_step_cost": draft_s / plain.seconds,
        "draft_vocab": settings.draft_vocab,
        "draft_vocab_step_us": None if part_s is None else part_s * 1e6,
        "acceptance": list(acceptance),
        "drafting": drafting,
        "time_by_part_us": rig.time_parts(settings.rounds),
    }


@dataclass(frozen=True, slots=True)
class Decoding:
    """Plain decoding: time of an engine's step, and the share of it outside the kernels."""

    seconds: float
    python_share: float


@dataclass(frozen=True, slots=True)
class Rig:
    """A target, its drafter and one sequence with its context filled."""

    config: TargetConfig
    model: TargetModel
    ops: Any
    memory: Memory
    runner: Runner
    drafter: Any
    packed_bytes: int

    @classmethod
    def build(cls, shape: Shape, settings: Settings) -> "Rig":
        """Make the weights and the memory.

        Raises:
            OutdraftError: they do not fit.
        """
        family, config, n_positions = shape.family, shape.target, settings.n_positions
        if family.cpu_only is not None and settings.device.type != "cpu":
            raise OutdraftError(
                f"{shape.name} cannot run on the GPU: {family.cpu_only}", "use --device cpu"
            )
        needed = weight_bytes(shape, settings)
        memory = Memory(
            family.memory_layers(config),
            max_sequences=1,
            max_tokens=n_positions,
            max_rows=FILL_ROWS,
            dtype=torch.bfloat16,
            device=settings.device,
            n_draft_max=MAX_ROWS - 1,
        )
        check_fits(shape.name, needed + memory.n_bytes, settings.device)
        ops = made_up_ops(settings.device, settings.quant)
        draft_ops = made_up_ops(settings.device, settings.draft_format)
        model = synthetic_target(config, ops, n_positions, family)
        drafter: Drafter = synthetic_drafter(shape, model, draft_ops, n_positions)
        fill_context(memory, settings.context)
        return cls(
            config,
            model,
            ops,
            memory,
            Runner(as_target(family, config, model, ops, n_positions), drafter, memory),
            drafter,
            sum(weight.n_bytes for weight in [*ops.weights, *draft_ops.weights]),
        )

    def run(self, tokens: list[int]) -> Pass:
        """A pass of these rows behind the context; they are not kept."""
        self.memory.reserve(SEQUENCE, len(tokens))
        n = len(tokens)
        return self.runner.target_pass.run(tokens, [Span(SEQUENCE, 0, n)], list(range(n)))

    def decode(self, n_tokens: int) -> Decoding:
        """Greedy decoding by the engine; the first steps, which record, are not counted."""
        sequence = self.new_sequence()
        plan = StepPlan([Work(SEQUENCE, 1, 0)])
        for _ in range(WARM_STEPS):
            self.runner.execute(plan, {SEQUENCE: sequence})
        before_s, n_before = self._replayed()
        start = time.perf_counter()
        steps = [clock(self.runner.execute, plan, {SEQUENCE: sequence}) for _ in range(n_tokens)]
        after_s, n_after = self._replayed()
        seconds = median(steps)
        if self.memory.device.type != "cpu":  # one pass was done before, and one more is done now
            seconds = (time.perf_counter() - start) / n_tokens
        self.runner.target_pass.ahead.drop()
        in_kernels = (after_s - before_s) / max(1, n_after - n_before)
        return Decoding(seconds, max(0.0, 1 - in_kernels / seconds))

    def _replayed(self) -> tuple[float, int]:
        """Seconds in recorded calls so far, all of which are waited for, and their number."""
        programs = self.ops.programs
        return sum(p.seconds for p in programs), sum(p.n_replays for p in programs)

    @torch.inference_mode()
    def time_drafting(self, k: int, rounds: int) -> float:
        """Seconds of an engine's step of k drafts, none of which is kept."""
        sequence = self.new_sequence()
        drafter: Drafter = self.drafter
        if isinstance(drafter, ReadsStates):  # it has read the context
            self.drafter.close(SEQUENCE)
            Rounds(self.drafter, self.memory, self.model, list(sequence.tokens), k)
        self.runner.execute(StepPlan([Work(SEQUENCE, 1, 0)]), {SEQUENCE: sequence})
        plan = StepPlan([Work(SEQUENCE, 1, k)])
        for _ in range(WARM_STEPS):
            self.runner.execute(plan, {SEQUENCE: sequence})
        start = time.perf_counter()  # a round has been launched before, and one more is launched
        for _ in range(rounds):
            self.runner.execute(plan, {SEQUENCE: sequence})
        seconds = (time.perf_counter() - start) / rounds
        assert sequence.stats.n_drafted == (WARM_STEPS + rounds) * k
        return seconds

    def new_sequence(self) -> Sequence:
        """The sequence behind the context, as the engine sees it: greedy, never ending."""
        n_computed = self.memory.lengths[SEQUENCE]
        tokens = [FIRST_TOKEN] * (n_computed + 1)
        return Sequence(
            request=Request(SEQUENCE, tuple(tokens)),
            seed=0,
            limit=sys.maxsize,
            end_ids=frozenset(),
            detokenizer=NoText(),
            stop_strings=StopStrings(()),
            tokens=tokens,
            n_computed=n_computed,
        )

    @torch.inference_mode()
    def time_rows(self, rounds: int) -> tuple[list[dict[str, float]], float]:
        """Passes of 1 .. 8 rows, and the bandwidth of a pure read, taking turns.

        Returns:
            For every number of rows: `us` (median), `spread_us` (min, max), `cost` in passes of
            one row, `bytes` touched; and the bandwidth in 1e9 bytes a second.
        """
        rng = random.Random(0)
        chosen = rng.sample(range(self.config.vocab_size), MAX_ROWS)
        rows = {n: chosen[:n] for n in range(1, MAX_ROWS + 1)}
        n_bytes = {n: self._record(tokens) for n, tokens in rows.items()}
        parts = self._large_parts()
        spent: dict[int, list[float]] = {n: [] for n in rows}
        reads = [self._read(parts)]
        for _ in range(rounds):
            for n, tokens in rows.items():
                spent[n].append(clock(self.run, tokens))
            reads.append(self._read(parts))
        one = median(spent[1])
        table = [
            {
                "rows": n,
                "us": median(times) * 1e6,
                "min_us": min(times) * 1e6,
                "max_us": max(times) * 1e6,
                "cost": median(times) / one,
                "bytes": n_bytes[n],
            }
            for n, times in spent.items()
        ]
        return table, 1 / median(reads[1:]) / 1e9

    @torch.inference_mode()
    def time_draft_step(self, k: int, rounds: int) -> float:
        """Seconds of one draft step, of rounds of k."""
        tokens = [FIRST_TOKEN] * (self.memory.lengths[SEQUENCE] + 1)
        self.memory.reserve(SEQUENCE, 1)
        behind = Rounds(self.drafter, self.memory, self.model, tokens, k)
        return median(clock(behind.next) for _ in range(rounds)) / k

    def time_part(self, shape: Shape, settings: Settings) -> float | None:
        """Seconds of a draft step over a part of the vocabulary, for a native head."""
        if settings.draft_vocab is None or not isinstance(self.drafter, MtpDrafter):
            return None
        drafter = self.drafter
        drafter.vocab = synthetic_vocab(shape, self.model, settings.draft_vocab)
        drafter.forget_recordings()
        drafter.close(SEQUENCE)
        return self.time_draft_step(settings.draft_steps, settings.rounds)

    @torch.inference_mode()
    def time_parts(self, rounds: int) -> dict[str, float]:
        """Microseconds of a pass of one row by part, call by call instead of recorded.

        Nothing on a GPU, where a call is only asked for when it returns.
        """
        if self.memory.device.type != "cpu":
            return {}
        self.memory.reserve(SEQUENCE, 1)
        found: list[dict[str, float]] = []
        for _ in range(rounds + 1):
            watch: Any = Stopwatch(self.ops)
            call = CausalCall.prepare(self.memory, watch, [Span(SEQUENCE, 0, 1)], [FIRST_TOKEN])
            holders = ops_holders(self.model)
            for holder in holders:
                holder.ops = watch
            try:
                hidden_TH = self.model.forward(call.token_T, call.position_T, call.attend)
            finally:
                for holder in holders:
                    holder.ops = self.ops
            head = clock(self._score, hidden_TH)
            found.append({**watch.by_part(), "head": head})
        return {part: median(one[part] for one in found[1:]) * 1e6 for part in found[0]}

    def _read(self, parts: list[Tensor]) -> float:
        """Seconds that a pure read takes a byte."""
        if self.memory.device.type == "cpu":
            return read_seconds(parts) / sum(part.numel() for part in parts)
        from outdraft.bench.cuda_synthetic import read_seconds_a_byte

        return read_seconds_a_byte(self.memory.device)

    def _score(self, hidden_TH: Tensor) -> Tensor:
        best_T: Tensor = self.ops.argmax(self.model.logits(hidden_TH))
        return best_T

    def _record(self, tokens: list[int]) -> int:
        """Run a number of rows for the first time; bytes of weights and keys that it touches."""
        recorded = len(self.ops.routed)
        self.run(tokens)
        if recorded == len(self.ops.routed):  # one row has been recorded before
            recorded = 0
        n_routed = sum(weight.n_blocks > 1 for weight in self.ops.weights) // 2
        per_layer = self.ops.routed[recorded : recorded + n_routed]
        hits = [len(set(ids_TA.flatten().tolist())) for ids_TA in per_layer]
        n_bytes = weights_touched(self.model, self.ops.weights, len(tokens), hits)
        return n_bytes + memory_touched(self.memory, SEQUENCE, len(tokens))

    def _large_parts(self) -> list[Tensor]:
        """The largest weights, about a gigabyte: more than any cache where the model is."""
        parts: list[Tensor] = []
        if self.memory.device.type != "cpu":
            return parts
        for weight in sorted(self.ops.weights, key=lambda w: w.n_bytes, reverse=True):
            if sum(part.numel() for part in parts) < READ_BYTES:
                parts.append(weight.data[:READ_BYTES])
        return parts


def ops_holders(model: Any) -> list[Any]:
    """The model and those of its parts that hold its operations."""
    parts = [getattr(layer, name, None) for layer in model.layers for name in ("mixer", "mlp")]
    return [model, *(part for part in parts if hasattr(part, "ops"))]


def weight_bytes(shape: Shape, settings: Settings) -> int:
    """Packed bytes of target and drafter, before there are any."""
    ops, draft_ops = CountingOps(settings.quant), CountingOps(settings.draft_format)
    synthetic_target(shape.target, ops, 1, shape.family)
    count_drafter(shape, draft_ops)
    return ops.n_bytes + draft_ops.n_bytes


def check_fits(name: str, n_bytes: int, device: torch.device = CPU) -> None:
    """Refuse what would not fit.

    Raises:
        OutdraftError: saying what is needed and what there is.
    """
    free = available_bytes() if device.type == "cpu" else free_bytes(device)[0]
    if free is not None and n_bytes + SPARE_BYTES > free:
        raise OutdraftError(
            f"{name} needs {(n_bytes + SPARE_BYTES) / 1e9:.1f} GB and {free / 1e9:.1f} are free",
            "use fewer bits (--quant w4), a smaller shape, or a shorter --context",
        )
