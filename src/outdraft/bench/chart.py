"""The picture of a report: speed by kind of prompt, acceptance by position of the draft."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIZE_INCHES = (11.0, 4.4)
DPI = 130
COLOURS = ("#9aa5b1", "#2f7d4f", "#d9c8a9", "#c07f2a")


def draw(report: dict[str, Any]) -> bytes:
    """A PNG of a benchmark's JSON (greedy decoding)."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    speed, acceptance = figure.subplots(1, 2)
    _draw_speed(speed, report)
    _draw_acceptance(acceptance, report["kinds"])
    settings, machine = report["settings"], report["machine"]
    what = f"{settings['model']}, {settings['computes']}, greedy, {settings['draft_n_max']} drafts"
    where = f"{machine['cpu']}, threads: {machine['threads']}"
    figure.suptitle(f"{what}; {where}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_speed(axes: Axes, report: dict[str, Any]) -> None:
    kinds = report["kinds"]
    bars = {
        "plain": [figures["plain_tok_s"] for figures in kinds.values()],
        "drafting": [figures["draft_tok_s"] for figures in kinds.values()],
    }
    peer = report.get("peer")
    if peer is not None:
        theirs = [peer["kinds"][kind] for kind in kinds]
        bars[f"{peer['name']} plain"] = [figures["plain_tok_s"] for figures in theirs]
        bars[f"{peer['name']} assisted"] = [figures["assisted_tok_s"] for figures in theirs]
    width = 0.8 / len(bars)
    for i, (label, heights) in enumerate(bars.items()):
        places = [place + (i - (len(bars) - 1) / 2) * width for place in range(len(kinds))]
        drawn = axes.bar(places, heights, width, label=label, color=COLOURS[i])
        if label == "drafting":
            ratios = [f"{figures['speedup']:.2f}×" for figures in kinds.values()]
            axes.bar_label(drawn, labels=ratios, fontsize=9, padding=2)
    axes.set_xticks(range(len(kinds)), list(kinds))
    axes.set_ylabel("tokens per second")
    axes.set_title("speed of decoding, by kind of prompt", fontsize=10)
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=9)


def _draw_acceptance(axes: Axes, kinds: dict[str, Any]) -> None:
    for kind, figures in kinds.items():
        positions = range(1, len(figures["acceptance"]) + 1)
        axes.plot(
            positions,
            figures["acceptance"],
            marker="o",
            label=f"{kind}: {figures['tokens_per_pass']:.2f} tokens per pass",
        )
    longest = max(len(figures["acceptance"]) for figures in kinds.values())
    axes.set_xticks(range(1, longest + 1))
    axes.set_ylim(0, 1)
    axes.set_xlabel("position of the draft")
    axes.set_ylabel("share accepted")
    axes.set_title("acceptance, all earlier drafts of the block included", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
