"""One thread a test process: the suite runs several processes, and threads of theirs would meet."""

import pytest
import torch

from outdraft import _core


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    _core.set_threads(1)
