"""Reading the JSON files of a model directory, with errors that say what to do.

Here: `read_json` and `read_config`. Not here: what a field means (models/ reads its own family's
fields) and the tensors (checkpoint).
"""

import json
from pathlib import Path
from typing import Any

from outdraft.errors import ModelError

CONFIG_NAME = "config.json"
_MAX_SUGGESTIONS = 4


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; `what` names the file's role in an error ("the model's config").

    Raises:
        ModelError: unreadable, not UTF-8, not JSON, or not an object.
    """
    hint = "the file may be damaged: download it again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{what} {path} does not exist", "check the name of the file") from None
    except OSError as error:
        raise ModelError(
            f"{what} {path} cannot be read: {error.strerror}", "check the file's permissions"
        ) from error
    except RecursionError:
        raise ModelError(f"{what} {path} is nested too deeply", hint) from None
    except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
        raise ModelError(f"{what} {path} is not valid JSON: {error}", hint) from error
    if not isinstance(value, dict):
        raise ModelError(f"{what} {path} is not a JSON object", hint)
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model directory, as Hugging Face wrote it.

    Raises:
        ModelError: not a directory, no config in it, or a config that is not a JSON object.
    """
    if not directory.exists():
        raise ModelError(
            f"{directory} does not exist", _suggestions(directory.parent) or "check the path"
        )
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is a file, not a model directory",
            f"give the directory that contains it: {directory.parent}",
        )
    path = directory / CONFIG_NAME
    if not path.exists():
        raise ModelError(f"{directory} has no {CONFIG_NAME}", _hint_without_config(directory))
    return read_json(path, "the model's config")


def model_directories(parent: Path) -> list[Path]:
    """The directories directly in `parent` that have a config.json, by name."""
    try:
        found = [child for child in parent.iterdir() if (child / CONFIG_NAME).is_file()]
    except OSError:
        return []
    return sorted(found)


def _hint_without_config(directory: Path) -> str:
    if any(directory.glob("*.safetensors")):
        return (
            f"it has weights: copy {CONFIG_NAME} from where they came from into the same directory"
        )
    return _suggestions(directory) or "give a directory with config.json and *.safetensors files"


def _suggestions(parent: Path) -> str:
    found = model_directories(parent)
    if not found:
        return ""
    return "did you mean " + " or ".join(str(path) for path in found[:_MAX_SUGGESTIONS]) + "?"
