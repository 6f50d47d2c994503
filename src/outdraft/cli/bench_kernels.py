"""`outdraft bench kernels`: single kernels by number of rows, measured by bench/kernels.py."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.bench import new_table
from outdraft.cli.console import remark, results, save

app = typer.Typer(add_completion=False)


@app.command()
def bench_kernels(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write a report here, and a chart beside it.")
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(
            help="Also time these libraries' kernels, `none` or some of `torch,onnxruntime,"
            "openvino`; without it, all that are installed."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Outputs x inputs of the weights, as `2048x2048,10240x2560`."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every kernel is measured.")] = 5,
    threads: options.Threads = None,
) -> None:
    """Time each kernel with cold weights, by number of rows.

    Against the bandwidth that a pure read reaches in the same run, and against the libraries of
    `pip install 'outdraft[peers]'`, each in a process of its own.
    """
    from outdraft import _core
    from outdraft.bench.hardware import set_threads
    from outdraft.bench.kernel_summary import summarise
    from outdraft.bench.kernels import FORMATS, ROWS, SIZES, OwnLinear, measure_kernels
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.peers.kernel_peers import installed_peers, peer_backends
    from outdraft.bench.row_kernels import row_cases

    sizes = SIZES if size is None else [parse_size(text) for text in size.split(",")]
    set_threads(threads)
    names = installed_peers() if peer is None else parse_peers(peer)
    versions: dict[str, str] = {}
    with peer_backends(names, _core.threads(), versions.__setitem__) as peers:
        for name, version in versions.items():
            remark(f"beside {name} {version}")
        backends = [*(OwnLinear(format) for format in FORMATS), *peers]
        report = measure_kernels(backends, sizes, ROWS, rounds, list(row_cases(ROWS)))
    report |= {"summary": summarise(report), "peers": versions}
    report |= {"machine": describe_machine(), **describe_version()}
    show(report)
    if json_file is not None:
        from outdraft.bench.cost_chart import draw_kernels

        save(report, json_file, draw_kernels)


def parse_peers(text: str) -> list[str]:
    """Names of libraries.

    Raises:
        typer.BadParameter: one of them is unknown.
    """
    from outdraft.bench.peers.kernel_peers import LIBRARIES

    if text == "none":
        return []
    names = text.split(",")
    for name in names:
        if name not in LIBRARIES:
            known = ", ".join(LIBRARIES)
            raise typer.BadParameter(f"{name}: none, or some of {known}", param_hint="--peer")
    return list(dict.fromkeys(names))


def parse_size(text: str) -> tuple[int, int]:
    """N and K of "NxK".

    Raises:
        typer.BadParameter: it is none, or not a multiple of 32 (groups of all libraries).
    """
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if found is None or int(found[1]) % 32 or int(found[2]) % 32:
        raise typer.BadParameter(f"{text}: two multiples of 32, as 2048x2048", param_hint="--size")
    return int(found[1]), int(found[2])


def show(report: dict[str, Any]) -> None:
    """A table a size on stdout, who is row-invariant, and ours beside the best of the others."""
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
    for entry in report["summary"]:
        console.print()
        for line in summary_lines(entry):
            console.print(line)


def summary_lines(entry: dict[str, Any]) -> list[str]:
    """What the run says about ours at one size."""
    lines = [
        f"{entry['n']} × {entry['k']}: w4 at one row {100 * entry['share_of_read']:.0f} % of a read"
    ]
    for name in ("w4", "w8"):
        if (cost := entry[f"{name}_cost"]) is not None:
            lines.append(f"  {name}, 4 rows: {cost:.2f} × the time of one")
    for what, kernels in (("4 rows", entry["verify"]), ("512 rows", entry["prefill"])):
        for name, beside in kernels.items():
            if beside is not None:
                lines.append(f"  {name}, {what}: {beside['ratio']:.2f} × {beside['peer']}'s time")
    return lines


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
