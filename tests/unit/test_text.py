"""Text piece by piece is the tokenizer's text of the whole, up to a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specdec.text import TextStream, decoder_of

CORPUS = ["the cat and the hat", "naïve café déjà vu", "日本語のテキスト", "👍🏽 👍 ok 👍🏽", "stop STOP st op"]


def make_tokenizer() -> Any:
    """Byte-level BPE: 256 bytes, a few merges within and across characters, one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, initial_alphabet=sorted(alphabet), special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return TOKENIZER


def byte_ids(text: str) -> list[int]:
    """One token per byte of a text."""
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = "".join(symbol for symbol, _ in encoder.pre_tokenize_str(text))
    ids: list[int] = TOKENIZER.convert_tokens_to_ids(list(symbols))
    return ids


def stream_pieces(stream: TextStream, ids: list[int]) -> list[str]:
    """Pieces taken after each token, and what is left at the end."""
    pieces = []
    for token in ids:
        if stream.push(token):
            break
        pieces.append(stream.take())
    stream.finish()
    return [*pieces, stream.take(final=True)]


random_ids = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=25)
written_ids = st.text(st.sampled_from("aß日👍 ’\ufffd\n"), max_size=12).map(byte_ids)


@settings(max_examples=200)
@given(st.one_of(random_ids, written_ids))
def test_pieces_join_to_the_text_of_the_whole(ids: list[int]) -> None:
    stream = TextStream(TOKENIZER)

    assert "".join(stream_pieces(stream, ids)) == TOKENIZER.decode(ids, skip_special_tokens=True) == stream.text


@settings(max_examples=100)
@given(random_ids, st.lists(st.text(st.sampled_from("ab the日"), min_size=1, max_size=3), min_size=1, max_size=2))
def test_text_with_stop_strings_is_a_prefix_that_holds_none(ids: list[int], stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, stop)
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)

    text = "".join(stream_pieces(stream, ids))

    assert text == stream.text
    assert whole.startswith(text)
    assert not any(string in text for string in stop)
    assert stream.stopped == any(string in whole for string in stop)
    if not stream.stopped:
        assert text == whole
    else:
        assert any(whole.startswith(string, len(text)) for string in stop)


@pytest.mark.parametrize("character", ["ß", "日", "👍", "👍🏽"])
def test_character_split_over_tokens_comes_when_it_is_complete(tokenizer: Any, character: str) -> None:
    ids = byte_ids(f"a{character}b")
    pieces = stream_pieces(TextStream(tokenizer), ids)

    assert len(ids) == len(character.encode()) + 2
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == f"a{character}b"
    bytes_of_first = len(character[0].encode())
    assert pieces[: bytes_of_first + 1] == ["a", *[""] * (bytes_of_first - 1), character[0]]


def test_incomplete_character_at_the_end_is_released_as_the_tokenizer_shows_it(tokenizer: Any) -> None:
    ids = byte_ids("a日")[:-1]
    stream = TextStream(tokenizer)

    assert stream_pieces(stream, ids) == ["a", "", "", "\ufffd"]
    assert stream.text == tokenizer.decode(ids) == "a\ufffd"


def test_bytes_that_are_no_character_do_not_hold_back_what_follows(tokenizer: Any) -> None:
    ids = [*byte_ids("日")[:1], *byte_ids("ab")]

    assert stream_pieces(TextStream(tokenizer), ids) == ["", "\ufffda", "b", ""]


def test_special_tokens_are_not_text_and_do_not_split_a_character(tokenizer: Any) -> None:
    first, *rest = byte_ids("日")
    end = tokenizer.eos_token_id

    assert "".join(stream_pieces(TextStream(tokenizer), [end, first, end, *rest, end])) == "日"


def test_stop_string_across_tokens_ends_the_text_before_it(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["STOP"])
    results = [stream.push(token) for token in byte_ids("go STOP")]

    assert results == [False] * 6 + [True]
    assert stream.stopped
    assert stream.text == stream.take() == "go "


def test_stop_string_inside_one_token_cuts_that_token(tokenizer: Any) -> None:
    token = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == " the")
    stream = TextStream(tokenizer, ["h"])

    assert stream.push(token)
    assert stream.text == " t"


def test_multi_byte_stop_string_is_found_when_its_last_byte_comes(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["本"])

    assert [stream.push(token) for token in byte_ids("日本")] == [False] * 5 + [True]
    assert stream.text == "日"


def test_first_of_several_stop_strings_ends_the_text(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["cd", "bcd"])
    for token in byte_ids("abcd"):
        stream.push(token)

    assert stream.text == "a"


def test_possible_beginning_of_a_stop_string_is_held_back_and_then_released(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["aab"])
    pieces = []
    for token in byte_ids("xaaac"):
        stream.push(token)
        pieces.append(stream.take())

    assert pieces == ["x", "", "", "a", "aac"]


def test_beginning_of_a_stop_string_at_the_end_is_released(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["STOP"])

    assert stream_pieces(stream, byte_ids("a ST")) == ["a", " ", "", "", "ST"]
    assert not stream.stopped


def test_nothing_is_taken_twice(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    for token in byte_ids("ab"):
        stream.push(token)

    assert (stream.take(), stream.take(), stream.take(final=True)) == ("ab", "", "")


def test_stop_string_completed_by_the_last_incomplete_character_is_cut(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["\ufffd"])

    assert "".join(stream_pieces(stream, byte_ids("a日")[:-1])) == "a"
    assert stream.stopped


@given(random_ids)
def test_past_the_tokenizer_the_text_is_the_tokenizers(ids: list[int]) -> None:
    assert decoder_of(TOKENIZER)(ids) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_that_does_more_is_asked_itself() -> None:
    class Loud(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            text: str = super()._decode(*args, **kwargs)
            return text.upper()

    loud = Loud(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<|end|>")
    assert decoder_of(loud)(byte_ids("ab")) == "AB"
    tidy = make_tokenizer()
    tidy.clean_up_tokenization_spaces = True
    ids = byte_ids("a .")
    assert decoder_of(tidy)(ids) == tidy.decode(ids, skip_special_tokens=True)
