"""Running the server: the engine's process beside uvicorn, and an orderly end.

Here: what starts in which order, and what SIGTERM does. Not here: options (cli/serve.py).
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvicorn

from outdraft.config import EngineConfig
from outdraft.errors import OutdraftError
from outdraft.server.app import make_app
from outdraft.server.engine import Engine
from outdraft.server.guard import LOOPBACK, Access
from outdraft.server.limits import Limits
from outdraft.server.listen import BACKLOG, listening
from outdraft.server.protocol import limited_protocol
from outdraft.server.service import Service
from outdraft.weights.find import resolve_model

WILDCARDS = ("0.0.0.0", "::", "")
DRAIN_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How a model is served.

    Attributes:
        alias: the model's name for clients; None is the one it was asked for by.
        keys: any of them is needed; none asks for none.
        drain_s: how long requests may go on after SIGTERM.
        tool_format: how the model calls tools; None finds out.
        verbose: print a line of JSON for each request.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    alias: str | None = None
    tool_format: str | None = None
    keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    drain_s: float = 20.0
    verbose: bool = False
    limits: Limits = field(default_factory=Limits)

    def access(self) -> Access:
        """Who may talk to the server.

        Raises:
            OutdraftError: others could reach it, and no key is asked for.
        """
        loopback = self.host in ("localhost", "127.0.0.1", "::1")
        if not loopback and not self.keys:
            raise OutdraftError(
                f"{self.host} can be reached from other machines and no key is asked for",
                "give --api-key or --api-key-file, or serve on 127.0.0.1",
            )
        own = f"[{self.host}]" if ":" in self.host else self.host
        hosts = {h.lower() for h in (*LOOPBACK, own, *self.allowed_hosts)}
        return Access(
            keys=self.keys,
            hosts=frozenset(hosts - {""}),
            any_address=self.host in WILDCARDS,
            origins=frozenset(o.rstrip("/") for o in self.allowed_origins),
        )


class Server(uvicorn.Server):
    """uvicorn, told to drain by its signals."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self.drain = drain

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours while it runs; unlike uvicorn's own they are not raised again after."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, self.end)
        try:
            yield
        finally:
            for sig in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(sig)

    def end(self) -> None:
        """The first signal drains; a second one ends at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.drain()


def serve(
    model: str,
    engine_config: EngineConfig,
    config: ServerConfig,
    remark: Callable[[str], None],
) -> None:
    """Serve until a signal.

    Raises:
        OutdraftError: the model cannot be loaded, or the address cannot be had.
    """
    import uvloop

    uvloop.run(_serve(model, engine_config, config, remark))


async def _serve(
    model: str,
    engine_config: EngineConfig,
    config: ServerConfig,
    remark: Callable[[str], None],
) -> None:
    access = config.access()
    path = resolve_model(model)
    engine = Engine(model, engine_config, remark)
    service = Service.make(
        config.alias or name_of(model, path), path, engine, config.limits, config.tool_format
    )
    app = make_app(service, access, _log if config.verbose else _no_log)
    tasks: list[asyncio.Task[None]] = []

    def drain() -> None:
        if not service.jobs.draining:
            service.jobs.draining = True
            tasks.append(asyncio.create_task(_drain(service, config.drain_s)))

    server = Server(
        uvicorn.Config(
            app,
            http=limited_protocol(config.limits),
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            proxy_headers=False,  # or a client could name the address its share is counted by
            server_header=False,
            date_header=False,
            timeout_keep_alive=30,
            backlog=BACKLOG,
        ),
        drain,
    )
    sockets = listening(config.host, config.port)
    engine.start()
    service.jobs.renderer.start()
    serving = asyncio.create_task(server.serve(sockets))
    loading = asyncio.create_task(engine.loaded())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving
            return
        await loading
        remark(loaded_line(service))
        port = sockets[0].getsockname()[1]
        remark(f"listening on http://{config.host}:{port}")
        await serving
    finally:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            if not serving.done():
                await serving
        loading.cancel()
        await engine.stop()
        await service.jobs.renderer.close()


async def _drain(service: Service, drain_s: float) -> None:
    """Let requests end; those that have not in time get an error as their last event."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + drain_s
    while service.jobs.n_in_flight and loop.time() < deadline:
        await asyncio.sleep(DRAIN_LOOK_S)
    service.jobs.cut("the server is shutting down")


def name_of(model: str, path: Path) -> str:
    """What clients call a model: its id, or the last part of its path."""
    return model if not Path(model).expanduser().exists() else path.resolve().name


def loaded_line(service: Service) -> str:
    """What was loaded, for who started the server."""
    info = service.engine.info
    drafts = info["draft_reason"]
    return (
        f"model: {service.name} ({info['n_params'] / 1e6:,.1f}M, {info['compute']}, "
        f"{info['ctx_size']} tokens)\ndrafts: {drafts}"
    )


def _log(line: dict[str, Any]) -> None:
    sys.stderr.write(orjson.dumps(line).decode() + "\n")


def _no_log(line: dict[str, Any]) -> None:
    pass
