"""Recorded kernel calls. Recording them is ops/kernels.py; what to record, ops/record.py."""

from outdraft import _core


class Program:
    """Recorded kernel calls of a step, replayed with one parallel region.

    Recording runs nothing; the tensors that recorded operations return are filled by each `replay`,
    from what the tensors they were given hold at that time.
    """

    def __init__(self) -> None:
        """An empty program."""
        self.core = _core.Program()
        self.tensors: list[object] = []

    def replay(self) -> None:
        """Run all recorded calls."""
        self.core.replay()

    def __len__(self) -> int:
        """Number of kernel calls."""
        return len(self.core)
