"""The whole demo recipe: text, tokenizer, target, its own writing, assistant, selection, report.

Every stage leaves its result in the run's directory and is passed over when that is there, so a run
that was killed goes on where it was. Here: the order and what is handed on. Not here: the settings
and the directory (run.py), how anything is trained.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from outdraft.models import gemma4, gemma4_assistant
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config
from outdraft.train.checkpoint import replace_json
from outdraft.train.corpus import own_corpus, python_corpus
from outdraft.train.export import export_model, load_exported_target
from outdraft.train.gemma4_assistant import AssistantTraining
from outdraft.train.plot import plot_run
from outdraft.train.presets import DRAFT_DEFAULT
from outdraft.train.pretrain import Pretraining, heldout_loss
from outdraft.train.rollouts import Rollouts
from outdraft.train.run import PLOT_NAME, REPORT_NAME, Run, Settings
from outdraft.train.select import Prompt, distinct_share, heldout_prompts, measure_drafting
from outdraft.train.tokenizer import train_tokenizer, write_tokenizer
from outdraft.train.trainer import Objective, Progress, Report, StopFlag, run_phase
from outdraft.train.weights import fresh_weights, make_trainable
from outdraft.train.windows import Windows, encode_texts
from outdraft.weights.config import read_json
from outdraft.weights.save import new_directory, write_json, write_weights

OWN_TEXT_PASSES = 2
"""How often the assistant reads what the target wrote."""

_OWN_TEXT_BATCH = 250  # sequences written at once; a multiple of the number of temperatures


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of one run, in order. Each may raise TrainingStopped or TrainingError."""

    run: Run
    report: Report
    stop: StopFlag

    def text(self) -> None:
        """Corpus, tokenizer, and the corpus as one stream of tokens."""
        run, preset = self.run, self.run.preset
        if run.data.exists():
            return
        self.report(Progress("text", 0, 1))
        paths = run.settings.data_paths
        size = preset.corpus_bytes
        corpus = own_corpus(paths, size) if paths else python_corpus(size)
        if not run.tokenizer.exists():
            tokenizer = train_tokenizer(corpus.train.values(), preset.vocab_size)
            write_tokenizer(run.tokenizer, tokenizer, preset.max_positions)
        self.stop.check()
        with new_directory(run.data) as unfinished:
            stream = encode_texts(self._tokenizer(), corpus.train.values())
            write_weights(unfinished, {"stream": stream})
            write_json(unfinished / "corpus.json", corpus.manifest())
            write_json(unfinished / "heldout.json", corpus.heldout)
        self.report(Progress("text", 1, 1))

    def target(self) -> None:
        """Pre-train the target and export it."""
        run, preset = self.run, self.run.preset
        if run.target.exists():
            return
        windows = Windows(self._stream(), preset.context, run.settings.seed)
        config = Gemma4Config.from_hf(preset.target_config())

        def objective() -> Pretraining:
            fresh = fresh_weights(gemma4.expected_tensors(config), run.settings.seed)
            weights = make_trainable(fresh, run.device)
            return Pretraining(config, weights, windows, preset.batch, run.dtype)

        trained = self._train("target", objective)
        assert isinstance(trained, Pretraining)
        export_model(run.target, preset.target_config(), trained.all_weights, run.tokenizer)

    def own_text(self) -> None:
        """Let the target write what the assistant will read."""
        run, preset = self.run, self.run.preset
        if run.own_text.exists():
            return
        n_steps = run.n_steps("assistant", self._timed_assistant)
        wanted = math.ceil(n_steps * self._n_own / OWN_TEXT_PASSES)
        prompts = Windows(self._stream(), preset.context, run.settings.seed + 1)
        config = Gemma4Config.from_hf(preset.target_config())
        weights = load_exported_target(run.target, config, run.device)
        rollouts = Rollouts(config, weights, run.dtype)
        written: list[Tensor] = []
        at_once = _OWN_TEXT_BATCH * (1 if run.device.type == "cpu" else 8)
        for start in range(0, wanted, at_once):
            self.report(Progress("own text", start, wanted))
            n = min(at_once, wanted - start)
            given = torch.stack([prompts.window(index) for index in range(start, start + n)])
            written.append(rollouts.write(given, run.settings.seed + start, self.stop.check))
        self.report(Progress("own text", wanted, wanted))
        with new_directory(run.own_text) as unfinished:
            write_weights(unfinished, {"windows": torch.cat(written).to(torch.int32)})

    def assistant(self) -> None:
        """Train the assistant; some of its checkpoints are kept as candidates."""
        if not self.run.assistant.exists():
            own_RS = load_file(self.run.own_text / "model.safetensors")["windows"].long()
            self._train("assistant", lambda: self._assistant_objective(own_RS))

    def selection(self) -> None:
        """Measure the candidates in the engine and export the best."""
        run, preset = self.run, self.run.preset
        if run.assistant.exists():
            return
        by_step: dict[int, float] = {}
        prompts, _ = self._prompts()
        steps = run.assistant_phase().store.kept_steps()
        for index, step in enumerate(steps):
            self.stop.check()
            self.report(Progress("selection", index, len(steps)))
            self._export_candidate(step)
            drafting = measure_drafting(
                run.target, run.candidate(step), prompts, preset.new_tokens, DRAFT_DEFAULT
            )
            by_step[step] = drafting.stats.tokens_per_pass
        self.report(Progress("selection", len(steps), len(steps)))
        run.write_scores(by_step)
        best = max(by_step, key=lambda step: (by_step[step], step))
        run.candidate(best).rename(run.assistant)

    def summary(self) -> dict[str, object]:
        """Measure the finished pair on prompts not selected by; write report.json and plot.png."""
        run, preset = self.run, self.run.preset
        if (run.out / REPORT_NAME).exists():
            return read_json(run.out / REPORT_NAME, "report")
        _, prompts = self._prompts()
        self.report(Progress("report", 0, 1))
        n_new = preset.new_tokens
        plain = measure_drafting(run.target, None, prompts, n_new, 0)
        drafted = measure_drafting(run.target, run.assistant, prompts, n_new, DRAFT_DEFAULT)
        scores = run.read_scores()
        losses = {name: run.losses(name) for name in ("target", "assistant")}
        summary = run.decided | self._heldout() | {
            "last_loss": {name: sum(part[-20:]) / len(part[-20:]) for name, part in losses.items()},
            "candidates": {str(step): score for step, score in scores.items()},
            "draft_length": DRAFT_DEFAULT,
            "tokens_per_pass": drafted.stats.tokens_per_pass,
            "acceptance_by_position": drafted.stats.acceptance_by_position,
            "distinct_share": distinct_share(plain),
            "identical": plain.tokens == drafted.tokens,
        }  # fmt: skip
        replace_json(run.out / REPORT_NAME, summary)
        plot_run(
            run.out / PLOT_NAME,
            losses["target"],
            losses["assistant"],
            scores,
            drafted.stats.acceptance_by_position,
        )
        self.report(Progress("report", 1, 1))
        return summary

    def _train(self, name: str, objective: Callable[[], Objective]) -> Objective:
        """Run a phase from its fresh or stored state to its end."""
        n_steps = self.run.n_steps(name, objective)
        phase = self.run.phase(name, n_steps)
        trained = objective()
        run_phase(phase, trained, self.report, self.stop)
        return trained

    def _assistant_objective(self, own_RS: Tensor) -> AssistantTraining:
        run, preset = self.run, self.run.preset
        config = AssistantConfig.from_hf(preset.assistant_config())
        target_config = Gemma4Config.from_hf(preset.target_config())
        windows = Windows(self._stream(), preset.context, run.settings.seed + 2)
        n_text = preset.assistant_batch - self._n_own

        def batch(step: int) -> Tensor:
            rows = [(step * self._n_own + i) % len(own_RS) for i in range(self._n_own)]
            return torch.cat((windows.batch(step, n_text), own_RS[rows]))

        fresh = fresh_weights(gemma4_assistant.expected_tensors(config), run.settings.seed + 3)
        return AssistantTraining(
            config,
            make_trainable(fresh, run.device),
            target_config,
            load_exported_target(run.target, target_config, run.device),
            batch,
            preset.unroll,
            run.dtype,
            preset.assistant_batch * (preset.context + 1 - preset.unroll),
        )

    def _timed_assistant(self) -> Objective:
        """One to be timed: text stands in for what the target has yet to write."""
        preset = self.run.preset
        windows = Windows(self._stream(), preset.context, 0)
        return self._assistant_objective(windows.batch(0, preset.assistant_batch))

    @property
    def _n_own(self) -> int:
        """Windows of the target's own text in a step of the assistant."""
        return round(self.run.preset.assistant_batch * self.run.preset.own_text)

    def _stream(self) -> Tensor:
        stream_N: Tensor = load_file(self.run.data / "model.safetensors")["stream"]
        return stream_N

    def _tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_file(str(self.run.tokenizer / "tokenizer.json"))

    def _heldout_texts(self) -> dict[str, str]:
        return dict(read_json(self.run.data / "heldout.json", "held-out text"))

    def _prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        preset = self.run.preset
        return heldout_prompts(
            self._tokenizer(),
            self._heldout_texts().values(),
            preset.n_prompts,
            preset.prompt_tokens,
        )

    def _export_candidate(self, step: int) -> None:
        run, raw = self.run, self.run.preset.assistant_config()
        if run.candidate(step).exists():
            return
        stored = run.assistant_phase().store.load(step)
        expected = gemma4_assistant.expected_tensors(AssistantConfig.from_hf(raw))
        # What is not in a checkpoint never learns: the layer scalars.
        constants = fresh_weights(expected, run.settings.seed)
        weights = {name: stored.get(name, constants[name]) for name in expected}
        export_model(run.candidate(step), raw, weights, run.tokenizer)

    def _heldout(self) -> dict[str, object]:
        """Loss of the served target on all held-out text."""
        run, preset = self.run, self.run.preset
        config = Gemma4Config.from_hf(preset.target_config())
        texts = list(self._heldout_texts().values())
        stream = encode_texts(self._tokenizer(), texts)
        weights = load_exported_target(run.target, config, run.device)
        nats = heldout_loss(config, weights, stream, preset.context)
        n_bytes = sum(len(text.encode()) for text in texts)
        return {
            "heldout_nats_per_token": nats,
            "heldout_bits_per_byte": nats * len(stream) / n_bytes / math.log(2),
        }


def train_demo(
    out: Path, settings: Settings, report: Report, *, fresh: bool = False
) -> dict[str, object]:
    """Make a demo pair in `out`: target/, assistant/, report.json, plot.png.

    A run that was interrupted goes on from where it was, with the same result to the bit.

    Args:
        out: a new directory, or that of the run to resume.
        settings: a resumed run needs the same.
        report: called with the progress.
        fresh: begin again, removing the run in `out`.

    Returns:
        The contents of report.json.

    Raises:
        TrainingStopped: SIGINT or SIGTERM arrived; everything so far is saved.
        TrainingError: the settings or the directory cannot be used, or the disk is full.
    """
    with StopFlag().installed() as stop:
        stages = Stages(Run.open(out, settings, fresh=fresh), report, stop)
        stages.text()
        stages.target()
        stages.own_text()
        stages.assistant()
        stages.selection()
        return stages.summary()
