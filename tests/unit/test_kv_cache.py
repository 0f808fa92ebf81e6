"""The KV cache holds, per row, exactly the committed tokens: a list of lists says which."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.layer_buffers import LayerAddresses, LayerBuffers

HEADS, KEY_WIDTH, VALUE_WIDTH, LAYERS = 2, 3, 5, 2


def entries(labels: list[list[int]], layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, n, d]`` that tell row, head and layer apart."""
    base = torch.tensor(labels, dtype=torch.float64).view(len(labels), 1, -1, 1)
    heads = torch.arange(HEADS).view(1, -1, 1, 1) * 0.25 + layer * 0.5
    keys = (base + heads).repeat(1, 1, 1, KEY_WIDTH)
    return keys, -(base + heads).repeat(1, 1, 1, VALUE_WIDTH)


class Checked:
    """A cache next to its model: labels of the committed tokens per row, and of those in flight."""

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.cache = KVCache(batch_size, capacity)
        self.committed: list[list[int]] = [[] for _ in range(batch_size)]
        self.in_flight: list[list[int]] = [[] for _ in range(batch_size)]
        self.next_label = 1

    def write(self, num_nodes: int) -> None:
        offset = len(self.in_flight[0])
        labels = []
        for row in self.in_flight:
            labels.append(list(range(self.next_label, self.next_label + num_nodes)))
            row += labels[-1]
            self.next_label += num_nodes
        for layer in range(LAYERS):
            keys, values = self.cache.write(layer, *entries(labels, layer), offset)
            assert keys.shape[2] == values.shape[2] == self.cache.max_length + offset + num_nodes
            for index, (settled, nodes) in enumerate(zip(self.committed, self.in_flight, strict=True)):
                expected = entries([settled + nodes], layer)
                end = len(settled) + len(nodes)
                assert torch.equal(keys[index, :, :end], expected[0][0])
                assert torch.equal(values[index, :, :end], expected[1][0])

    def drop_in_flight(self) -> None:
        self.in_flight = [[] for _ in self.committed]

    def check(self) -> None:
        self.cache.check_integrity()
        assert self.cache.row_lengths == [len(row) for row in self.committed]
        assert self.cache.lengths.tolist() == self.cache.row_lengths
        assert self.cache.max_length == max(self.cache.row_lengths)
        for layer, buffers in self.cache.layers.items():
            for row, labels in enumerate(self.committed):
                keys, values = entries([labels], layer)
                assert torch.equal(buffers.keys[row, :, : len(labels)], keys[0])
                assert torch.equal(buffers.values[row, :, : len(labels)], values[0])


@settings(max_examples=80)
@given(st.data(), st.integers(1, 3), st.integers(0, 6))
def test_any_sequence_of_operations_keeps_exactly_the_committed_tokens(
    data: st.DataObject, batch_size: int, capacity: int
) -> None:
    checked = Checked(batch_size, capacity)
    for _ in range(data.draw(st.integers(1, 8))):
        cache = checked.cache
        operation = data.draw(st.sampled_from(["pass", "pass", "pass", "advance", "truncate", "keep", "reserve"]))
        if operation in ("pass", "advance"):
            for _ in range(data.draw(st.integers(1, 2))):
                num_nodes = data.draw(st.integers(1, 4))
                cache.reserve(cache.max_length + len(checked.in_flight[0]) + num_nodes)
                checked.write(num_nodes)
            nodes = len(checked.in_flight[0])
        if operation == "pass":
            kept = [sorted(data.draw(st.sets(st.integers(0, nodes - 1)))) for _ in checked.committed]
            width = max(1, max(len(columns) for columns in kept))
            path = torch.tensor([columns + [10**6] * (width - len(columns)) for columns in kept])  # ignored entries
            cache.commit(path, [len(columns) for columns in kept])
            for row, columns in enumerate(kept):
                checked.committed[row] += [checked.in_flight[row][column] for column in columns]
        elif operation == "advance":
            counts = [data.draw(st.integers(0, nodes)) for _ in checked.committed]
            cache.advance(counts)
            for row, count in enumerate(counts):
                checked.committed[row] += checked.in_flight[row][:count]
        elif operation == "truncate":
            lengths = [data.draw(st.integers(0, len(row))) for row in checked.committed]
            cache.truncate(lengths)
            checked.committed = [row[:length] for row, length in zip(checked.committed, lengths, strict=True)]
        elif operation == "keep":
            rows = data.draw(st.lists(st.integers(0, cache.batch_size - 1), min_size=1, max_size=4))
            cache.keep_rows(rows)
            checked.committed = [list(checked.committed[row]) for row in rows]
        else:
            cache.reserve(data.draw(st.integers(0, 30)))
        checked.drop_in_flight()
        checked.check()


def filled(lengths: list[int], capacity: int = 8) -> Checked:
    """A cache with rows of these lengths."""
    checked = Checked(len(lengths), capacity)
    checked.write(max(lengths))
    checked.cache.advance(lengths)
    checked.committed = [row[:length] for row, length in zip(checked.in_flight, lengths, strict=True)]
    checked.drop_in_flight()
    return checked


