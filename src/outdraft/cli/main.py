"""The `outdraft` command: finds the verb, and turns errors into messages and exit codes.

Here: the table of verbs, loaded only when one is used, and what happens when one fails. Not here:
the verbs, one file each.

Exit codes: 0 done, 1 something unforeseen, 2 wrong use or a model that cannot be used, 3 `tune`
gained nothing, 130 Ctrl-C.
"""

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from outdraft import __version__
from outdraft.cli.console import complain
from outdraft.cli.hub_option import with_hub_option
from outdraft.errors import OutdraftError

VERBS = {
    "generate": "Continue a text, streaming, with accepted drafts in colour.",
    "chat": "Talk to a model in the terminal.",
    "bench": "Measure plain decoding against drafting, by kind of prompt.",
    "bench kernels": "Time each kernel with cold weights, by number of rows.",
    "bench quality": "Measure what quantising costs: perplexity, KL and acceptance against bf16 "
    "weights.",
    "bench shape": "Measure what a model of a published shape costs here, with made-up weights.",
    "bench throughput": "Measure many requests at once: plain, fixed draft lengths, and lengths "
    "chosen while running.",
    "bench serve": "Measure tokens per second through `outdraft serve` against the engine alone.",
    "doctor": "Say what this machine computes with, how fast it reads, and whether all is well.",
    "serve": "Serve a model over HTTP, with OpenAI's and Anthropic's APIs and a page of its own.",
    "fit": "Say what fits into this machine's memory, and the command to run it with.",
    "pull": "Download a model from the Hugging Face Hub.",
    "inspect": "Say what a model directory holds, what fits and what is missing.",
    "verify": "Prove on this machine that drafting, batching and caching change no token.",
    "tune": "Make the drafter fit a target, on the target's own answers.",
    "distill": "Teach a student what a teacher answers, calls of tools included.",
    "train": "Train a target and its drafter from text.",
    "pretrain": "Train a small hybrid (Qwen 3.5) and its native head from scratch.",
}
UNFORESEEN, WRONG_USE = 1, 2


def load_verb(name: str) -> Any:
    """The command of a verb, from the `app` in the file of its name."""
    module = import_module(f"outdraft.cli.{name.replace(' ', '_')}")
    return with_hub_option(typer.main.get_command(module.app))


class VerbGroup(TyperGroup):
    """Lists the verbs by their summaries and imports only the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, summary in VERBS.items():
            self.add_command(TyperCommand(name=name, help=summary), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """See TyperGroup: the verb itself, of one word or two, in place of its entry."""
        if " ".join(args[:2]) in VERBS:
            args = [" ".join(args[:2]), *args[2:]]
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_verb(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; an error becomes a message and an exit code."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise  # typer's own, and a reader that has left: it deals with both
        except Exception as error:
            if ctx.params["debug"]:
                raise
            if isinstance(error, OutdraftError):
                complain(error.message, error.hint)
                raise typer.Exit(WRONG_USE) from error
            complain(
                f"{type(error).__name__}: {error}",
                "this should not happen: `outdraft --debug …` shows where, please report it",
            )
            raise typer.Exit(UNFORESEEN) from error


app = typer.Typer(
    cls=VerbGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"outdraft {__version__}")
        raise typer.Exit


@app.callback()
def outdraft(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Exact multi-token-prediction decoding on your own machine.

    MODEL is `demo` (built in), a model directory, or a Hugging Face id that has been downloaded.
    """


def main() -> None:
    """The entry point."""
    app(prog_name="outdraft")


if __name__ == "__main__":
    main()
