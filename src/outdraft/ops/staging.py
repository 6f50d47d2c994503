"""Small int32 tensors to and from a device without waiting for it.

A copy from or to ordinary memory waits for all that was launched before. These go through
page-locked memory, pieces of which take turns. On a CPU they are plain copies. Not here: what is
copied.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TURNS = 4


@dataclass(slots=True)
class Staging:
    """The page-locked pieces of one device, by their use and size, the longest unused first."""

    device: torch.device
    _pieces: dict[tuple[str, int], list[tuple[Tensor, Any]]] = field(default_factory=dict)

    def send(self, numbers: Tensor, into: Tensor) -> None:
        """Copy numbers of the host to the device; the host may change them at once."""
        if self.device.type == "cpu":
            into.copy_(numbers)
            return
        host, done = self._piece("send", numbers.shape[0])
        host.copy_(numbers)
        into.copy_(host, non_blocking=True)
        done.record()

    def fetch(self, *parts_T: Tensor) -> "Fetched":
        """Ask for tensors of one dimension. What is launched later is not waited for.

        `TURNS` of a size may be asked for before the first is waited for.
        """
        sizes = [part.shape[0] for part in parts_T]
        if self.device.type == "cpu":
            return Fetched(torch.cat(parts_T), sizes, None)
        host, ready = self._piece("fetch", sum(sizes))
        at = 0
        for part, size in zip(parts_T, sizes, strict=True):
            host[at : at + size].copy_(part, non_blocking=True)
            at += size
        ready.record()
        return Fetched(host, sizes, ready)

    def _piece(self, use: str, size: int) -> tuple[Tensor, Any]:
        pieces = self._pieces.setdefault((use, size), [])
        if len(pieces) < TURNS:
            event: Any = torch.cuda.Event
            pieces.append((torch.empty(size, dtype=torch.int32, pin_memory=True), event()))
        else:
            pieces.append(pieces.pop(0))
            pieces[-1][1].synchronize()
        return pieces[-1]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was asked for, one behind the other."""

    host: Tensor
    sizes: list[int]
    ready: Any

    def wait(self) -> list[Tensor]:
        """The parts on the CPU, once they are there."""
        if self.ready is not None:
            self.ready.synchronize()
        return list(torch.split(self.host.clone(), self.sizes))
