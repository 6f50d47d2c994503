"""Recording the operations of a call once and replaying them with new contents.

Only operations that know how to be recorded are: the compiled ones (`Recordable`). A recorded call
reads and writes the same tensors each time, so whoever records keeps its inputs and changes what is
in them. It is to a CPU what a CUDA graph is to a GPU: Python costs next to nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


class Replayable(Protocol):
    """A recorded call."""

    def replay(self) -> None:
        """Run it again on what its input tensors now hold."""
        ...


@runtime_checkable
class Recordable(Protocol):
    """Operations that can be recorded."""

    def begin(self, program: Replayable | None) -> Replayable:
        """Record into a program, a new one if None is given, until `end`."""
        ...

    def end(self) -> None:
        """Run operations at once again."""
        ...


@contextmanager
def recording(*all_ops: Recordable) -> Iterator[Replayable]:
    """Operations of all of these go into one program, in order, and are not run."""
    program: Replayable | None = None
    unique = list({id(ops): ops for ops in all_ops}.values())  # two models may share theirs
    try:
        for ops in unique:
            program = ops.begin(program)
        assert program is not None
        yield program
    finally:
        for ops in unique:
            ops.end()
