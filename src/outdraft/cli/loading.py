"""A bar on stderr for as long as a model is loaded, and afterwards what there is to say of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from outdraft.cli.console import harmless, remark, remarks
from outdraft.weights.loading import Loading

SLOW_BYTES = 32 << 20  # less is read before anybody can look


@contextmanager
def loading_bar(model: str) -> Iterator[Loading]:
    """To be handed to what loads `model`; without a terminal nothing but the notes is shown."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=remarks(),
        transient=True,
    )
    name = harmless(model)
    task = bar.add_task(f"loading {name}", total=None)
    shown = ""

    def show(what: str, done: int, total: int) -> None:
        nonlocal task, shown
        if total < SLOW_BYTES:
            return
        if shown != what or done == 0:  # a task of its own: the rate is this work's
            bar.remove_task(task)
            task, shown = bar.add_task(f"{what} of {name}", total=total), what
        bar.update(task, completed=done)

    loading = Loading(show)
    with bar:
        yield loading
    for note in loading.notes:
        remark(note)
