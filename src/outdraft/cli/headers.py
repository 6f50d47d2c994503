"""A checkpoint without its data, and what a config says of its quantisation, for `inspect`."""

from collections.abc import Mapping
from typing import Any

import torch

from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.int4 import int4_scheme
from outdraft.weights.quantise import is_int8_channel


class HeadersOnly(Checkpoint):
    """A checkpoint whose tensors have shapes and types but no data."""

    def get(self, name: str) -> torch.Tensor:
        """A tensor of the `meta` device."""
        spec = self.spec(name)
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def quantisation_of(raw: Mapping[str, Any]) -> str | None:
    """What a config declares of its weights, in words; None for floating point.

    Raises:
        ModelError: a quantisation that is not supported.
    """
    four = int4_scheme(raw)
    if four is not None:
        zeros = " with zero-points" if four.zero_points else ""
        return f"int4 ({four.method}), one scale for {four.group} inputs{zeros}"
    return "int8, one scale a row" if is_int8_channel(raw) else None
