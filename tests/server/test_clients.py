"""The examples of docs/clients.md, run as they stand against a live server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.live import Live

TEXT = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
EXAMPLES = re.findall(r"^```(sh|python)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
URL = "http://127.0.0.1:8080"


def test_there_are_examples() -> None:
    assert len([kind for kind, _ in EXAMPLES if kind == "sh"]) >= 3
    assert len([kind for kind, _ in EXAMPLES if kind == "python"]) >= 6


@pytest.mark.parametrize("kind,code", EXAMPLES, ids=lambda value: str(value)[:6].strip())
def test_the_examples_run(live: Live, kind: str, code: str) -> None:
    assert URL in code
    code = code.replace(URL, live.url)
    if kind == "sh" and shutil.which("curl") is None:
        pytest.skip("no curl here")
    command = ["sh", "-e"] if kind == "sh" else [sys.executable, "-"]
    done = subprocess.run(
        command, input=code, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
