"""Segments that rows share: a row reads what it would hold itself, whatever is done to it; memory counts them once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.pooled_cache import BufferPools, PooledKVCache
from specdec.segments import Segment, Share, first_tokens, num_tokens, runs

HEADS, WIDTH, LAYERS = 2, 3, 2


def entries(labels: list[list[int]], layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, n, d]`` that tell row, head and layer apart."""
    base = torch.tensor(labels, dtype=torch.float64).view(len(labels), 1, -1, 1)
    heads = torch.arange(HEADS).view(1, -1, 1, 1) * 0.25 + layer * 0.5
    keys = (base + heads).repeat(1, 1, 1, WIDTH)
    return keys, -keys


def segment(labels: list[int], slack: int = 0) -> Segment:
    layers = {}
    for layer in range(LAYERS):
        keys, values = (part[0] for part in entries([labels + [10**6] * slack], layer))
        layers[layer] = keys.contiguous(), values.contiguous()
    return Segment(layers, len(labels))


SEGMENTS = [segment([1000, 1001, 1002]), segment([1100, 1101], slack=2), segment([1200])]
LABELS = [[1000, 1001, 1002], [1100, 1101], [1200]]


class Checked:
    """A cache next to what its rows hold."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.rows: list[list[int]] = [[] for _ in range(cache.batch_size)]
        self.label = 1

    def share(self, row: int, which: list[int]) -> None:
        self.cache.share(row, [Share(SEGMENTS[index], len(LABELS[index])) for index in which])
        self.rows[row] = [label for index in which for label in LABELS[index]]

    def step(self, nodes: int, kept: list[list[int]]) -> None:
        """A pass over ``nodes`` columns of which each row keeps some."""
        self.cache.reserve(self.cache.max_length + nodes)
        new = [[self.label + nodes * row + node for node in range(nodes)] for row in range(len(self.rows))]
        self.label += nodes * len(self.rows)
        for layer in range(LAYERS):
            parts = self.cache.write(layer, *entries(new, layer), 0)
            for row, labels in enumerate(self.rows):
                for got, expected in zip(parts, entries([labels + new[row]], layer), strict=True):
                    assert torch.equal(got[row, :, : len(labels) + nodes], expected[0])
        path = torch.tensor([columns + [0] * (nodes - len(columns)) for columns in kept])
        self.cache.commit(path, [len(columns) for columns in kept])
        for row, columns in enumerate(kept):
            self.rows[row] += [new[row][column] for column in columns]

    def check(self) -> None:
        self.cache.check_integrity()
        assert self.cache.row_lengths == self.cache.lengths.tolist() == [len(row) for row in self.rows]
        for row, labels in enumerate(self.rows):
            for layer in range(LAYERS if labels else 0):
                for got, expected in zip(self.cache.entries(layer, row), entries([labels], layer), strict=True):
                    assert torch.equal(got, expected[0])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
@torch.inference_mode()
def test_rows_hold_the_same_whether_they_share_it_or_not(data: st.DataObject, pooled: bool) -> None:
    pools = BufferPools(torch.device("cpu"))
    cache = PooledKVCache(pools, 2, 8, torch.device("cpu")) if pooled else KVCache(2, 8)
    checked = Checked(cache)
    for row in range(2):
        checked.share(row, data.draw(st.lists(st.integers(0, 2), max_size=3, unique=True)))
    for _ in range(data.draw(st.integers(1, 7))):
        operation = data.draw(st.sampled_from(["pass", "pass", "truncate", "keep", "add", "copy", "share", "reserve"]))
        size = len(checked.rows)
        if operation == "pass":
            nodes = data.draw(st.integers(1, 4))
            checked.step(nodes, [sorted(data.draw(st.sets(st.integers(0, nodes - 1)))) for _ in range(size)])
        elif operation == "truncate":
            lengths = [data.draw(st.integers(0, len(row))) for row in checked.rows]
            cache.truncate(lengths)
            checked.rows = [row[:length] for row, length in zip(checked.rows, lengths, strict=True)]
        elif operation == "keep":
            rows = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
            cache.keep_rows(rows)
            checked.rows = [list(checked.rows[row]) for row in rows]
        elif operation == "add" and size < 4:
            cache.add_rows(1)
            checked.rows.append([])
        elif operation == "copy":
            into, source = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
            length = data.draw(st.integers(0, len(checked.rows[source])))
            cache.copy_row(into, cache, source, length)
            checked.rows[into] = checked.rows[source][:length]
        elif operation == "share":
            checked.share(data.draw(st.integers(0, size - 1)), data.draw(st.lists(st.integers(0, 2), max_size=2)))
        elif operation == "reserve":
            cache.reserve(data.draw(st.integers(0, 30)))
        checked.check()


def test_memory_counts_a_segment_once_and_slots_behind_it_only() -> None:
    checked = Checked(KVCache(4, 10))
    for row in range(4):
        checked.share(row, [0, 1])
    assert checked.cache.num_bytes == SEGMENTS[0].num_bytes + SEGMENTS[1].num_bytes
    checked.step(1, [[0]] * 4)
    own = 4 * (10 - 5) * HEADS * WIDTH * 2 * LAYERS * 8
    assert checked.cache.num_bytes == SEGMENTS[0].num_bytes + SEGMENTS[1].num_bytes + own


def test_a_cut_within_a_segment_uses_less_of_it_and_leaves_it_as_it_was() -> None:
    checked = Checked(KVCache(2, 8))
    checked.share(0, [0, 1])
    checked.share(1, [0, 1])
    checked.step(2, [[0], [0, 1]])
    checked.cache.truncate([2, 5])
    checked.rows = [row[:length] for row, length in zip(checked.rows, (2, 5), strict=True)]
    assert [num_tokens(shares) for shares in checked.cache.shares] == [2, 5]
    checked.step(3, [[0, 1, 2], [1]])
    checked.check()
    for held, labels in zip(SEGMENTS, LABELS, strict=True):
        assert torch.equal(held.layers[1][0][:, : held.length], entries([labels], 1)[0][0])


def test_segments_beyond_the_most_are_copied() -> None:
    class Few(KVCache):
        most_segments = 1

    checked = Checked(Few(2, 6))
    checked.share(0, [0, 1])
    checked.share(1, [0])
    assert [len(shares) for shares in checked.cache.shares] == [1, 1]
    checked.check()
    checked.step(1, [[0], [0]])
    checked.check()


def test_what_a_cache_gives_away_is_no_longer_its_own() -> None:
    checked = Checked(KVCache(2, 5))
    checked.share(0, [0])
    checked.step(2, [[0, 1], [0]])
    given, before = checked.cache.give_away(), [list(row) for row in checked.rows]
    assert checked.cache.row_lengths == [0, 0]
    checked.rows = [[], []]
    checked.step(2, [[0, 1], [0, 1]])  # writes to none of what was given
    other = KVCache(2, 6)
    for row, shares in enumerate(given):
        other.share(row, shares)
        for got, expected in zip(other.entries(1, row), entries([before[row]], 1), strict=True):
            assert torch.equal(got, expected[0])


@pytest.mark.parametrize("count", range(6))
def test_a_rows_beginning_stays_as_it_was(count: int) -> None:
    """Of what it shares, its own tokens, or both; a part of a segment is the segment's."""
    checked = Checked(KVCache(2, 8))
    checked.share(1, [0])
    checked.step(2, [[0], [0, 1]])
    shares, before = checked.cache.beginning(1, count), list(checked.rows[1][:count])
    assert [share.segment for share in shares[:1]] == [SEGMENTS[0]][:count]
    checked.cache.truncate([0, 0])
    checked.rows = [[], []]
    checked.step(2, [[0, 1], [0, 1]])  # over what was its own
    other = KVCache(1, 8)
    other.share(0, shares)
    assert other.row_lengths == [count]
    for got, expected in zip(other.entries(1, 0), entries([before], 1), strict=True) if count else ():
        assert torch.equal(got, expected[0])
    with pytest.raises(ValueError, match=r"row 1 holds 2 tokens, 9 are asked for"):
        checked.cache.beginning(1, 9)


