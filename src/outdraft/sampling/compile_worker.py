"""A process that compiles grammars so that the engine's need not find out how that ends.

Run as a script by compile_check.py. The first line of its input is a JSON object: the tokenizer and
the limits; every other line is a list of a grammar and the seconds of a core that it may take. Each
is answered by a line: null, or the error as a string. A grammar that takes more of them (SIGXCPU),
too much memory or too much stack ends the process instead. It imports nothing of outdraft, which
would take longer than most grammars.
"""

import contextlib
import json
import math
import resource
import sys
import threading
from typing import Any

import llguidance

STACK_BYTES = 4 * 2**20
"""Half of what a thread usually has: what passes here does not overflow there."""


def main() -> None:
    """Serve until the input ends."""
    setup: dict[str, Any] = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(
        setup["tokenizer"], n_vocab=setup["vocab"], eos_token=setup["eos_ids"]
    )
    limits = llguidance.LLParserLimits(**setup["limits"])
    _limit("RLIMIT_AS", setup["memory_bytes"])
    threading.stack_size(STACK_BYTES)
    _answer(None)
    for line in sys.stdin:
        source, cpu_s = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit("RLIMIT_CPU", math.ceil(used.ru_utime + used.ru_stime + cpu_s))
        found: list[str | None] = []
        thread = threading.Thread(target=lambda: found.append(tried(tokenizer, source, limits)))  # noqa: B023
        thread.start()
        thread.join()
        _answer(found[0] if found else "it could not be compiled")


def tried(tokenizer: Any, source: str, limits: Any) -> str | None:
    """Compile a grammar and form its first mask; what is wrong with it, or None."""
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error()) if matcher.is_error() else None


def _answer(error: str | None) -> None:
    print(json.dumps(error), flush=True)


def _limit(name: str, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every system
        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


if __name__ == "__main__":
    main()
