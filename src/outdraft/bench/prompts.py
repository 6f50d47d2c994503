"""Prompts for a benchmark, cut from Python sources that no model was trained on, by kind.

- code: lines of code.
- json: what a file defines, as JSON text.
- prose: lines of a docstring or a comment.
- repetition: code that is given, and then begins a second time, as in an edit.

Each is about 64 tokens of whole lines (repetition: a third more), and ends within its kind, so that
what follows is of it too. Which ones are chosen depends on the seed and the texts alone.
"""

import ast
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from outdraft.errors import OutdraftError

N_TOKENS = 64
MIN_TOKENS = 32
MAX_PROSE_SHARE = 0.25  # of the lines of a code prompt
HELDOUT = Path(__file__).parent.parent / "models_data" / "demo" / "heldout"
PATTERNS = ("*.txt", "*.py")
MAX_ATTEMPTS = 50  # places tried in one file

Encode = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt and where it is from: `line` of file `source`, counted from 1."""

    kind: str
    source: str
    line: int
    text: str
    tokens: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Source:
    """A Python file: its lines with their ends, its tree, and the ranges of prose in it."""

    name: str
    lines: list[str]
    tree: ast.Module
    prose: list[range]  # line indices, from 0


def read_sources(directory: Path) -> list[Source]:
    """All Python texts of a directory; files that do not parse are passed over.

    Raises:
        OutdraftError: there are none.
    """
    sources = []
    for path in sorted(path for pattern in PATTERNS for path in directory.glob(pattern)):
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError):
            continue
        lines = io.StringIO(text).readlines()  # as ast counts them: form feeds end no line
        prose = sorted([*_docstrings(tree), *_comments(lines)], key=lambda found: found.start)
        sources.append(Source(path.name, lines, tree, prose))
    if not sources:
        raise OutdraftError(
            f"there are no Python texts in {directory}",
            f"give a directory with {' or '.join(PATTERNS)} files of Python code",
        )
    return sources


def choose_prompts(
    sources: Sequence[Source], n_per_kind: int, encode: Encode, *, seed: int
) -> list[Prompt]:
    """Up to n prompts of every kind, spread over the files.

    Args:
        encode: token ids of a text, `<bos>` included.
    """
    chosen = []
    for kind, candidates in CANDIDATES.items():
        rng = random.Random(f"{kind}/{seed}")
        order = rng.sample(sources, len(sources))
        chosen += _take_in_turn([candidates(s, encode, rng) for s in order], n_per_kind)
    return chosen


def _take_in_turn(iterators: list[Iterator[Prompt]], n: int) -> list[Prompt]:
    """The first n, one of each in turn, without repeating a place."""
    taken: dict[tuple[str, int], Prompt] = {}
    while iterators and len(taken) < n:
        iterator = iterators.pop(0)
        prompt = next(iterator, None)
        if prompt is not None:
            taken.setdefault((prompt.source, prompt.line), prompt)
            iterators.append(iterator)
    return list(taken.values())


def _code(source: Source, encode: Encode, rng: random.Random) -> Iterator[Prompt]:
    for start, end in _code_windows(source, encode, rng):
        text = "".join(source.lines[start:end])
        yield Prompt("code", source.name, start + 1, text, encode(text))


def _json(source: Source, encode: Encode, rng: random.Random) -> Iterator[Prompt]:
    entries = _outline(source.tree)
    for start in rng.sample(range(len(entries)), len(entries)):
        rest = [entry for _, entry in entries[start:]]
        lines = json.dumps(rest, indent=2).splitlines(keepends=True)
        end = _fit(lines, 0, len(lines), encode)
        if end is not None:
            text = "".join(lines[:end])
            yield Prompt("json", source.name, entries[start][0], text, encode(text))


def _prose(source: Source, encode: Encode, rng: random.Random) -> Iterator[Prompt]:
    for place in rng.sample(source.prose, len(source.prose)):
        start = place.start + rng.randrange(max(1, len(place) // 2))
        end = _fit(source.lines, start, place.stop, encode)
        if end is not None:
            text = "".join(source.lines[start:end])
            yield Prompt("prose", source.name, start + 1, text, encode(text))


def _repetition(source: Source, encode: Encode, rng: random.Random) -> Iterator[Prompt]:
    for start, end in _code_windows(source, encode, rng):
        block = source.lines[start:end]
        beginning = block[: -(-len(block) // 3)]
        text = "".join(["# Before:\n", *block, "\n# After:\n", *beginning])
        yield Prompt("repetition", source.name, start + 1, text, encode(text))


CANDIDATES: dict[str, Callable[[Source, Encode, random.Random], Iterator[Prompt]]] = {
    "code": _code,
    "json": _json,
    "prose": _prose,
    "repetition": _repetition,
}


def _code_windows(source: Source, encode: Encode, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Ranges of lines that begin and end in code and are mostly code."""
    prose = {line for place in source.prose for line in place}
    code = [i for i, line in enumerate(source.lines) if line.strip() and i not in prose]
    is_code = set(code)
    for start in rng.sample(code, min(len(code), MAX_ATTEMPTS)):
        end = _fit(source.lines, start, len(source.lines), encode)
        if end is None or end - 1 not in is_code:
            continue
        if sum(line in prose for line in range(start, end)) <= MAX_PROSE_SHARE * (end - start):
            yield start, end


def _fit(lines: Sequence[str], start: int, stop: int, encode: Encode) -> int | None:
    """The end of the most whole lines that fit, before `stop`; None if they are too few tokens."""
    end, n_tokens = start, 0
    while end + 1 < stop:
        n_next = len(encode("".join(lines[start : end + 1])))
        if n_next > N_TOKENS:
            break
        end, n_tokens = end + 1, n_next
    return end if n_tokens >= MIN_TOKENS else None


def _docstrings(tree: ast.Module) -> Iterator[range]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None:
                yield range(first.lineno - 1, first.end_lineno or first.lineno)


def _comments(lines: Sequence[str]) -> Iterator[range]:
    start = None
    for i, line in enumerate([*lines, ""]):
        is_comment = line.lstrip().startswith("#")
        if is_comment and start is None:
            start = i
        if not is_comment and start is not None:
            yield range(start, i)
            start = None


def _outline(tree: ast.Module) -> list[tuple[int, dict[str, object]]]:
    """What a file defines, as plain data, each with its line."""
    entries: list[tuple[int, dict[str, object]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts = {"kind": "function", "args": [argument.arg for argument in node.args.args]}
        elif isinstance(node, ast.ClassDef):
            parts = {"kind": "class", "bases": [ast.unparse(base) for base in node.bases]}
        else:
            continue
        entries.append((node.lineno, {"name": node.name, "line": node.lineno, **parts}))
    return entries
