"""Asks PyPI's advisories about every version in requirements.lock, and about PyTorch's.

Run by `make audit`, with pip-audit's path as argument. Exit status: 0 nothing is known, 1 there are
advisories, 2 they could not be asked for. The last is a failure, too: no answer is not good news.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIONS = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")


def main() -> None:
    """Ask, and say what is known."""
    pins = re.findall(r"^[a-z0-9][\w.-]*==[^\s;]+", (ROOT / "requirements.lock").read_text(), re.M)
    pins += re.findall(r"torch==[\d.]+", (ROOT / "Makefile").read_text())[:1]
    with tempfile.TemporaryDirectory() as folder:
        known = []
        for pin in sorted(set(pins)):  # one by one: a package may be there in two versions
            asked, answer = Path(folder, "pins.txt"), Path(folder, "answer.json")
            asked.write_text(pin + "\n")
            answer.unlink(missing_ok=True)
            command = [sys.argv[1], *OPTIONS, "--requirement", asked, "--output", answer]
            done = subprocess.run(command, check=False, text=True, capture_output=True)
            found = json.loads(answer.read_text())["dependencies"] if answer.exists() else []
            if not found or "skip_reason" in found[0]:
                why = found[0]["skip_reason"] if found else done.stderr.strip().rpartition("\n")[2]
                print(f"no audit: the advisories could not be asked about {pin}\n  {why[:300]}")
                sys.exit(2)
            known += [f"{pin}: {v['id']} {v.get('fix_versions')}" for v in found[0]["vulns"]]
    print("\n".join(known) or f"nothing is known against {len(set(pins))} versions")
    sys.exit(bool(known))


if __name__ == "__main__":
    main()
