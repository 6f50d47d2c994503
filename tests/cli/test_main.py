"""Help is quick and loads nothing heavy; failures become messages and exit codes."""

import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from outdraft.cli import main
from outdraft.cli.main import VERBS, app, load_verb
from tests.cli.conftest import Invoke

HEAVY = ("torch", "numpy", "tokenizers", "safetensors", "jinja2", "matplotlib", "transformers")
LISTING = """
import sys
from typer.testing import CliRunner
from outdraft.cli.main import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
verbs = sorted(m for m in sys.modules if m.startswith("outdraft.cli."))
for verb in ("generate", "chat", "bench", "inspect"):
    assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0
print(verbs, [m for m in {heavy} if m in sys.modules])
"""


def test_help_loads_no_verb_and_no_verbs_help_loads_anything_heavy() -> None:
    code = LISTING.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == "['outdraft.cli.console', 'outdraft.cli.hub_option', 'outdraft.cli.main'] []\n"
    )


def test_help_takes_less_than_half_a_second() -> None:
    spent = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "outdraft", "--help"], capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # the processor's time: the clock would measure what else runs on the machine
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
def test_the_list_says_what_the_verb_says(verb: str) -> None:
    assert load_verb(verb).help.splitlines()[0] == VERBS[verb]


def test_an_unknown_verb_is_refused_with_a_suggestion(outdraft: Invoke) -> None:
    result = outdraft("genrate")
    assert result.exit_code == 2
    assert "generate" in result.stderr


def test_the_unforeseen_is_one_message_and_with_debug_a_traceback(
    outdraft: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("outdraft.weights.find.resolve_model", fail)
    result = outdraft("inspect", "demo")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: RuntimeError: boom\n") and "--debug" in result.stderr
    assert isinstance(outdraft("--debug", "inspect", "demo").exception, RuntimeError)


def test_a_reader_that_leaves_is_no_error(pair: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("outdraft.cli.streaming.Printer.write", gone)
    result = CliRunner().invoke(app, ["generate", str(pair), "--prompt", "a"])
    assert result.exit_code == 1
    assert "rror" not in result.stderr


def test_ctrl_c_outside_of_an_answer_exits_130(
    outdraft: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("outdraft.weights.find.resolve_model", interrupt)
    result = outdraft("inspect", "demo")
    assert result.exit_code == 130 and "rror" not in result.stderr


def test_version(outdraft: Invoke) -> None:
    assert outdraft("--version").stdout == f"outdraft {main.__version__}\n"
