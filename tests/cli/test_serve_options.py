"""Options of `serve` that other engines' users know: llama.cpp's names and vLLM's JSON."""

from typing import Any

import pytest
from typer.testing import CliRunner

from outdraft.cli import options
from outdraft.cli.main import app
from outdraft.config import EngineConfig
from outdraft.errors import OutdraftError


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> EngineConfig:
    """The engine's configuration that `outdraft serve demo` comes to with these options."""
    seen: list[EngineConfig] = []
    monkeypatch.setattr(
        "outdraft.server.run.serve", lambda model, engine, *rest: seen.append(engine)
    )
    done = CliRunner().invoke(app, ["serve", "demo", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return seen[0]


@pytest.mark.parametrize("name", ["--assistant", "--spec-draft-model", "-hfd"])
def test_the_drafter_by_any_of_its_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert served(monkeypatch, name, "some/drafter").assistant == "some/drafter"


def test_the_least_confidence_by_llama_cpps_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(monkeypatch, "--spec-draft-p-min", "0.75").draft_p_min == 0.75
    with pytest.raises(OutdraftError, match=r"draft_p_min is 1\.5"):
        EngineConfig(draft_p_min=1.5)


def test_the_device_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(monkeypatch, "--device", "cpu").device == "cpu"


@pytest.mark.parametrize(
    "text,expected",
    [
        ('{"num_speculative_tokens": 3}', {"draft_n_max": 3}),
        ('{"method": "ngram", "num_speculative_tokens": 5}', {"spec_type": "ngram"}),
        ('{"method": "qwen3_next_mtp"}', {"spec_type": "mtp"}),
        ('{"method": "draft_model", "model": "x/y"}', {"assistant": "x/y"}),
        ("{}", {"spec_type": "auto", "assistant": None, "draft_n_max": None}),
    ],
)
def test_a_speculative_config(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: dict[str, Any]
) -> None:
    config = served(monkeypatch, "--speculative-config", text)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "3",
        "[]",
        "null",
        '"mtp"',
        '{"method": "eagle3"}',
        '{"method": ["ngram"]}',
        '{"model": 3}',
        '{"num_speculative_tokens": "3"}',
        '{"num_speculative_tokens": true}',
        '{"draft_tensor_parallel_size": 2}',
    ],
)
def test_what_cannot_be_met_is_refused(text: str) -> None:
    with pytest.raises(OutdraftError, match="speculative-config"):
        options.engine_config({"speculative_config": text})


def test_two_options_must_not_say_the_same() -> None:
    given = {"speculative_config": '{"num_speculative_tokens": 3}', "spec_draft_n_max": 2}
    with pytest.raises(OutdraftError, match="both"):
        options.engine_config(given)
