"""Prompts are of their kind and size, come from the texts, and depend on the seed alone."""

import ast
from pathlib import Path

import pytest

from outdraft.bench.prompts import (
    CANDIDATES,
    HELDOUT,
    MIN_TOKENS,
    N_TOKENS,
    Prompt,
    Source,
    choose_prompts,
    read_sources,
)
from outdraft.errors import OutdraftError
from outdraft.text.tokenizer import Tokenizer
from outdraft.weights.find import DEMO_DIRECTORY

N = 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO_DIRECTORY / "target")


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {source.name: source for source in read_sources(HELDOUT)}


@pytest.fixture(scope="module")
def prompts(sources: dict[str, Source], tokenizer: Tokenizer) -> list[Prompt]:
    return choose(sources, tokenizer, seed=1)


def choose(sources: dict[str, Source], tokenizer: Tokenizer, seed: int) -> list[Prompt]:
    return choose_prompts(
        list(sources.values()), N, lambda text: tuple(tokenizer.encode(text)), seed=seed
    )


def of(kind: str, prompts: list[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.kind == kind]


def test_every_kind_has_its_number_from_many_files(prompts: list[Prompt]) -> None:
    for kind in CANDIDATES:
        chosen = of(kind, prompts)
        assert len(chosen) == N
        assert len({prompt.source for prompt in chosen}) >= N - 3
        assert len({(prompt.source, prompt.line) for prompt in chosen}) == N


def test_sizes_and_line_breaks(prompts: list[Prompt], tokenizer: Tokenizer) -> None:
    for prompt in prompts:
        assert prompt.tokens[0] == tokenizer.bos_id
        assert tokenizer.decode(prompt.tokens) == prompt.text
        assert prompt.text.endswith("\n")
        most = N_TOKENS if prompt.kind != "repetition" else 2 * N_TOKENS + 12
        assert MIN_TOKENS <= len(prompt.tokens) <= most


def test_code_and_prose_stand_in_the_file_and_go_on_in_kind(
    prompts: list[Prompt], sources: dict[str, Source]
) -> None:
    for prompt in [*of("code", prompts), *of("prose", prompts)]:
        source = sources[prompt.source]
        lines = prompt.text.splitlines(keepends=True)
        start, end = prompt.line - 1, prompt.line - 1 + len(lines)
        assert source.lines[start:end] == lines
        prose = {line for place in source.prose for line in place}
        if prompt.kind == "prose":
            assert set(range(start, end + 1)) <= prose
        else:
            assert start not in prose and end - 1 not in prose


def test_json_is_the_beginning_of_json(prompts: list[Prompt]) -> None:
    for prompt in of("json", prompts):
        assert prompt.text.startswith('[\n  {\n    "name": "')
        assert '    "line": ' in prompt.text


def test_repetition_begins_a_block_again(prompts: list[Prompt]) -> None:
    for prompt in of("repetition", prompts):
        block, beginning = prompt.text.removeprefix("# Before:\n").split("\n# After:\n")
        assert beginning and block.startswith(beginning) and len(beginning) < len(block)


def test_the_seed_decides(
    prompts: list[Prompt], sources: dict[str, Source], tokenizer: Tokenizer
) -> None:
    assert choose(sources, tokenizer, seed=1) == prompts
    assert choose(sources, tokenizer, seed=2) != prompts


def test_prose_is_found(tmp_path: Path) -> None:
    text = (
        '"""Doc\n\x0c\nstring."""\n# 1\n# 2\nx = 1\n\n\ndef f():\n    "Doc."\n    return "# no"\n'
    )
    (tmp_path / "a.py").write_text(text)
    (tmp_path / "broken.py").write_text("def (")
    (source,) = read_sources(tmp_path)
    assert source.prose == [range(0, 3), range(3, 5), range(9, 10)]
    assert isinstance(source.tree, ast.Module)


def test_a_directory_without_texts(tmp_path: Path) -> None:
    with pytest.raises(OutdraftError, match="no Python texts"):
        read_sources(tmp_path)
