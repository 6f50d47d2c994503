"""The doctor finds kernels in order, and names what is not."""

import json
from typing import Any

import pytest

from outdraft.bench import doctor
from tests.cli.conftest import Invoke


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(doctor, "cold_bytes", lambda: 1 << 20)
    return doctor.examine()


def test_the_kernels_are_row_invariant_here(found: dict[str, Any]) -> None:
    assert len(found["row_invariant"]) == 7 and all(found["row_invariant"].values())
    assert found["memory"]["read_gb_s"] > 0
    assert found["kernels"]["isa"] in found["kernels"]["available"]


def test_what_is_wrong_is_said_in_words(found: dict[str, Any]) -> None:
    found["row_invariant"]["linear w4"] = False
    found["kernels"] |= {"isa": "portable", "threads": 9}
    found["machine"] |= {"usable_cores": 2, "load_average": [7.0, 1.0, 1.0]}
    found["memory"]["available_bytes"] = 1 << 20
    messages = [problem.message for problem in doctor.problems_of(found)]
    assert [message.split()[0] for message in messages] == ["linear", "only", "9", "the", "only"]
    quiet = found | {"row_invariant": {}, "kernels": found["kernels"] | {"isa": "avx2"}}
    quiet["kernels"]["threads"] = 1
    quiet["machine"]["load_average"], quiet["memory"]["available_bytes"] = None, None
    assert doctor.problems_of(quiet) == []


def test_it_is_a_command(outdraft: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cold_bytes", lambda: 1 << 20)
    monkeypatch.setattr(doctor, "problems_of", lambda _: [])
    plain = outdraft("doctor")
    assert plain.exit_code == 0 and "GB/s" in plain.stdout and "Nothing is wrong." in plain.stdout
    problem = doctor.Problem("it is Monday", "wait")
    monkeypatch.setattr(doctor, "problems_of", lambda _: [problem])
    result = outdraft("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"] == [
        {"message": "it is Monday", "hint": "wait", "passing": False}
    ]
    monkeypatch.setattr(doctor, "problems_of", lambda _: [doctor.Problem("busy", "wait", True)])
    assert outdraft("doctor").exit_code == 0
