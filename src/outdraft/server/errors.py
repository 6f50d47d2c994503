"""What clients are told when something is wrong: OpenAI's shape, and Anthropic's on its routes.

No body has a path, an address or a traceback in it: `public` takes them out of every text that was
written elsewhere. Not here: when a request is refused (limits.py, guard.py, the fronts).
"""

import re
from dataclasses import dataclass, field
from typing import Any

from outdraft.errors import CapacityError, OutdraftError, QueueFull

MAX_MESSAGE_CHARS = 600
_PATH = re.compile(r"(?<![\w./-])(?:~|\.{1,2})?(?:/[\w.@+-]+){2,}/?|\b[A-Za-z]:\\[\w\\.-]+")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{5,}\b")
_TRACE = re.compile(r"Traceback \(most recent call last\).*", re.DOTALL)

_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OPENAI = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(slots=True)
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        param: the field that is wrong, where it is one.
        retry_after_s: when to try again, for 429 and 503.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status >= 500:
            return "server_error"
        return _OPENAI.get(self.status, "invalid_request_error")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be met, with the reason."""
    return ApiError(400, message, code, param)


def from_outdraft(error: OutdraftError, param: str | None = None) -> ApiError:
    """One of our own errors, which are about what was asked."""
    text = f"{error.message}: {error.hint}" if error.hint else error.message
    if isinstance(error, QueueFull | CapacityError):
        return ApiError(503, text, "queue_full", retry_after_s=1)
    return ApiError(400, text, param=param)


def public(text: str, *, names: bool = False) -> str:
    """The text without paths, addresses and tracebacks, and not too long.

    Args:
        names: leave of a path its last part.
    """

    def without(found: re.Match[str]) -> str:
        return found[0].rstrip("/").rpartition("/")[2] if names else "(path)"

    text = _ADDRESS.sub("(address)", _PATH.sub(without, _TRACE.sub("", text)))
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "…"


def body(error: ApiError, *, anthropic: bool = False, request_id: str = "") -> dict[str, Any]:
    """The JSON of an error."""
    message = public(error.message)
    if anthropic:
        kind = _ANTHROPIC.get(error.status, "api_error")
        inner = {"type": kind, "message": message}
        return {"type": "error", "error": inner, "request_id": request_id}
    return {
        "error": {
            "message": message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def is_anthropic(path: str) -> bool:
    """Whether a route speaks Anthropic's shape."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")
