"""`outdraft bench serve`: the engine through HTTP beside the engine alone."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outdraft.cli import options
from outdraft.cli.bench import find_prompts, new_table
from outdraft.cli.bench_throughput import read_concurrencies
from outdraft.cli.console import remark, remarks, results
from outdraft.errors import OutdraftError

if TYPE_CHECKING:
    from outdraft.bench.serve import ServeRun
    from outdraft.bench.throughput import Asked
    from outdraft.engine.engine import LLM

PROMPTS_PER_KIND = 8
START_S = 600.0
START_LEARNING_S = 8.0  # its process loads the model

app = typer.Typer(add_completion=False)


@app.command()
def bench_serve(
    ctx: typer.Context,
    model: options.Model,
    streams: Annotated[str, typer.Option(help="Streams at a time.")] = "1,16",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests a run; twice the highest of streams.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=4, help="Most tokens of an answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and lengths.")] = 0,
    assistant: options.Assistant = None,
    spec_draft_n: options.DraftFixed = None,
    quant: options.Bits = "auto",
    threads: options.Threads = None,
    learn: Annotated[
        bool, typer.Option("--learn", help="Measure what learning in the pauses costs instead.")
    ] = False,
    pause: Annotated[float, typer.Option(min=0.3, help="Seconds of a pause, for --learn.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Measure tokens per second through `outdraft serve` against the engine alone.

    Greedy, streamed, the same requests in turn, no prefix cache; both have the machine to
    themselves while they run. That the texts are the same is checked first. With --learn a server
    that learns is compared with one that does not, request by request behind equal pauses.
    """
    wanted = read_concurrencies(streams)
    config = options.engine_config(ctx.params, max_sequences=wanted[-1], prefix_cache=False)
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.serve import summarise
    from outdraft.bench.throughput import mix_requests
    from outdraft.cli.streaming import load

    llm = load(model, config)
    prompts = find_prompts(llm, None, PROMPTS_PER_KIND, seed)
    asked = mix_requests(prompts, requests or 2 * wanted[-1], max_tokens, llm.ctx_size, seed)
    given = ["--parallel", str(wanted[-1]), "--quant", quant]
    given += [] if threads is None else ["--threads", str(threads)]
    given += [] if spec_draft_n is None else ["--spec-draft-n", str(spec_draft_n)]
    given += [] if assistant is None else ["--assistant", assistant]
    if learn:
        learning(model, given, asked, pause, as_json=as_json)
        return
    with serving(model, given) as port:
        same = check(llm, port, asked, wanted[-1])
        runs = measure(llm, port, asked, wanted, rounds)
    rows = summarise(runs)
    if as_json:
        report = {"rows": rows, "identical": same, "machine": describe_machine()}
        typer.echo(json.dumps({**report, **describe_version()}, indent=2))
        return
    show(rows, same)


def learning(
    model: str, given: Sequence[str], asked: "Sequence[Asked]", pause_s: float, *, as_json: bool
) -> None:
    """What learning while serving costs requests."""
    from outdraft.bench.learning import OFF, ON, find_learner, measure, summarise, while_learning
    from outdraft.bench.machine import describe_machine, describe_version
    from outdraft.bench.serve import ask_all

    idle_s = ["--learn", "--learn-idle-seconds", str(0.1)]
    with serving(model, given) as off, serving(model, [*given, *idle_s]) as on:
        same = ask_all(off, asked, 1)[2] == ask_all(on, asked, 1)[2]  # and something to learn from
        time.sleep(START_LEARNING_S)
        with remarks().status("measuring"):
            answers = measure({OFF: off, ON: on}, find_learner(os.getpid()), asked, pause_s)
    counted = while_learning(answers, pause_s)
    if len(counted) < 8:
        raise OutdraftError("the learner had too little to do", "give more --requests")
    rows, n_rounds = summarise(counted), len(counted) // 2
    if as_json:
        report = {
            "rows": rows,
            "rounds": n_rounds,
            "identical": same,
            "machine": describe_machine(),
        }
        typer.echo(json.dumps({**report, **describe_version()}, indent=2))
        return
    table = new_table("learning in pauses", ["off, ms", "on, ms", "ratio", "of pairs (quartiles)"])
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(
            {"first_ms": "first text", "pass_ms": "a pass", "total_ms": "a request"}[row["what"]],
            f"{row['off']:.2f}",
            f"{row['on']:.2f}",
            f"{row['ratio_of_medians']:.3f}",
            f"{row['ratio']:.3f} ({low:.3f}-{high:.3f})",
        )
    results().print(table)
    remark(f"{n_rounds} of {len(asked)} requests, those behind a pause in which it learned")
    remark("texts are the same" if same else "TEXTS DIFFER")


@contextmanager
def serving(model: str, given: Sequence[str]) -> Iterator[int]:
    """A server of the model on a free port, ready; it ends with the block.

    Raises:
        OutdraftError: it does not start.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    command = [sys.executable, "-m", "outdraft", "serve", model, "--port", str(port), "--quiet"]
    process = subprocess.Popen([*command, "--no-prefix-cache", "--client-share", "1", *given])
    try:
        deadline = time.monotonic() + START_S
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise OutdraftError("the server does not start", "see what it printed above")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _ready(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def check(llm: "LLM", port: int, asked: Sequence["Asked"], streams: int) -> bool:
    """Both answer all requests once, which warms them up; whether the texts are the same."""
    from outdraft.bench.serve import ask_all
    from outdraft.bench.throughput import answer_all
    from outdraft.text.stream import IncrementalDetokenizer

    _, answers = answer_all(llm, asked, streams)
    _, _, texts = ask_all(port, asked, streams)
    for one, answer, text in zip(asked, answers, texts, strict=True):
        stream = IncrementalDetokenizer(llm.tokenizer, one.prompt)
        own = "".join(map(stream.push, answer.tokens)) + stream.flush()
        if own != text:
            remark(f"a text differs: {own[:80]!r} and {text[:80]!r}")
            return False
    return True


def measure(
    llm: "LLM", port: int, asked: Sequence["Asked"], wanted: Sequence[int], rounds: int
) -> list["ServeRun"]:
    """Runs in turn: in each round both, at every number of streams, the first one changing."""
    from outdraft.bench.serve import ENGINE, HTTP, ServeRun, ask_all
    from outdraft.bench.throughput import answer_all

    runs = []
    with remarks().status("measuring"):
        for i in range(rounds):
            for streams in wanted:
                for where in (ENGINE, HTTP) if i % 2 else (HTTP, ENGINE):
                    if where == ENGINE:
                        seconds, answers = answer_all(llm, asked, streams)
                        n_tokens = sum(len(a.tokens) for a in answers)
                    else:
                        seconds, n_tokens, _ = ask_all(port, asked, streams)
                    runs.append(ServeRun(where, streams, i, n_tokens / seconds))
    return runs


def show(rows: Sequence[dict[str, Any]], same: bool) -> None:
    """The table."""
    table = new_table("through HTTP", ["engine, tokens/s", "HTTP, tokens/s", "ratio (low-high)"])
    for row in rows:
        table.add_row(
            str(row["streams"]),
            f"{row['engine_tok_s']:.0f}",
            f"{row['http_tok_s']:.0f}",
            f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})",
        )
    results().print(table)
    remark("texts are the same" if same else "TEXTS DIFFER")
