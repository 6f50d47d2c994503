"""What tests with the real SDKs share: the demo in Python, a tool, clients. Not a test itself."""

from functools import cache
from typing import Any

import anthropic
import openai

from outdraft.engine.engine import LLM, Completion
from outdraft.request import SamplingParams
from outdraft.server.schema import model_defaults
from outdraft.text.files import read_json_if_there
from tests.server.live import Live

PROMPT = "Write a function that adds two numbers."
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def openai_of(live: Live, **options: Any) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    options = {"api_key": live.key or "none", "max_retries": 0, "http_client": http, **options}
    return openai.OpenAI(base_url=f"{live.url}/v1", **options)


def async_openai_of(live: Live) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", http_client=http)


def anthropic_of(live: Live, **options: Any) -> anthropic.Anthropic:
    http = anthropic.DefaultHttpxClient(trust_env=False)
    options = {"api_key": live.key or "none", "max_retries": 0, "http_client": http, **options}
    return anthropic.Anthropic(base_url=live.url, **options)


def async_anthropic_of(live: Live) -> anthropic.AsyncAnthropic:
    http = anthropic.DefaultAsyncHttpxClient(trust_env=False)
    return anthropic.AsyncAnthropic(base_url=live.url, api_key="none", http_client=http)


@cache
def demo() -> LLM:
    return LLM("demo")


def python_says(**params: Any) -> Completion:
    """What the Python API answers to MESSAGES, with the model's own defaults as the server has."""
    config = read_json_if_there(demo().target.path / "generation_config.json")
    return demo().chat(MESSAGES, SamplingParams(**{**model_defaults(config), **params}))


def check_weather(arguments: dict[str, Any]) -> None:
    """The arguments are of WEATHER's schema."""
    assert {"city", "days"} <= set(arguments) <= {"city", "days", "unit"}
    assert isinstance(arguments["city"], str) and len(arguments["city"]) <= 12
    assert arguments["days"] in range(10)
    assert arguments.get("unit", "C") in ("C", "F")
