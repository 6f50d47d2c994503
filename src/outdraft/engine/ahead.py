"""A pass launched before it is asked for, so that the device does not wait for the host.

While one row of each sequence decodes plainly, the next pass is known but for its tokens, and those
are on the device already. It is launched behind the present one; if the host then asks for another
call (a sequence has ended, a page has begun, a token was drawn), its result is dropped. It has only
written keys of rows behind the committed ones, in pages that its sequences held when it was
launched; whoever gets such a page later writes to it later.

Shapes: T rows, V vocabulary, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.cache.attend import CausalCall, further_numbers
from outdraft.cache.memory import Memory
from outdraft.ops.record import Replayable


@dataclass(frozen=True, slots=True)
class _Flight:
    """A pass that runs: the call it fills, and its numbers but for the tokens, which are `best_T`
    of the pass before."""

    call: CausalCall
    numbers: Tensor
    best_T: Tensor


class Ahead:
    """The pass that was launched ahead, if there is one."""

    def __init__(self) -> None:
        """None yet."""
        self.flight: _Flight | None = None
        self.n_dropped = 0
        self._host: dict[tuple[bool, int, int], tuple[Tensor, Tensor]] = {}
        self._turn = False

    def drop(self) -> None:
        """What was launched will not be used: something else is about to be replayed."""
        self.n_dropped += self.flight is not None
        self.flight = None

    def has(self, call: CausalCall, numbers: Tensor) -> bool:
        """Whether this very call has been launched; if not, what was launched is dropped."""
        flight, self.flight = self.flight, None
        if flight is None:
            return False
        n_rows = flight.best_T.shape[0]
        same = (
            flight.call is call
            and torch.equal(numbers[:n_rows], flight.best_T)
            and torch.equal(numbers[n_rows:], flight.numbers[n_rows:])
        )
        self.n_dropped += not same
        return same

    def launch(
        self,
        memory: Memory,
        call: CausalCall,
        program: Replayable,
        numbers: Tensor,
        done: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Launch the pass behind the one that fills `done`, and wait for that one.

        Args:
            call: what the program reads; it is filled anew.
            numbers: of the call that runs, on the host.
            done: hidden states, logits and best tokens of that call.

        Returns:
            The same, the first copied and the last on the CPU; the logits are overwritten.
        """
        hidden_TH, logits_TV, best_T = done
        n_rows = best_T.shape[0]
        further = further_numbers(memory, numbers, n_rows)
        if further is None:
            return hidden_TH, logits_TV, best_T.cpu()
        hidden_TH = hidden_TH.clone()
        host_T, sent = self._buffers(n_rows, further)
        host_T.copy_(best_T, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        sent.copy_(further)
        call.numbers.copy_(sent, non_blocking=True)
        call.token_T.copy_(best_T)
        program.replay()
        ready.synchronize()
        best_T = host_T.clone()
        self.flight = _Flight(call, further, best_T)
        return hidden_TH, logits_TV, best_T

    def _buffers(self, n_rows: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Page-locked memory: a copy from or to any other waits for the device."""
        self._turn = not self._turn  # the device may still read what was sent before
        key = self._turn, n_rows, numbers.shape[0]
        if key not in self._host:
            best_T = torch.empty(n_rows, dtype=torch.int32, pin_memory=True)
            self._host[key] = best_T, torch.empty_like(numbers, pin_memory=True)
        return self._host[key]
