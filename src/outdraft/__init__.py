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
    if name not in _HOME:
        raise AttributeError(f"module 'outdraft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
