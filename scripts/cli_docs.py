"""Writes what the commands say of themselves: docs/cli.md for people, the surface for the tests.

    python scripts/cli_docs.py            write both
    python scripts/cli_docs.py --check    fail if one of them is out of date

tests/cli/surface.txt lists every verb, option and default: a change of it is a change of what
users type, and its diff is to be read as one.
"""

import difflib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outdraft.cli.main import VERBS, load_verb

ROOT = Path(__file__).parent.parent
DOCS, SURFACE = ROOT / "docs" / "cli.md", ROOT / "tests" / "cli" / "surface.txt"
INTRODUCTION = """# Command line

Written by `make docs` from the commands themselves; do not edit.

`MODEL` is `demo` (built in), a model directory, or a Hugging Face id that was downloaded (`pull`);
`-hf ID` in its place downloads one first. See [models.md](models.md).
Results go to stdout, remarks and errors to stderr. Exit codes: 0 done, 1 something unforeseen (or
`inspect` found a problem), 2 wrong use or a model that cannot be used, 130 Ctrl-C.
`outdraft --debug VERB …` shows the traceback of an error.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    for verb in VERBS:
        yield from _leaves(verb, load_verb(verb))


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if not inner:
        yield name, command
        return
    for sub_name, sub in inner.items():
        yield from _leaves(f"{name} {sub_name}", sub)


def spelling(parameter: Any) -> str:
    """How a parameter is typed. Only what outlasts a new version of typer is used of it."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return " / ".join([*parameter.opts, *parameter.secondary_opts])


def surface() -> str:
    """One line a parameter."""
    lines = [
        f"{name} {spelling(parameter)} = {parameter.default!r}"
        for name, command in commands()
        for parameter in command.params
    ]
    return "\n".join(lines) + "\n"


def docs() -> str:
    """docs/cli.md."""
    parts = [INTRODUCTION]
    for name, command in commands():
        parts.append(f"## outdraft {name}\n\n{inspect.cleandoc(command.help or '')}\n")
        rows = ["| option | default | what |", "|---|---|---|"]
        for parameter in command.params:
            default = "" if parameter.default is None else f"{parameter.default}"
            rows.append(f"| `{spelling(parameter)}` | {default} | {parameter.help or ''} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Writes, or with --check compares."""
    stale = False
    for path, text in ((DOCS, docs()), (SURFACE, surface())):
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            continue
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before != text:
            stale = True
            name = str(path.relative_to(ROOT))
            sys.stdout.writelines(
                difflib.unified_diff(
                    before.splitlines(True), text.splitlines(True), name, "the commands"
                )
            )
    if stale:
        raise SystemExit("out of date: run `make docs` and review the diff")


if __name__ == "__main__":
    main()
