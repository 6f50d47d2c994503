"""Chat messages to one text, by the Jinja template that comes with a checkpoint.

Here: finding the template, rendering it in a sandbox. Not here: reading the answer back (reasoning,
tool calls). A rendered text begins with `<bos>` itself; `Tokenizer.encode` does not double it.

A template is foreign code. It cannot reach Python objects, files or other templates, cannot change
its arguments, and its output and time are limited. The limits are looked at between two pieces of
output. Not covered here: a loop that prints nothing, and a single expression that builds a huge
string ('a' * 10**8). The server renders in a process that it can kill (server/renderer.py).
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outdraft.errors import ModelError, PromptError
from outdraft.text.files import TOKENIZER_CONFIG_NAME, read_json_if_there, token_text

TEMPLATE_NAME = "chat_template.jinja"
ALLOWED_OPTIONS = frozenset(
    {"documents", "enable_thinking", "preserve_thinking", "reasoning_effort", "thinking_budget"}
)
MAX_OUTPUT_CHARS = 4 * 1024 * 1024
MAX_SECONDS = 5.0


class ChatTemplate:
    """A compiled template and the special tokens that it may print (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ModelError when `source` is not a valid template."""
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # Jinja evaluates constants here, which can fail in any way
            raise ModelError(
                f"the chat template is not valid: {error}", "download the model's files again"
            ) from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """From chat_template.jinja, else tokenizer_config.json; None when there is no template.

        Raises:
            ModelError: the file cannot be read, or the template is not valid.
        """
        source = template_source(directory)
        if source is None:
            return None
        config = read_json_if_there(directory / TOKENIZER_CONFIG_NAME)
        tokens = {name: token_text(config[name]) for name in config if name.endswith("_token")}
        return cls(source, {name: text for name, text in tokens.items() if text is not None})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: plain JSON objects with at least "role" and "content".
            add_generation_prompt: end with the beginning of the model's turn.
            tools: JSON schemas of the functions that the model may call.
            options: further variables of the template, of `ALLOWED_OPTIONS`.

        Raises:
            PromptError: an option is unknown, the template refuses the messages (its own words are
                in the message), or a limit is exceeded.
        """
        unknown = sorted(set(options) - ALLOWED_OPTIONS)
        if unknown:
            raise PromptError(
                f"unknown chat template option {unknown[0]!r}",
                f"allowed are {', '.join(sorted(ALLOWED_OPTIONS))}",
            )
        variables = {
            **self._special_tokens,
            **options,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return "".join(_limited(self._template.generate(variables)))
        except PromptError:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            raise PromptError(
                f"the chat template refuses these messages: {error}",
                "check the roles, their order and the contents of the messages",
            ) from error


def template_source(directory: Path) -> str | None:
    """The template of a model directory as it is written; None when there is none.

    Raises:
        ModelError: a file cannot be read.
    """
    path = directory / TEMPLATE_NAME
    if not path.is_file():
        config = read_json_if_there(directory / TOKENIZER_CONFIG_NAME)
        return _default_template(config.get("chat_template"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "download the file again") from error


def _limited(pieces: Iterator[str]) -> Iterator[str]:
    """Passes the pieces on until the output or the time is used up."""
    deadline = time.monotonic() + MAX_SECONDS
    n_chars = 0
    for piece in pieces:
        n_chars += len(piece)
        if n_chars > MAX_OUTPUT_CHARS:
            raise PromptError(
                f"the chat template printed more than {MAX_OUTPUT_CHARS} characters",
                "shorten the messages; if they are short, do not trust this template",
            )
        if time.monotonic() > deadline:
            raise PromptError(
                f"the chat template took longer than {MAX_SECONDS:g} seconds",
                "shorten the messages; if they are short, do not trust this template",
            )
        yield piece


def _default_template(value: Any) -> str | None:
    """The template in tokenizer_config.json: a string, or a list of named ones."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if _is_named(entry)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)


def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face's templates are written for: its whitespace rules, functions and filter."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        optimized=False,  # or constant expressions, however large, are evaluated while compiling
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes, which models are not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
