"""A tiny pair on disk, and the command line called in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from outdraft.cli.main import app
from tests import tiny

Invoke = Callable[..., Result]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with an assistant inside its directory."""
    target = tiny.tiny_target(tmp_path_factory.mktemp("cli") / "target", seed=21)
    tiny.tiny_assistant(target / "assistant", target, seed=22)
    return target


@pytest.fixture
def outdraft() -> Invoke:
    """`outdraft("generate", …, input=text)`; the result has exit_code, stdout and stderr."""

    def invoke(*arguments: object, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return invoke
