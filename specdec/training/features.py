"""The target's hidden states over the training texts, computed once and read ever after."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from specdec.drafters.weights import TargetFacts
from specdec.target import Feature, HFTarget
from specdec.training.shards import FeatureStore, Shard, plan_shards
from specdec.training.texts import TrainingText

PASS_TOKENS = 512
"""Tokens of one pass, padding included. States of more leave a core's cache: on a CPU with a matrix unit a thread did
1,960 tokens of the embedded model a second at 512, 1,150 at 2,048."""


@dataclass(frozen=True)
class FeatureProgress:
    """How far the features are: tokens done and in all, and the speed of this run in tokens a second."""

    tokens: int
    wanted: int
    tokens_per_second: float

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the speed so far."""
        return (self.wanted - self.tokens) / self.tokens_per_second if self.tokens_per_second else None


def open_features(target: HFTarget, texts: Sequence[TrainingText], folder: Path, max_len: int) -> FeatureStore:
    """The store of a target's hidden states over texts, of which the first ``max_len`` tokens are used."""
    origin = {"target": asdict(TargetFacts.of(target)), "dtype": str(target.dtype), "max_len": max_len}
    return FeatureStore(folder, plan_shards(texts, max_len), origin)


def compute_features(
    target: HFTarget,
    texts: Sequence[TrainingText],
    folder: Path,
    names: Sequence[Feature],
    max_len: int,
    progress: Callable[[FeatureProgress], None] | None = None,
    pass_tokens: int = PASS_TOKENS,
) -> FeatureStore:
    """Compute what is missing, shard by shard.

    Args:
        target: the model.
        texts: all texts.
        folder: where features are kept; shards in it count.
        names: hidden states wanted; none is fine.
        max_len: tokens of a text that are used.
        progress: told after every shard that was computed.
        pass_tokens: tokens of one pass, padding included.

    Raises:
        ValueError: for a damaged cache, one of another target, a feature the target has not, or a disk that is full or
            will be.
    """
    shards = plan_shards(texts, max_len)
    store = open_features(target, texts, folder, max_len)
    todo = [(shard, wanted) for shard in shards if (wanted := store.missing(shard, names))]
    if not todo:
        return store
    _check_room(folder, store.num_bytes(names, int(target.config.hidden_size), target.dtype))
    total, done, began = sum(shard.num_tokens for shard, _ in todo), 0, monotonic()
    for shard, wanted in todo:
        states = run_shard(target, texts, shard, wanted, pass_tokens)
        for name in wanted:
            store.write(shard, name, states[name])
        done += shard.num_tokens
        if progress is not None:
            progress(FeatureProgress(done, total, done / (monotonic() - began)))
    return store


@torch.inference_mode()
def run_shard(
    target: HFTarget, texts: Sequence[TrainingText], shard: Shard, names: Sequence[Feature], pass_tokens: int
) -> dict[Feature, Tensor]:
    """Name -> ``[n_tokens, d]`` hidden states of a shard's texts, one after the other."""
    ids = []
    for offset, length in enumerate(shard.lengths):
        text = texts[shard.first + offset]
        ids.append((*text.prompt_ids, *text.reply_ids)[:length])
    found: dict[Feature, list[Tensor]] = {name: [torch.empty(0)] * len(ids) for name in names}
    for rows in group_by_length(shard.lengths, pass_tokens):
        longest = max(shard.lengths[row] for row in rows)
        # Rows of one length share their last column, so that the output head reads one state a row; what a text's own
        # tokens see does not change with what stands behind them.
        padded = [(*ids[row], *[0] * (longest - len(ids[row]))) for row in rows]
        output = target.extend(padded, target.new_cache(len(rows), longest), names)
        for place, row in enumerate(rows):
            for name in names:
                found[name][row] = output.features[name][place, : len(ids[row])].cpu().clone()
    return {name: torch.cat(parts) for name, parts in found.items()}


def group_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in groups of similar length whose padded size keeps to a budget of tokens; at least one each."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"the hidden states need {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: make room, give "
            "another --cache, or fewer --tokens"
        )
