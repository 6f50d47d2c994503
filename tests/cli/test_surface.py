"""Verbs, options and defaults are those of surface.txt, and docs/cli.md is up to date.

`make docs` writes both; the diff of surface.txt is to be reviewed as a change of the interface.
"""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "cli_docs.py"


def test_surface_and_docs_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
