"""`outdraft tune`: make the drafter fit a target. Not here: how (train/tune.py)."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.cli.options import Adapter, Bits, Model

NOTHING_GAINED = 3

app = typer.Typer()


@app.command()
def tune(
    ctx: typer.Context,
    model: Model,
    data: Annotated[list[Path], typer.Option(help="Text, JSONL or JSON; can be repeated.")],
    out: Annotated[
        Path, typer.Option(help="Directory of the new drafter; an unfinished run goes on.")
    ],
    heldout: Annotated[
        list[Path] | None, typer.Option(help="To measure by, instead of a part of --data.")
    ] = None,
    assistant: Annotated[
        str | None,
        typer.Option(help="The drafter to start from; found by itself if not given; new: none."),
    ] = None,
    adapter: Adapter = None,
    quant: Bits = "auto",
    minutes: Annotated[float, typer.Option(help="About how long the whole run may take.")] = 15.0,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of what fits.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Texts the target writes, instead of what fits.")
    ] = None,
    loss: Annotated[str, typer.Option(help="kl, lk, nla or ce.")] = "kl",
    draft_n: Annotated[
        int | None, typer.Option("--spec-draft-n", help="Drafts of a round; 4 if not given.")
    ] = None,
    n_heldout: Annotated[
        int, typer.Option("--n-heldout", help="Prompts held out; half select, half compare.")
    ] = 48,
    prompt_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after a prompt.")] = 128,
    seed: Annotated[int, typer.Option(help="Of sampling and of the order of the texts.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Train even where there is nothing to gain.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an unfinished run, or begin again.")
    ] = True,
) -> None:
    """Make the drafter fit a target, on the target's own answers.

    The new drafter is written only if it is better on held-out prompts outside the noise; else the
    exit code is 3 and nothing is left. Ctrl-C stops; the same command goes on from there.
    """
    _run(out, ctx.params, fresh=not resume)


def _run(out: Path, given: dict[str, Any], *, fresh: bool) -> None:
    from rich.console import Console

    from outdraft.cli.train import ProgressBars
    from outdraft.train.trainer import TrainingStopped
    from outdraft.train.tune import NothingGained, tune
    from outdraft.train.tune_settings import TuneSettings

    values = {f.name: given[f.name] for f in fields(TuneSettings) if f.name in given}
    for name in ("data", "heldout"):
        values[name] = tuple(str(path) for path in given[name] or ())
    settings = TuneSettings(target=given["model"], **values)
    console = Console(stderr=True)
    if settings.new:
        from outdraft.train.propose import propose_assistant
        from outdraft.train.served import check_target
        from outdraft.weights.config import read_config
        from outdraft.weights.find import resolve_model

        path = resolve_model(settings.target)
        check_target(path)
        for reason in propose_assistant(read_config(path)).reasons:
            console.print(f"A new drafter: {reason}.")
    with ProgressBars(console) as bars:
        try:
            report = tune(out, settings, bars.report, fresh=fresh)
        except TrainingStopped:
            console.print("Stopped. The same command goes on from here.")
            raise typer.Exit(130) from None
        except NothingGained as reason:
            kept = "" if settings.new else "kept the stock drafter; "
            console.print(f"Nothing was written: {kept}{reason}")
            raise typer.Exit(NOTHING_GAINED) from None
    console.print(summary_of(out, report))


def summary_of(out: Path, report: dict[str, Any]) -> str:
    """The result in a few lines."""
    parts = {
        name: f"{report[name]['tokens_per_pass']:.2f} ± {report[name]['standard_error']:.2f}"
        for name in ("before", "after", "change")
    }
    lines = [
        f"{parts['after']} tokens per pass on held-out prompts, {parts['before']} before "
        f"(change {parts['change']}, {report['draft_length']} drafts, greedy)",
        f"Use it: --assistant {out}",
    ]
    lines += [f"Passed over: {row}" for row in report["bad_rows"][:3]]
    return "\n".join(lines)
