"""`outdraft serve`: answer clients of OpenAI's and Anthropic's APIs over HTTP."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.console import remark
from outdraft.errors import OutdraftError

if TYPE_CHECKING:
    from outdraft.server.run import ServerConfig

app = typer.Typer(add_completion=False)

Hosts = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", help="A name in Host that is fine, too. Can be repeated."),
]
Origins = Annotated[
    list[str] | None,
    typer.Option("--allowed-origin", help="A site whose pages may use it. Can be repeated."),
]
Keys = Annotated[
    list[str] | None, typer.Option("--api-key", help="Ask for this key. Can be repeated.")
]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="Ask for a key of this file, one a line.")
]
ClientShare = Annotated[
    float, typer.Option(min=0.01, max=1, help="Of those, how much one client may have.")
]
SendSeconds = Annotated[
    float, typer.Option(min=0.1, help="Cut a client off that has not read for so long.")
]
DrainSeconds = Annotated[
    float, typer.Option(min=0, help="After SIGTERM, let requests go on for so long.")
]
Parallel = Annotated[
    int, typer.Option("--parallel", "-np", min=1, max=4096, help="Requests in a batch.")
]
KvTokens = Annotated[
    int | None, typer.Option(min=1, help="Positions of keys and values for all of them.")
]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep prompts for later ones.")
]
KeptStates = Annotated[
    int | None, typer.Option(min=0, help="States of recurrent layers kept with them, at most.")
]
Learn = Annotated[
    bool,
    typer.Option("--learn/--no-learn", help="Make the drafter fit what is asked, in idle time."),
]
LearnDir = Annotated[
    str | None, typer.Option(help="Keep learned drafters here for the next start; with --learn.")
]
LearnMb = Annotated[int, typer.Option(min=1, help="Most memory for texts to learn from, in MB.")]
LearnIdle = Annotated[
    float,
    typer.Option("--learn-idle-seconds", min=0, help="Learn after so long without a request."),
]
ToolFormat = Annotated[
    str | None, typer.Option(help="How the model calls tools, instead of finding out.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose/--quiet", help="Print a line of JSON for each request.")
]


@app.command()
def serve(
    ctx: typer.Context,
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8080,
    alias: Annotated[str | None, typer.Option(help="The model's name for clients.")] = None,
    api_key: Keys = None,
    api_key_file: KeyFile = None,
    allowed_host: Hosts = None,
    allowed_origin: Origins = None,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Requests taken on at once.")] = 128,
    client_share: ClientShare = 0.75,
    max_body_mib: Annotated[int, typer.Option(min=1, max=1024, help="Largest body.")] = 8,
    send_seconds: SendSeconds = 30.0,
    drain_seconds: DrainSeconds = 20.0,
    max_sequences: Parallel = 16,
    kv_cache_tokens: KvTokens = None,
    prefix_cache: PrefixCache = True,
    kept_states: KeptStates = None,
    assistant: options.Assistant = None,
    adapter: options.Adapter = None,
    spec_type: options.Spec = "auto",
    speculative_config: options.SpecConfig = None,
    spec_draft_n_max: options.DraftMax = None,
    spec_draft_n: options.DraftFixed = None,
    spec_draft_p_min: options.DraftPMin = 0.0,
    spec_draft_sample: options.DraftSample = True,
    spec_draft_vocab: options.DraftVocab = None,
    spec_draft_vocab_text: options.DraftVocabText = None,
    device: options.Card = "auto",
    backend: options.Kernels = "auto",
    dtype: options.Compute = "auto",
    quant: options.Bits = "auto",
    kv_dtype: options.KvType = "bf16",
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    cache: options.Cache = True,
    cache_dir: options.CacheDir = None,
    cache_max_gb: options.CacheMax = options.CACHE_MAX_GB,
    learn: Learn = False,
    learn_dir: LearnDir = None,
    learn_mb: LearnMb = 16,
    learn_idle_s: LearnIdle = 1.0,
    tool_format: ToolFormat = None,
    verbose: Verbose = True,
) -> None:
    """Serve a model over HTTP, with OpenAI's and Anthropic's APIs and a page of its own."""
    from outdraft.server.run import serve as run

    engine = options.engine_config(ctx.params, max_queue=max_in_flight)
    run(model, engine, server_config(ctx.params), remark)


def server_config(given: Mapping[str, Any]) -> "ServerConfig":
    """What the server is asked for, from the options by name."""
    from outdraft.server.limits import Limits
    from outdraft.server.run import ServerConfig

    limits = Limits(
        body_bytes=given["max_body_mib"] << 20,
        in_flight=given["max_in_flight"],
        client_share=given["client_share"],
        send_s=given["send_seconds"],
    )
    return ServerConfig(
        host=given["host"],
        port=given["port"],
        alias=given["alias"],
        tool_format=given["tool_format"],
        keys=read_keys(given["api_key"] or None, given["api_key_file"]),  # none given: ()
        allowed_hosts=tuple(given["allowed_host"] or ()),
        allowed_origins=tuple(given["allowed_origin"] or ()),
        drain_s=given["drain_seconds"],
        verbose=given["verbose"],
        limits=limits,
    )


def read_keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The keys of the options and of the file.

    Raises:
        OutdraftError: the file cannot be read, or there is no key where one was meant.
    """
    keys = list(given or ())
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise OutdraftError(
                f"the key file {file} cannot be read", "check the path and its rights"
            ) from error
        keys += [line.strip() for line in lines if line.strip()]
    if (given is not None or file is not None) and not all(keys or [""]):
        raise OutdraftError("there is no key, or an empty one", "give keys with characters in them")
    return tuple(keys)
