"""One test for each class of hole that servers of this kind have had; numbers are the classes'.

What a live server is needed for runs against one; classes whose proof lies elsewhere name it.
"""

import ast
import asyncio
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import OutdraftError
from outdraft.server.app import FRONTS, LOOKS
from outdraft.server.errors import ApiError
from outdraft.server.renderer import Renderer
from outdraft.weights.find import resolve_model
from tests.server.live import ROOT, Live, run

SOURCE = ROOT / "src" / "outdraft"
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
LEAK = re.compile(r"/(?:tmp|home|root|usr|etc|work|src)/|Traceback|site-packages|0x[0-9a-f]{6,}")


def demo_copy(folder: Path) -> Path:
    """The demo's target in a directory of its own, its weights linked."""
    target = resolve_model("demo")
    folder.mkdir()
    for file in target.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder / file.name)
    return folder


def canary(path: Path) -> str:
    """Python that leaves a trace when it runs."""
    return f"from pathlib import Path\nPath({str(path)!r}).touch()\n"


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.open, (self.path, os.O_CREAT | os.O_WRONLY)


def test_class_01_no_pickle(tmp_path: Path) -> None:
    """Weights as a pickle are refused, not read; that no module imports pickle: test_structure."""
    import pickle

    folder, trace = demo_copy(tmp_path / "model"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(OutdraftError):
        LLM(str(folder), EngineConfig(threads=1))
    assert not trace.exists()


def test_class_02_a_model_folder_is_not_code(tmp_path: Path) -> None:
    folder, trace = demo_copy(tmp_path / "model"), tmp_path / "ran"
    for name in (
        "modeling_demo",
        "configuration_demo",
        "tokenization_demo",
        "torch",
        "jinja2",
    ):
        (folder / f"{name}.py").write_text(canary(trace))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_demo.Demo"}
    (folder / "config.json").write_text(json.dumps(config))
    names = json.loads((folder / "tokenizer_config.json").read_text())
    names |= {"auto_map": {"AutoTokenizer": ["tokenization_demo.Demo", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    with LLM(str(folder), EngineConfig(threads=1, spec_type="off")) as llm:
        assert llm.render_chat(ASK["messages"])

    async def render() -> str:
        renderer = Renderer(folder, 20)
        try:
            return await renderer.render(ASK["messages"])
        finally:
            await renderer.close()

    assert "hi" in run(render())
    assert not trace.exists()


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'a' * 10**9 * 9 }}",
    "output": "{% for a in range(99999) %}{{ 'abcdefgh' * 1000 }}{% endfor %}",
    "objects": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "files": "{% include '/etc/passwd' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_class_03_templates(tmp_path: Path, name: str) -> None:
    """A hostile one ends with an error in time; the next conversation is served as ever."""
    folder = tmp_path / "model"
    folder.mkdir()
    text = "{% if messages[0].content == 'attack' %}" + TEMPLATES[name] + "{% else %}ok{% endif %}"
    (folder / "chat_template.jinja").write_text(text)

    async def attack() -> None:
        renderer = Renderer(folder, 1.0)
        renderer.start()
        try:
            assert await renderer.render([{"role": "user", "content": "x"}]) == "ok"
            with pytest.raises(ApiError) as refused:
                await renderer.render([{"role": "user", "content": "attack"}])
            assert refused.value.status == 400
            assert not LEAK.search(refused.value.message)
            assert await renderer.render([{"role": "user", "content": "x"}]) == "ok"
        finally:
            await renderer.close()

    run(asyncio.wait_for(attack(), 60))


def test_class_03_templates_come_with_the_model_only(live: Live) -> None:
    response = live.post(CHAT, {**ASK, "chat_template": "{{ 7 * 7 }}"})
    assert response.status_code == 400
    response = live.post(CHAT, {**ASK, "chat_template_kwargs": {"messages": []}})
    assert response.status_code == 400


def test_class_04_no_eval_of_what_a_model_wrote() -> None:
    """No module evaluates text as code. (Fuzzing of the tool-call parsers is with them.)"""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, path
            if isinstance(node, ast.Attribute):
                assert node.attr != "literal_eval", path


EVIL = [
    {"guided_regex": "((a{1,500}){1,500}){1,500}b"},
    {"guided_regex": "(a|a)*" * 200 + "b"},
    {"guided_regex": "[a-z]{1,100000}{1,1000}"},
    {"guided_grammar": 'start: a\na: a a | "x"\n'},
    {"guided_grammar": "start: " + "(" * 500 + '"a"' + ")*" * 500},
    {"guided_json": {"$ref": "#"}},
    {"guided_json": {"type": "string", "pattern": "(x+x+)+y"}},
    {"guided_json": {"enum": [f"{i:09d}" for i in range(3000)]}},
    {"guided_json": {"anyOf": [{"$ref": "#/$defs/a"}] * 50, "$defs": {"a": {"$ref": "#/$defs/a"}}}},
]


@pytest.mark.parametrize("extra", EVIL, ids=lambda e: str(e)[:40])
def test_class_05_regex_and_grammar(live: Live, extra: dict[str, Any]) -> None:
    """It is served or refused, others are served meanwhile, and the engine lives."""
    n_served, done = 0, threading.Event()

    def bystander() -> None:
        nonlocal n_served
        while not done.is_set():
            assert live.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
            n_served += 1

    thread = threading.Thread(target=bystander)
    thread.start()
    try:
        response = live.post(CHAT, {**ASK, "max_tokens": 30, **extra})
    finally:
        done.set()
        thread.join()
    assert response.status_code in (200, 400), response.text
    assert n_served > 0
    assert live.metric("outdraft_engine_restarts_total") == 0


def grow(live: Live, n: int) -> None:
    """Unique schemas, paths, methods, headers and salts."""
    with live.client() as client:
        for i in range(n):
            schema = {"type": "object", "properties": {f"k{time.time_ns()}{i}": {"const": i}}}
            body = {**ASK, "max_tokens": 1, "guided_json": schema, "cache_salt": f"{i}"}
            assert client.post(CHAT, json=body).status_code == 200
            client.request(f"M{i}", f"/nothing/{i}?{i}", headers={f"X-{i}": "y"})
            client.get(f"/v1/models/m{i}")


def sizes(live: Live) -> tuple[int, float, float]:
    import psutil

    server = psutil.Process(live.process.pid).memory_info().rss / 2**20
    return len(live.get("/metrics").text), server, live.worker().memory_info().rss / 2**20


def test_class_06_clients_do_not_make_caches_grow(live: Live) -> None:
    grow(live, 60)  # fills what is bounded
    metrics, server, engine = sizes(live)
    grow(live, 150)
    after = sizes(live)
    assert after[0] < metrics + 2000
    assert after[1] < server + 8
    assert after[2] < engine + 24


@pytest.mark.prove
def test_class_06_ten_thousand(live: Live) -> None:
    grow(live, 500)
    metrics, server, engine = sizes(live)
    grow(live, 10_000)
    after = sizes(live)
    assert after[0] < metrics + 2000
    assert after[1] < server + 24
    assert after[2] < engine + 64


TOOLS = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(257)]
FAN_OUT: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {**ASK, "n": 65}),
    (CHAT, {**ASK, "n": 2**40}),
    (CHAT, {**ASK, "messages": ASK["messages"] * 4097}),
    (CHAT, {**ASK, "stop": [f"s{i}" for i in range(17)]}),
    (CHAT, {**ASK, "stop_token_ids": list(range(17))}),
    (CHAT, {**ASK, "logprobs": True, "top_logprobs": 21}),
    (CHAT, {**ASK, "max_tokens": 2**52}),
    (CHAT, {**ASK, "guided_regex": "a" * 70_000}),
    (CHAT, {**ASK, "bad_words": ["x"] * 2000}),
    (CHAT, {**ASK, "logit_bias": {str(i): 1 for i in range(5000)}}),
    (CHAT, {**ASK, "tools": TOOLS}),
    ("/v1/completions", {"prompt": ["x"] * 65}),
    ("/v1/completions", {"prompt": ["x"] * 9, "n": 8}),
    ("/v1/completions", {"prompt": "x", "logprobs": 50}),
    ("/v1/completions", {"prompt": "word " * 10_000}),
    ("/v1/embeddings", {"input": ["x"] * 65}),
    ("/v1/embeddings", {"input": [[2] * 4096]}),
]


