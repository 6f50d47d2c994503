"""Text to token ids and back, for one checkpoint.

Here: a thin layer over the `tokenizers` library plus which ids begin and end a text. Not here:
turning ids into text while they arrive (stream) and chat messages (chat).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from outdraft.errors import ModelError, PromptError
from outdraft.text.files import TOKENIZER_CONFIG_NAME, read_json_if_there, token_text

TOKENIZER_NAME = "tokenizer.json"
_EOS_SOURCES = ("generation_config.json", "config.json")  # in order of authority


class Tokenizer:
    """Encodes and decodes; made by `load`.

    `bos_id` is None for a checkpoint without one; `eos_ids` may be empty.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, bos_id: int | None, eos_ids: frozenset[int]
    ) -> None:
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)
        self._have_text: dict[int, bool] = {}  # of ids that were asked for
        self._byte_ids = _byte_fallback_ids(backend)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """From the tokenizer.json of a model directory and the JSON files beside it.

        Raises:
            ModelError: tokenizer.json is missing, or one of the files is damaged.
        """
        path = directory / TOKENIZER_NAME
        if not path.is_file():
            raise ModelError(
                f"{directory} has no {TOKENIZER_NAME}",
                "copy it from where the weights came from into the same directory",
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever is wrong
            raise ModelError(
                f"{path} is not a valid tokenizer: {error}", "download the file again"
            ) from error
        backend.no_truncation()  # settings of training: whole texts are encoded here
        backend.no_padding()
        names = read_json_if_there(directory / TOKENIZER_CONFIG_NAME)
        bos_id = _token_id(backend, names.get("bos_token"))
        return cls(backend, bos_id, _eos_ids(directory, backend, names.get("eos_token")))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. The model's vocabulary may be padded beyond it."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. With special tokens, `<bos>` stands in front exactly once.

        Exactly once even when the text begins with `<bos>` itself, as a rendered chat does, and
        even when the file's post-processor adds none.

        Raises:
            PromptError: `text` is not Unicode (lone surrogates).
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what the library says to a lone surrogate
            raise PromptError(
                "the text is not valid Unicode", "check the encoding that it was read with"
            ) from error
        if not add_special_tokens or self.bos_id is None:
            return ids
        n_bos = next((n for n, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[n_bos:]]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids beyond the vocabulary have none."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def has_text(self, token_id: int) -> bool:
        """False for special tokens and ids beyond the vocabulary, which `decode` leaves out."""
        known = self._have_text.get(token_id)
        if known is None:
            known = token_id not in self._special_ids and self.id_to_token(token_id) is not None
            self._have_text[token_id] = known
        return known

    def is_byte(self, token_id: int) -> bool:
        """True for a token such as `<0xE2>` that stands for one byte of a character."""
        return token_id in self._byte_ids

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id, or None beyond it."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by the vocabulary's spelling, or None."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id


def _byte_fallback_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids of `<0x00>` to `<0xFF>` where the decoder takes them for bytes (SentencePiece)."""
    letter = backend.token_to_id("<0x41>")
    if letter is None or backend.decode([letter]) != "A":
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(number for number in ids if number is not None)


def _token_id(backend: tokenizers.Tokenizer, value: Any) -> int | None:
    text = token_text(value)
    token_id: int | None = None if text is None else backend.token_to_id(text)
    return token_id


def _eos_ids(directory: Path, backend: tokenizers.Tokenizer, eos_token: Any) -> frozenset[int]:
    for name in _EOS_SOURCES:
        ids = _as_ids(read_json_if_there(directory / name).get("eos_token_id"))
        if ids:
            return ids
    return _as_ids(_token_id(backend, eos_token))


def _as_ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(number for number in values if type(number) is int)
