"""`outdraft bench shape`: what a published shape costs here. The measuring is bench/shape.py's."""

from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.bench import new_table
from outdraft.cli.console import results, save
from outdraft.config import Quant
from outdraft.errors import OutdraftError

app = typer.Typer(add_completion=False)


@app.command()
def bench_shape(
    name: Annotated[
        str,
        typer.Argument(
            metavar="SHAPE",
            help="gemma-4-e2b, gemma-4-e4b, gemma-4-12b, gemma-4-26b-a4b, gemma-4-31b, "
            "qwen3.6-27b, qwen3.6-35b-a3b, ministral-14b, "
            "nemotron-3.5-lightning-30b-a3b or nemotron-3-super-120b-a12b.",
            show_default=False,
        ),
    ],
    quant: Annotated[Quant, typer.Option(help="Weights: w4, w8 or bf16; auto is w4.")] = "auto",
    accept: Annotated[
        str | None,
        typer.Option(
            metavar="A1,A2,…",
            help="Forecast drafting: share accepted at each position, given all before it.",
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens already in the context.")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded plainly.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every pass is measured.")] = 5,
    draft_vocab: Annotated[
        int | None, typer.Option(min=1, help="Time drafts over so many ids as well.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write a report here, and a chart beside it.")
    ] = None,
    device: options.Card = "cpu",
    threads: options.Threads = None,
) -> None:
    """Measure what a model of a published shape costs here, with made-up weights.

    The weights are random and at true size in memory; what is accepted is put in, not measured.
    """
    acceptance = read_acceptance(accept)
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.shape import Settings, measure_shape
    from outdraft.bench.shapes import find_shape
    from outdraft.device import find_device
    from outdraft.ops.threads import set_threads

    where = find_device(device)
    set_threads(threads, compiled=where.type == "cpu")
    settings = Settings(
        quant="w4" if quant == "auto" else quant,
        context=context,
        n_tokens=tokens,
        rounds=rounds,
        draft_vocab=draft_vocab,
        device=where,
    )
    report = measure_shape(find_shape(name), settings, acceptance)
    report |= {"machine": describe_machine(), **describe_version()}
    show(report)
    if json_file is not None:
        from outdraft.bench.cost_chart import draw_shape

        save(report, json_file, draw_shape)


def read_acceptance(text: str | None) -> list[float]:
    """The numbers of `--accept`.

    Raises:
        OutdraftError: it is not a list of shares, or a longer one than can be measured.
    """
    if text is None:
        return []
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 7 or not all(0 <= share <= 1 for share in shares):
        raise OutdraftError(
            f"--accept {text} is not a list of acceptances", "give 1 to 7 shares, as .8,.7,.6"
        )
    return shares


def show(report: dict[str, Any]) -> None:
    """The report on stdout."""
    console = results()
    machine = report["machine"]
    console.print(f"\n{report['shape']} at {report['quant']}, context {report['context']}")
    console.print(f"{report['computes']}; {machine['cpu']}, threads: {machine['threads']}")
    console.print(f"SYNTHETIC: {report['synthetic']}.\n")
    console.print(
        f"Plain decoding: {report['plain_tok_s']:.2f} tokens/s, "
        f"{report['bytes_per_token'] / 1e9:.2f} GB a token, "
        f"{100 * report['share_of_bandwidth']:.0f} % of the {report['read_gb_s']:.1f} GB/s "
        f"of a pure read; Python takes {100 * report['python_share']:.1f} %."
    )
    console.print(
        f"Memory: {report['peak_bytes'] / 1e9:.2f} GB at most, of which weights "
        f"{report['packed_bytes'] / 1e9:.2f}, keys, values, states "
        f"{report['kv_bytes'] / 1e9:.2f}, "
        f"and {report['base_bytes'] / 1e9:.2f} before the model."
    )
    console.print(cost_table(report))
    console.print(
        f"\nA draft step takes {report['draft_step_us'] / 1e3:.2f} ms, "
        f"{report['draft_step_cost']:.3f} of a plain one."
    )
    if report["draft_vocab_step_us"]:
        part_ms = report["draft_vocab_step_us"] / 1e3
        console.print(f"Over {report['draft_vocab']} ids it takes {part_ms:.2f} ms.")
    if report["time_by_part_us"]:
        console.print(parts_line(report))
    if report["drafting"]:
        console.print(draft_table(report))


def parts_line(report: dict[str, Any]) -> str:
    """Where the time of a pass goes."""
    parts = ", ".join(f"{part} {us / 1e3:.2f}" for part, us in report["time_by_part_us"].items())
    return f"Milliseconds of a pass of one row, call by call: {parts}."


def cost_table(report: dict[str, Any]) -> Any:
    """A rich table of passes by number of rows."""
    made = new_table(
        "passes by number of rows (drawn at random: experts are hit more widely than by text)",
        ["ms", "min–max", "cost", "GB touched"],
    )
    for row in report["cost_by_rows"]:
        made.add_row(
            str(row["rows"]),
            f"{row['us'] / 1e3:.2f}",
            f"{row['min_us'] / 1e3:.2f}–{row['max_us'] / 1e3:.2f}",
            f"{row['cost']:.2f}",
            f"{row['bytes'] / 1e9:.2f}",
        )
    return made


def draft_table(report: dict[str, Any]) -> Any:
    """A rich table of what drafting would give."""
    given = ", ".join(f"{share:g}" for share in report["acceptance"])
    made = new_table(
        f"drafting forecast from these costs and an acceptance of {given} (synthetic)",
        ["tok/pass", "tok/s", "speed-up"],
    )
    for entry in report["drafting"]:
        made.add_row(
            f"{entry['k']} draft{'s' if entry['k'] > 1 else ''}",
            f"{entry['tokens_per_pass']:.2f}",
            f"{entry['tok_s']:.2f}",
            f"{entry['speedup']:.2f}{'  best' if entry['k'] == report['best_k'] else ''}",
        )
    return made
