"""`outdraft doctor`: what this machine computes with. The checks are those of bench/doctor.py."""

import json
from typing import Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.console import harmless, results

SOMETHING_WRONG = 1

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    threads: options.Threads = None,
) -> None:
    """Say what this machine computes with, how fast it reads, and whether all is well.

    Takes a few seconds. Exit code 1 if something is wrong that does not pass by itself.
    """
    from outdraft.bench.doctor import examine
    from outdraft.bench.hardware import set_threads

    set_threads(threads)
    found = examine()
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        show(found)
    if not all(problem["passing"] for problem in found["problems"]):
        raise typer.Exit(SOMETHING_WRONG)


def show(found: dict[str, Any]) -> None:
    """A table of facts, and the problems."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts(found):
        table.add_row(name, harmless(value))
    console = results()
    console.print(table)
    for problem in found["problems"]:
        console.print(f"\n{problem['message']}\n  {problem['hint']}")
    if not found["problems"]:
        console.print("\nNothing is wrong.")


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what is found, for people."""
    machine, kernels, memory = found["machine"], found["kernels"], found["memory"]
    broken = [name for name, holds in found["row_invariant"].items() if not holds]
    return [
        ("processor", machine["cpu"]),
        ("cores", f"{machine['usable_cores']} of {machine['cores']} can be used"),
        ("instruction sets", " ".join(machine["isa"])),
        ("kernels", kernels["report"]),
        ("threads", f"{kernels['threads']} of the kernels, {machine['threads']} of PyTorch"),
        ("memory", f"{gigabytes(memory['available_bytes'])} of "
                   f"{gigabytes(memory['total_bytes'])} free"),
        ("largest cache", f"{memory['last_level_cache_bytes'] / 2**20:.0f} MiB"),
        ("reading", f"{memory['read_gb_s']:.1f} GB/s"),
        ("row-invariant", f"not: {', '.join(broken)}" if broken else
                          f"all {len(found['row_invariant'])} kernels checked, 1 to 9 rows"),
        ("PyTorch", f"{machine['torch']} ({machine['torch_isa']})"),
        ("Python", f"{machine['python']} on {machine['system']}"),
    ]  # fmt: skip


def gigabytes(n_bytes: int | None) -> str:
    """For people; the system may not say."""
    return "?" if n_bytes is None else f"{n_bytes / 1e9:.1f} GB"