@pytest.mark.parametrize("path,body", FAN_OUT, ids=lambda v: str(v)[-36:])
def test_class_07_fan_out(live: Live, path: str, body: dict[str, Any]) -> None:
    response = live.post(path, body)
    assert response.status_code == 400, response.text
    assert any(word in response.text for word in ("limit", "context", "use ", "less than"))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA"]
)
def test_class_08_media(live: Live, url: str) -> None:
    """Nothing is fetched. This model takes no images, so `data:` is refused, too."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.3)
        image = {
            "type": "image_url",
            "image_url": {"url": url.format(port=listener.getsockname()[1])},
        }
        message = {"role": "user", "content": [image]}
        assert live.post(CHAT, {**ASK, "messages": [message]}).status_code == 400
        with pytest.raises(TimeoutError):
            listener.accept()


def test_class_09_errors_leak_nothing(live: Live) -> None:
    bodies: list[bytes] = [
        b"",
        b"{",
        b"[" * 5000,
        b"\xff\xfe",
        b'"text"',
        b"null",
        b'{"messages": 5}',
        b'{"messages": [{"role": {}}]}',
        b'{"prompt": {"a": 1}}',
        json.dumps({**ASK, "guided_regex": "("}).encode(),
        json.dumps({**ASK, "guided_grammar": "start: nothing"}).encode(),
        json.dumps({**ASK, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
        json.dumps({"prompt": [10**8]}).encode(),
    ]
    with live.client() as client:
        for path, *_ in FRONTS:
            for body in bodies:
                response = client.post(path, content=body)
                lowest = 200 if path.endswith("count_tokens") else 400  # grammars do not count
                assert lowest <= response.status_code < 500, (path, body, response.text)
                assert not LEAK.search(response.text), (path, body, response.text)
        for path in ("/nothing", "/v1/models/%00", "/etc/passwd", "/v1/models/" + "x" * 3000):
            assert not LEAK.search(client.get(path).text)
        for path in ("/props", "/health", "/v1/outdraft/stats", "/metrics", "/openapi.json"):
            assert not LEAK.search(client.get(path).text), path


def routes() -> list[tuple[str, str]]:
    """Every route of the application, the page's included."""
    from outdraft.server.app import PAGE, page_files

    found = [("POST", path) for path, *_ in FRONTS] + [("GET", path) for path, *_ in LOOKS]
    found += [("GET", path) for path in page_files(PAGE)]
    return [*found, ("GET", "/v1/models/demo"), ("GET", "/metrics"), ("GET", "/openapi.json")]


