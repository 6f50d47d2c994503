"""Writes requirements.lock: what pyproject.toml needs at run time, pinned, with hashes.

Run by `make lock`, with `uv` on the path. PyTorch is left out: which of its builds is right depends
on the machine, and they share a version but no file. Only public hashes get in: the package index
is PyPI, whatever this machine is set up to use.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
LEFT_OUT = "torch"
HEADER = """\
# What outdraft needs at run time, pinned, with the hashes of PyPI's files. Written by `make lock`.
#
# Install the build of PyTorch that fits the machine first; it is not in here, because the builds
# (CPU, CUDA) share a version and no file. Then:
#     pip install --require-hashes --no-deps -r requirements.lock
"""
COMMAND = """
pip compile - --quiet --no-config --no-header --no-annotate --generate-hashes --universal --no-build
--no-emit-index-url --no-emit-find-links --default-index https://pypi.org/simple
"""


def main() -> None:
    """Compile and write."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [d for d in project["dependencies"] if name_of(d) != LEFT_OUT]
    oldest = project["requires-python"].removeprefix(">=")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    done = subprocess.run(
        [sys.argv[1], *COMMAND.split(), "--python-version", oldest],
        input="\n".join(wanted),
        env=environment,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        sys.exit("requirements.lock is as it was: uv could not resolve, see above")
    LOCK.write_text(HEADER + done.stdout)
    print(f"{LOCK.name}: {len(re.findall(r'^[a-z0-9]', done.stdout, re.MULTILINE))} packages")


def name_of(requirement: str) -> str:
    """The package's name in a requirement."""
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower()


if __name__ == "__main__":
    main()
