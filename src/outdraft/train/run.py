"""One training run: its settings, its directory, and how long its phases are.

What is decided once (types, threads, numbers of steps) is written to run.json and read from there
when the run is resumed, so that nothing measured changes a run that goes on. Here: paths and
decisions. Not here: the stages (recipe.py).
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from outdraft.errors import TrainingError
from outdraft.models.registry import DTYPES
from outdraft.train.checkpoint import CheckpointStore, fingerprint, replace_json
from outdraft.train.optimiser import OptimiserConfig
from outdraft.train.presets import PRESETS, Preset
from outdraft.train.trainer import LOG_NAME, Objective, Phase, read_log, seconds_per_step
from outdraft.train.weights import fastest_dtype
from outdraft.weights.config import read_json

RUN_NAME, SCORES_NAME, REPORT_NAME, PLOT_NAME = "run.json", "scores.json", "report.json", "plot.png"
RUN_FILES = (SCORES_NAME, REPORT_NAME, PLOT_NAME, RUN_NAME)
RUN_DIRECTORIES = ("data", "tokenizer", "phases", "own-text", "candidates", "target", "assistant")
_OTHER_SECONDS = 120  # text, own text, selection and report, on two cores
_SPARE = 0.9  # steps are timed at their fastest
_LEAST_TRAINING = 0.4

CHECKPOINTS_PER_PHASE = 20
_TIMED_PHASE = 1000  # steps of a phase that is only timed


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asks for: target steps or minutes, one of them.

    Raises:
        TrainingError: a value is impossible.
    """

    preset: str = "cpu"
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    data: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise TrainingError(
                f"there is no preset {self.preset!r}", f"use one of {', '.join(PRESETS)}"
            )
        if (self.steps is None) == (self.minutes is None):
            raise TrainingError("the length of the run is unclear", "give --steps or --minutes")
        length = self.steps if self.steps is not None else self.minutes
        if length is None or not 0 < length < 1e9:
            raise TrainingError(f"the length of the run is {length}", "use a positive number")
        if not 0 <= self.seed < 2**31:
            raise TrainingError(f"seed is {self.seed}", "use a whole number from 0 to 2^31 - 1")
        if self.device not in ("cpu", "cuda"):
            raise TrainingError(f"device is {self.device!r}", "use cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise TrainingError("there is no CUDA device here", "use --device cpu")

    @property
    def data_paths(self) -> list[Path]:
        """The user's files and directories; none for Python source of this machine."""
        return [Path(name) for name in self.data]


class Run:
    """A run's directory and its decisions; `open` makes or resumes one."""

    def __init__(self, out: Path, settings: Settings, decided: dict[str, Any]) -> None:
        self.out = out
        self.settings = settings
        self.preset: Preset = PRESETS[settings.preset]
        self.decided = decided
        self.dtype: torch.dtype = DTYPES[decided["dtype"]]
        self.device = torch.device(settings.device)
        self.data, self.tokenizer = out / "data", out / "tokenizer"
        self.own_text = out / "own-text"
        self.target, self.assistant = out / "target", out / "assistant"

    @classmethod
    def open(cls, out: Path, settings: Settings, *, fresh: bool = False) -> "Run":
        """Resume the run in `out`, or begin one there.

        Raises:
            TrainingError: `out` holds something else, a run with other settings, or cannot be
                written.
        """
        holds_run = (out / RUN_NAME).exists()
        if fresh and holds_run:
            _remove_run(out)
        wanted = asdict(settings) | {"data": list(settings.data)}
        if (out / RUN_NAME).exists():
            decided = read_json(out / RUN_NAME, "training run")
            same_settings(out, wanted, decided.get("settings", {}))
        else:
            if not holds_run and out.exists() and any(out.iterdir()):
                raise TrainingError(f"{out} is not empty", "choose a new directory for --out")
            out.mkdir(parents=True, exist_ok=True)
            dtype = fastest_dtype(torch.device(settings.device))
            decided = {
                "settings": wanted,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "steps": {},
            }
            replace_json(out / RUN_NAME, decided)
        # Another number of threads adds in another order.
        torch.set_num_threads(decided["threads"])
        return cls(out, settings, decided)

    def n_steps(self, name: str, example: Callable[[], Objective]) -> int:
        """The number of steps of a phase, decided when it is first asked for.

        Args:
            name: `target` or `assistant`.
            example: gives an objective of its own to time; it is trained a little.
        """
        steps: dict[str, int] = self.decided["steps"]
        if name not in steps:
            share = self.preset.assistant_share
            if self.settings.steps is not None:
                ratio = 1.0 if name == "target" else self.preset.assistant_ratio
                wanted = self.settings.steps * ratio
            else:
                assert self.settings.minutes is not None
                seconds = training_seconds(self.settings.minutes)
                seconds *= share if name == "assistant" else 1 - share
                wanted = seconds / seconds_per_step(example(), self.phase(name, _TIMED_PHASE))
            steps[name] = max(1, round(wanted))
            replace_json(self.out / RUN_NAME, self.decided)
        return steps[name]

    def phase(self, name: str, n_steps: int) -> Phase:
        """The phase `name` with this many steps."""
        preset = self.preset
        optimiser: OptimiserConfig = {
            "target": preset.target_optimiser,
            "assistant": preset.assistant_optimiser,
        }[name]
        save_every = max(1, n_steps // CHECKPOINTS_PER_PHASE)
        candidate_every = save_every * max(1, CHECKPOINTS_PER_PHASE // preset.n_candidates)
        decided = {key: self.decided[key] for key in ("settings", "dtype", "threads")}
        return Phase(
            name=name,
            n_steps=n_steps,
            save_every=save_every,
            store=CheckpointStore(
                self.out / "phases" / name,
                fingerprint({"preset": asdict(preset), "n_steps": n_steps, "name": name} | decided),
                candidate_every if name == "assistant" else 0,
            ),
            optimiser=optimiser,
            iteration_dtype=self.dtype,
        )

    def assistant_phase(self) -> Phase:
        """The assistant's phase once its length is decided. Its checkpoints are the candidates."""
        return self.phase("assistant", self.decided["steps"]["assistant"])

    def losses(self, name: str) -> list[float]:
        """The losses of a phase so far."""
        return read_log(self.out / "phases" / name / LOG_NAME)

    def candidate(self, step: int) -> Path:
        """Where a candidate assistant is exported."""
        return self.out / "candidates" / f"step-{step:08d}"

    def write_scores(self, by_step: dict[int, float]) -> None:
        """Keep the tokens per pass of the candidates."""
        replace_json(self.out / SCORES_NAME, {str(step): score for step, score in by_step.items()})

    def read_scores(self) -> dict[int, float]:
        """The tokens per pass of the candidates, by step."""
        scores = read_json(self.out / SCORES_NAME, "scores")
        return {int(step): score for step, score in scores.items()}


def training_seconds(minutes: float) -> float:
    """How much of a run of `minutes` the two phases get; a short run takes longer than asked."""
    seconds = 60 * minutes
    return max(_LEAST_TRAINING * seconds, _SPARE * seconds - _OTHER_SECONDS)


def _remove_run(out: Path) -> None:
    """Remove what a run has written, run.json last, and nothing else."""
    for name in RUN_DIRECTORIES:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)


def same_settings(out: Path, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raises TrainingError when the run stored in `out` was asked for differently."""
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise TrainingError(
                f"{out} holds a run with {key} = {stored.get(key)!r}, not {value!r}",
                "repeat its settings to resume it, choose another --out, or start over with "
                "--fresh",
            )
