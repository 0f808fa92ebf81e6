"""Texts: what the filters let in, and that the store survives a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.training.texts import TextFilter, TextStore, TrainingText, cut_loop, is_text, repeated_share
from training.toy import make_tokenizer

TOKENIZER = make_tokenizer(None)
VARIED = "the quick brown fox jumps over a lazy dog while seven zebras watch"


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text).input_ids)


def text(prompt: str, reply: str = VARIED) -> TrainingText:
    return TrainingText(encode(prompt), encode(reply))


def kept(reply: tuple[int, ...] | str) -> tuple[list[TrainingText], dict[str, int]]:
    found = TextFilter(TOKENIZER)
    ids = encode(reply) if isinstance(reply, str) else reply
    return found.replies([TrainingText((1,), ids)]), dict(found.take_dropped())


def test_a_loop_at_the_end_is_cut_to_two_turns() -> None:
    head = encode("something new, then:")
    assert cut_loop((*head, *encode("again ") * 9), 64, 24) == (*head, *encode("again ") * 2)
    assert cut_loop((*head, *encode("x") * 30), 64, 24) == (*head, *encode("x") * 2)


def test_a_short_repetition_is_no_loop() -> None:
    for reply in (VARIED, VARIED + " no no no no", ""):
        assert cut_loop(encode(reply), 64, 24) == encode(reply)


def test_the_share_of_repeated_grams_counts_those_seen_before() -> None:
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([1, 2]) == 0.0


def test_replies_are_dropped_with_their_reason() -> None:
    end = TOKENIZER.eos_token_id
    scrambled = "ab cd ef ab cd gh " * 3 + "q" + "ab cd ef ab cd gh " * 4 + "!?"
    assert kept(VARIED) == ([TrainingText((1,), encode(VARIED))], {})
    assert kept((*encode(VARIED), end))[1] == {}, "the token that ends a reply belongs to it"
    assert kept("Yes.")[1] == {"reply too short": 1}
    assert kept((*encode("first"), end, *encode("second part")))[1] == {"reply holds special tokens": 1}
    assert kept(scrambled)[1] == {"reply repeats itself": 1}
    broken = encode("ü")[:1]
    assert kept((*encode(VARIED), *broken, *encode("more")))[1] == {"reply is no text": 1}
    assert kept((*encode(VARIED), *broken))[1] == {}, "a character may be cut at the end"


def test_control_characters_are_no_text() -> None:
    assert is_text("tabs\tand\r\nlines")
    assert not is_text("bell\x07")


def test_duplicates_are_refused_within_a_round_and_after_it() -> None:
    found = TextFilter(TOKENIZER)
    assert found.prompts([encode("Hello there!"), encode("hello, THERE")]) == [encode("Hello there!")]
    assert found.prompts([encode("Hello there!")]) == [encode("Hello there!")], "nothing was remembered yet"
    found.remember([text("Hello there!")])
    assert found.prompts([encode("hello there")]) == []
    assert found.replies([text("another prompt")]) == []
    assert found.take_dropped() == {"prompt seen before": 2, "reply seen before": 1}
    assert found.take_dropped() == {}


def test_a_store_is_read_back(tmp_path: Path) -> None:
    store = TextStore(tmp_path, {"target": "t"})
    store.append([text("one"), text("two")], {"reply too short": 3})
    store.append([], {})
    again = TextStore(tmp_path, {"target": "t"})
    assert (again.texts, again.rounds, again.dropped) == (store.texts, 2, {"reply too short": 3})
    assert again.num_reply_tokens == 2 * len(VARIED)
    assert again.first(1) == again.first(len(VARIED)) == store.texts[:1]
    assert again.first(10**6) == store.texts


def test_what_a_crash_left_behind_is_cut_off(tmp_path: Path) -> None:
    store = TextStore(tmp_path, {})
    store.append([text("one")], {})
    with store.path.open("ab") as file:
        file.write(b'{"prompt":[1],"reply":[2,3]}\n{"prompt":[1')  # a round that was not counted, its last line torn
    again = TextStore(tmp_path, {})
    assert again.texts == store.texts
    again.append([text("two")], {})
    assert TextStore(tmp_path, {}).texts == [text("one"), text("two")]


def test_two_writers_of_one_store_are_told_apart(tmp_path: Path) -> None:
    first, second = TextStore(tmp_path, {}), TextStore(tmp_path, {})
    first.append([text("one")], {})
    with pytest.raises(ValueError, match="written to by another process meanwhile"):
        second.append([text("two")], {})
    assert TextStore(tmp_path, {}).texts == first.texts


def test_damage_and_foreign_texts_are_refused(tmp_path: Path) -> None:
    store = TextStore(tmp_path, {"target": "a", "settings": {"seed": 1}})
    store.append([text("one"), text("two")], {})
    with pytest.raises(ValueError, match=r"another origin \(target: 'a' before, 'b' now\)"):
        TextStore(tmp_path, {"target": "b"})
    other = TextStore(tmp_path, {"target": "a", "settings": {"seed": 2}})
    assert other.origin["settings"] == {"seed": 1}, "what is there can be used with any settings"
    with pytest.raises(ValueError, match=r"another origin \(settings\.seed: 1 before, 2 now\)"):
        other.check_settings()
    whole = store.path.read_bytes()
    store.path.write_bytes(b"[" + whole[1:])
    with pytest.raises(ValueError, match="line 1 is damaged"):
        TextStore(tmp_path, {"target": "a"})
    store.path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=f"is truncated: {len(whole) - 9} bytes of {len(whole)}"):
        TextStore(tmp_path, {"target": "a"})
    store.path.write_bytes(whole)
    store.path.with_name("texts.json").unlink()
    with pytest.raises(ValueError, match=r"no texts\.json beside it"):
        TextStore(tmp_path, {"target": "a"})
