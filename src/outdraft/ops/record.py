"""Recording the operations of a call once and replaying them with new contents.

Only operations that know how to be recorded are: the compiled ones and those of a GPU
(`Recordable`). A recorded call
reads and writes the same tensors each time, so whoever records keeps its inputs and changes what is
in them. It is to a CPU what a CUDA graph is to a GPU: Python costs next to nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

T = TypeVar("T")


class Replayable(Protocol):
    """A recorded call."""

    def replay(self) -> None:
        """Run it again on what its input tensors now hold."""
        ...


@runtime_checkable
class Resizable(Protocol):
    """A recorded call that can be replayed with fewer rows than it was recorded with."""

    def replay(self) -> None:
        """As `Replayable`."""
        ...

    def resize(self, n_rows: int, recorded: int) -> None:
        """Replays take the first `n_rows` of the `recorded` rows of every tensor from now on.

        A tensor with several rows for each row of the call has the first of as many times more.
        """
        ...


@runtime_checkable
class Recordable(Protocol):
    """Operations that can be recorded."""

    @property
    def records_all(self) -> bool:
        """Whether PyTorch's own operations are recorded too, not only those of `Ops`."""
        ...

    @property
    def warms_up(self) -> bool:
        """Whether a call must have run before it is recorded."""
        ...

    def copy_rows(self, x_TK: Tensor, out_TK: Tensor, /) -> object:
        """Copy rows, as an operation that can be recorded."""
        ...

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


def record(call: Callable[[], T], *all_ops: Recordable) -> tuple[Replayable, T]:
    """Record a call and give what it returned, which each replay fills.

    The call may be run before it is recorded, so what it changes is to be set before a replay.
    """
    if any(ops.warms_up for ops in all_ops):
        call()
    with recording(*all_ops) as program:
        result = call()
    return program, result
