"""`-hf ID`, llama.cpp's way to name a model of the Hub, in every verb that takes a MODEL.

The option stands in for the argument: the model is downloaded if it is not here, and the verb sees
its id. It is added in one place, so that the verbs need not know of it.
"""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from outdraft.errors import OutdraftError

MODEL, OPTION = "model", "hf_repo"


def with_hub_option(command: Any) -> Any:
    """The command, and if it takes a MODEL with the option."""
    model = next((p for p in command.params if p.name == MODEL), None)
    if model is None or model.metavar != "MODEL" or not model.required:
        return command
    model.required = False
    command.params.insert(command.params.index(model) + 1, _option())
    command.callback = _in_place_of_model(command.callback)
    return command


def _option() -> Any:
    """As typer makes it of a declaration."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def holder(
        hf_repo: Annotated[
            str | None,
            typer.Option(
                "--hf-repo",
                "-hf",
                metavar="ID",
                help="In place of MODEL: an id of the Hub, downloaded if it is not here.",
            ),
        ] = None,
    ) -> None:
        pass

    return next(p for p in typer.main.get_command(app).params if p.name == OPTION)


def _in_place_of_model(run: Callable[..., Any]) -> Callable[..., Any]:
    def called(**given: Any) -> Any:
        from outdraft.cli.pull import ensure

        repository = given.pop(OPTION)
        if (repository is None) == (given[MODEL] is None):
            what = "there is no MODEL" if repository is None else "MODEL and -hf both name a model"
            raise OutdraftError(what, "give a directory, an id, or `demo`; or -hf and an id")
        if repository is not None:
            given[MODEL] = ensure(repository)
        return run(**given)

    return called
