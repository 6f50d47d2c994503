"""How many threads compute: those of the kernels or those of PyTorch."""

import torch

from outdraft import _core


def set_threads(n_threads: int | None, *, compiled: bool) -> None:
    """Give the processor to the kernels or to PyTorch, never to both.

    A worker of the one that waits for its next call would spin on the core that the other needs:
    with both on all cores, sampling ran at a fifth of its speed.

    Args:
        n_threads: None is PyTorch's own choice, whichever of the two has it now.
        compiled: the kernels do the work.
    """
    n_threads = n_threads or max(torch.get_num_threads(), _core.threads())
    torch.set_num_threads(1 if compiled else n_threads)
    _core.set_threads(n_threads if compiled else 1)
