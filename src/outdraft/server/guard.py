"""What every request passes before its route: host, origin, key, size of the body; its log line.

Deny by default: when there are keys, every path but /health needs one. A browser's requests must
come from a page of this server (or of an allowed origin), and under a host name that is ours, so
that no web site can use the server of who visits it. Not here: limits of what is asked (limits.py).
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import itertools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outdraft.server.errors import ApiError
from outdraft.server.limits import Limits
from outdraft.server.sse import error_response

PUBLIC = frozenset({"/health"})
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
VISIT = "outdraft.visit"
SECURITY_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        b"font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may talk to the server.

    Attributes:
        keys: any of them opens it; none means that no key is asked for.
        hosts: names that a Host header may have, in lower case, without port.
        any_address: a Host that is an IP address is fine, too (bound to all interfaces). No web
            site can make a browser send one for it by changing its DNS.
        origins: of pages elsewhere that may use the server, such as https://example.org.
    """

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset(LOOPBACK)
    any_address: bool = False
    origins: frozenset[str] = frozenset()

    def knows_host(self, host: str) -> bool:
        """Whether a Host header names this server."""
        name = _host_name(host)
        if name in self.hosts:
            return True
        if not self.any_address:
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def knows_origin(self, origin: str, host: str) -> bool:
        """Whether an Origin header is of this server's own page, or of an allowed one."""
        if origin in self.origins:
            return True
        scheme, _, rest = origin.partition("://")
        return scheme in ("http", "https") and bool(rest) and rest.lower() == host.lower()

    def client_of(self, authorization: str, api_key: str) -> str | None:
        """The client whose key was given, or None. Takes as long for any wrong key."""
        given = api_key
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            given = value.strip()
        elif scheme.lower() == "basic":  # what a browser sends after asking its user
            given = _password(value.strip())
        found = None
        for i, key in enumerate(self.keys):
            if hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
                found = f"key{i}"
        return found


@dataclass(slots=True)
class Visit:
    """One request: who, when, and what its log line says beside that.

    `left_at` is when its connection closed under it (protocol.py says so); both times are
    time.monotonic's.
    """

    id: str
    client: str = ""
    started: float = field(default_factory=time.monotonic)
    left_at: float | None = None
    status: int = 0
    route: str = ""
    ignored: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        limits: Limits,
        done: Callable[[Scope, Visit], None],
    ) -> None:
        self.app = app
        self.access = access
        self.limits = limits
        self.done = done
        self._start, self._count = secrets.token_hex(4), itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        visit = Visit(f"req_{self._start}{next(self._count):06x}")
        scope[VISIT] = visit
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._extra(visit, headers)]
            await send(message)

        try:
            refusal = self._check(scope, headers, visit)
            if refusal is not None:
                await error_response(refusal, scope)(scope, receive, watched)
                return
            if scope["method"] == "OPTIONS":
                await self._preflight(headers, watched)
                return
            await self.app(scope, _limited(receive, self.limits), watched)
        finally:
            self.done(scope, visit)

    def _check(self, scope: Scope, headers: dict[str, str], visit: Visit) -> ApiError | None:
        """Why a request may not pass, or None."""
        peer = scope.get("client")
        visit.client = peer[0] if peer else "local"
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.access.knows_host(host):
            return ApiError(403, "this Host is not allowed: start with --allowed-host", "host")
        if origin is not None and not self.access.knows_origin(origin, host):
            return ApiError(
                403, "this Origin is not allowed: start with --allowed-origin", "origin"
            )
        if scope["method"] == "OPTIONS" and origin in self.access.origins:
            return None  # a browser sends no key with it
        if self.access.keys and scope["path"] not in PUBLIC:
            client = self.access.client_of(
                headers.get("authorization", ""), headers.get("x-api-key", "")
            )
            if client is None:
                wants_page = "text/html" in headers.get("accept", "")
                how = 'Basic realm="outdraft: the key is the password"' if wants_page else "Bearer"
                return ApiError(
                    401,
                    "a key is needed: send Authorization: Bearer KEY",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": how},
                )
            visit.client = client
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body_bytes:
            return _too_large(self.limits)
        return None

    def _extra(self, visit: Visit, headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
        extra = [*SECURITY_HEADERS, (b"x-request-id", visit.id.encode())]
        if visit.ignored:
            extra.append(
                (b"x-outdraft-ignored", ", ".join(visit.ignored).encode("ascii", "replace"))
            )
        origin = headers.get("origin")
        if origin in self.access.origins and origin is not None:
            extra.append((b"access-control-allow-origin", origin.encode("latin-1")))
            extra.append((b"vary", b"Origin"))
        return extra

    async def _preflight(self, headers: dict[str, str], send: Send) -> None:
        allowed = headers.get("origin") in self.access.origins
        answer = [
            (b"access-control-allow-methods", b"GET, POST"),
            (
                b"access-control-allow-headers",
                b"authorization, content-type, x-api-key, anthropic-version, anthropic-beta",
            ),
        ]
        start = {"type": "http.response.start", "status": 204 if allowed else 405}
        await send({**start, "headers": answer if allowed else []})
        await send({"type": "http.response.body", "body": b""})


def visit_of(scope: Scope) -> Visit:
    """The visit of a request."""
    visit: Visit = scope[VISIT]
    return visit


def _limited(receive: Receive, limits: Limits) -> Receive:
    """`receive` that refuses bodies that are too long or too slow."""
    n_bytes = 0
    deadline = asyncio.get_running_loop().time() + limits.body_s
    complete = False

    async def limited() -> Message:
        nonlocal n_bytes, complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive") from None
        if message["type"] == "http.request":
            n_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if n_bytes > limits.body_bytes:
                raise _too_large(limits)
        return message

    return limited


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body is larger than {limits.body_bytes} bytes", "body_too_large")


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    host = host.lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
