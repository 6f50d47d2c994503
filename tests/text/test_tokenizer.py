"""Encoding with exactly one <bos>, end-of-sequence ids, and damaged files."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outdraft.errors import ModelError, PromptError
from outdraft.text.tokenizer import Tokenizer
from tests.text.tiny_tokenizers import KINDS, byte_level, with_bos

BOS = 2


def write(directory: Path, *, post_processor: bool = False, **files: object) -> Path:
    tokenizer = with_bos(byte_level()) if post_processor else byte_level()
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


@pytest.mark.parametrize("post_processor", [False, True])
@pytest.mark.parametrize("text", ["the", "<bos>the", "<bos><bos>the", "", "<bos>"])
def test_bos_stands_in_front_exactly_once(tmp_path: Path, text: str, post_processor: bool) -> None:
    config = {"bos_token": {"content": "<bos>"}}
    write(tmp_path, post_processor=post_processor, tokenizer_config=config)
    ids = Tokenizer.load(tmp_path).encode(text)
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert (len(ids) > 1) == ("the" in text)


def test_bos_is_not_added_where_none_is_wanted_or_known(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"bos_token": "<bos>"})
    assert BOS not in Tokenizer.load(tmp_path).encode("the", add_special_tokens=False)
    write(tmp_path, tokenizer_config={"bos_token": None})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_id is None
    assert BOS not in tokenizer.encode("the")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [1, 3]}, "config": {"eos_token_id": 0}}, {1, 3}),
        ({"generation_config": {"eos_token_id": 3}}, {3}),
        ({"generation_config": {}, "config": {"eos_token_id": [3]}}, {3}),
        ({"config": {}, "tokenizer_config": {"eos_token": "<eos>"}}, {1}),
        ({"tokenizer_config": {"eos_token": {"content": "<turn|>"}}}, {3}),
        ({"generation_config": {"eos_token_id": None}}, set()),
        ({"generation_config": {"eos_token_id": True}}, set()),
    ],
)
def test_eos_ids_come_from_the_most_authoritative_file(
    tmp_path: Path, files: dict[str, object], expected: set[int]
) -> None:
    assert Tokenizer.load(write(tmp_path, **files)).eos_ids == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), kind=st.sampled_from(sorted(KINDS)))
def test_decoding_gives_the_text_back(text: str, kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind](), None, frozenset())
    if "strip" in kind:
        text = "a" + text
    if "byte_level" not in kind:
        text = text.replace("▁", "_")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_and_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path))
    assert tokenizer.id_to_token(BOS) == "<bos>"
    assert tokenizer.token_to_id("<bos>") == BOS
    assert tokenizer.token_to_id("nothing") is None
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert not tokenizer.has_text(BOS)
    assert not tokenizer.has_text(tokenizer.vocab_size)


def test_byte_tokens_are_known_only_where_the_decoder_joins_them() -> None:
    fallback = Tokenizer(KINDS["byte_fallback"](), None, frozenset())
    ids = [fallback.token_to_id(f"<0x{byte:02X}>") for byte in (0, 0x41, 0xFF)]
    assert all(token_id is not None and fallback.is_byte(token_id) for token_id in ids)
    backend = byte_level()
    backend.add_tokens(["<0x41>"])
    plain = Tokenizer(backend, None, frozenset())
    assert not plain.is_byte(backend.token_to_id("<0x41>"))


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        Tokenizer.load(write(tmp_path)).encode("a\ud800")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for text in ("", "{", "[]", '{"version": "1.0"}', "\x00\xff"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match="not a valid tokenizer"):
            Tokenizer.load(tmp_path)
    write(tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ModelError, match=r"generation_config\.json"):
            Tokenizer.load(tmp_path)
