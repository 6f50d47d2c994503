"""The pictures of costs: kernels by number of rows, and passes of a whole shape."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIZE_INCHES = (11.0, 4.4)
DPI = 130
MOST_ROWS = 16


def draw_kernels(report: dict[str, Any]) -> bytes:
    """A PNG of a `bench kernels` report: bandwidth at one row, and cost by rows, largest size."""
    n, k = max(((row["n"], row["k"]) for row in report["rows"]), key=lambda size: size[0] * size[1])
    chosen = [row for row in report["rows"] if (row["n"], row["k"]) == (n, k)]
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in chosen:
        by_label.setdefault(f"{row['backend']} {row['kernel']}", []).append(row)
    figure = _new_figure()
    speed, cost = figure.subplots(1, 2)
    speed.barh(list(by_label), [rows[0]["gb_s"] for rows in by_label.values()], color="#2f7d4f")
    speed.axvline(report["read_gb_s"], color="#9aa5b1", label="pure read")
    speed.invert_yaxis()
    speed.set_xlabel("GB/s at one row, cold weights")
    speed.legend(frameon=False, fontsize=9)
    for label, rows in by_label.items():
        few = [row for row in rows if row["rows"] <= MOST_ROWS]
        cost.plot([row["rows"] for row in few], [row["cost"] for row in few], "o-", label=label)
    _label_costs(cost)
    machine = report["machine"]
    figure.suptitle(f"{n} × {k}; {machine['cpu']}, threads: {machine['threads']}", fontsize=10)
    return _png(figure)


def draw_shape(report: dict[str, Any]) -> bytes:
    """A PNG of a `bench shape` report: cost of a pass by rows, and speed by length of drafts."""
    figure = _new_figure()
    cost, speed = figure.subplots(1, 2)
    rows = report["cost_by_rows"]
    counts = [row["rows"] for row in rows]
    cost.plot(counts, [row["cost"] for row in rows], "o-", label="time")
    cost.plot(counts, [row["bytes"] / rows[0]["bytes"] for row in rows], "--", label="bytes")
    _label_costs(cost)
    rates = [report["plain_tok_s"], *(entry["tok_s"] for entry in report["drafting"])]
    bars = speed.bar(range(len(rates)), rates, color="#2f7d4f")
    ratios = [f"{rate / rates[0]:.2f}×" for rate in rates]
    speed.bar_label(bars, labels=ratios, fontsize=9, padding=2)
    speed.margins(y=0.12)
    speed.set_xticks(range(len(rates)))
    speed.set_xlabel("drafts a step; acceptance put in, not measured")
    speed.set_ylabel("tokens per second")
    machine = report["machine"]
    figure.suptitle(
        f"{report['shape']}, {report['quant']}, made-up weights, context {report['context']}; "
        f"{machine['cpu']}, threads: {machine['threads']}",
        fontsize=10,
    )
    return _png(figure)


def _new_figure() -> Figure:
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _label_costs(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows")
    axes.set_ylabel("cost, in calls of one row")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
