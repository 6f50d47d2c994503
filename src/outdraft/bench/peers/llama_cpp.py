"""llama.cpp's server as a peer: the same weights and prompts, plain and with 1 to 4 drafts a step.

Each way of decoding is a process of its own, because the server fixes the number of drafts when it
starts; one that is not asked sleeps. Prompts go in and answers come out as token ids over HTTP.
Times are the server's own (`timings`): `predicted_ms` is from the first token to the last, as ours
is. Not here: converting (gguf.py).
"""

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from outdraft import _core
from outdraft.bench.peers.gguf import Files, LlamaCpp, convert_pair, find_llama_cpp
from outdraft.bench.run import Arm, Measurement, Peer
from outdraft.engine.engine import LLM
from outdraft.errors import OutdraftError
from outdraft.ops.cpu import CpuOps
from outdraft.request import SamplingParams
from outdraft.speculate.stats import DraftStats

NAME = "llama.cpp"
MOST_DRAFTS = 4
READY_S = 60.0
ANSWER_S = 600.0
STOP_S = 5.0
GREEDY = {
    "temperature": 0.0,
    "top_k": 1,
    "samplers": ["top_k"],
    "ignore_eos": True,
    "cache_prompt": False,
    "return_tokens": True,
    "stream": False,
}


class Server:
    """A running llama-server and how to reach it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, output: Path) -> None:
        self.process = process
        self.output = output
        self.connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)

    def wait(self) -> None:
        """Until it answers.

        Raises:
            OutdraftError: it ended, or took too long.
        """
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.request("GET", "/health").get("status") == "ok":
                    return
            except (OSError, HTTPException, ValueError):
                pass  # not yet
            time.sleep(0.05)
        said = self.output.read_text(errors="replace")[-800:].strip()
        raise OutdraftError(
            f"llama-server does not answer; it said last:\n{said}",
            "use the sources of llama-cpp-python 0.3.36, as scripts/build_llama_cpp.sh does",
        )

    def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """One exchange of JSON, by a connection of its own: the server ends idle ones."""
        content = None if body is None else json.dumps(body)
        try:
            self.connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = json.loads(self.connection.getresponse().read())
        finally:
            self.connection.close()
        assert isinstance(answer, dict)
        return answer

    def measure(self, tokens: Sequence[int], params: SamplingParams) -> Measurement:
        """One greedy request.

        Raises:
            OutdraftError: the server refused it.
        """
        assert params.greedy, "greedy decoding is what is compared"
        body = GREEDY | {"prompt": list(tokens), "n_predict": params.max_tokens}
        start = time.perf_counter()
        answer = self.request("POST", "/completion", body)
        wall_s = time.perf_counter() - start
        if "timings" not in answer:
            raise OutdraftError(
                f"llama-server refused a request: {answer.get('error', answer)}",
                "see the message; prompts and answers must fit its context",
            )
        timings = answer["timings"]
        # sums only: the server does not tell positions
        stats = DraftStats(
            drafted=[timings.get("draft_n", 0)], accepted=[timings.get("draft_n_accepted", 0)]
        )
        return Measurement(
            answer["tokens"],
            timings["prompt_ms"] / 1e3,
            timings["predicted_ms"] / 1e3,
            stats,
            wall_s=wall_s,
        )

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def build_peer(llm: LLM, server: Path | None) -> Iterator[Peer]:
    """llama.cpp with our weights at as many bits as ours have; its processes end with the block.

    Raises:
        OutdraftError: llama.cpp is not there, or cannot run this pair.
    """
    assert llm.pairing.path is not None
    llama = find_llama_cpp(server)
    ops = llm.target.ops
    quant = ops.format if isinstance(ops, CpuOps) else "bf16"
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = convert_pair(llama, llm.target, llm.pairing.path, quant, directory)
        arms = []
        for k in range(MOST_DRAFTS + 1):
            name = f"{NAME} plain" if k == 0 else f"{NAME} k={k}"
            running = stack.enter_context(serve(llama, files, k, llm.ctx_size, directory))
            arms.append(Arm(name, running.measure))
        about = {
            "name": NAME,
            "version": version_of(llama),
            "target": files.target_type,
            "target_bytes": files.target.stat().st_size,
            "assistant": files.assistant_type,
            "assistant_bytes": files.assistant.stat().st_size,
            "threads": _core.threads(),
        }
        yield Peer(arms, about)


@contextmanager
def serve(
    llama: LlamaCpp, files: Files, k: int, ctx_size: int, directory: Path
) -> Iterator[Server]:
    """A server that drafts k tokens a step; plain, without the assistant, for 0."""
    port = free_port()
    output = directory / f"server-{k}.txt"
    with output.open("wb") as log:
        process = subprocess.Popen(
            command_line(llama, files, k, ctx_size, port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, output)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def command_line(llama: LlamaCpp, files: Files, k: int, ctx_size: int, port: int) -> list[str]:
    """What starts a server: one request at a time, as many threads as ours, no prompts kept."""
    threads = str(_core.threads())
    words = [str(llama.server), "--model", str(files.target), "--ctx-size", str(ctx_size)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--parallel", "1", "--offline"]
    words += ["--threads", threads, "--threads-batch", threads, "--cache-ram", "0"]
    words += ["--ctx-checkpoints", "0", "--log-verbosity", "2"]
    if k > 0:
        words += ["--spec-type", "draft-mtp", "--spec-draft-model", str(files.assistant)]
        words += ["--spec-draft-n-max", str(k), "--spec-draft-n-min", "0"]
        words += ["--spec-draft-threads", threads, "--spec-draft-threads-batch", threads]
    return words


def version_of(llama: LlamaCpp) -> str:
    """What the program says of itself."""
    done = subprocess.run(
        [str(llama.server), "--version"], capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).splitlines()
    return next((line.strip() for line in lines if line.startswith("version")), "unknown")


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
