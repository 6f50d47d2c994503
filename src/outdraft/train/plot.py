"""The picture of a training run: losses of both phases, and what the drafts are worth.

Not here: the numbers (report.json holds them).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SMOOTHING = 0.95
_COLOURS = ("#1f6fb4", "#d1671a", "#2f8f4e")


def plot_run(
    path: Path,
    target_losses: Sequence[float],
    assistant_losses: Sequence[float],
    candidates: Mapping[int, float],
    acceptance: Sequence[float],
) -> None:
    """Write a PNG with three panels.

    Args:
        target_losses, assistant_losses: of every step, nats per token and nats per draft.
        candidates: tokens per pass by the assistant's step.
        acceptance: share of the drafts at each position that were accepted, from the first on.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, selection, positions = figure.subplots(1, 3)
    _curve(losses, target_losses, "target: cross-entropy", _COLOURS[0])
    _curve(losses, assistant_losses, "assistant: KL from the target", _COLOURS[1])
    losses.set(title="Training loss", xlabel="step", ylabel="nats per token", ylim=(0, None))
    losses.legend()
    selection.plot(list(candidates), list(candidates.values()), "o-", color=_COLOURS[2])
    selection.axhline(1.0, color="grey", linestyle=":", label="plain decoding")
    selection.set(
        title="Tokens per pass, greedy, held-out prompts",
        xlabel="assistant's step",
        ylabel="tokens per pass of the target",
        ylim=(0.9, None),
    )
    selection.legend()
    numbers = range(1, len(acceptance) + 1)
    bars = positions.bar(numbers, acceptance, color=_COLOURS[2])
    positions.bar_label(bars, fmt="%.2f")
    positions.set(
        title="Drafts accepted, best assistant",
        xlabel="position in the draft",
        ylabel="share (all earlier ones accepted too)",
        ylim=(0, 1),
        xticks=list(numbers),
    )
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def plot_tuning(path: Path, before: Sequence[float], after: Sequence[float]) -> None:
    """Write a PNG of the share of drafts accepted at each position, before and after tuning."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for shares, label, shift in ((before, "stock", -0.2), (after, "tuned", 0.2)):
        places = [i + 1 + shift for i in range(len(shares))]
        bars = axes.bar(places, shares, width=0.38, label=label)
        axes.bar_label(bars, fmt="%.2f")
    axes.set(
        title="Drafts accepted, held-out prompts, greedy",
        xlabel="position in the draft",
        ylabel="share (all earlier ones accepted too)",
        ylim=(0, 1.08),
        xticks=[i + 1 for i in range(len(after))],
    )
    axes.legend()
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def plot_losses(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Write a PNG of the losses of every stage, nats per token."""
    figure = Figure(figsize=(4 * len(curves), 4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for index, (axes, (name, losses)) in enumerate(zip(panels, curves.items(), strict=True)):
        _curve(axes, losses, name, _COLOURS[index % len(_COLOURS)])
        axes.set(title=name, xlabel="step", ylabel="nats per token", ylim=(0, None))
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def plot_pretraining(
    path: Path, losses: Sequence[float], heldout: Mapping[str, float], acceptance: Sequence[float]
) -> None:
    """Write a PNG: the training loss, held-out losses by tokens ahead, drafts accepted."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    training, ahead, positions = figure.subplots(1, 3)
    _curve(training, losses, "model and head", _COLOURS[0])
    training.set(title="Training loss", xlabel="step", ylabel="nats per token", ylim=(0, None))
    for axes, names, values, title, label in (
        (ahead, list(heldout), list(heldout.values()), "Held-out text", "tokens ahead"),
        (
            positions,
            [str(i + 1) for i in range(len(acceptance))],
            acceptance,
            "Drafts accepted, held-out prompts, greedy",
            "position in the draft",
        ),
    ):
        axes.bar_label(axes.bar(names, values, color=_COLOURS[2]), fmt="%.2f")
        axes.set(title=title, xlabel=label)
    ahead.set(ylabel="nats per token")
    positions.set(ylabel="share (all earlier ones accepted too)", ylim=(0, 1))
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def _curve(axes: Axes, losses: Sequence[float], label: str, colour: str) -> None:
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color=colour, label=label)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias towards zero of its beginning."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        result.append(total / weight)
    return result
