"""`outdraft bench throughput`: many requests at once. The measuring is bench/throughput.py's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.bench import find_prompts, new_table
from outdraft.cli.console import remark, remarks, results
from outdraft.config import EngineConfig
from outdraft.errors import OutdraftError

if TYPE_CHECKING:
    from outdraft.bench.throughput import Asked, Run
    from outdraft.engine.engine import LLM

PROMPTS_PER_KIND = 8

app = typer.Typer(add_completion=False)


@app.command()
def bench_throughput(
    model: options.Model,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json", help="Write a report here, and a chart beside it; - prints the report."
        ),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests in progress.")] = "1,2,4,8,16",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests a run; twice the highest concurrency.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=4, help="Most tokens of an answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each mode.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and lengths.")] = 0,
    assistant: options.Assistant = None,
    spec_draft_n_max: options.DraftMax = None,
    backend: options.Kernels = "auto",
    dtype: options.Compute = "auto",
    quant: options.Bits = "auto",
    kv_dtype: options.KvType = "bf16",
    threads: options.Threads = None,
) -> None:
    """Measure many requests at once: plain, fixed draft lengths, and lengths chosen while running.

    Greedy, prompts and answers of mixed lengths, each run the same requests; no prefix cache.
    """
    wanted = read_concurrencies(concurrency)
    config = EngineConfig(
        assistant=assistant,
        draft_n_max=spec_draft_n_max,
        backend=backend,
        dtype=dtype,
        quant=quant,
        kv_dtype=kv_dtype,
        max_sequences=wanted[-1],
        prefix_cache=False,  # prompts come again in every run and would be computed only once
        threads=threads,
    )
    report = compare(model, config, wanted, requests, max_tokens, rounds, seed)
    if json_file == "-":
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    show(report)
    if json_file is not None:
        save(report, Path(json_file))


def compare(
    model: str,
    config: EngineConfig,
    concurrencies: list[int],
    n_requests: int | None,
    max_tokens: int,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """Measure everything; the report.

    Raises:
        OutdraftError: there is no drafter, or the context is too short for the answers.
    """
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.throughput import mix_requests, summarise
    from outdraft.cli.streaming import load

    llm = load(model, config)
    if llm.pairing.drafter is None:
        raise OutdraftError(
            f"there is nothing to compare: {llm.pairing.reason}",
            "give the drafter with --assistant, and a --spec-draft-n-max above 0",
        )
    if max_tokens > llm.ctx_size // 2:
        raise OutdraftError(f"--max-tokens {max_tokens} is too long", f"most: {llm.ctx_size // 2}")
    prompts = find_prompts(llm, None, PROMPTS_PER_KIND, seed)
    n = n_requests or 2 * concurrencies[-1]
    asked = mix_requests(prompts, n, max_tokens, llm.ctx_size, seed)
    report = summarise(measure(llm, asked, concurrencies, rounds))
    report["settings"] = settings_of(llm, asked) | {
        "model": model,
        "rounds": rounds,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    return report | {"machine": describe_machine(), **describe_version()}


def read_concurrencies(text: str) -> list[int]:
    """The numbers of `--concurrency`, ascending.

    Raises:
        OutdraftError: it is not a list of numbers from 1 to 256.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1 or numbers[-1] > 256:
        raise OutdraftError(f"--concurrency is {text!r}", "give numbers of 1 to 256: 1,4,16")
    return numbers


def settings_of(llm: "LLM", asked: "list[Asked]") -> dict[str, Any]:
    """What the measurement depends on, for the report."""
    lengths = [len(one.prompt) for one in asked]
    answers = [one.max_tokens for one in asked]
    return {
        "computes": llm.describe(),
        "drafter": llm.pairing.reason,
        "draft_n_max": llm.pairing.n_draft_max,
        "n_requests": len(asked),
        "prompt_tokens": {"min": min(lengths), "max": max(lengths), "sum": sum(lengths)},
        "answer_tokens": {"min": min(answers), "max": max(answers), "sum": sum(answers)},
    }


def measure(llm: "LLM", asked: "list[Asked]", concurrencies: list[int], rounds: int) -> "list[Run]":
    """All runs, behind a progress bar that shows the newest rate."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from outdraft.bench.throughput import measure_all, own_modes, warm_up

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[newest]}"),
    )
    modes, runs = own_modes(llm), []
    with Progress(*columns, console=remarks()) as progress:
        total = len(modes) * len(concurrencies) * rounds
        task = progress.add_task("", total=total, newest="warming up")
        warm_up(llm, modes, asked, concurrencies[-1])
        for run in measure_all(llm, modes, asked, concurrencies, rounds):
            runs.append(run)
            newest = f"{run.concurrency} at once, {run.mode}: {run.tok_s:.0f} tokens/s"
            progress.update(task, advance=1, newest=newest)
    return runs


def show(report: dict[str, Any]) -> None:
    """The report as tables on stdout."""
    settings, machine, console = report["settings"], report["machine"], results()
    console.print(f"\n{settings['model']} on {machine['cpu']}, threads: {machine['threads']}")
    console.print(f"{settings['computes']}, up to {settings['draft_n_max']} drafts a step")
    console.print(rate_table(report))
    for figures in report["summary"]["by_concurrency"]:
        console.print(
            f"{figures['concurrency']} at once: controller over plain "
            f"{_ratio(figures['controller_over_plain'])}, over {figures['best_other']} (the best "
            f"other) {_ratio(figures['controller_over_best_other'])}"
        )
    together = report["summary"]["together_over_one_after_another"]
    if together is not None:
        console.print(
            f"{together['concurrency']} at once over one after another: controller "
            f"{_ratio(together['controller'])}, plain {_ratio(together['plain'])}"
        )
    same = "identical" if report["identical"] else "DIFFERENT"
    console.print(f"Greedy tokens are {same} over all modes, concurrencies and rounds.")


def rate_table(report: dict[str, Any]) -> Any:
    """A rich table, one row for each concurrency and mode."""
    settings = report["settings"]
    made = new_table(
        f"{settings['n_requests']} requests, {settings['rounds']} rounds: tokens per second "
        "(lowest–highest),\nms to the first token and ms a token after it, median and 99 %",
        ["mode", "tok/s", "first", "99 %", "each", "99 %"],
    )
    for row in report["rows"]:
        made.add_row(
            str(row["concurrency"]),
            row["mode"],
            f"{row['tok_s']:.0f} ({row['tok_s_min']:.0f}–{row['tok_s_max']:.0f})",
            *(f"{row[name]:.1f}" for name in ("ttft_ms_p50", "ttft_ms_p99")),
            *(
                "" if row[name] is None else f"{row[name]:.2f}"
                for name in ("tpot_ms_p50", "tpot_ms_p99")
            ),
        )
    return made


def _ratio(figures: dict[str, float]) -> str:
    return f"{figures['ratio']:.2f} ({figures['min']:.2f}–{figures['max']:.2f})"


def save(report: dict[str, Any], path: Path) -> None:
    """The JSON and, beside it under the same name, the chart.

    Raises:
        OutdraftError: one of them cannot be written.
    """
    from outdraft.bench.chart import draw_throughput
    from outdraft.bench.report import write_bytes, write_json

    picture = path.with_suffix(".png")
    write_json(path, report)
    write_bytes(picture, draw_throughput(report))
    remark(f"written: {path} and {picture}")
