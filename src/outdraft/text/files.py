"""Reading the small JSON files beside a tokenizer.

Here: `read_json_if_there`. Not here: the model's own config (weights/config).
"""

import json
from pathlib import Path
from typing import Any

from outdraft.errors import ModelError

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty when there is no such file.

    Raises:
        ModelError: the file is there, but cannot be read as a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "download the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object", "download the file again")
    return value


def token_text(value: Any) -> str | None:
    """A special token of tokenizer_config.json, which is a string or an object with "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
