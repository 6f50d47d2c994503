"""outdraft: exact multi-token-prediction decoding on your own machine.

The public API, imported on first use so that `import outdraft` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from outdraft.config import EngineConfig
    from outdraft.engine.aio import AsyncLLM
    from outdraft.engine.engine import LLM, Completion
    from outdraft.engine.stats import EngineStats
    from outdraft.errors import OutdraftError
    from outdraft.request import FinishReason, SamplingParams, TokenEvent

_HOME = {
    "AsyncLLM": "outdraft.engine.aio",
    "LLM": "outdraft.engine.engine",
    "Completion": "outdraft.engine.engine",
    "EngineConfig": "outdraft.config",
    "EngineStats": "outdraft.engine.stats",
    "FinishReason": "outdraft.request",
    "OutdraftError": "outdraft.errors",
    "SamplingParams": "outdraft.request",
    "TokenEvent": "outdraft.request",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "OutdraftError",
    "SamplingParams",
    "TokenEvent",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "_core":  # asked for by the import system if the module is not imported yet
        return _load_core()
    if name not in _HOME:
        raise AttributeError(f"module 'outdraft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def _load_core() -> Any:
    """The compiled core; where it was not built, something that says so when it is used.

    A GPU and the reference do without it.
    """
    from importlib import import_module

    try:
        return import_module("outdraft._core")
    except ModuleNotFoundError:
        return _AbsentCore()


class _AbsentCore:
    """Types for annotations, one thread, and an error for all else."""

    def threads(self) -> int:
        """Those of kernels that are not there."""
        return 1

    def available_isas(self) -> list[str]:
        """None."""
        return []

    def packed_layout(self) -> str:
        """That of no weights."""
        return "none"

    def set_threads(self, n_threads: int) -> None:
        """Nothing to set."""

    def __getattr__(self, name: str) -> Any:
        return type(name, (), {"__init__": _refuse})


def _refuse(*_arguments: object, **_options: object) -> None:
    from outdraft.errors import OutdraftError

    raise OutdraftError(
        "the compiled CPU kernels are not installed",
        "install outdraft with its compiled core, or use --device cuda or --backend reference",
    )
