"""What users pass as a prompt, turned into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, str]
"""A chat message, ``{"role": ..., "content": ...}``."""
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or a chat."""


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether a list was given.

    Raises:
        ValueError: for an empty list or a value that is no prompt.
    """
    if isinstance(prompts, str):
        return [prompts], False
    if not isinstance(prompts, Sequence):
        raise ValueError(
            f"a prompt is text, token ids or chat messages, or a list of those; got {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("the prompt is empty: give some text, token ids or messages")
    if isinstance(prompts[0], Integral | Mapping):
        return [prompts], False  # type: ignore[list-item]
    return list(prompts), True  # type: ignore[arg-type]


def encode_prompt(prompt: Prompt, tokenizer: Any | None, vocab_size: int) -> list[int]:
    """Token ids of a prompt; text gets the tokenizer's special tokens, a chat goes through its template.

    Raises:
        ValueError: for an empty prompt, ids outside the vocabulary, text without a tokenizer or a chat without a
            template.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty: give some text")
        if tokenizer is None:
            raise ValueError("text prompts need a tokenizer: pass SpecDecoder(..., tokenizer=...) or give token ids")
        ids: list[int] = list(tokenizer(prompt).input_ids)
    elif not prompt:
        raise ValueError("the prompt is empty: give some token ids or messages")
    elif isinstance(prompt[0], Mapping):
        ids = encode_chat(prompt, tokenizer)  # type: ignore[arg-type]
    else:
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens")
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"the prompt holds token {outside[0]}, outside the vocabulary of {vocab_size}")
    return ids


def encode_chat(messages: Sequence[Message], tokenizer: Any | None) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {index} needs 'role' and 'content', got {message!r}")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model's tokenizer has no chat template: use generate() with text instead of chat()")
    text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
