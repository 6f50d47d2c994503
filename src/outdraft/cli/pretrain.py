"""`outdraft pretrain`: a hybrid with a native head, from text. Not here: how (train/)."""

from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_MINUTES = 20.0

app = typer.Typer()


@app.command()
def pretrain(
    preset: Annotated[str, typer.Argument(help="hybrid, or the config.json of a dense Qwen 3.5.")],
    out: Annotated[
        Path, typer.Option(help="Directory of the new model; an unfinished run goes on.")
    ],
    data: Annotated[
        list[Path] | None, typer.Option(help="Text to learn, instead of Python source found here.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Length of the whole run; 20 if no steps are given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    mtp_depths: Annotated[
        int, typer.Option(help="Tokens behind the next one that the head learns to predict.")
    ] = 3,
    mtp_loss_scale: Annotated[
        float, typer.Option(help="Weight of the head's losses, over their number.")
    ] = 0.1,
    mtp_detach: Annotated[
        bool,
        typer.Option("--mtp-detach", help="Keep the head's losses from changing the model."),
    ] = False,
    mtp_repeat: Annotated[
        bool,
        typer.Option(
            "--mtp-repeat/--mtp-separate",
            help="One layer for all depths, as drafting uses it, or one each; the first is kept.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Another seed gives another model.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an unfinished run, or begin again.")
    ] = True,
) -> None:
    """Train a small hybrid (Qwen 3.5) and its native head from scratch.

    The loss is that of multi-token prediction in Megatron-Core. Ctrl-C stops after the step in
    progress; the same command goes on from there.
    """
    from outdraft.train.hybrid_run import PretrainSettings
    from outdraft.train.mtp import MtpOptions

    if steps is None and minutes is None:
        minutes = DEFAULT_MINUTES
    options = MtpOptions(mtp_depths, mtp_loss_scale, mtp_detach, mtp_repeat)
    names = tuple(str(path) for path in data or ())
    _run(out, PretrainSettings(preset, steps, minutes, seed, names, options), fresh=not resume)


def _run(out: Path, settings: Any, *, fresh: bool) -> None:
    from rich.console import Console

    from outdraft.cli.train import ProgressBars
    from outdraft.train.hybrid_run import pretrain as train
    from outdraft.train.trainer import TrainingStopped

    console = Console(stderr=True)
    with ProgressBars(console) as bars:
        try:
            report = train(out, settings, bars.report, fresh=fresh)
        except TrainingStopped:
            console.print("Stopped. The same command goes on from here.")
            raise typer.Exit(130) from None
    console.print(summary_of(out, report))


def summary_of(out: Path, report: dict[str, Any]) -> str:
    """The result in a few lines."""
    accepted = " ".join(f"{share:.2f}" for share in report["acceptance_by_position"])
    ahead = " ".join(f"{loss:.2f}" for loss in report["heldout"].values())
    same = "identical to" if report["identical"] else "DIFFERENT FROM"
    return (
        f"Held-out loss by tokens ahead: {ahead} nats\n"
        f"{report['tokens_per_pass']:.2f} tokens per pass, greedy, "
        f"{report['draft_length']} drafts (accepted by position: {accepted}); "
        f"tokens {same} plain decoding\n"
        f"Try it: outdraft bench {out}"
    )
