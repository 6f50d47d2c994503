"""Reading config.json: every way in which it can be absent or damaged."""

from pathlib import Path

import pytest

from outdraft.errors import ModelError
from outdraft.weights.config import model_directories, read_config, read_json


def make_model(directory: Path, text: str = "{}") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(text)
    return directory


def test_the_config_is_read(tmp_path: Path) -> None:
    assert read_config(make_model(tmp_path, '{"model_type": "é"}')) == {"model_type": "é"}


def test_not_a_model_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        read_config(tmp_path)
    assert caught.value.hint == "give a directory with config.json and *.safetensors files"
    model = make_model(tmp_path / "inner")
    with pytest.raises(ModelError) as caught:
        read_config(tmp_path)
    assert caught.value.hint == f"did you mean {model}?"
    with pytest.raises(ModelError, match="does not exist") as caught:
        read_config(tmp_path / "iner")
    assert caught.value.hint == f"did you mean {model}?"
    with pytest.raises(ModelError, match="is a file") as caught:
        read_config(model / "config.json")
    assert str(model) in caught.value.hint


def test_weights_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        read_config(tmp_path)
    assert "it has weights" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_damaged_json(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read_config(make_model(tmp_path, text))
    assert "config.json" in caught.value.message
    assert "download it again" in caught.value.hint


def test_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelError, match="not valid JSON"):
        read_config(tmp_path)


def test_a_directory_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        read_json(tmp_path / "other.json", "the other file")


def test_model_directories(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make_model(tmp_path / name)
    (tmp_path / "c").mkdir()
    assert [path.name for path in model_directories(tmp_path)] == ["a", "b"]
    assert model_directories(tmp_path / "nothing") == []
