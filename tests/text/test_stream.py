"""The pieces of a stream are the whole: for text, for arbitrary ids, for stop strings."""

from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from outdraft.text.stream import REPLACEMENT, IncrementalDetokenizer, StopStrings
from outdraft.text.tokenizer import Tokenizer
from tests.text.tiny_tokenizers import KINDS, byte_level

TOKENIZERS = {kind: Tokenizer(make(), None, frozenset()) for kind, make in KINDS.items()}
# tokens of a byte above 0x7F: part of a character, or of none
HIGH_BYTES = {
    kind: [n for n in range(tokenizer.vocab_size) if tokenizer.decode([n]) == REPLACEMENT]
    for kind, tokenizer in TOKENIZERS.items()
}
KIND = st.sampled_from(sorted(KINDS))
PIECES = ["a", "the ", " def", "  ", "\n", "é", "€", "😀", "👩‍👩‍👧", "🏳️‍🌈", "\u200d", REPLACEMENT]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join)


def stream(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token_id) for token_id in output), detokenizer.flush()]


@settings(max_examples=400, deadline=None)
@given(kind=KIND, prompt=TEXT, text=TEXT)
def test_a_text_arrives_whole_and_without_half_characters(
    kind: str, prompt: str, text: str
) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt_ids = tokenizer.encode(prompt)
    assume(not tokenizer.decode(prompt_ids).endswith(REPLACEMENT))
    output = tokenizer.encode(text)
    pieces = stream(tokenizer, prompt_ids, output)
    whole = tokenizer.decode(prompt_ids + output)
    assert "".join(pieces) == whole[len(tokenizer.decode(prompt_ids)) :]
    assert "".join(pieces).count(REPLACEMENT) == text.count(REPLACEMENT)


