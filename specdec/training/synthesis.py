"""The target writes the texts that its drafter is trained on: prompts, where none are given, and replies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from specdec.decoder import SpecDecoder
from specdec.prompts import encode_chat
from specdec.result import GenerationResult
from specdec.sampling import SamplingParams, derive_seed
from specdec.target import HFTarget
from specdec.training.chat_format import UserTurn, find_user_turn
from specdec.training.openings import OPENINGS
from specdec.training.sampler import BatchSampler
from specdec.training.texts import TextFilter, TextStore, TrainingText, normalised, special_token_ids

MOST_EMPTY_ROUNDS = 10
"""Rounds in a row without a single text after which writing is given up."""

_LOOK_EVERY = 4


@dataclass(frozen=True)
class SynthesisSettings:
    """How texts are written.

    Attributes:
        seed: same seed, same texts, on the same machine.
        batch_size: prompts of a round, which are decoded together.
        prompt_tokens: longest prompt; a message that has not ended by then is dropped.
        prompt_temperature: prompts are sampled, at this temperature
        prompt_top_p: and with this nucleus.
        opening_share: share of the prompts that start with one of ``OPENINGS``.
        reply_tokens: longest reply.
        reply_temperature: temperature of the sampled replies; the others are greedy.
        sampled_every: every how many rounds replies are sampled; 0 for never.
        tail: a round ends when at most this share of its rows still runs: a pass over few rows costs as much as one
            over many. Replies are cut there, prompts dropped.
    """

    seed: int = 0
    batch_size: int = 64
    prompt_tokens: int = 96
    prompt_temperature: float = 1.0
    prompt_top_p: float = 0.95
    opening_share: float = 0.5
    reply_tokens: int = 256
    reply_temperature: float = 0.8
    sampled_every: int = 4
    tail: float = 0.1


@dataclass(frozen=True)
class Asked:
    """A prompt, and its reply where that is given."""

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...] | None = None


class PromptSource(Protocol):
    """Where prompts come from, a round at a time; a round is a function of its number alone."""

    def round(self, index: int) -> list[Asked] | None:
        """The prompts of a round, None when there are no more."""

    def take_dropped(self) -> dict[str, int]:
        """Reason -> candidates dropped since the last call."""


@dataclass(frozen=True)
class Progress:
    """How far the writing is.

    Attributes:
        texts: number of texts.
        tokens: reply tokens so far.
        wanted: reply tokens wanted.
        tokens_per_second: reply tokens written a second in this run; 0 before the first round.
    """

    texts: int
    tokens: int
    wanted: int
    tokens_per_second: float

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the speed so far."""
        return (self.wanted - self.tokens) / self.tokens_per_second if self.tokens_per_second else None