def test_class_10_deny_by_default(keyed: Live) -> None:
    wrong = ["x", "sesame-123", "sesame-12345", "SESAME-1234", "Sesame-1234\u00e9"]
    with httpx.Client(base_url=keyed.url, trust_env=False) as client:
        for method, path in [*routes(), ("GET", "/nothing"), ("PUT", "/x"), ("HEAD", "/props")]:
            expected = 200 if path == "/health" else 401
            assert client.request(method, path).status_code == expected, path
            for key in wrong:
                headers = {"Authorization": f"Bearer {key}".encode()}
                assert client.request(method, path, headers=headers).status_code == expected
            assert client.request(method, path, headers={"x-api-key": "no"}).status_code == expected
            other = client.request(method, path, headers={"Host": "127.0.0.1:1"}).status_code
            assert other == expected
        for headers in (
            {"Authorization": "Bearer sesame-1234"},
            {"Authorization": "bearer sesame-1234"},
            {"x-api-key": "sesame-1234"},
            {"Authorization": httpx.BasicAuth("me", "sesame-1234")._auth_header},
        ):
            assert client.get("/v1/models", headers=headers).status_code == 200
        asked = client.get("/", headers={"Accept": "text/html"}).headers["www-authenticate"]
        assert asked.startswith("Basic")  # so that a browser asks for the key


def test_class_10_keys_are_compared_in_constant_time() -> None:
    text = (SOURCE / "server" / "guard.py").read_text()
    assert "hmac.compare_digest" in text
    assert not re.search(r"in self\.(access\.)?keys\b(?!\))", text)


