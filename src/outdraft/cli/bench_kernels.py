"""`outdraft bench kernels`: single kernels by number of rows, measured by bench/kernels.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from outdraft.cli import options
from outdraft.cli.bench import new_table
from outdraft.cli.console import results, save

if TYPE_CHECKING:
    from outdraft.bench.kernels import Backend

KernelPeer = Literal["torch"]

app = typer.Typer(add_completion=False)


@app.command()
def bench_kernels(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write a report here, and a chart beside it.")
    ] = None,
    peer: Annotated[
        KernelPeer | None, typer.Option(help="Also time another library's kernels: torch.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every kernel is measured.")] = 7,
    threads: options.Threads = None,
) -> None:
    """Time each kernel with cold weights, by number of rows.

    Against the bandwidth that a pure read reaches in the same run.
    """
    from outdraft.bench.hardware import set_threads
    from outdraft.bench.kernels import FORMATS, ROWS, SIZES, OwnLinear, measure_kernels
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.row_kernels import row_cases

    set_threads(threads)
    backends: list[Backend] = [OwnLinear(format) for format in FORMATS]
    if peer is not None:
        from outdraft.bench.peers.torch_kernels import torch_backends

        backends += torch_backends()
    report = measure_kernels(backends, SIZES, ROWS, rounds, list(row_cases(ROWS)))
    report |= {"machine": describe_machine(), **describe_version()}
    show(report)
    if json_file is not None:
        from outdraft.bench.cost_chart import draw_kernels

        save(report, json_file, draw_kernels)


def show(report: dict[str, Any]) -> None:
    """A table a size on stdout, and who is row-invariant."""
    console = results()
    machine = report["machine"]
    console.print(f"\n{machine['cpu']}, threads: {machine['threads']}")
    console.print(f"A pure read of cold memory reaches {report['read_gb_s']:.1f} GB/s.")
    for size in dict.fromkeys((row["n"], row["k"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["n"], row["k"]) == size]
        console.print(table(f"{size[0]} × {size[1]}", rows))
    console.print(table("attention over 4096 keys, norm", report["others"]))
    console.print()
    for label, holds in report["row_invariant"].items():
        console.print(f"{label}: {'row-invariant' if holds else 'NOT row-invariant'}")


def table(title: str, rows: list[dict[str, Any]]) -> Any:
    """A rich table: a kernel a line, its cost by number of rows."""
    counts = list(dict.fromkeys(row["rows"] for row in rows))
    made = new_table(
        f"{title}: microseconds at one row, share of a pure read,\n"
        "then the cost of more rows in calls of one",
        ["us", "read %", *(str(count) for count in counts[1:])],
    )
    for backend, kernel in dict.fromkeys((row["backend"], row["kernel"]) for row in rows):
        own = [row for row in rows if (row["backend"], row["kernel"]) == (backend, kernel)]
        made.add_row(
            f"{backend} {kernel}".removeprefix("outdraft "),
            f"{own[0]['us']:.0f}",
            f"{100 * own[0]['share_of_read']:.0f}",
            *(
                f"{row['cost']:.2f}" if row["cost"] < 10 else f"{row['cost']:.0f}"
                for row in own[1:]
            ),
        )
    return made