@settings(max_examples=600, deadline=None)
@given(kind=KIND, data=st.data())
def test_arbitrary_ids_give_what_decoding_all_gives(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    token = st.one_of(st.integers(0, tokenizer.vocab_size + 3), st.sampled_from(HIGH_BYTES[kind]))
    prompt = data.draw(st.lists(token, max_size=10))
    output = data.draw(st.lists(token, max_size=20))
    shown = tokenizer.decode(prompt)
    assume(not shown.endswith(REPLACEMENT))
    pieces = stream(tokenizer, prompt, output)
    assert "".join(pieces) == tokenizer.decode(prompt + output)[len(shown) :]


@settings(max_examples=300, deadline=None)
@given(kind=KIND, prompt=TEXT, before=TEXT, after=TEXT)
def test_special_tokens_that_are_shown_stand_where_they_were_written(
    kind: str, prompt: str, before: str, after: str
) -> None:
    tokenizer = TOKENIZERS[kind]
    marker = tokenizer.token_to_id("<turn|>")
    hidden = tokenizer.token_to_id("<pad>")
    assert marker is not None and hidden is not None
    first, second = tokenizer.encode(prompt), tokenizer.encode(before)
    third = tokenizer.encode(after)
    assume(not tokenizer.decode(first).endswith(REPLACEMENT))
    detokenizer = IncrementalDetokenizer(tokenizer, first, frozenset({marker}))
    pieces = [detokenizer.push(t) for t in [*second, marker, hidden, *third, marker]]
    start, middle = tokenizer.decode(first), tokenizer.decode(first + second)
    whole = tokenizer.decode(first + second + third)
    expected = f"{middle[len(start) :]}<turn|>{whole[len(middle) :]}<turn|>"
    assert "".join(pieces) + detokenizer.flush() == expected


@settings(max_examples=200, deadline=None)
@given(output=st.binary(max_size=30))
def test_only_the_last_unfinished_character_is_held(output: bytes) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    alphabet = byte_alphabet(tokenizer)
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    text = ""
    for n_bytes in range(1, len(output) + 1):
        text += detokenizer.push(alphabet[output[n_bytes - 1]])
        assert text == output[:n_bytes].decode(errors="replace").removesuffix(REPLACEMENT)
    assert text + detokenizer.flush() == output.decode(errors="replace")


def byte_alphabet(tokenizer: Tokenizer) -> list[int]:
    """The id of the token of each single byte, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = (byte for byte in range(256) if byte not in printable)
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(0x100 + number) for number, byte in enumerate(shifted)}
    ids = [tokenizer.token_to_id(spelling[byte]) for byte in range(256)]
    assert None not in ids
    return [token_id for token_id in ids if token_id is not None]


def test_a_character_waits_for_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    alphabet = byte_alphabet(tokenizer)
    pieces = stream(tokenizer, [], [alphabet[byte] for byte in "x€".encode()])
    assert pieces == ["x", "", "", "€", ""]


def test_the_end_of_a_character_begun_in_the_prompt_is_output() -> None:
    euro = "€".encode()
    for kind, ids in (
        ("byte_level", [byte_alphabet(TOKENIZERS["byte_level"])[byte] for byte in euro]),
        ("byte_fallback", TOKENIZERS["byte_fallback"].encode("€")),
    ):
        letter = TOKENIZERS[kind].encode("a")
        assert stream(TOKENIZERS[kind], letter + ids[:2], ids[2:] + letter)[-2] in ("a", "€a")
        assert "".join(stream(TOKENIZERS[kind], letter + ids[:2], ids[2:] + letter)) == "€a"


def test_a_byte_run_complete_in_the_prompt_is_not_shown_again() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    assert "".join(stream(tokenizer, tokenizer.encode("a€"), tokenizer.encode("€b"))) == "€b"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_space_after_a_special_token_is_kept(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    bos = tokenizer.token_to_id("<bos>")
    turn = tokenizer.token_to_id("<turn|>")
    assert bos is not None and turn is not None
    output = [turn, *tokenizer.encode(" def"), turn, *tokenizer.encode(" def")]
    assert "".join(stream(tokenizer, [bos, *tokenizer.encode("a")], output)) == " def def"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_push_decodes_a_few_tokens_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(KINDS[kind](), None, frozenset())
    n_decoded = 0
    decode = tokenizer.decode

    def counted(ids: Sequence[int]) -> str:
        nonlocal n_decoded
        n_decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    for ids in (tokenizer.encode("the a" * 400), HIGH_BYTES[kind] * 20):
        n_decoded = 0
        stream(tokenizer, tokenizer.encode("b" * 1000), ids)
        assert n_decoded <= 10 * len(ids) + 20


def pushed(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, str | None]:
    """All that a stream shows, and its stop."""
    strings = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stop = strings.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + strings.flush(), None


def first_stop(stops: Sequence[str], text: str) -> tuple[str, str | None]:
    """The same by definition: look at ever longer beginnings of the whole text."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_stops_are_found_however_the_text_is_divided(stops: list[str], pieces: list[str]) -> None:
    assert pushed(stops, pieces) == first_stop(stops, "".join(pieces))


@settings(max_examples=300, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_no_more_is_held_than_a_stop_could_begin_with(stops: list[str], pieces: list[str]) -> None:
    strings = StopStrings(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        new, stop = strings.push(piece)
        shown += new
        if stop is not None:
            return
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        ends = (text[start:] for start in range(len(text)))
        longest = next((e for e in ends if any(s.startswith(e) for s in stops)), "")
        assert held == longest


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["\n\n"], ["a\n", "\nb"], ("a", "\n\n")),
        (["END"], ["xE", "N", "E", "ND"], ("xEN", "END")),
        (["abcd", "bc"], ["a", "b", "c", "d"], ("a", "bc")),
        (["bc", "abc"], ["xabc"], ("x", "abc")),
        (["aab"], ["aa", "ab"], ("a", "aab")),
        ([], ["a", "b"], ("ab", None)),
        (["stop"], ["st"], ("st", None)),
    ],
)
def test_stop_examples(
    stops: list[str], pieces: list[str], expected: tuple[str, str | None]
) -> None:
    assert pushed(stops, pieces) == expected


def test_a_token_may_end_within_a_character() -> None:
    tokenizer = Tokenizer(byte_level(), None, frozenset())
    ids = tokenizer.encode("a €b")
    assert any(tokenizer.decode([token_id]).endswith(REPLACEMENT) for token_id in ids)
    assert stream(tokenizer, [], ids) == ["a", " ", "€", "b", ""]