def test_integrity_covers_what_is_shared() -> None:
    bad = segment([1, 2])
    cache = KVCache(1, 4)
    cache.share(0, [Share(bad, 1)])
    cache.check_integrity()
    bad.layers[1][1][0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="layer 1 of a shared segment"):
        cache.check_integrity()


def test_shares_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 to 3 tokens of the segment, got 4"):
        Share(SEGMENTS[0], 4)
    with pytest.raises(ValueError, match="got 0"):
        Share(SEGMENTS[0], 0)
    with pytest.raises(ValueError, match="contiguous, with a slot for every token"):
        Segment(SEGMENTS[0].layers, 9)
    with pytest.raises(ValueError, match="3 slots are needed, the cache has 2"):
        KVCache(1, 2).share(0, [Share(SEGMENTS[0], 3)])
    assert first_tokens([Share(SEGMENTS[0], 3), Share(SEGMENTS[1], 2)], 4)[1].tokens == 1


def test_what_is_given_away_keeps_no_padding_alive() -> None:
    """Rows of different length: the longest, given away as it lies, would keep the buffers of all of them."""
    cache = KVCache(3, 40)
    keys = torch.randn(3, 2, 40, 8)
    cache.write(0, keys, keys, 0)
    cache.advance([40, 3, 0])
    given = cache.give_away()
    parts = [part for shares in given for share in shares for pair in share.segment.layers.values() for part in pair]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    assert sum(storages.values()) == 2 * 2 * (40 + 3) * 8 * 4
    for row, shares in enumerate(given):
        for share in shares:
            assert torch.equal(share.entries(0)[0], keys[row, :, : share.tokens])


def test_neighbouring_rows_read_a_segment_together() -> None:
    part = torch.zeros(1, 8, 4)
    one, two, three = (Share(Segment({0: (part, part)}, 8), tokens) for tokens in (8, 5, 8))
    shorter = Share(one.segment, 3)
    rows = [(one, two), (one, two), (one,), (), (one, three), (shorter,)]
    assert runs(rows) == [(one, 0, 3), (one, 4, 5), (shorter, 5, 6), (two, 0, 2), (three, 4, 5)]
    assert runs([]) == []
    assert runs([(), ()]) == []
