"""Where the user's words stand in a chat template: what comes before them, and what ends them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdec.training.texts import special_token_ids

_MARKER = "QZXJVKUSERWORDSHERE"


@dataclass(frozen=True)
class UserTurn:
    """The frame of a first user turn.

    Attributes:
        header: text from the start of the chat to where the user's words begin.
        stop_ids: tokens that end the user's words; empty where the template ends them with plain text.
        stop_text: the plain text that ends them, "" where a token does.
    """

    header: str
    stop_ids: frozenset[int]
    stop_text: str


def find_user_turn(tokenizer: Any | None) -> UserTurn | None:
    """The frame of a user turn, read off the template; None for a tokenizer without one.

    Raises:
        ValueError: for a template that fails on a single user message, or does not render it.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": _MARKER}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the tokenizer's chat template fails on a single user message: {error}") from error
    header, found, tail = rendered.partition(_MARKER)
    if not found:
        raise ValueError("the tokenizer's chat template does not render the user's message")
    ending = tokenizer(tail, add_special_tokens=False).input_ids
    special = special_token_ids(tokenizer)
    first = next((index for index, token in enumerate(ending) if token in special), None)
    if first is not None and not tokenizer.decode(ending[:first]).strip():
        return UserTurn(header, frozenset({ending[first]}), "")
    return UserTurn(header, frozenset(), tail.strip().split("\n")[0])


def turn_end_ids(tokenizer: Any) -> list[int]:
    """Tokens that a template puts behind the assistant's words, up to the first special one; empty without one."""
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARKER}]
    _, _, tail = tokenizer.apply_chat_template(messages, tokenize=False).partition(_MARKER)
    ids = list(tokenizer(tail, add_special_tokens=False).input_ids)
    special = special_token_ids(tokenizer)
    return next((ids[: index + 1] for index, token in enumerate(ids) if token in special), [])
