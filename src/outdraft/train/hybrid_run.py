"""A run of `outdraft pretrain`: text, tokenizer, training, measurement, a model directory.

Every stage leaves its result in a directory beside the output, so a run that was killed goes on.
It is removed when the run has ended, and the output appears whole. Here: the order and what is
decided once. Not here: the losses (mtp.py), sizes (hybrid_presets.py).
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import TrainingError
from outdraft.models import mtp, qwen3_5
from outdraft.request import SamplingParams
from outdraft.speculate.stats import DraftStats
from outdraft.train.checkpoint import CheckpointStore, fingerprint, replace_json
from outdraft.train.corpus import own_corpus, python_corpus
from outdraft.train.hybrid import fresh_hybrid
from outdraft.train.hybrid_presets import HybridPreset, find_preset
from outdraft.train.mtp import HybridPretraining, MtpOptions, head_prefix
from outdraft.train.plot import plot_pretraining
from outdraft.train.run import PLOT_NAME, REPORT_NAME, training_seconds
from outdraft.train.select import Prompt, complete, heldout_prompts
from outdraft.train.tokenizer import (
    BOS_ID,
    END_OF_TURN_ID,
    EOS_ID,
    PAD_ID,
    train_tokenizer,
    write_tokenizer,
)
from outdraft.train.trainer import (
    LOG_NAME,
    Phase,
    Progress,
    Report,
    StopFlag,
    read_log,
    run_phase,
    seconds_per_step,
)
from outdraft.train.weights import make_trainable
from outdraft.train.windows import Windows, encode_texts
from outdraft.train.work import decided_dtype, keep_decided, open_work, work_beside
from outdraft.weights.config import CONFIG_NAME, read_json
from outdraft.weights.save import new_directory, write_json, write_weights

SAVES = 20
_TIMED_PHASE = 1000
_HELDOUT_WINDOWS = 64
_BEFORE_PREFIX = ("lm_head.", "mtp.")


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """What the user asks for: steps or minutes, one of them.

    Raises:
        TrainingError: a value is impossible.
    """

    preset: str = "hybrid"
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    data: tuple[str, ...] = ()
    mtp: MtpOptions = field(default_factory=MtpOptions)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise TrainingError("the length of the run is unclear", "give --steps or --minutes")
        length = self.steps if self.steps is not None else self.minutes
        for name, value, low, high in (
            ("the length of the run", length, 1e-6, 1e9),
            ("seed", self.seed, 0, 2**31 - 1),
            ("mtp-depths", self.mtp.depths, 1, 16),
            ("mtp-loss-scale", self.mtp.scale, 1e-6, 100),
        ):
            if value is None or not low <= value <= high:
                raise TrainingError(f"{name} is {value}", f"use {low:g} to {high:g}")


class PretrainRun:
    """One run: its settings, its directory of work, and what was decided once."""

    def __init__(
        self,
        out: Path,
        settings: PretrainSettings,
        report: Report,
        stop: StopFlag,
        *,
        fresh: bool,
    ) -> None:
        self.out, self.settings, self.report, self.stop = out, settings, report, stop
        self.preset: HybridPreset = find_preset(settings.preset)
        self.work = work_beside(out, "pretraining")
        wanted = asdict(settings) | {"config": dict(self.preset.config)}
        self.decided = open_work(self.work, wanted, fresh=fresh)
        self.dtype = decided_dtype(self.decided)
        self.data, self.tokenizer = self.work / "data", self.work / "tokenizer"
        self.model = self.work / "model"

    def text(self) -> None:
        """Corpus, tokenizer, and the corpus as one stream of tokens."""
        if self.data.exists():
            return
        self.report(Progress("text", 0, 1))
        paths = [Path(name) for name in self.settings.data]
        size = self.preset.corpus_bytes
        corpus = own_corpus(paths, size) if paths else python_corpus(size)
        shape = self.preset.shape
        if not self.tokenizer.exists():
            tokenizer = train_tokenizer(corpus.train.values(), shape.vocab_size)
            write_tokenizer(self.tokenizer, tokenizer, shape.max_position_embeddings)
        self.stop.check()
        with new_directory(self.data) as unfinished:
            stream = encode_texts(self._read_tokenizer(), corpus.train.values())
            write_weights(unfinished, {"stream": stream})
            write_json(unfinished / "corpus.json", corpus.manifest())
            write_json(unfinished / "heldout.json", corpus.heldout)
        self.report(Progress("text", 1, 1))

    def train(self) -> None:
        """Train model and head together, and write them."""
        if self.model.exists():
            return
        if "steps" not in self.decided:
            steps = self.settings.steps
            if steps is None:
                assert self.settings.minutes is not None
                each = seconds_per_step(self.objective(), self.phase(_TIMED_PHASE))
                steps = round(training_seconds(self.settings.minutes) / each)
            self.decided["steps"] = max(1, steps)
            self._decide()
        objective = self.objective()
        run_phase(self.phase(self.decided["steps"]), objective, self.report, self.stop)
        self.decided["heldout"] = self._heldout(objective)
        self._decide()
        export_hybrid(self.model, self.preset.config, objective.weights, self.tokenizer)

    def objective(self) -> HybridPretraining:
        """Fresh weights and what they learn."""
        shape, options, seed = self.preset.shape, self.settings.mtp, self.settings.seed
        fresh = fresh_hybrid(qwen3_5.expected_tensors(shape), seed)
        for index in range(options.n_heads):
            head = fresh_hybrid(mtp.expected_tensors(shape), seed + 1 + index)
            fresh |= {head_prefix(index) + name: weight for name, weight in head.items()}
        stream_N = load_file(self.data / "model.safetensors")["stream"]
        return HybridPretraining(
            shape,
            make_trainable(fresh, torch.device("cpu")),
            Windows(stream_N, self.preset.context, seed),
            self.preset.batch,
            options,
            self.dtype,
        )

    def phase(self, n_steps: int) -> Phase:
        """The training with this many steps."""
        preset = self.preset
        known = {key: self.decided[key] for key in ("settings", "dtype", "threads")}
        known |= {"n_steps": n_steps, "batch": preset.batch, "context": preset.context}
        known |= {"optimiser": asdict(preset.optimiser)}
        store = CheckpointStore(self.work / "phase", fingerprint(known))
        every = max(1, n_steps // SAVES)
        return Phase("training", n_steps, every, store, preset.optimiser, self.dtype)

    def finish(self) -> dict[str, Any]:
        """Measure drafting on held-out text; the report and the picture go into the model."""
        preset = self.preset
        prompts, _ = heldout_prompts(
            self._read_tokenizer(), self._texts().values(), preset.n_prompts, preset.prompt_tokens
        )
        self.report(Progress("report", 0, 1))
        n = max(2, self.settings.mtp.depths)
        plain, _ = measure(self.model, prompts, preset.new_tokens, 0)
        drafted, stats = measure(self.model, prompts, preset.new_tokens, n)
        losses = read_log(self.work / "phase" / LOG_NAME)
        report = self.decided | {
            "tokens": self.decided["steps"] * preset.batch * preset.context,
            "parameters": sum(
                tensor.numel() for tensor in load_file(self.model / "model.safetensors").values()
            ),
            "last_loss": sum(losses[-20:]) / len(losses[-20:]),
            "draft_length": n,
            "tokens_per_pass": stats.tokens_per_pass,
            "acceptance_by_position": stats.acceptance_by_position,
            "identical": plain == drafted,
        }
        acceptance = stats.acceptance_by_position
        plot_pretraining(self.model / PLOT_NAME, losses, self.decided["heldout"], acceptance)
        replace_json(self.model / REPORT_NAME, report)
        self.model.rename(self.out)
        self.report(Progress("report", 1, 1))
        shutil.rmtree(self.work)
        return report

    @torch.no_grad()
    def _heldout(self, objective: HybridPretraining) -> dict[str, float]:
        """Losses on held-out text, nats per token, by how far ahead (1: the next token)."""
        stream_N = encode_texts(self._read_tokenizer(), self._texts().values())
        context = min(self.preset.context, len(stream_N))
        n = min(_HELDOUT_WINDOWS, len(stream_N) // context)
        rows = stream_N[: n * context].view(n, context).long()
        ids = torch.cat((torch.full((n, 1), BOS_ID), rows), dim=1)
        sums: dict[str, float] = {}
        for part in torch.split(ids, self.preset.batch):
            losses = objective.losses(part)
            for ahead, loss in enumerate((losses.main, *losses.depths), start=1):
                sums[str(ahead)] = sums.get(str(ahead), 0.0) + float(loss) * len(part) / n
        return sums

    def _texts(self) -> dict[str, str]:
        return dict(read_json(self.data / "heldout.json", "held-out text"))

    def _read_tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_file(str(self.tokenizer / "tokenizer.json"))

    def _decide(self) -> None:
        keep_decided(self.work, self.decided)


def export_hybrid(
    directory: Path, config: Any, weights: dict[str, Tensor], tokenizer: Path
) -> None:
    """Write a model and its first head in bf16, in the layout of the published checkpoints.

    Raises:
        TrainingError: the directory is there already, or cannot be written.
    """
    named = {
        name if name.startswith(_BEFORE_PREFIX) else f"model.{name}": weight.to(torch.bfloat16)
        for name, weight in weights.items()
        if name.startswith("mtp.") or not name.startswith("mtp")
    }
    with new_directory(directory) as unfinished:
        write_json(unfinished / CONFIG_NAME, config)
        generation = {
            "bos_token_id": BOS_ID,
            "eos_token_id": [EOS_ID, END_OF_TURN_ID],
            "pad_token_id": PAD_ID,
        }
        write_json(unfinished / "generation_config.json", generation)
        write_weights(unfinished, named)
        for path in tokenizer.iterdir():
            (unfinished / path.name).write_bytes(path.read_bytes())


def measure(
    model: Path, prompts: Sequence[Prompt], n_new: int, k: int
) -> tuple[list[list[int]], DraftStats]:
    """Greedy answers of `n_new` tokens with drafts of k (0: plainly), and what drafting came to."""
    config = EngineConfig(spec_type="off" if k == 0 else "mtp", draft_n=k, device="cpu")
    params = SamplingParams(max_tokens=n_new, ignore_eos=True)
    with LLM(str(model), config) as llm:
        done = complete(llm, prompts, params)
    stats = DraftStats()
    for one in done:
        stats.merge(one.stats)
    return [one.tokens for one in done], stats


def pretrain(
    out: Path, settings: PretrainSettings, report: Report, *, fresh: bool = False
) -> dict[str, Any]:
    """Train a hybrid and its head into `out`, a Hugging Face directory with report and picture.

    Returns:
        The contents of report.json.

    Raises:
        TrainingStopped: SIGINT or SIGTERM arrived; the same call goes on from there.
        TrainingError: settings, data or directory cannot be used, or the disk is full.
    """
    with StopFlag().installed() as stop:
        run = PretrainRun(out, settings, report, stop, fresh=fresh)
        run.text()
        run.train()
        stop.check()
        return run.finish()
