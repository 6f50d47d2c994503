"""Learning while serving, seen from outside: tokens per pass of a user's requests, over time.

`python scripts/learn_demo.py TARGET ASSISTANT TEXTS --requests N` serves the target with `--learn`,
asks it to continue texts of a JSONL file, each once, with a pause after every few, and prints what
drafting did. At the end every request is made again without drafts: the texts have to be the same.
It is the example of docs/learning.md.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from typing import Any

PORT = 8093
URL = f"http://127.0.0.1:{PORT}"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(text: str, n: int, **more: Any) -> dict[str, Any]:
    """One greedy completion."""
    body = {"prompt": text, "max_tokens": n, "temperature": 0, "ignore_eos": True, **more}
    request = urllib.request.Request(
        f"{URL}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with OPENER.open(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def look(path: str) -> str:
    """What a route says."""
    with OPENER.open(URL + path, timeout=10) as answer:
        return str(answer.read().decode())


def learned() -> str:
    """A few numbers of /metrics."""
    values = {}
    for line in look("/metrics").splitlines():
        if line.startswith("outdraft_learn_") and " " in line:
            name, value = line.removeprefix("outdraft_learn_").rsplit(" ", 1)
            values[name] = float(value)
    names = ("steps_total", "candidates_total", "swaps_total", "rollbacks_total")
    return ", ".join(f"{values.get(n, 0):.0f} {n.removesuffix('_total')}" for n in names)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("assistant")
    parser.add_argument("texts")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--together", type=int, default=10, help="Requests between two pauses.")
    parser.add_argument("--pause", type=float, default=20.0, help="Seconds of a pause.")
    parser.add_argument("--tokens", type=int, default=96)
    given, more = parser.parse_known_args()
    with open(given.texts, encoding="utf-8") as file:
        rows = [json.loads(line)["text"] for line in file]
    prompts = [row[len(row) // 3 :][:200] for row in rows][: given.requests]
    command = [sys.executable, "-m", "outdraft", "serve", given.target, "--port", str(PORT)]
    command += ["--assistant", given.assistant, "--learn", "--quiet", "--spec-draft-n", "4", *more]
    server = subprocess.Popen(command)
    try:
        while True:
            try:
                look("/health")
                break
            except OSError:
                time.sleep(0.2)
        start, texts, passes, tokens = time.monotonic(), [], 0, 0
        for i, prompt in enumerate(prompts, start=1):
            answer = ask(prompt, given.tokens)
            texts.append(answer["choices"][0]["text"])
            usage = answer["usage"]
            n = usage["completion_tokens"]
            accepted = usage["completion_tokens_details"]["accepted_prediction_tokens"]
            tokens, passes = tokens + n, passes + n - accepted
            if i % given.together == 0:
                seconds = time.monotonic() - start
                print(f"{seconds:6.0f} s  {i:4} requests  {tokens / passes:.2f} tokens per pass")
                passes = tokens = 0
                time.sleep(given.pause)
                print(f"          behind the pause: {learned()}", flush=True)
        plain = {"store": False, "outdraft": {"drafting": "off"}}
        same = sum(
            ask(prompt, given.tokens, **plain)["choices"][0]["text"] == text
            for prompt, text in zip(prompts, texts, strict=True)
        )
        print(f"{same} of {len(texts)} texts are those of decoding without drafts")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
