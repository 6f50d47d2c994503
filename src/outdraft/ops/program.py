"""Recorded kernel calls. Recording them is ops/kernels.py; what to record, ops/record.py."""

from torch import Tensor

from outdraft import _core
from outdraft.ops.arena import Arena


class Program:
    """Recorded kernel calls of a step, replayed with one parallel region.

    Recording runs nothing; the tensors that recorded operations return are filled by each `replay`,
    from what the tensors they were given hold at that time, and last until another program of the
    same arena is replayed.
    """

    def __init__(self, arena: Arena | None = None) -> None:
        """An empty program.

        Args:
            arena: memory of the results, shared with other programs.
        """
        self.core = _core.Program()
        self.arena = arena or Arena()
        self.arena.start()
        self.kept: list[object] = []

    def keep(self, used: tuple[object, ...]) -> None:
        """Keep what a call reads and writes for as long as the program can be replayed."""
        self.kept.append([x for x in used if not self._is_result(x)])

    def replay(self) -> None:
        """Run all recorded calls."""
        self.core.replay()

    def resize(self, n_rows: int, recorded: int) -> None:
        """See `Resizable`.

        Raises:
            ValueError: there are more than recorded, or a call has rows of another number.
        """
        self.core.resize(n_rows, recorded)

    def __len__(self) -> int:
        """Number of kernel calls."""
        return len(self.core)

    def _is_result(self, x: object) -> bool:
        return x is None or (isinstance(x, Tensor) and self.arena.holds(x))
