"""`outdraft fit`: what of a model fits into this machine's memory, and how to start it.

The model's parts are found out by checkup.py, as `inspect` does; the sums are the engine's
(engine/room.py). Not here: how fast it will be (`bench`).
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from outdraft.cli import options
from outdraft.cli.console import harmless, results
from outdraft.config import DEFAULT_CTX_SIZE
from outdraft.errors import ModelError, OutdraftError

if TYPE_CHECKING:
    from outdraft.cli.findings import Checkup
    from outdraft.engine.room import Choice, Parts, Room

DOES_NOT_FIT = 1

app = typer.Typer(add_completion=False)


@app.command()
def fit(
    model: options.Model,
    assistant: options.Assistant = None,
    device: options.Card = "auto",
    ctx_size: options.CtxSize = None,
    parallel: Annotated[
        int, typer.Option("--parallel", "-np", min=1, max=4096, help="Requests in a batch.")
    ] = 16,
    memory_gb: Annotated[
        float | None, typer.Option(min=0, help="Plan for so much memory, not for what is free.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what fits into this machine's memory, and the command to run it with.

    Reads JSON files and tensor headers, not the weights. Exit code 1 if the model does not fit.
    """
    from outdraft.cli.checkup import examine
    from outdraft.engine.room import FORMATS, choose, room_of
    from outdraft.weights.find import resolve_model

    found = examine(resolve_model(model), assistant)
    parts = parts_of(found)
    where, free, total = memory_of(found, device, memory_gb)
    ctx = min(ctx_size or DEFAULT_CTX_SIZE, parts.max_tokens)
    rooms = [room_of(parts, q, free, ctx) for q in FORMATS if q in parts.weight_bytes]
    choice = choose(parts, free, ctx, parallel)
    line = None if choice is None else command_line(model, assistant, device, parallel, choice)
    if as_json:
        told = {
            "model": model,
            "memory": {"where": where, "free_bytes": free, "total_bytes": total},
            "ctx_size": ctx,
            "stored": parts.stored,
            "drafter": found.drafter_reason,
            "formats": [asdict(room) for room in rooms],
            "choice": None if choice is None else {**asdict(choice), "command": line},
        }
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        show(found, parts, rooms, ctx)
        of = "" if total is None else f" of {total / 1e9:,.1f}"
        results().print(f"\n{where}: {free / 1e9:,.1f}{of} GB free")
        results().print(harmless(verdict(rooms, choice, ctx, line)), style="bold")
    if choice is None:
        raise typer.Exit(DOES_NOT_FIT)


def parts_of(found: "Checkup") -> "Parts":
    """The sizes of a model's parts.

    Raises:
        ModelError: it cannot run at all, or drafts for another.
    """
    from outdraft.engine.room import Parts
    from outdraft.models.heads import has_heads, head_family
    from outdraft.models.registry import family_of
    from outdraft.weights.config import read_config

    if found.problems:
        raise ModelError(found.problems[0].message, found.problems[0].hint)
    raw = read_config(found.path)
    family = family_of(raw, found.path)
    config = family.read_config(raw)
    memories = [family.memory_layers(config)]
    drafter = None if found.drafter is None or found.drafter.problems else found.drafter
    if drafter is not None and drafter.kind == "native head" and has_heads(config):
        memories.append(head_family(config).memory_layers(config))
    if drafter is not None and drafter.kind == "draft model":
        small = read_config(drafter.path)
        own = family_of(small, drafter.path)
        memories.append(own.memory_layers(own.read_config(small)))
    drafter_bytes: dict[str, int] = {}
    if drafter is not None:  # kept in 8 bits at least
        packed = drafter.packed_bytes
        drafter_bytes = {q: packed.get(q, packed["w8"]) for q in ("bf16", "w8")}
        drafter_bytes["w4"] = packed["w8"]
    quantised = found.quantisation or ""
    return Parts(
        config=config,
        memories=memories,
        weight_bytes=dict(found.packed_bytes),
        drafter_bytes=drafter_bytes,
        stored="w4" if "int4" in quantised else "w8" if "int8" in quantised else "bf16",
        max_tokens=config.max_position_embeddings,
        n_draft_max=0 if drafter is None else drafter.n_draft_default or 0,
    )


def memory_of(
    found: "Checkup", device: str, memory_gb: float | None
) -> tuple[str, int, int | None]:
    """Where the model would run, and what is free there and in all, in bytes.

    Raises:
        OutdraftError: the device cannot be used, or the system does not say what is free.
    """
    from outdraft.bench.hardware import available_bytes, total_bytes
    from outdraft.device import find_device, free_bytes
    from outdraft.models.registry import TARGETS

    card = find_device(device, cpu_only=TARGETS[str(found.model_type)].cpu_only)
    where = "memory" if card.type == "cpu" else "the GPU's memory"
    if memory_gb is not None:
        return f"{where}, as you said", int(memory_gb * 1e9), None
    if card.type != "cpu":
        return where, *free_bytes(card)
    free = available_bytes()
    if free is None:
        raise OutdraftError("the system does not say what memory is free", "give --memory-gb")
    return where, free, total_bytes()


def command_line(
    model: str, assistant: str | None, device: str, parallel: int, choice: "Choice"
) -> str:
    """How to start the server that was chosen."""
    import shlex

    words = ["outdraft", "serve", model]
    words += [] if assistant is None else ["--assistant", assistant]
    words += [] if device == "auto" else ["--device", device]
    words += ["--quant", choice.quant, "--ctx-size", str(choice.ctx_tokens)]
    words += [] if parallel == 16 else ["--parallel", str(parallel)]
    words += [] if choice.kv_tokens is None else ["--kv-cache-tokens", str(choice.kv_tokens)]
    return shlex.join(words)


def show(found: "Checkup", parts: "Parts", rooms: list["Room"], ctx: int) -> None:
    """A row for each format."""
    from rich.table import Table

    from outdraft.cli.inspect import size

    table = Table(box=None, padding=(0, 2, 0, 0))
    names = ("--quant", "weights", "drafter", f"{ctx} tokens", "1000 more", "a pass", "in all")
    for name in (*names, "longest"):
        table.add_column(name, justify="left" if name == "--quant" else "right", no_wrap=True)
    for room in rooms:
        parts_bytes = (room.weight_bytes, room.drafter_bytes, room.ctx_bytes)
        every = sum(parts_bytes) + room.other_bytes
        sizes = (*parts_bytes, room.per_1k_bytes, room.other_bytes, every)
        longest = str(room.most_tokens or "none")
        table.add_row(room.quant, *(size(n) if n else "-" for n in sizes), longest)
    results().print(table)
    reason = found.drafter_reason or "none"
    results().print(harmless(f"\nstored as {parts.stored}; drafter: {reason}"))


def verdict(rooms: list["Room"], choice: "Choice | None", ctx: int, line: str | None) -> str:
    """The conclusion."""
    if choice is None:
        short = min(room.short_bytes for room in rooms) / 1e9
        return f"It does not fit: {short:.2f} GB are missing."
    if choice.ctx_tokens < ctx:
        return f"It fits with {choice.ctx_tokens} tokens:\n  {line}"
    return f"It fits:\n  {line}"
