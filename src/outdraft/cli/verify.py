"""`outdraft verify`: the losslessness ladder on a model. The rungs are those of bench/verify.py."""

import json
from typing import Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.console import harmless, remark, results

NOT_EXACT = 1

app = typer.Typer(add_completion=False)


@app.command()
def verify(
    ctx: typer.Context,
    model: options.Model,
    assistant: options.Assistant = None,
    adapter: options.Adapter = None,
    spec_type: options.Spec = "auto",
    spec_draft_n_max: options.DraftMax = None,
    spec_draft_sample: options.DraftSample = True,
    device: options.Card = "auto",
    backend: options.Kernels = "auto",
    dtype: options.Compute = "auto",
    quant: options.Bits = "auto",
    kv_dtype: options.KvType = "bf16",
    threads: options.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Prove on this machine that drafting, batching and caching change no token.

    Exit code 1 if a rung fails. A rung is skipped (`passed` is null in the JSON) where the model
    has nothing to try, as drafts without a drafter. `worst_margin` is the smallest distance between
    the two largest logits of any token seen: how near another token came.
    """
    from outdraft.bench.verify import config_for, verify_model
    from outdraft.cli.streaming import load

    with load(model, config_for(options.engine_config(ctx.params))) as llm:
        report = verify_model(llm, remark)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        show(report)
    if not report["passed"]:
        raise typer.Exit(NOT_EXACT)


def show(report: dict[str, Any]) -> None:
    """A table of rungs, and the verdict."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("rung", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    words = {True: "passed", False: "FAILED", None: "skipped"}
    for rung in report["rungs"]:
        detail = harmless(rung["detail"].removeprefix("skipped: "))
        table.add_row(rung["name"], words[rung["passed"]], detail)
    console = results()
    console.print(table)
    if report["worst_margin"] is not None:
        console.print(f"\nThe nearest two tokens came to each other: {report['worst_margin']:.3g}.")
    failed = [rung["name"] for rung in report["rungs"] if rung["passed"] is False]
    console.print(f"NOT EXACT: {', '.join(failed)}." if failed else "Every rung that ran holds.")