def test_commit_moves_nothing_where_the_accepted_nodes_lie_in_place() -> None:
    checked = filled([2, 1])
    checked.write(3)
    before = [buffers.keys.clone() for buffers in checked.cache.layers.values()]

    checked.cache.commit(torch.tensor([[0, 1, 2], [0, 1, 0]]), [3, 2])

    assert checked.cache.row_lengths == [5, 3]
    after = [buffers.keys for buffers in checked.cache.layers.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("lengths", [[5, 5], [5, 1]], ids=["equal rows", "ragged rows"])
def test_writing_beyond_the_capacity_is_an_error_and_changes_nothing(lengths: list[int]) -> None:
    checked = filled(lengths, capacity=8)

    with pytest.raises(ValueError, match="9 slots are needed, the cache has 8"):
        checked.cache.write(0, *entries([[0] * 3, [0] * 3], 0), offset=1)

    checked.check()


def test_growing_leaves_room_to_write_and_never_shrinks() -> None:
    checked = filled([8, 3], capacity=8)

    checked.cache.reserve(10)
    checked.cache.reserve(4)
    checked.write(2)

    assert checked.cache.capacity == 10


def test_num_bytes_counts_every_buffer() -> None:
    checked = filled([1, 1], capacity=8)

    assert checked.cache.num_bytes == LAYERS * 2 * HEADS * 8 * (KEY_WIDTH + VALUE_WIDTH) * 8


@pytest.mark.parametrize("lengths", [[4, 1], [3, 2], [-1, 1]])
def test_truncating_to_tokens_that_are_not_there_is_an_error(lengths: list[int]) -> None:
    checked = filled([3, 1])

    with pytest.raises(ValueError, match=r"cannot truncate row \d to -?\d tokens: it holds \d"):
        checked.cache.truncate(lengths)

    checked.check()


def test_unwritten_slots_are_zero_so_that_masked_ones_add_nothing() -> None:
    checked = filled([2, 1])

    assert all(not buffers.keys[:, :, 2:].any() for buffers in checked.cache.layers.values())


def test_integrity_check_finds_lengths_that_differ_between_device_and_host() -> None:
    checked = filled([2, 1])
    checked.cache.lengths[0] = 1

    with pytest.raises(RuntimeError, match=r"device lengths \[1, 1\] differ from host lengths \[2, 1\]"):
        checked.cache.check_integrity()


def test_integrity_check_finds_lengths_beyond_the_capacity() -> None:
    checked = filled([8, 1])
    checked.cache.advance([1, 0])

    with pytest.raises(RuntimeError, match=r"lengths \[9, 1\] leave \[0, 8\]"):
        checked.cache.check_integrity()


@pytest.mark.parametrize("name", ["keys", "values"])
def test_integrity_check_finds_buffers_of_another_size(name: str) -> None:
    rows, slots = filled([2, 1]), filled([2, 1])
    for checked, part in ((rows, slice(0, 1)), (slots, slice(None))):
        buffers = checked.cache.layers[1]
        whole: Tensor = getattr(buffers, name)
        setattr(buffers, name, whole[part] if checked is rows else whole[:, :, :7])

        with pytest.raises(RuntimeError, match=f"{name} of layer 1 are .*expected 2 rows of 8 slots"):
            checked.cache.check_integrity()


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_integrity_check_finds_committed_values_that_are_not_finite(name: str, value: float) -> None:
    checked = filled([2, 1])
    getattr(checked.cache.layers[1], name)[1, 1, 0, 2] = value

    with pytest.raises(RuntimeError, match=f"{name} of layer 1, row 1 hold a value that is not finite"):
        checked.cache.check_integrity()


def test_integrity_check_ignores_what_is_dead_by_length() -> None:
    checked = filled([2, 1])
    checked.cache.layers[0].keys[1, :, 1:] = torch.nan

    checked.cache.check_integrity()


@pytest.mark.parametrize("rows", [[0, 5, 2, 3, 4], [5, 1, 2, 4], [4, 1], [5]])
def test_rows_that_fill_gaps_are_moved_in_place_until_half_the_memory_idles(rows: list[int]) -> None:
    checked = Checked(6, 8)
    checked.write(3)
    checked.cache.advance([3, 1, 2, 3, 1, 2])
    before = [checked.cache.entries(1, row)[0].clone() for row in rows]
    memory = checked.cache.layers[1].keys.data_ptr()
    checked.cache.keep_rows(rows)
    for place, expected in enumerate(before):
        assert torch.equal(checked.cache.entries(1, place)[0], expected)
    checked.cache.check_integrity()
    assert (checked.cache.layers[1].keys.data_ptr() == memory) == (len(rows) > 3)


def test_addresses_are_asked_for_anew_where_a_buffer_was_replaced_and_only_there() -> None:
    cache = KVCache(6, 8)
    same_width = entries([[1, 2]] * 6, 0)[0]
    for layer in range(LAYERS):
        cache.write(layer, same_width, same_width, 0)
    layers = list(cache.layers.values())

    def held() -> LayerAddresses:
        known = cache.addresses(layers)
        size = 2 * LAYERS
        found = (ctypes.c_void_p * size).from_address(known.keys)
        assert list(found) == [*(pair.keys.data_ptr() for pair in layers), *(pair.values.data_ptr() for pair in layers)]
        assert known.values == known.keys + ctypes.sizeof(found) // 2
        assert known.alike
        return known

    first = held()
    cache.advance([2] * 6)
    assert held() is first
    replacing = [lambda: cache.reserve(40), lambda: cache.keep_rows([0, 5, 2, 3]), lambda: cache.keep_rows([1]),
                 lambda: cache.add_rows(2)]  # fmt: skip
    for replace in replacing:
        before = held()
        replace()
        assert held() is not before
    assert not KVCache(1, 8).addresses([LayerBuffers(torch.zeros(1, 2, 8, 3), torch.zeros(1, 2, 8, 5))]).alike
