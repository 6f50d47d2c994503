"""Where the commands write: results to stdout, remarks and errors to stderr.

Colours, NO_COLOR and whether there is a terminal are rich's business.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress

# What a model writes is foreign: control characters could drive the terminal. They become visible.
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_CONTROL_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def results() -> Console:
    """The console of stdout."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def remarks() -> Console:
    """The console of stderr."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def remark(text: str) -> None:
    """A line on stderr beside the result."""
    remarks().print(Text(harmless(text), style="dim"))


def counting(label: str = "") -> "Progress":
    """A bar on stderr that counts runs; its tasks have a field `newest`, the newest rate."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    front = (TextColumn("{task.description}"),) if label else ()
    behind = TextColumn("{task.fields[newest]}")
    columns = (*front, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), behind)
    return Progress(*columns, console=remarks())


def complain(message: str, hint: str) -> None:
    """An error on stderr: what is wrong, and below it what to do."""
    block = Text.assemble(("error: ", "bold red"), harmless(message))
    if hint:
        block.append(f"\n  {harmless(hint)}", style="dim")
    remarks().print(block)


def save(report: dict[str, Any], path: Path, draw: Callable[[dict[str, Any]], bytes]) -> None:
    """Write a report's JSON and, beside it under the same name, its chart as PNG.

    Raises:
        OutdraftError: one of them cannot be written.
    """
    from outdraft.bench.report import write_bytes, write_json

    picture = path.with_suffix(".png")
    write_json(path, report)
    write_bytes(picture, draw(report))
    remark(f"written: {path} and {picture}")


def harmless(text: str) -> str:
    """The text with control characters, except line breaks and tabs, as visible signs."""
    return text.translate(_CONTROL_PICTURES)
