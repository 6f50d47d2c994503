"""`outdraft pull`: a model from the Hugging Face Hub, and the drafter that belongs to it.

Also what `-hf ID` does in the verbs that take a model. Here: what is said, and the bar. Not here:
what is taken and how (weights/hub.py).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outdraft.cli.console import harmless, remark, remarks, results
from outdraft.errors import ModelError, OutdraftError

if TYPE_CHECKING:
    from outdraft.weights.hub import Remote

app = typer.Typer(add_completion=False)


@app.command()
def pull(
    model: Annotated[
        str, typer.Argument(metavar="ID", help="An id of the Hub, org/name.", show_default=False)
    ],
    revision: Annotated[
        str | None, typer.Option(help="A branch, a tag or a commit; the main branch if not given.")
    ] = None,
    with_assistant: Annotated[
        bool, typer.Option("--with-assistant", help="Download the assistant that belongs to it.")
    ] = False,
) -> None:
    """Download a model from the Hugging Face Hub.

    Takes safetensors, JSON, the chat template and the tokenizer, nothing that can be executed.
    What is whole is kept and not downloaded again, so an interrupted pull is repeated.
    """
    from outdraft.weights.hub import check_room, look_up

    name = model if revision is None else f"{model}@{revision}"
    found = [look_up(name)]
    drafter, reason = pairing(model, found[0]) if not with_assistant else (None, "")
    if with_assistant:
        found.append(look_up(assistant_id(model)))
    check_room(found)
    for remote in found:
        results().print(harmless(str(download(remote))))
    if reason:
        remark(reason)
    after = "" if revision is None else f"@{revision}"
    if drafter is not None:
        remark(f"  download it with: outdraft pull {drafter}")
    remark(f"run it with: outdraft serve {found[0].id}{after}")


def download(remote: "Remote") -> Path:
    """What is missing of a repository, with a bar on stderr; its directory."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from outdraft.weights.hub import fetch

    remark(
        f"{remote.id} at {remote.commit[:12]}: {len(remote.missing)} of {len(remote.sizes)} files "
        f"to download, {remote.missing_bytes / 1e9:.2f} of {remote.n_bytes / 1e9:.2f} GB"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    rate = (TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, *rate, console=remarks(), transient=True) as bar:
        task = bar.add_task(harmless(remote.id), total=remote.missing_bytes)
        return fetch(remote, lambda n_bytes: bar.advance(task, n_bytes))


def assistant_id(model: str) -> str:
    """The id of the assistant that is published beside a target."""
    from outdraft.weights.find import ASSISTANT_NAME, split_id

    return f"{split_id(model)[0]}-{ASSISTANT_NAME}"


def pairing(model: str, remote: "Remote") -> tuple[str | None, str]:
    """The id of the assistant to offer, or None, and what to say of it."""
    from outdraft.weights.find import ASSISTANT_NAME
    from outdraft.weights.hub import look_up

    if remote.id.endswith(f"-{ASSISTANT_NAME}"):
        return None, f"it drafts for {remote.id.removesuffix(f'-{ASSISTANT_NAME}')}"
    name = assistant_id(model)
    try:
        assistant = look_up(name)
    except ModelError:
        return None, f"there is no {name}: `outdraft inspect {remote.id}` says what can draft"
    size = f"{assistant.n_bytes / 1e9:.2f} GB"
    if not assistant.missing:
        return None, f"{name} drafts for it, and is here"
    return name, f"{name} drafts for it ({size}): --with-assistant downloads both"


def ensure(model: str) -> str:
    """The id as the other verbs take it, downloaded unless all of it is here.

    Raises:
        OutdraftError: it is not an id, or cannot be downloaded.
    """
    from outdraft.weights.find import split_id
    from outdraft.weights.hub import check_room, is_whole, look_up

    if ":" in model:
        raise OutdraftError(f"-hf {model} names a file", "give the id alone, and --quant w4 or w8")
    split_id(model)
    if not is_whole(model):
        remote = look_up(model)
        check_room([remote])
        download(remote)
        drafter, reason = pairing(model, remote)
        remark(reason)
        if drafter is not None:
            remark(f"  download it with: outdraft pull {drafter}")
    return model