def test_class_11_the_browser_attacks_localhost(live: Live) -> None:
    own = f"http://127.0.0.1:{live.port}"
    with live.client() as client:
        for host in ("evil.example", f"evil.example:{live.port}", "127.0.0.1.evil.example", ""):
            response = client.post(CHAT, json=ASK, headers={"Host": host})
            assert response.status_code == 403, host
        for origin in (
            "https://evil.example",
            "null",
            f"http://localhost:{live.port + 1}",
            "file://",
        ):
            response = client.post(CHAT, json=ASK, headers={"Origin": origin})
            assert response.status_code == 403, origin
            assert "access-control-allow-origin" not in response.headers
            response = client.options(CHAT, headers={"Origin": origin})
            assert response.status_code == 403
        assert client.post(CHAT, json=ASK, headers={"Origin": own}).status_code == 200
        assert client.get("/health", headers={"Host": f"localhost:{live.port}"}).status_code == 200
        for path in ("/", "/health", CHAT, "/nothing"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"


def test_class_11_loopback_unless_there_is_a_key() -> None:
    from outdraft.server.run import ServerConfig

    assert ServerConfig().host == "127.0.0.1"
    for host in ("0.0.0.0", "192.168.1.5", "::"):
        with pytest.raises(OutdraftError, match="key"):
            ServerConfig(host=host).access()
        assert ServerConfig(host=host, keys=("k",)).access().keys == ("k",)


def test_class_12_paths(live: Live) -> None:
    """Ids are looked up. (Mutated safetensors headers: tests/weights/test_checkpoint.py.)"""
    for path in (
        "/v1/models/../../../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/models//etc/passwd",
        "/..%2f..%2fpyproject.toml",
        "/js/..%2f..%2fapp.py",
        "/%2e%2e/app.py",
    ):
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answer = sock.recv(4000).decode()
        assert answer.startswith("HTTP/1.1 404"), (path, answer[:100])
        assert "root:" not in answer
    response = live.post(CHAT, {**ASK, "model": "../../etc/passwd"})
    assert response.json()["model"] == "demo"


def test_class_13_one_request_does_not_end_the_engine(live: Live) -> None:
    """Options crossed, with drafting. (Faults at every stage: tests/engine/test_faults.py.)"""
    options: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1.5},
        {"logit_bias": {"5": -100, "7": 100}},
        {"logprobs": True, "top_logprobs": 5},
        {"response_format": {"type": "json_object"}},
        {"stop": ["e", " "], "min_tokens": 1},
        {"n": 3, "seed": 0},
        {"outdraft": {"tokens": True, "drafting": "off"}},
        {"bad_words": ["def", " the"], "repeat_last_n": 4},
        {"max_tokens": 1},
    ]
    with live.client() as client:
        for i, one in enumerate(options):
            for other in options[i:]:
                body = {**ASK, "max_tokens": 12, **one, **other}
                response = client.post(CHAT, json=body)
                assert response.status_code == 200, (one, other, response.text)
    assert live.metric("outdraft_engine_restarts_total") == 0


def test_class_14_requests_do_not_see_each_other(live: Live) -> None:
    """Answers of a mixture are those of each alone. (Ten thousand steps: tests/contract.)"""
    asks: list[dict[str, Any]] = [
        {"prompt": f"# number {i}\ndef f{i}(x):\n", "max_tokens": 20, "seed": i, **extra}
        for i, extra in enumerate(
            [
                {"temperature": 0},
                {"temperature": 1.1},
                {"temperature": 0.8, "presence_penalty": 1.5},
                {"temperature": 0, "logit_bias": {"300": 5}},
                {"temperature": 0.7, "guided_regex": "[a-z ]{5,30}"},
                {"temperature": 0, "outdraft": {"drafting": "off"}},
            ]
        )
    ]
    alone = [live.post("/v1/completions", ask).json()["choices"] for ask in asks]

    async def together() -> list[Any]:
        async with httpx.AsyncClient(base_url=live.url, timeout=60, trust_env=False) as client:
            posts = [client.post("/v1/completions", json=ask) for ask in asks * 2]
            return [r.json()["choices"] for r in await asyncio.gather(*posts)]

    assert run(together()) == alone * 2


def test_class_15_prefix_cache_isolation(live: Live) -> None:
    text = "# a prompt of some pages\n" + "".join(f"value_{i} = {i}\n" for i in range(80))
    ask = {"prompt": text, "max_tokens": 1}

    def cached(salt: str) -> int:
        answer = live.post("/v1/completions", {**ask, "cache_salt": salt}).json()
        n: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return n

    fresh = f"{time.time_ns()}"
    assert cached(fresh) == 0
    assert cached(fresh) > 0
    assert cached(fresh + "x") == 0


