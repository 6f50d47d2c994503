"""`outdraft bench quality`: what quantising costs. The measuring is bench/quality.py's."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from outdraft.cli import options
from outdraft.cli.bench import find_prompts, new_table
from outdraft.cli.console import remark, remarks, results
from outdraft.config import EngineConfig, Quant
from outdraft.errors import OutdraftError

if TYPE_CHECKING:
    from outdraft.engine.engine import LLM

app = typer.Typer(add_completion=False)


@app.command()
def bench_quality(
    model: options.Model,
    quant: Annotated[str, typer.Option(help="What to compare with bf16: w8, w4.")] = "w8,w4",
    text: Annotated[
        Path | None, typer.Option(help="A held-out text, or a directory of *.txt and *.py.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of text scored.")] = 16384,
    window: Annotated[int, typer.Option(min=32, help="Tokens scored in one context.")] = 512,
    prompts: Annotated[int, typer.Option(min=0, help="Prompts of each kind for acceptance.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens written after each prompt.")] = 128,
    assistant: options.Assistant = None,
    spec_draft_n_max: options.DraftMax = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write a report here.")] = None,
    threads: options.Threads = None,
) -> None:
    """Measure what quantising costs: perplexity, KL and acceptance against bf16 weights.

    The bf16 weights of a checkpoint that is quantised already are its dequantised ones.
    """
    wanted = read_quants(quant)
    from outdraft.bench import quality
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.prompts import HELDOUT
    from outdraft.bench.report import write_json
    from outdraft.cli.streaming import load

    config = EngineConfig(assistant=assistant, draft_n_max=spec_draft_n_max, threads=threads)
    config = replace(config, backend="cpu", quant="bf16", max_sequences=1)
    texts = quality.read_texts(text or HELDOUT)
    base = load(model, config)
    if window > base.ctx_size - 1:
        raise OutdraftError(f"--window {window} is too long", f"at most {base.ctx_size - 1}")
    chosen = find_prompts(base, None, prompts, 0) if prompts else []
    with remarks().status("acceptance at bf16"):
        bf16 = quality.acceptance_figures(base, chosen, max_tokens) if chosen else None
    rows: dict[str, Any] = {}
    for name in wanted:
        other = load(model, replace(config, quant=name))
        with remarks().status(f"{name} against bf16"):
            rows[name] = quality.text_figures(
                quality.compare_windows(base, other, texts, window, tokens)
            )
            accepted = quality.acceptance_figures(other, chosen, max_tokens) if chosen else None
            rows[name]["acceptance"] = accepted
    report = {
        "settings": settings_of(base) | {"window": window, "max_tokens": max_tokens},
        "bf16": {"acceptance": bf16},
        "quants": rows,
        "machine": describe_machine(),
        **describe_version(),
    }
    report["settings"] |= {"model": model, "n_prompts": len(chosen)}
    show(report)
    if json_file is not None:
        write_json(json_file, report)
        remark(f"written: {json_file}")


def settings_of(base: "LLM") -> dict[str, Any]:
    """What the figures depend on, for the report."""
    return {
        "params_by_dtype": dict(base.target.report.params_by_dtype),
        "drafter": base.pairing.reason,
        "draft_n_max": base.pairing.n_draft_max,
    }


def read_quants(names: str) -> list[Quant]:
    """The formats named in `--quant`.

    Raises:
        OutdraftError: one of them is no format, or bf16 itself is asked for.
    """
    chosen: list[Quant] = []
    for name in (part.strip() for part in names.split(",")):
        found = next((q for q in get_args(Quant) if q == name and q not in ("auto", "bf16")), None)
        if found is None:
            raise OutdraftError(f"--quant has {name!r}", "give w8, w4 or both as w8,w4")
        chosen.append(found)
    return list(dict.fromkeys(chosen))


def show(report: dict[str, Any]) -> None:
    """The report as a table on stdout."""
    console, rows = results(), report["quants"]
    stored = report["settings"]["params_by_dtype"]
    if any(kind.startswith("int") for kind in stored):
        console.print(f"\nThe checkpoint is {', '.join(stored)}; bf16 is what it dequantises to.")
    n_tokens = max(row["n_tokens"] for row in rows.values())
    made = new_table(
        f"{n_tokens} tokens of held-out text; greedy drafting",
        ["perplexity", "change %", "± %", "KL", "same top %", "tok/pass", "accepted %"],
    )
    perplexity = next(iter(rows.values()))["bf16_perplexity"]
    made.add_row("bf16", f"{perplexity:.4f}", *[""] * 4, *_accepted(report["bf16"]["acceptance"]))
    for name, row in rows.items():
        error = row["nll_standard_error"]
        made.add_row(
            name,
            f"{row['perplexity']:.4f}",
            f"{100 * row['perplexity_change']:+.2f}",
            "" if error is None else f"{100 * error:.2f}",
            f"{row['kl']:.5f}",
            f"{100 * row['top1_agreement']:.1f}",
            *_accepted(row["acceptance"]),
        )
    console.print(made)


def _accepted(figures: dict[str, Any] | None) -> tuple[str, str]:
    if figures is None:
        return "", ""
    shares = " ".join(f"{100 * share:.0f}" for share in figures["conditional"])
    return f"{figures['tokens_per_pass']:.2f}", shares
