"""`outdraft inspect`: a checkpoint doctor. The finding out is checkup.py's."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.console import harmless, results

if TYPE_CHECKING:
    from outdraft.cli.findings import Checkup

CANNOT_RUN = 1

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    model: options.Model,
    assistant: options.Assistant = None,
    adapter: options.Adapter = None,
    cache_dir: options.CacheDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what a model directory holds, what fits and what is missing.

    Reads JSON files and tensor headers, not the weights. Exit code 1 if the model, or a drafter
    that is asked for, cannot run.
    """
    from outdraft.cli.checkup import examine
    from outdraft.weights.find import resolve_model
    from outdraft.weights.packed_cache import PackedCache

    cache = PackedCache(Path(cache_dir) if cache_dir else options.default_cache_dir())
    found = examine(resolve_model(model), assistant, cache, adapter)
    if as_json:
        print(json.dumps(as_object(found), ensure_ascii=False, indent=2))
    else:
        show(found)
    asked = found.drafter if assistant is not None else None
    if found.problems or (asked is not None and asked.problems):
        raise typer.Exit(CANNOT_RUN)


def as_object(found: "Checkup") -> dict[str, Any]:
    """Everything that was found, for --json."""
    return {
        **asdict(found),
        "path": str(found.path),
        "n_params": found.n_params,
        "drafter": None if found.drafter is None else as_object(found.drafter),
        "verdict": verdict(found),
    }


def verdict(found: "Checkup") -> str:
    """The conclusion in a sentence."""
    if found.problems:
        n = len(found.problems)
        return f"It cannot run: {n} problem{'s' if n > 1 else ''}, see above."
    if found.kind == "assistant":
        return f"A whole drafter; it proposes {found.n_draft_default} tokens a step by default."
    if found.drafter is None:
        return f"It runs, without drafting: {found.drafter_reason}."
    if found.drafter.problems:
        return f"It runs, without drafting: {found.drafter.problems[0].message}."
    return f"It runs, drafting up to {found.drafter.n_draft_default} tokens a step."


def show(found: "Checkup") -> None:
    """A table of facts, the problems, and the verdict."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*facts(found), *drafter_facts(found)]:
        table.add_row(name, harmless(value))
    console = results()
    console.print(table)
    for problem in [*found.problems, *(found.drafter.problems if found.drafter else [])]:
        console.print(f"\n{problem.where}: {harmless(problem.message)}", style="red")
        console.print(f"  {harmless(problem.hint)}", style="dim")
    console.print(f"\n{harmless(verdict(found))}", style="bold")


def facts(found: "Checkup") -> list[tuple[str, str]]:
    """The rows of one model."""
    rows = [
        ("directory", str(found.path)),
        ("family", f"{found.model_type or 'unknown'} ({found.kind})"),
        *((name, str(value)) for name, value in found.shape.items()),
    ]
    if found.params_by_group:
        rows.append(("parameters", f"{found.n_params:,}"))
        rows += [(f"  {group}", f"{n:,}") for group, n in found.params_by_group.items()]
    if found.n_tensors is not None:
        stored = ", ".join(f"{n:,} {dtype}" for dtype, n in found.stored_params.items())
        rows.append(("in the files", f"{found.n_tensors} tensors, {size(found.n_bytes or 0)}"))
        rows.append(("  elements", stored))
    if found.shape:
        rows.append(("quantisation", found.quantisation or "none"))
    if found.adapter is not None:
        rows.append(("adapter", found.adapter))
    if found.packed_bytes:
        sizes = (f"{size(n)} {format}" for format, n in found.packed_bytes.items())
        rows.append(("packed", ", ".join(sizes)))
        rows += [(f"  kept {format}", path) for format, path in found.packed_files.items()]
    for ignored in found.ignored:
        rows.append(("left out", f"{ignored['count']} tensors: {ignored['reason']}"))
    if found.state_bytes:
        each = f"{size(found.state_bytes)}, k + 2 of them a sequence with drafts of up to k"
        rows.append(("recurrent state", each))
        kept = f"{found.kept_states} behind pages, {size(found.kept_states * found.state_bytes)}"
        if found.kept_states:
            rows.append(("  kept for later prompts", f"at most {kept} (--kept-states)"))
    for group, n_bytes in found.kv_bytes_per_token.items():
        window = f", at most {found.windows[group]} positions" if group in found.windows else ""
        rows.append((f"KV of {group}", f"{size(n_bytes)} a token{window}"))
    rows += [(f"text: {name}", str(value)) for name, value in found.tokenizer.items()]
    return rows


def drafter_facts(found: "Checkup") -> list[tuple[str, str]]:
    """The rows of a target's drafter."""
    if found.drafter_reason is None:
        return []
    rows = [("drafter", found.drafter_reason)]
    if found.drafter is not None:
        rows.append(("drafter: drafts a step", str(found.drafter.n_draft_default)))
        rows += [(f"drafter: {name}", value) for name, value in facts(found.drafter)[1:]]
    return rows


def size(n_bytes: int) -> str:
    """Bytes in the unit that fits."""
    amount = float(n_bytes)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.2f} GB"
