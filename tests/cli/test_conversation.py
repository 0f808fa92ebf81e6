"""A conversation over one cache says what separate chats would, and prefills only what is new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_chat import TEMPLATE, make_model, make_tokenizer

from specdec import SamplingParams, SpecDecoder
from specdec.conversation import Conversation


@pytest.fixture(params=["none", "ngram", "recycling"])
def decoder(request: pytest.FixtureRequest) -> SpecDecoder:
    tokenizer = make_tokenizer(TEMPLATE)
    return SpecDecoder(make_model(tokenizer).to(torch.float64), request.param, tokenizer=tokenizer)


def spy_on_prefill(decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    extend = decoder.target.extend

    def counting(rows: Any, *arguments: Any, **keywords: Any) -> Any:
        counts.append(sum(len(row) for row in rows))
        return extend(rows, *arguments, **keywords)

    monkeypatch.setattr(decoder.target, "extend", counting)
    return counts


def read(stream: Any) -> str:
    return "".join(piece.text for piece in stream)


def test_a_later_turn_prefills_only_new_tokens(decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = spy_on_prefill(decoder, monkeypatch)
    conversation = Conversation(decoder, system="Be brief, and never more than that.")
    read(conversation.send("What is a tree?", max_new_tokens=40))
    first = sum(counts)
    counts.clear()
    read(conversation.send("And a leaf?", max_new_tokens=40))
    # <|end|> <|user|> the text <|end|> <|assistant|>, less the last, pending one, and the first answer's last token,
    # which was emitted but never cached
    assert sum(counts) == len("And a leaf?") + 4
    assert first > sum(counts)


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=40), SamplingParams(40, temperature=0.8, seed=3)])
def test_turns_say_what_separate_chats_say(decoder: SpecDecoder, params: SamplingParams) -> None:
    conversation = Conversation(decoder, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("What is a tree?", "And a leaf?", "Why?"):
        messages.append({"role": "user", "content": question})
        separate = decoder.chat(messages, params).text
        assert read(conversation.send(question, params)) == separate
        messages.append({"role": "assistant", "content": separate})
    assert conversation.messages == messages


def test_a_closed_answer_stays_in_the_conversation_and_the_next_turn_is_right(decoder: SpecDecoder) -> None:
    conversation = Conversation(decoder)
    with conversation.send("What is a tree?", max_new_tokens=200) as stream:
        for _ in zip(range(9), stream, strict=False):
            pass
    assert stream.result.finish_reason == "cancelled"
    assert conversation.messages[-1] == {"role": "assistant", "content": stream.result.text}
    expected = decoder.chat([*conversation.messages, {"role": "user", "content": "Go on"}], max_new_tokens=30).text
    assert read(conversation.send("Go on", max_new_tokens=30)) == expected


def test_an_answer_broken_inside_a_step_leaves_the_conversation_right(
    decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(decoder)
    read(conversation.send("What is a tree?", max_new_tokens=20))
    stream = conversation.send("And a leaf?", max_new_tokens=20)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(decoder.target, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            read(stream)
    assert conversation.messages[-1]["role"] == "assistant"
    # another history, so that a stale cache would show
    conversation.messages[1]["content"] = "Something else entirely"
    expected = decoder.chat([*conversation.messages, {"role": "user", "content": "Go on"}], max_new_tokens=30).text
    assert read(conversation.send("Go on", max_new_tokens=30)) == expected


def test_an_open_answer_is_closed_by_the_next_message_and_by_reset(decoder: SpecDecoder) -> None:
    conversation = Conversation(decoder, system="Be brief.")
    next(conversation.send("One", max_new_tokens=30))
    conversation.send("Two", max_new_tokens=30)
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant", "user"]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_a_message_that_cannot_be_served_changes_nothing(decoder: SpecDecoder) -> None:
    conversation = Conversation(decoder)
    for text, fields in (("", {}), ("x" * 20000, {}), ("x", {"n": 2}), ("x", {"top_p": 0.0})):
        with pytest.raises(ValueError, match=r"empty|context|one row|top_p"):
            conversation.send(text, **fields)
    assert conversation.messages == []


def test_a_model_without_a_template_is_refused() -> None:
    tokenizer = make_tokenizer(None)
    decoder = SpecDecoder(make_model(tokenizer), "none", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(decoder)
