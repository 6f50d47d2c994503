"""Memory for what is read over and over: weights, and keys and values.

It lies in large pages, small tensors side by side in one: reading at full speed needs that. Not
here: activations (torch's own).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from outdraft import _core


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in large pages, contiguous."""
    n_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(_core.zeros(n_bytes)).view(dtype).view(*shape)
