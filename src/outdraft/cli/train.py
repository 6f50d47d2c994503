"""`outdraft train …`: making models from text. Not here: how (train/)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from outdraft.train.trainer import Progress

DEFAULT_MINUTES = 20.0

app = typer.Typer(no_args_is_help=True, help="Train models.")


@app.callback()
def train() -> None:
    """Train models."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run; an unfinished one goes on.")],
    steps: Annotated[int | None, typer.Option(help="Training steps of the target.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Length of the whole run; 20 if no steps are given.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="cpu; for a GPU demo, the shipped size, or large, twice that.")
    ] = "cpu",
    data: Annotated[
        list[Path] | None, typer.Option(help="Text to learn, instead of Python source found here.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives another model.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with the run in --out, or begin again.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Make a small target and its assistant from scratch, and measure them.

    Ctrl-C stops after the step in progress; the same command goes on from there.
    """
    from rich.console import Console

    from outdraft.train.recipe import train_demo
    from outdraft.train.run import Settings
    from outdraft.train.trainer import TrainingStopped

    if steps is None and minutes is None:
        minutes = DEFAULT_MINUTES
    names = tuple(str(path) for path in data or ())
    settings = Settings(preset, steps, minutes, seed, names, device)
    console = Console(stderr=True)
    with ProgressBars(console) as bars:
        try:
            report = train_demo(out, settings, bars.report, fresh=not resume)
        except TrainingStopped:
            console.print(f"Stopped. The same command goes on from here: {out}")
            raise typer.Exit(130) from None
    console.print(summary_of(out, report))


def summary_of(out: Path, report: dict[str, Any]) -> str:
    """The result in a few lines."""
    accepted = " ".join(f"{share:.2f}" for share in report["acceptance_by_position"])
    same = "identical to" if report["identical"] else "DIFFERENT FROM"
    return (
        f"Held-out loss {report['heldout_nats_per_token']:.2f} nats/token "
        f"({report['heldout_bits_per_byte']:.2f} bits/byte)\n"
        f"{report['tokens_per_pass']:.2f} tokens per pass, greedy, "
        f"{report['draft_length']} drafts (accepted by position: {accepted}); "
        f"tokens {same} plain decoding\n"
        f"Try it: outdraft generate {out / 'target'} --prompt 'def '\n"
        f"Curves: {out / 'plot.png'}"
    )


class ProgressBars:
    """A bar for each stage: steps, loss, speed, time left."""

    def __init__(self, console: Any) -> None:
        from rich import progress

        self.bars = progress.Progress(
            progress.TextColumn("{task.description:>10}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[detail]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
        )
        self.tasks: dict[str, progress.TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def report(self, state: "Progress") -> None:
        """Show the progress of a stage (a `Report`)."""
        if state.phase not in self.tasks:
            self.tasks[state.phase] = self.bars.add_task(
                state.phase, total=state.n_steps, completed=state.step, detail=""
            )
        detail = ""
        if state.loss is not None:
            detail = f"loss {state.loss:.3f}  {state.tokens_per_s:,.0f} tokens/s"
        self.bars.update(self.tasks[state.phase], completed=state.step, detail=detail)
