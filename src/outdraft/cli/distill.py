"""`outdraft distill`: teach a student what a teacher answers. Not here: how (train/distill.py)."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from outdraft.cli.options import Bits

app = typer.Typer()


@app.command()
def distill(
    ctx: typer.Context,
    student: Annotated[str, typer.Option(help="Model directory to begin from; never changed.")],
    data: Annotated[
        list[Path], typer.Option(help="JSONL of conversations with tools; can be repeated.")
    ],
    out: Annotated[
        Path, typer.Option(help="Directory of the new model; an unfinished run goes on.")
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Model that answers; without one the data's answers are all.")
    ] = None,
    heldout: Annotated[
        list[Path] | None, typer.Option(help="To measure by, instead of a part of --data.")
    ] = None,
    traces: Annotated[
        str,
        typer.Option(help="Whose answers: `data`, `teacher`, or `auto`, who fills in."),
    ] = "auto",
    rounds: Annotated[
        int, typer.Option(help="Rounds on the student's own answers, under the teacher.")
    ] = 3,
    beta: Annotated[
        float, typer.Option(help="0: KL from the teacher, 1: reverse KL, between: generalised JSD.")
    ] = 0.5,
    quant: Bits = "auto",
    minutes: Annotated[float, typer.Option(help="About how long the whole run may take.")] = 15.0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each stage, instead of what fits.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Conversations a step.")] = 8,
    lr: Annotated[
        float, typer.Option(help="Learning rate; a quarter of it on own answers.")
    ] = 1e-3,
    n_heldout: Annotated[int, typer.Option("--n-heldout", help="Conversations held out.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longest conversation.")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Longest answer that is written.")] = 256,
    seed: Annotated[int, typer.Option(help="Of sampling and of the order of the texts.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an unfinished run, or begin again.")
    ] = True,
) -> None:
    """Teach a student what a teacher answers, calls of tools included.

    Vocabulary and chat template are compared first. Ctrl-C stops; the same command goes on from
    there.
    """
    _run(out, ctx.params, fresh=not resume)


def _run(out: Path, given: dict[str, Any], *, fresh: bool) -> None:
    from rich.console import Console

    from outdraft.cli.train import ProgressBars
    from outdraft.train.distill import distill
    from outdraft.train.distill_settings import DistillSettings
    from outdraft.train.trainer import TrainingStopped

    values = {f.name: given[f.name] for f in fields(DistillSettings) if f.name in given}
    for name in ("data", "heldout"):
        values[name] = tuple(str(path) for path in given[name] or ())
    settings = DistillSettings(**values)
    console = Console(stderr=True)
    with ProgressBars(console) as bars:
        try:
            report = distill(out, settings, bars.report, fresh=fresh)
        except TrainingStopped:
            console.print("Stopped. The same command goes on from here.")
            raise typer.Exit(130) from None
    nats = report["heldout_nats"]
    console.print(
        f"{nats['after']:.3f} nats a token on held-out answers, {nats['before']:.3f} before, in "
        f"{report['seconds'] / 60:.1f} minutes. Use it: outdraft serve {out}"
    )
    for row in report["bad_rows"][:3]:
        console.print(f"Passed over: {row}", markup=False)
