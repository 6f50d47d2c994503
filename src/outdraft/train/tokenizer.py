"""A byte-level BPE tokenizer for the demo, trained on text and written in Hugging Face's layout.

Here: its special tokens, how text is cut into words, the chat template. Not here: using one, which
is what text/ does.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from outdraft.weights.save import new_directory, write_json

PAD, EOS, BOS, UNK, TURN, END_OF_TURN = "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"
MARKERS = (
    "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", '<|"|>',
)  # fmt: skip
"""Gemma 4's other markers: reserved, so that its templates can be tried; never in the text."""

SPECIAL_TOKENS = (PAD, EOS, BOS, UNK, TURN, END_OF_TURN, *MARKERS)
PAD_ID, EOS_ID, BOS_ID, END_OF_TURN_ID = (
    SPECIAL_TOKENS.index(token) for token in (PAD, EOS, BOS, END_OF_TURN)
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# A newline with its indentation is one word, digits stand alone, a space belongs to what follows.
WORDS = r"\n[ ]*| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z0-9_]+|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|turn>' + role + '\\n' + (message['content'] | trim) + '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learn merges from the texts.

    The vocabulary is filled up with unused tokens where the texts are too few for it, so that its
    size is always the one asked for. `encode` of the result puts `<bos>` in front.
    """
    assert vocab_size >= SMALLEST_VOCABULARY
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<unused{i}>" for i in range(missing)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: tokenizers.Tokenizer, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into a new directory.

    Raises:
        TrainingError: the directory is there already, or cannot be written.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "additional_special_tokens": list(SPECIAL_TOKENS[4:]),
        "chat_template": CHAT_TEMPLATE,
    }
    with new_directory(directory) as unfinished:
        tokenizer.save(str(unfinished / "tokenizer.json"))
        write_json(unfinished / "tokenizer_config.json", config)
