"""One thread a test process: the suite runs several processes, and threads of theirs would meet."""

import os

import pytest
import torch

from outdraft import _core

if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run on a CPU
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    _core.set_threads(1)
