"""A pass launched before it is asked for, so that the device does not wait for the host.

While a sequence decodes plainly, the next pass is known but for its tokens, and those are on the
device already. It is launched behind the present one; if the host then asks for another call (the
sequence has ended, a page has begun, a token was drawn), its result is dropped. It has only written
keys of rows behind the committed ones, in pages that its sequences held when it was launched;
whoever gets such a page later writes to it later.

Shapes: T rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.cache.attend import CausalCall
from outdraft.ops.record import Replayable
from outdraft.ops.staging import Staging


@dataclass(frozen=True, slots=True)
class _Flight:
    """A pass that runs: its turn, and its numbers but for the tokens, which are `best_T`."""

    turn: int
    numbers: Tensor
    best_T: Tensor


class Ahead:
    """The pass that was launched ahead, if there is one.

    Recordings that run behind one another without the host take turns: the results of one are
    still read while the other fills its own.
    """

    def __init__(self, staging: Staging) -> None:
        """None yet."""
        self._staging = staging
        self.flight: _Flight | None = None
        self.n_used = self.n_dropped = 0

    def drop(self) -> None:
        """What was launched will not be used."""
        self.n_dropped += self.flight is not None
        self.flight = None

    def take(self, numbers: Tensor) -> int | None:
        """The turn of the very call that was launched ahead; None, and it is dropped."""
        flight = self.flight
        if flight is not None and flight.numbers.shape == numbers.shape:
            n_rows = flight.best_T.shape[0]
            same = torch.equal(numbers[:n_rows], flight.best_T)
            if same and torch.equal(numbers[n_rows:], flight.numbers[n_rows:]):
                self.flight = None
                self.n_used += 1
                return flight.turn
        self.drop()
        return None

    def launch(
        self, call: CausalCall, program: Replayable, numbers: Tensor, turn: int, best_T: Tensor
    ) -> Tensor:
        """Launch a pass behind the one that fills `best_T`, and wait for that one.

        Args:
            call: what the program reads; it is filled.
            numbers: of the call, on the host; its tokens are `best_T`.
            turn: 0 or 1, of the program.
            best_T: of the pass that runs, on the device.

        Returns:
            `best_T` on the CPU.
        """
        fetched = self._staging.fetch(best_T)
        self._staging.send(numbers, call.numbers)
        torch.clamp(best_T, min=0, out=call.token_T)  # -1 where logits are not finite
        program.replay()
        (best_T,) = fetched.wait()
        self.flight = _Flight(turn, numbers, best_T)
        return best_T
