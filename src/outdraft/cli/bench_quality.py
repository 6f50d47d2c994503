"""`outdraft bench quality`: what quantising costs.

The measuring is that of bench/quality.py and bench/acceptance.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from outdraft.cli import options
from outdraft.cli.bench import new_table
from outdraft.cli.console import remark, remarks, results
from outdraft.config import EngineConfig, Quant
from outdraft.errors import OutdraftError

if TYPE_CHECKING:
    from outdraft.bench.acceptance import Scored, Text
    from outdraft.engine.engine import LLM

AT_ONCE = 8  # texts drafted for in one pass
CONTEXT = 32  # tokens of a held-out text that come before the first round
BEGINNING = 64  # tokens that bf16 continues
KINDS = {"heldout": "held-out text", "continued": "text that bf16 wrote"}

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
    continued: Annotated[
        int, typer.Option(min=0, help="Beginnings of text that bf16 continues for acceptance.")
    ] = 96,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens it writes after each.")] = 128,
    assistant: options.Assistant = None,
    spec_draft_n_max: options.DraftMax = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write a report here.")] = None,
    threads: options.Threads = None,
) -> None:
    """Measure what quantising costs: perplexity, KL and acceptance against bf16 weights.

    Acceptance is of greedy drafts at every position of texts that are the same for all: the
    held-out ones, and what bf16 makes of their beginnings. The bf16 weights of a checkpoint that is
    quantised already are its dequantised ones.
    """
    wanted = read_quants(quant)
    from outdraft.bench import quality
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.prompts import HELDOUT
    from outdraft.bench.report import write_json
    from outdraft.cli.streaming import load

    config = EngineConfig(assistant=assistant, draft_n_max=spec_draft_n_max, threads=threads)
    config = replace(config, backend="cpu", quant="bf16", max_sequences=AT_ONCE)
    texts = quality.read_texts(text or HELDOUT)
    base = load(model, config)
    if window > base.ctx_size - 1:
        raise OutdraftError(f"--window {window} is too long", f"at most {base.ctx_size - 1}")
    windows = list(quality.windows(base, texts, window, tokens))
    if not windows:
        raise OutdraftError("the text is too short", "give more of it with --text")
    drafted = texts_to_draft(base, texts, windows, continued, max_tokens)
    scored = score(base, drafted, "bf16")
    rows: dict[str, Any] = {}
    for name in wanted:
        other = load(model, replace(config, quant=name))
        with remarks().status(f"{name} against bf16"):
            rows[name] = quality.text_figures(quality.compare_windows(base, other, windows))
        rows[name]["acceptance"] = figures_of(score(other, drafted, name), scored)
    report = {
        "settings": settings_of(base) | {"window": window, "max_tokens": max_tokens},
        "bf16": {"acceptance": figures_of(scored, None)},
        "quants": rows,
        "machine": describe_machine(),
        **describe_version(),
    }
    report["settings"]["model"] = model
    show(report)
    if json_file is not None:
        write_json(json_file, report)
        remark(f"written: {json_file}")


def texts_to_draft(
    base: "LLM",
    texts: Sequence[str],
    windows: Sequence[list[int]],
    n_continued: int,
    max_tokens: int,
) -> "dict[str, list[Text]]":
    """What acceptance is measured on, by kind; nothing without a drafter."""
    from outdraft.bench import quality
    from outdraft.bench.acceptance import Text, continuations

    if base.pairing.drafter is None:
        return {}
    found = {"heldout": [Text(window, CONTEXT) for window in windows if len(window) >= CONTEXT]}
    starts = list(quality.windows(base, texts, BEGINNING, n_continued * BEGINNING))
    with remarks().status("bf16 continues the texts"):
        found["continued"] = list(continuations(base, starts[:n_continued], max_tokens))
    return {kind: some for kind, some in found.items() if some}


def score(llm: "LLM", texts: "dict[str, list[Text]]", name: str) -> "dict[str, list[Scored]]":
    """All texts with one target, behind a progress bar."""
    from rich.progress import Progress

    from outdraft.bench.acceptance import score_texts

    total = sum(len(t.tokens) - t.first + 1 for some in texts.values() for t in some)
    with Progress(console=remarks()) as progress:
        task = progress.add_task(f"acceptance at {name}", total=total)
        return {
            kind: score_texts(
                llm, some, llm.pairing.n_draft_max, lambda n: progress.advance(task, n)
            )
            for kind, some in texts.items()
        }


def figures_of(
    own: "dict[str, list[Scored]]", base: "dict[str, list[Scored]] | None"
) -> dict[str, Any]:
    """Figures by kind of text."""
    from outdraft.bench.acceptance import acceptance_figures

    return {
        kind: acceptance_figures(scored, None if base is None else base[kind])
        for kind, scored in own.items()
    }


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
    """The report as tables on stdout."""
    console, rows = results(), report["quants"]
    stored = report["settings"]["params_by_dtype"]
    if any(kind.startswith("int") for kind in stored):
        console.print(f"\nThe checkpoint is {', '.join(stored)}; bf16 is what it dequantises to.")
    n_tokens = max(row["n_tokens"] for row in rows.values())
    made = new_table(
        f"{n_tokens} tokens of held-out text",
        ["perplexity", "change %", "± %", "KL", "same top %"],
    )
    made.add_row("bf16", f"{next(iter(rows.values()))['bf16_perplexity']:.4f}", *[""] * 4)
    for name, row in rows.items():
        made.add_row(
            name,
            f"{row['perplexity']:.4f}",
            f"{100 * row['perplexity_change']:+.2f}",
            percent(row["nll_standard_error"]),
            f"{row['kl']:.5f}",
            f"{100 * row['top1_agreement']:.1f}",
        )
    console.print(made)
    for kind, figures in report["bf16"]["acceptance"].items():
        console.print(acceptance_table(kind, figures, rows))


def acceptance_table(kind: str, base: dict[str, Any], rows: dict[str, Any]) -> Any:
    """Greedy drafts at every position of one kind of texts."""
    made = new_table(
        f"{base['n_positions']} positions of {KINDS[kind]}, greedy drafts: accepted % by\n"
        "position, if those before were; change from bf16 in points, ± its standard error",
        ["tok/pass", "accepted %", *(f"{i + 1}" for i in range(len(base["conditional"])))],
    )
    made.add_row(
        "bf16",
        f"{base['tokens_per_pass']:.2f}",
        f"{100 * base['accepted']:.1f}",
        *(f"{100 * share:.1f}" for share in base["conditional"]),
    )
    for name, row in rows.items():
        own = row["acceptance"][kind]
        changes = zip(
            [own["accepted_change"], *own["conditional_change"]],
            [
                own["accepted_change_standard_error"],
                *own["conditional_change_standard_error"],
            ],
            strict=True,
        )
        made.add_row(
            name,
            f"{own['tokens_per_pass']:.2f}",
            *(f"{100 * change:+.1f} ±{percent(error, 1)}" for change, error in changes),
        )
    return made


def percent(share: float | None, digits: int = 2) -> str:
    """A share in per cent, "" if it is not known."""
    return "" if share is None else f"{100 * share:.{digits}f}"
