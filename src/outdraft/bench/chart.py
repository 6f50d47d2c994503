"""The pictures of reports: speed and acceptance by kind of prompt, throughput by concurrency."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIZE_INCHES = (11.0, 4.4)
DPI = 130
COLOURS = ("#9aa5b1", "#2f7d4f", "#d9c8a9", "#c07f2a", "#b9c7dd", "#3f67a3")


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
    for peer in report.get("peers", {}).values():
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


def draw_throughput(report: dict[str, Any]) -> bytes:
    """A PNG of the JSON of `bench throughput`: rate and time per token by concurrency."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    speed, wait = figure.subplots(1, 2)
    concurrencies = sorted({row["concurrency"] for row in report["rows"]})
    for mode in dict.fromkeys(row["mode"] for row in report["rows"]):
        rows = sorted(
            (row for row in report["rows"] if row["mode"] == mode),
            key=lambda row: int(row["concurrency"]),
        )
        width = 2.5 if mode == "controller" else 1.0
        for axes, figure_name in ((speed, "tok_s"), (wait, "tpot_ms_p50")):
            heights = [row[figure_name] for row in rows]
            axes.plot(concurrencies, heights, marker="o", linewidth=width, label=mode)
    for axes, label in ((speed, "tokens per second"), (wait, "ms per token, median")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(concurrencies, [str(c) for c in concurrencies])
        axes.set_xlabel("requests at once")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    speed.legend(frameon=False, fontsize=9)
    settings, machine = report["settings"], report["machine"]
    what = f"{settings['model']}, {settings['computes']}, greedy, mixed lengths"
    figure.suptitle(f"{what}; {machine['cpu']}, threads: {machine['threads']}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
