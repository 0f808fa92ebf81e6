"""Training batches: which texts, in which order, as tensors. Any step's batch is found without replaying others."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from specdec.sampling import derive_seed
from specdec.target import Feature
from specdec.training.features import group_by_length
from specdec.training.method import TrainingBatch
from specdec.training.shards import FeatureStore
from specdec.training.texts import TrainingText

HELD_OUT_SHARE = 0.05
"""Share of the texts that is never trained on."""

_POOL_BATCHES = 32


class TrainingSet:
    """Texts with their features, split and batched.

    Whether a text is held out is a function of the text alone, so it does not change as texts are added. The order of
    an epoch is a function of (seed, epoch): texts are shuffled, sorted by length within pools of about 32 batches, cut
    into batches of at most ``batch_tokens`` padded tokens, and the batches shuffled.

    Args:
        texts: all texts.
        features: their hidden states; None for a method that needs none.
        names: which of them.
        max_len: tokens of a text that are used.
        batch_tokens: padded tokens of a batch.
        seed: of the order.

    Raises:
        ValueError: when there are fewer than two texts with a token to learn.
    """

    def __init__(
        self,
        texts: Sequence[TrainingText],
        features: FeatureStore | None,
        names: Sequence[Feature],
        *,
        max_len: int = 512,
        batch_tokens: int = 4096,
        seed: int = 0,
    ) -> None:
        self._texts = texts
        self._features = features
        self._names = tuple(names) if features is not None else ()
        self._lengths = [min(len(text), max_len) for text in texts]
        self._batch_tokens = batch_tokens
        self._seed = seed
        # Two tokens of the reply at least: a draft stands two places after the last known state.
        usable = [i for i, text in enumerate(texts) if self._lengths[i] >= len(text.prompt_ids) + 2]
        self.held_out = [i for i in usable if is_held_out(texts[i])]
        self.training = [i for i in usable if not is_held_out(texts[i])]
        if len(usable) < 2:
            raise ValueError(
                f"{len(usable)} of {len(texts)} texts have a reply within the first {max_len} tokens; at least 2 are "
                "needed to train on one and check on another"
            )
        if not self.held_out or not self.training:  # few texts: the split by hash may leave one side empty
            ordered = sorted(usable, key=lambda i: texts[i].key)
            self.held_out, self.training = ordered[:1], ordered[1:]
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._sizes: list[int] = []  # batches of each epoch so far looked at

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch, which may differ by a few between epochs."""
        while len(self._sizes) <= epoch:
            self._sizes.append(len(self._epoch(len(self._sizes))))
        return self._sizes[epoch]

    def total_batches(self, epochs: int) -> int:
        """Batches of the first ``epochs`` epochs."""
        return sum(self.num_batches(epoch) for epoch in range(epochs))

    def indices(self, step: int) -> list[int]:
        """Texts of the ``step``-th batch, counted from 0 through all epochs."""
        epoch = 0
        while step >= self.num_batches(epoch):
            step -= self.num_batches(epoch)
            epoch += 1
        return self._epoch(epoch)[step]

    def batch(self, step: int) -> TrainingBatch:
        """The ``step``-th batch, counted from 0 through all epochs."""
        return self.collate(self.indices(step))

    def held_out_batches(self, max_tokens: int | None = None) -> Iterator[TrainingBatch]:
        """The held-out texts, up to about ``max_tokens`` tokens of them, always the same ones."""
        chosen, tokens = [], 0
        for index in sorted(self.held_out, key=lambda i: self._texts[i].key):
            if max_tokens is not None and tokens >= max_tokens:
                break
            chosen.append(index)
            tokens += self._lengths[index]
        for group in group_by_length([self._lengths[i] for i in chosen], self._batch_tokens):
            yield self.collate([chosen[place] for place in group])

    def token_counts(self, vocab_size: int) -> Tensor:
        """``[V]`` int64, how often each token occurs in the replies trained on."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for index in self.training:
            counts += torch.bincount(torch.tensor(self._texts[index].reply_ids), minlength=vocab_size)
        return counts

    def num_reply_tokens(self, indices: Sequence[int]) -> int:
        """Tokens of the texts' replies, as far as they are used."""
        return sum(self._lengths[i] - len(self._texts[i].prompt_ids) for i in indices)

    def collate(self, indices: Sequence[int]) -> TrainingBatch:
        """Texts as one batch, in the order given."""
        lengths = [self._lengths[i] for i in indices]
        tokens = torch.zeros(len(indices), max(lengths), dtype=torch.int64)
        prompts = []
        for row, index in enumerate(indices):
            text = self._texts[index]
            tokens[row, : lengths[row]] = torch.tensor((*text.prompt_ids, *text.reply_ids)[: lengths[row]])
            prompts.append(len(text.prompt_ids))
        features = {name: self._states(name, indices, lengths) for name in self._names}
        return TrainingBatch(tokens, torch.tensor(lengths), torch.tensor(prompts), features)

    def _states(self, name: Feature, indices: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """``[B, T, d]``."""
        assert self._features is not None
        rows = [self._features.read(name, index) for index in indices]
        states = rows[0].new_zeros(len(rows), max(lengths), rows[0].shape[-1])
        for place, row in enumerate(rows):
            states[place, : len(row)] = row
        return states

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        rng = random.Random(derive_seed(self._seed, epoch))
        order = sorted(self.training, key=lambda i: self._texts[i].key)
        rng.shuffle(order)
        batches: list[list[int]] = []
        pool: list[int] = []
        filled = 0
        for place, index in enumerate(order, start=1):
            pool.append(index)
            filled += self._lengths[index]
            if filled >= _POOL_BATCHES * self._batch_tokens or place == len(order):
                groups = group_by_length([self._lengths[i] for i in pool], self._batch_tokens)
                batches += [[pool[at] for at in group] for group in groups]
                pool, filled = [], 0
        rng.shuffle(batches)
        return batches


def is_held_out(text: TrainingText) -> bool:
    """Whether a text is kept from training: by its hash, about one in twenty."""
    return int(text.key[:8], 16) < HELD_OUT_SHARE * 2**32
