"""Prompts and conversations from a jsonl file that the user gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specdec.prompts import encode_chat, encode_prompt
from specdec.registry import unknown
from specdec.target import HFTarget
from specdec.training.chat_format import turn_end_ids
from specdec.training.synthesis import Asked

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SHAPES = '{"prompt": ...}, {"messages": [...]}, {"conversations": [...]} or {"text": ...}'


class FilePrompts:
    """The rows of a jsonl file, in order.

    A row is ``{"prompt": str}``, ``{"messages": [{"role", "content"}]}``, ``{"conversations": [{"from", "value"}]}``
    or ``{"text": str}``. The last answer of a conversation is its reply; where the user spoke last, the target answers.
    Of plain text all but the first token is the reply.

    Args:
        path: the file, UTF-8.
        target: the model, for its vocabulary and its end of sequence.
        tokenizer: of the target.
        batch_size: rows of a round.

    Raises:
        ValueError: for a file that cannot be read, and a line that has none of the shapes, naming its number.
    """

    def __init__(self, path: Path, target: HFTarget, tokenizer: Any | None, batch_size: int) -> None:
        if tokenizer is None:
            raise ValueError(f"{path} holds text, and the model comes without a tokenizer")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        self._target = target
        self._tokenizer = tokenizer
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        self.sha256 = hashlib.sha256(data).hexdigest()
        items = list(self._items(path, data))
        if not items:
            raise ValueError(f"{path} is empty: it needs a line such as {_SHAPES}")
        self._rounds = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]

    def round(self, index: int) -> list[Asked] | None:
        """As ``PromptSource``."""
        return self._rounds[index] if index < len(self._rounds) else None

    def take_dropped(self) -> dict[str, int]:
        """As ``PromptSource``: nothing is dropped here."""
        return {}

    def _items(self, path: Path, data: bytes) -> Iterator[Asked]:
        for number, line in enumerate(data.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                yield self._item(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error

    def _item(self, row: Any) -> Asked:
        if not isinstance(row, dict):
            raise ValueError(f"a line must be a JSON object, such as {_SHAPES}")
        if isinstance(row.get("prompt"), str):
            prompt = row["prompt"]
            if not prompt.strip():
                raise ValueError("the prompt is empty")
            message = [{"role": "user", "content": prompt}]
            return Asked(tuple(encode_prompt(message if self._chat else prompt, self._tokenizer, self._vocab)))
        if isinstance(row.get("text"), str):
            ids = encode_prompt(row["text"], self._tokenizer, self._vocab)
            return Asked(tuple(ids[:1]), tuple(ids[1:]))
        if isinstance(row.get("messages"), list):
            return self._conversation(row["messages"])
        if isinstance(row.get("conversations"), list):
            return self._conversation([_message(turn) for turn in row["conversations"]])
        raise ValueError(f"a line must be {_SHAPES}, got the keys {sorted(row)}")

    @property
    def _vocab(self) -> int:
        return self._target.vocab_size

    def _conversation(self, messages: Sequence[dict[str, str]]) -> Asked:
        if not self._chat:
            raise ValueError('this model\'s tokenizer has no chat template: give lines of the form {"text": ...}')
        if not messages:
            raise ValueError("the conversation is empty")
        whole = encode_chat(messages, self._tokenizer)  # checks the messages
        *before, last = messages
        if last["role"] != "assistant":
            return Asked(tuple(whole))
        if not before:
            raise ValueError("a conversation must begin with the user's message")
        reply = self._tokenizer(last["content"], add_special_tokens=False).input_ids
        return Asked(tuple(encode_chat(before, self._tokenizer)), (*reply, *turn_end_ids(self._tokenizer)))


def _message(turn: Any) -> dict[str, str]:
    """A turn as ShareGPT's exports write it, as a chat message."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise ValueError(f"a turn needs 'from' and 'value', got {turn!r}")
    if turn["from"] not in _ROLES:
        raise ValueError(unknown("speaker", str(turn["from"]), _ROLES))
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}
