"""Texts to train on: the file they are kept in, and what is let into it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from specdec.benchmarks.record import differences
from specdec.files import write_atomically
from specdec.training.storage import read_json, to_json, writing

FORMAT = 1
"""Version of the files' layout."""


@dataclass(frozen=True)
class TrainingText:
    """One text as token ids; only the reply is trained on.

    Attributes:
        prompt_ids: what the target was given, template and all; at least one token.
        reply_ids: what follows, with the token that ended it where there was one.
    """

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]

    @cached_property
    def key(self) -> str:
        """A hash of the whole text, the same in every run."""
        joined = ",".join(map(str, self.prompt_ids)) + "|" + ",".join(map(str, self.reply_ids))
        return hashlib.sha256(joined.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.reply_ids)


class TextStore:
    """``texts.jsonl``, one text a line, and ``texts.json``, which says how much of it is valid.

    Texts come in rounds. A round is appended first and then counted in ``texts.json``, which is replaced atomically:
    whatever a crash left behind the counted part, a torn line for one, is cut off when the store is opened again, and
    the round is written anew.

    Attributes:
        origin: what the texts there are stem from.
        texts: all of them, in order.
        rounds: rounds that were finished, those without a text included.
        dropped: reason -> how many candidates the filters refused.

    Args:
        folder: where the files lie; made where it is missing.
        origin: what the texts stem from: "target", "settings", "data".

    Raises:
        ValueError: when the files are damaged, of another target or data, or cannot be written.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        self.path, self._manifest_path = folder / "texts.jsonl", folder / "texts.json"
        self.origin: dict[str, Any] = json.loads(json.dumps(origin))
        self._wanted_origin = self.origin
        self.texts: list[TrainingText] = []
        self.rounds = 0
        self.dropped: Counter[str] = Counter()
        self._num_bytes = 0
        self._num_reply_tokens = 0
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if self._manifest_path.exists():
            self._load()
        elif self.path.exists() and self.path.stat().st_size:
            raise ValueError(f"{self.path} has no {self._manifest_path.name} beside it: move it away")
        else:
            self._save()

    @property
    def num_reply_tokens(self) -> int:
        """Tokens of all replies, which is what is trained on."""
        return self._num_reply_tokens

    def check_settings(self) -> None:
        """Raise ValueError where more texts would be written with other settings than those there are."""
        self._check_origin("settings")

    def append(self, texts: Sequence[TrainingText], dropped: Mapping[str, int]) -> None:
        """Add a finished round; it is on disk when this returns."""
        on_disk = read_json(self._manifest_path, "run the command again")
        if on_disk.get("rounds") != self.rounds:
            raise ValueError(f"{self.path} was written to by another process meanwhile: run one at a time")
        data = "".join(_line(text) for text in texts).encode()
        with writing(self.path), self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._num_bytes)
            file.seek(self._num_bytes)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._num_bytes += len(data)
        self._num_reply_tokens += sum(len(text.reply_ids) for text in texts)
        self.texts.extend(texts)
        self.rounds += 1
        self.dropped.update(dropped)
        self._save()

    def first(self, reply_tokens: int) -> list[TrainingText]:
        """The first texts that together have so many tokens of replies; all, where there are not as many."""
        count = tokens = 0
        while tokens < reply_tokens and count < len(self.texts):
            tokens += len(self.texts[count].reply_ids)
            count += 1
        return self.texts[:count]

    def _save(self) -> None:
        document = {
            "format": FORMAT,
            "origin": self.origin,
            "rounds": self.rounds,
            "texts": len(self.texts),
            "reply_tokens": self._num_reply_tokens,
            "bytes": self._num_bytes,
            "dropped": dict(sorted(self.dropped.items())),
        }
        with writing(self._manifest_path):
            write_atomically(self._manifest_path, to_json(document))

    def _load(self) -> None:
        remedy = f"move {self._manifest_path.parent} away"
        manifest = read_json(self._manifest_path, remedy)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{self._manifest_path} has format {manifest.get('format')!r}, not {FORMAT}: {remedy}")
        self.origin = manifest["origin"]
        self._check_origin("target", "data")
        self._num_bytes, self.rounds = int(manifest["bytes"]), int(manifest["rounds"])
        self.dropped.update(manifest["dropped"])
        data = self.path.read_bytes()[: self._num_bytes] if self.path.exists() else b""
        if len(data) < self._num_bytes:
            raise ValueError(f"{self.path} is truncated: {len(data)} bytes of {self._num_bytes}; {remedy}")
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                fields = json.loads(line)
                self.texts.append(TrainingText(tuple(fields["prompt"]), tuple(fields["reply"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} is damaged ({error}); {remedy}") from error
        if len(self.texts) != manifest["texts"]:
            raise ValueError(f"{self.path} has {len(self.texts)} texts, not {manifest['texts']}; {remedy}")
        self._num_reply_tokens = sum(len(text.reply_ids) for text in self.texts)

    def _check_origin(self, *names: str) -> None:
        before, now = ({name: origin.get(name) for name in names} for origin in (self.origin, self._wanted_origin))
        differing = differences(before, now)
        if differing:
            raise ValueError(
                f"{self.path} holds texts of another origin ({'; '.join(differing)}): give another cache folder"
            )


def texts_sha256(texts: Sequence[TrainingText]) -> str:
    """Of the file that would hold just these."""
    return hashlib.sha256("".join(map(_line, texts)).encode()).hexdigest()


def _line(text: TrainingText) -> str:
    fields = {"prompt": text.prompt_ids, "reply": text.reply_ids}
    return json.dumps(fields, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Limits:
    """What a text must keep to.

    Attributes:
        min_reply_tokens: shorter replies teach nothing.
        max_repeated: largest share of a reply's 4-grams that stood in it before.
        max_period: longest loop, in tokens, that is recognised at the end of a reply.
        min_loop_tokens: tokens that must have looped, and the loop at least four times, for the reply to be cut.
    """

    min_reply_tokens: int = 8
    max_repeated: float = 0.5
    max_period: int = 64
    min_loop_tokens: int = 24


class TextFilter:
    """Lets in what is worth training on, and counts the rest by reason.

    Args:
        tokenizer: of the target; None leaves out what needs text.
        limits: what a text must keep to.

    Attributes:
        dropped: reason -> count, since the last ``take_dropped``.
    """

    def __init__(self, tokenizer: Any | None, limits: Limits | None = None) -> None:
        self.dropped: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._limits = limits or Limits()
        self._special = frozenset() if tokenizer is None else special_token_ids(tokenizer)
        self._prompts: set[str] = set()
        self._replies: set[str] = set()

    def take_dropped(self) -> Counter[str]:
        """The counts, which start again from zero."""
        taken, self.dropped = self.dropped, Counter()
        return taken

    def remember(self, texts: Sequence[TrainingText]) -> None:
        """Later duplicates of these are refused. What was never remembered is not: a resumed run decides alike."""
        for text in texts:
            self._prompts.add(self._prompt_key(text.prompt_ids))
            self._replies.add(_reply_key(text.reply_ids))

    def prompts(self, candidates: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Those of a round's prompts that are new."""
        admitted, keys = [], set(self._prompts)
        for ids in candidates:
            key = self._prompt_key(ids)
            if key in keys:
                self.dropped["prompt seen before"] += 1
            else:
                keys.add(key)
                admitted.append(tuple(ids))
        return admitted

    def replies(self, candidates: Sequence[TrainingText]) -> list[TrainingText]:
        """Those of a round's texts whose reply is worth training on, without the loops they end in."""
        admitted, keys = [], set(self._replies)
        for text in candidates:
            kept = cut_loop(text.reply_ids, self._limits.max_period, self._limits.min_loop_tokens)
            key = _reply_key(kept)
            reason = self._fault(kept) or ("reply seen before" if key in keys else None)
            if reason is None:
                keys.add(key)
                admitted.append(TrainingText(text.prompt_ids, kept))
            else:
                self.dropped[reason] += 1
        return admitted

    def _fault(self, reply: Sequence[int]) -> str | None:
        if len(reply) < self._limits.min_reply_tokens:
            return "reply too short"
        if any(token in self._special for token in reply[:-1]):
            return "reply holds special tokens"
        if repeated_share(reply) > self._limits.max_repeated:
            return "reply repeats itself"
        if self._tokenizer is not None and not is_text(self._tokenizer.decode(reply, skip_special_tokens=True)):
            return "reply is no text"
        return None

    def _prompt_key(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        words = normalised(self._tokenizer.decode(ids, skip_special_tokens=True))
        return words or " ".join(map(str, ids))


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that are no text: begin, end, turn markers."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


def normalised(text: str) -> str:
    """Lower-case words alone, so that prompts that differ in punctuation count as one."""
    return " ".join(re.findall(r"\w+", text.lower()))


def is_text(text: str) -> bool:
    """Whether text has neither broken characters, one cut at the end apart, nor control characters."""
    body = text.rstrip("�")
    return "�" not in body and not any(unicodedata.category(c) == "Cc" and c not in "\n\t\r" for c in body)


def repeated_share(ids: Sequence[int], length: int = 4) -> float:
    """Share of n-grams that stood in the text before, in [0, 1)."""
    grams = [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def cut_loop(ids: Sequence[int], max_period: int, min_tokens: int) -> tuple[int, ...]:
    """The text up to the second turn of the loop it ends in; unchanged where it ends in none."""
    for period in range(1, min(max_period, len(ids) // 4) + 1):
        start = len(ids) - period  # the longest tail in which every token equals the one a period later
        while start > 0 and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        if len(ids) - start >= max(4 * period, min_tokens):
            return tuple(ids[: start + 2 * period])
    return tuple(ids)


def _reply_key(ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
