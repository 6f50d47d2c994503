"""Sampling options on the command line: they reach the parameters, and bad ones are explained."""

import math
from pathlib import Path

import pytest

from outdraft.cli.options import sampling_params
from outdraft.errors import SamplingError


def test_values_reach_the_parameters(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object"}')
    params = sampling_params(
        {
            "model": "demo",
            "temperature": 0.5,
            "logit_bias": ["29+5", "7-inf", "8-1.5"],
            "bad_words": ["no"],
            "stop": None,
            "json_schema": f"@{path}",
        }
    )
    assert params.logit_bias == ((7, -math.inf), (8, -1.5), (29, 5.0))
    assert params.bad_words == ("no",) and params.stop == () and params.temperature == 0.5
    assert params.json_schema == '{"type": "object"}'


@pytest.mark.parametrize(
    "given,words",
    [
        ({"logit_bias": ["x+5"]}, "ID"),
        ({"logit_bias": ["5"]}, "ID"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": "@/does/not/exist"}, "cannot be read"),
        ({"regex": "a", "grammar": "start: x"}, "both given"),
    ],
)
def test_what_cannot_be_is_explained(given: dict[str, object], words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        sampling_params(given)
