"""Errors shown to users. Each says what is wrong and, as its hint, what to do about it.

`assert` is for programmer errors only; everything a user can cause is raised as one of these.
"""


class OutdraftError(ValueError):
    """Base of all user-facing errors.

    Args:
        message: what is wrong, naming the file, tensor or value.
        hint: what the user can do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n  {hint}" if hint else message)
        self.message = message
        self.hint = hint


class ModelError(OutdraftError):
    """The model directory or its configuration cannot be used."""


class WeightsError(ModelError):
    """A tensor is missing, unexpected, misshapen, or its file is damaged."""


class PairingError(ModelError):
    """The drafter does not belong to the target."""


class PromptError(OutdraftError):
    """The prompt cannot be run (empty, outside the vocabulary, longer than the context)."""


class SamplingError(OutdraftError):
    """A sampling or decoding option has an impossible value."""


class CapacityError(OutdraftError):
    """There is not enough memory planned for what was asked."""


class QueueFull(OutdraftError):
    """As many requests wait as the queue may hold; try again later."""


class TrainingError(OutdraftError):
    """Training cannot start or go on (bad data, no space left, a foreign checkpoint)."""