class OwnPrompts:
    """Prompts that the target draws by going on from its template's user header (Magpie, Xu et al. 2024, section 2).

    A model without a chat template gets plain text instead: the beginning-of-sequence token or an opening, and some
    sampled tokens, of which its reply is the continuation.

    Args:
        target: the model.
        tokenizer: its tokenizer; None for token ids alone.
        settings: how to write.
    """

    def __init__(self, target: HFTarget, tokenizer: Any | None, settings: SynthesisSettings) -> None:
        self._target = target
        self._tokenizer = tokenizer
        self._settings = settings
        self._turn = find_user_turn(tokenizer)
        self._special = frozenset() if tokenizer is None else special_token_ids(tokenizer)
        self._dropped: dict[str, int] = {}

    @property
    def chat(self) -> bool:
        """Whether prompts are chat messages; else they are beginnings of plain text."""
        return self._turn is not None

    def round(self, index: int) -> list[Asked] | None:
        """As ``PromptSource``; there is always another round."""
        settings, rng = self._settings, random.Random(derive_seed(self._settings.seed, index))
        openings = [
            rng.choice(OPENINGS) if rng.random() < settings.opening_share else ""
            for _ in range(settings.batch_size)
        ]  # fmt: skip
        starts = [self._start(opening) for opening in openings]
        stop_ids = self._turn.stop_ids if self._turn is not None else frozenset()
        length = settings.prompt_tokens if self.chat else max(1, settings.prompt_tokens // 4)
        params = SamplingParams(
            max_new_tokens=length,
            temperature=settings.prompt_temperature,
            top_p=settings.prompt_top_p,
            stop_token_ids=tuple(sorted(stop_ids)),
        )
        results = decode(self._target, starts, params, settings.tail, rng.getrandbits(63))
        asked = []
        for opening, start, result in zip(openings, starts, results, strict=True):
            ids = self._message(opening, result) if self._turn else self._beginning(start, result)
            if ids is not None:
                asked.append(Asked(tuple(ids)))
        return asked

    def take_dropped(self) -> dict[str, int]:
        """As ``PromptSource``."""
        taken, self._dropped = self._dropped, {}
        return taken

    def _start(self, opening: str) -> list[int]:
        """What the model goes on from."""
        if self._turn is not None:
            assert self._tokenizer is not None
            return list(self._tokenizer(self._turn.header + opening, add_special_tokens=False).input_ids)
        ids = list(self._tokenizer(opening).input_ids) if self._tokenizer is not None and opening else []
        return ids or [first_token(self._target, self._tokenizer)]

    def _message(self, opening: str, result: GenerationResult) -> list[int] | None:
        """The prompt around the words that were drawn, None where they are no message."""
        assert self._turn is not None
        words = user_words(self._turn, result, self._target, self._tokenizer)
        text = (opening + words).strip() if words is not None else ""
        if words is None:
            reason = "prompt did not end"
        elif any(token in self._special for token in result.token_ids[:-1]) or "�" in text:
            reason = "prompt is no text"
        elif len(normalised(text).split()) < 2:
            reason = "prompt too short"
        else:
            return encode_chat([{"role": "user", "content": text}], self._tokenizer)
        self._dropped[reason] = self._dropped.get(reason, 0) + 1
        return None

    def _beginning(self, start: list[int], result: GenerationResult) -> list[int]:
        ended = result.finish_reason == "eos"
        return start + (result.token_ids[:-1] if ended else result.token_ids)


def user_words(turn: UserTurn, result: GenerationResult, target: HFTarget, tokenizer: Any) -> str | None:
    """What a sampled user turn says, None where it did not end."""
    ids = result.token_ids
    if ids and (ids[-1] in turn.stop_ids or ids[-1] in target.eos_token_ids):
        text: str = tokenizer.decode(ids[:-1])
        return text
    if turn.stop_text:
        text, found, _ = tokenizer.decode(ids).partition(turn.stop_text)
        return text if found else None
    return None


def first_token(target: HFTarget, tokenizer: Any | None) -> int:
    """A token to begin a text with: beginning of sequence, else end of sequence, else 0."""
    for token in (getattr(tokenizer, "bos_token_id", None), getattr(target.config, "bos_token_id", None)):
        if isinstance(token, int):
            return token
    return min(target.eos_token_ids, default=0)


def decode(
    target: HFTarget, prompts: Sequence[Sequence[int]], params: SamplingParams, tail: float, seed: int
) -> list[GenerationResult]:
    """Complete prompts together, until at most a share ``tail`` of them still runs; those end as "cancelled"."""
    decoder = SpecDecoder(target, "none", verifier=BatchSampler(seed))
    enough, until_look = int(tail * len(prompts)), 0
    with decoder.stream([list(prompt) for prompt in prompts], params) as stream:
        for _ in stream:
            until_look -= 1
            if until_look < 0:
                running = sum(result.finish_reason == "cancelled" for result in stream.results)
                if running <= enough:
                    break
                until_look = _LOOK_EVERY * running
        stream.close()
        return stream.results


def write_texts(
    target: HFTarget,
    store: TextStore,
    source: PromptSource,
    text_filter: TextFilter,
    settings: SynthesisSettings,
    wanted: int,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write until the store holds ``wanted`` reply tokens or the source has no more prompts.

    Args:
        target: answers prompts that come without a reply.
        store: gets the texts, a round at a time; rounds it has count.
        source: of the prompts.
        text_filter: decides which texts are kept; it is told of those in the store.
        settings: how to write.
        wanted: reply tokens.
        progress: told after every round, and once before.

    Raises:
        ValueError: where nothing passes the filters for ``MOST_EMPTY_ROUNDS`` rounds.
    """
    text_filter.remember(store.texts)
    began, before, empty = monotonic(), store.num_reply_tokens, 0
    report = progress or (lambda _: None)
    report(Progress(len(store.texts), before, wanted, 0.0))
    while store.num_reply_tokens < wanted:
        asked = source.round(store.rounds)
        if asked is None:
            return
        texts = _round(target, asked, text_filter, settings, store.rounds)
        text_filter.remember(texts)
        dropped = text_filter.take_dropped()
        dropped.update(source.take_dropped())
        store.append(texts, dropped)
        empty = 0 if texts else empty + 1
        if empty == MOST_EMPTY_ROUNDS:
            reasons = ", ".join(f"{reason} {count}" for reason, count in store.dropped.most_common())
            raise ValueError(f"no text passed the filters in {empty} rounds of {settings.batch_size}: {reasons}")
        speed = (store.num_reply_tokens - before) / (monotonic() - began)
        report(Progress(len(store.texts), store.num_reply_tokens, wanted, speed))


def _round(
    target: HFTarget, asked: Sequence[Asked], text_filter: TextFilter, settings: SynthesisSettings, index: int
) -> list[TrainingText]:
    """The texts of one round: those that came with a reply, and new prompts, answered."""
    texts = [TrainingText(item.prompt_ids, item.reply_ids) for item in asked if item.reply_ids is not None]
    new = text_filter.prompts([item.prompt_ids for item in asked if item.reply_ids is None])
    open_prompts = [prompt for prompt in new if _fits(target, prompt, text_filter)]
    sampled = settings.sampled_every > 0 and index % settings.sampled_every == settings.sampled_every - 1
    params = SamplingParams(
        max_new_tokens=settings.reply_tokens, temperature=settings.reply_temperature if sampled else 0.0
    )
    if open_prompts:
        seed = derive_seed(settings.seed + 1, index)
        for prompt, result in zip(open_prompts, decode(target, open_prompts, params, settings.tail, seed), strict=True):
            if result.finish_reason == "error":
                text_filter.dropped["the target failed"] += 1
            else:
                texts.append(TrainingText(prompt, tuple(result.token_ids)))
    return text_filter.replies(texts)


def _fits(target: HFTarget, prompt: Sequence[int], text_filter: TextFilter) -> bool:
    if target.max_context is None or len(prompt) < target.max_context:
        return True
    text_filter.dropped["prompt longer than the context"] += 1
    return False