def test_class_16_nothing_leaks(live: Live) -> None:
    """After all of the above: no page is held. (Counts after every step: tests/engine.)"""
    live.post("/v1/completions", {"prompt": "x", "max_tokens": 30})
    stats = live.wait_idle()
    assert stats["running"] == stats["waiting"] == stats["pages"]["used"] == 0


def test_class_17_sizes(live: Live) -> None:
    """Bodies and nesting; headers and slowness are in test_protocol.py."""
    with live.client() as client:
        response = client.post(CHAT, content=b"x" * (9 << 20))
        assert response.status_code == 413
        with suppress(httpx.TransportError):
            pieces = (b"x" * (1 << 20) for _ in range(10))  # chunked: no length is announced
            assert client.post(CHAT, content=pieces).status_code == 413
        for deep in (
            b'{"messages":' + b"[" * 100 + b"]" * 100 + b"}",
            b'{"a":' * 2000 + b"1" + b"}" * 2000,
        ):
            assert client.post(CHAT, content=deep).status_code == 400
        wide = b'{"messages": [' + b"1," * 500_000 + b"1]}"
        assert client.post(CHAT, content=wide).status_code == 400
        response = client.get("/health", headers={"X-Big": "y" * 40_000})
        assert response.status_code == 431
        assert client.get("/health").status_code == 200


NEEDED = {
    "torch", "numpy", "safetensors", "tokenizers", "jinja2", "llguidance", "typer", "rich",
    "matplotlib", "fastapi", "uvicorn", "uvloop", "httptools", "orjson", "prometheus-client",
    "huggingface-hub", "pillow", "psutil", "gguf",
}  # fmt: skip


def test_class_18_supply_chain() -> None:
    """What a user installs is a short list; a new name here is a decision."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\s<>=!~;\[]", d, maxsplit=1)[0].lower() for d in project["dependencies"]}
    assert names <= NEEDED
    code = "import sys, outdraft.server.run; sys.exit('torch' in sys.modules)"
    done = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code])
    assert done == 0, "the server's process does without PyTorch"


def pins() -> dict[str, list[tuple[Requirement, str]]]:
    """The lock file: by name, each pinned requirement and the text below it."""
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    found: dict[str, list[tuple[Requirement, str]]] = {}
    for line, hashes in re.findall(r"^(\S[^\\\n]*)((?:\\\n    [^\n]*)*)", text, re.MULTILINE):
        pinned = Requirement(line)
        found.setdefault(pinned.name, []).append((pinned, hashes))
    return found


def test_class_18_the_lock_file_has_what_is_declared() -> None:
    """Every dependency but PyTorch, whose builds share a version: in range, and with its hashes."""
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|file:|index-url|find-links|(?<=\s)/|\s-e\s", text)
    locked = pins()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for declared in map(Requirement, project["dependencies"]):
        if declared.name == "torch":
            assert "torch" not in locked
            continue
        versions = locked[declared.name]
        for pinned, _ in versions:
            (exactly,) = pinned.specifier
            assert exactly.operator == "=="
            assert declared.specifier.contains(exactly.version), (declared, pinned)
        for version in ("3.11", "3.12", "3.13", "3.14"):
            machine = {"python_version": version, "python_full_version": version + ".0"}
            here = [p for p, _ in versions if not p.marker or p.marker.evaluate(machine)]
            assert len(here) == 1, (declared, version)
    for name, versions in locked.items():
        for pinned, hashes in versions:
            lines = re.findall(r"--hash=sha256:([0-9a-f]+)(?=\s|$)", hashes)
            assert lines and all(len(h) == 64 for h in lines), pinned
            assert len(set(lines)) == hashes.count("--hash="), name


def test_no_client_names_its_own_address(live: Live) -> None:
    """Shares are counted by address: who could name one would have as many as it likes."""
    with live.client() as client:
        done = client.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.9"})
    assert done.status_code == 200
    lines = [line for line in live.output().splitlines() if '"/v1/models"' in line]
    assert lines and all("203.0.113.9" not in line for line in lines)
