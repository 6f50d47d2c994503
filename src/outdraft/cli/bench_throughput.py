"""`outdraft bench throughput`: many requests at once. The measuring is bench/throughput.py's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from outdraft.cli import options
from outdraft.cli.bench import find_prompts, new_table
from outdraft.cli.console import counting, results, save
from outdraft.config import EngineConfig, SpecType
from outdraft.errors import OutdraftError

if TYPE_CHECKING:
    from outdraft.bench.throughput import Asked, Mode, Run
    from outdraft.engine.engine import LLM

PROMPTS_PER_KIND = 8

Text = Literal["mixed", "edits", "random"]
DrafterArm = Literal["own", "random", "ngram"]

app = typer.Typer(add_completion=False)


JsonFile = Annotated[
    str | None,
    typer.Option("--json", help="Write a report here, and a chart beside it; - prints the report."),
]


@app.command()
def bench_throughput(
    ctx: typer.Context,
    model: options.Model,
    json_file: JsonFile = None,
    concurrency: Annotated[str, typer.Option(help="Requests in progress.")] = "1,4,16",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests a run; twice the highest concurrency.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=4, help="Most tokens of an answer.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each mode.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and lengths.")] = 0,
    text: Annotated[
        Text, typer.Option(help="Code, JSON, prose and edits; edits alone; or random tokens.")
    ] = "mixed",
    drafter: Annotated[
        DrafterArm,
        typer.Option(
            help="The model's own; with random weights; or with n-grams, against either alone."
        ),
    ] = "own",
    assistant: options.Assistant = None,
    adapter: options.Adapter = None,
    spec_draft_n_max: options.DraftMax = None,
    device: options.Card = "auto",
    backend: options.Kernels = "auto",
    dtype: options.Compute = "auto",
    quant: options.Bits = "auto",
    kv_dtype: options.KvType = "bf16",
    kv_cache_tokens: options.KvCacheTokens = None,
    threads: options.Threads = None,
) -> None:
    """Measure many requests at once: plain, fixed draft lengths, and lengths chosen while running.

    Greedy, prompts and answers of mixed lengths, each run the same requests; no prefix cache.
    "controller" chooses lengths; with `--drafter ngram` from n-grams and the assistant.
    """
    wanted = read_concurrencies(concurrency)
    # Prompts come again in every run and would be computed only once with a prefix cache.
    config = options.engine_config(ctx.params, max_sequences=wanted[-1], prefix_cache=False)
    settings: dict[str, Any] = {
        "model": model,
        "text": text,
        "drafts": drafter,
        "rounds": rounds,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    deliver(report_of(settings, config, wanted, requests or 2 * wanted[-1]), json_file)


def report_of(
    settings: dict[str, Any], config: EngineConfig, concurrencies: list[int], n: int
) -> dict[str, Any]:
    """Load, measure with n requests, and give the report; `settings` become part of it."""
    from outdraft.bench.arms import modes_of, of_text, random_requests
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.throughput import mix_requests, summarise
    from outdraft.cli.streaming import load

    model, seed, max_tokens = (settings[name] for name in ("model", "seed", "max_tokens"))
    llm = load(model, config)
    check(llm, max_tokens)
    if settings["text"] == "random":
        asked = random_requests(llm, n, max_tokens, seed)
    else:
        prompts = of_text(find_prompts(llm, None, PROMPTS_PER_KIND, seed), settings["text"])
        asked = mix_requests(prompts, n, max_tokens, llm.ctx_size, seed)

    def load_with(drafter: SpecType) -> "LLM":
        assistant = None if drafter == "ngram" else config.assistant
        return load(model, replace(config, spec_type=drafter, assistant=assistant))

    modes = modes_of(llm, settings["drafts"], seed, load_with)
    report = summarise(measure(modes, asked, concurrencies, settings["rounds"]))
    report["settings"] = settings_of(llm, asked) | settings
    return report | {"machine": describe_machine(), **describe_version()}


def deliver(report: dict[str, Any], json_file: str | None) -> None:
    """The report as JSON on stdout, or as tables and, if a file is named, into it."""
    if json_file == "-":
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    show(report)
    if json_file is not None:
        from outdraft.bench.chart import draw_throughput

        save(report, Path(json_file), draw_throughput)


def check(llm: "LLM", max_tokens: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        OutdraftError: there is no drafter, or the answers leave no room for prompts.
    """
    if llm.pairing.drafter is None:
        raise OutdraftError(
            f"there is nothing to compare: {llm.pairing.reason}",
            "give the drafter with --assistant, and a --spec-draft-n-max above 0",
        )
    if max_tokens > llm.ctx_size // 2:
        raise OutdraftError(f"--max-tokens {max_tokens} is too long", f"most: {llm.ctx_size // 2}")


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


def measure(
    modes: "list[Mode]", asked: "list[Asked]", concurrencies: list[int], rounds: int
) -> "list[Run]":
    """All runs, behind a progress bar that shows the newest rate."""
    from outdraft.bench.throughput import measure_all, warm_up

    runs = []
    with counting() as progress:
        total = len(modes) * len(concurrencies) * rounds
        task = progress.add_task("", total=total, newest="warming up")
        warm_up(modes, asked, concurrencies[-1])
        for run in measure_all(modes, asked, concurrencies, rounds):
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
