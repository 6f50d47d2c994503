"""Three tiny tokenizers of the kinds that published checkpoints have, built from nothing."""

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

SPECIAL = ["<pad>", "<eos>", "<bos>", "<turn|>"]
WORDS = ["the", "def", "return", "für", "é"]


def byte_level() -> Tokenizer:
    """As Qwen, Mistral and the demo: every token is a string of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    merged = [split.pre_tokenize_str(word)[0][0] for word in WORDS]
    # a token that ends within a character: the first two bytes of the euro sign, after a space
    merged.append(split.pre_tokenize_str(" €")[0][0][:3])
    vocabulary, merges = _with_merges([*SPECIAL, *alphabet], merged)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


def byte_fallback(strip_first_space: bool = False) -> Tokenizer:
    """As Gemma (and, with `strip_first_space`, Llama 2): characters, and bytes for the rest."""
    characters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,éü\n\ufffd"]
    vocabulary, merges = _with_merges(
        [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters], ["the", "▁def"]
    )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return _finished(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_strip": lambda: byte_fallback(strip_first_space=True),
}


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """The same with a post-processor that puts <bos> in front."""
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


def _with_merges(
    base: list[str], merged: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Adds every beginning of each merged token, built from left to right."""
    vocabulary = {token: number for number, token in enumerate(base)}
    merges: list[tuple[str, str]] = []
    for token in merged:
        for length in range(2, len(token) + 1):
            if token[:length] not in vocabulary:
                vocabulary[token[:length]] = len(vocabulary)
                merges.append((token[: length - 1], token[length - 1]))
    return vocabulary, merges


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer
