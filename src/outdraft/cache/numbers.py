"""The small int32 tensors of one call as views of one: making each costs more than a small kernel.

Not here: what the numbers mean (memory.py, attend.py).
"""

import math

import torch
from torch import Tensor


class Numbers:
    """Collects numbers part by part, then makes one tensor of them."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.shapes: list[tuple[int, ...]] = []

    def add(self, values: list[int], *shape: int) -> None:
        """One more part; its shape is [len(values)] unless given."""
        self.shapes.append(shape or (len(values),))
        assert math.prod(self.shapes[-1]) == len(values)
        self.values += values

    def build(self, device: torch.device | None = None) -> tuple[Tensor, list[Tensor]]:
        """All numbers in one int32 tensor, and a view of it for each part."""
        flat = torch.tensor(self.values, dtype=torch.int32, device=device)
        parts, start = [], 0
        for shape in self.shapes:
            end = start + math.prod(shape)
            parts.append(flat[start:end].view(shape))
            start = end
        return flat, parts
