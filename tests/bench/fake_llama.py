"""Stands in for llama.cpp's programs: answers like its server, with tokens made from the prompt.

Copied into a directory as `llama-server`, `llama-quantize` and the conversion script.
"""

import json
import shutil
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.answer({"status": "ok"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(body["prompt"]) > 4000:
            return self.answer({"error": {"message": "too long for the context"}})
        assert body["temperature"] == 0 and body["ignore_eos"] and not body["cache_prompt"]
        n, k = body["n_predict"], DRAFTS
        timings = {"prompt_ms": 1.0, "predicted_ms": 1000 * (n - 1) / (100 + 10 * k)}
        if k:
            timings |= {"draft_n": 8, "draft_n_accepted": 6}
        tokens = [(sum(body["prompt"]) + i) % 100 + (k == 4) for i in range(n)]
        self.answer({"tokens": tokens, "timings": timings})


program = Path(sys.argv[0]).name
if program == "convert_hf_to_gguf.py":
    source = Path(sys.argv[1])
    assert json.loads((source / "tokenizer.json").read_text())["model"]["byte_fallback"] is True
    shutil.copyfile(source / "model.safetensors", option("--outfile"))
elif program == "llama-quantize":
    if sys.argv[3] == "Q4_0" and "fail" in Path(__file__).read_text().splitlines()[-1]:
        sys.exit("this program fails")
    Path(sys.argv[2]).write_bytes(Path(sys.argv[1]).read_bytes()[: 1000 + len(sys.argv[3])])
elif "--version" in sys.argv:
    print("version: 7 (fake)", file=sys.stderr)
else:
    DRAFTS = int(option("--spec-draft-n-max")) if "--spec-type" in sys.argv else 0
    assert (Path(option("--model"))).exists() and option("--threads") == "1"
    assert DRAFTS == 0 or Path(option("--spec-draft-model")).exists()
    HTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
