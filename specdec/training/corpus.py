"""The texts of a training run: found in its cache, continued, or written from nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.drafters.weights import TargetFacts
from specdec.target import HFTarget
from specdec.training.data import FilePrompts
from specdec.training.synthesis import OwnPrompts, Progress, PromptSource, SynthesisSettings, write_texts
from specdec.training.texts import TextFilter, TextStore


def make_texts(
    target: HFTarget,
    tokenizer: Any | None,
    folder: Path,
    settings: SynthesisSettings,
    wanted: int,
    data: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> TextStore:
    """Texts with ``wanted`` reply tokens, or as many as the data file has.

    Args:
        target: writes what is missing.
        tokenizer: of the target; None for a model that comes without.
        folder: cache of texts; those in it count.
        settings: how to write.
        wanted: reply tokens.
        data: jsonl of prompts or conversations instead of the target's own prompts.
        progress: told after every round.
        note: told what a user should know.

    Raises:
        ValueError: for a damaged cache, one of another origin, a data file that cannot be read, a full disk.
    """
    source: PromptSource
    about_data = None
    if data is None:
        source = own = OwnPrompts(target, tokenizer, settings)
        if not own.chat and note is not None:
            note("the model has no chat template: it trains on plain continuations of its own text")
    else:
        source = file = FilePrompts(data, target, tokenizer, settings.batch_size)
        about_data = {"name": data.name, "sha256": file.sha256}
    origin = {"target": asdict(TargetFacts.of(target)), "settings": asdict(settings), "data": about_data}
    store = TextStore(folder, origin)
    if store.num_reply_tokens < wanted:
        store.check_settings()
    write_texts(target, store, source, TextFilter(tokenizer), settings, wanted, progress)
    if store.num_reply_tokens < wanted and note is not None:
        note(f"{data} has {store.num_reply_tokens} tokens of replies, fewer than the {wanted} asked for")
    if not store.texts:
        raise ValueError(f"no text is left to train on; dropped: {dict(store.dropped)}")
    return store
