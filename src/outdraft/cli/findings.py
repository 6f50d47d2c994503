"""What was found out about a model directory: plain data. Who finds it out is checkup.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from outdraft.errors import OutdraftError


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that keeps the model from running, and what to do about it."""

    where: str
    message: str
    hint: str


@dataclass(slots=True)
class Checkup:
    """Facts about one directory; what could not be found out is None or empty.

    `packed_bytes`: what the kernels' weights take, by `--quant`; `packed_files`: those of them that
    are in the cache. `kv_bytes_per_token`: by group of layers, of `window` positions at most where
    there is one. `state_bytes`: of one state of all recurrent layers; a sequence has k + 2 of them
    with drafts of up to k tokens; at the default settings the prefix cache keeps
    `kept_states` more.
    """

    path: Path
    kind: Literal["target", "assistant", "native head", "draft model"] = "target"
    model_type: str | None = None
    shape: dict[str, str | int | float] = field(default_factory=dict)
    n_tensors: int | None = None
    n_bytes: int | None = None
    stored_params: dict[str, int] = field(default_factory=dict)
    params_by_group: dict[str, int] = field(default_factory=dict)
    quantisation: str | None = None
    adapter: str | None = None
    ignored: list[dict[str, str | int]] = field(default_factory=list)
    packed_bytes: dict[str, int] = field(default_factory=dict)
    packed_files: dict[str, str] = field(default_factory=dict)
    kv_bytes_per_token: dict[str, int] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    state_bytes: int = 0
    kept_states: int = 0
    tokenizer: dict[str, object] = field(default_factory=dict)
    drafter: "Checkup | None" = None
    drafter_reason: str | None = None
    n_draft_default: int | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def n_params(self) -> int:
        """Parameters that the model uses."""
        return sum(self.params_by_group.values())

    def note(self, where: str, error: OutdraftError) -> None:
        """Add a problem."""
        self.problems.append(Problem(where, error.message, error.hint))
