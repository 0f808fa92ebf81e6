"""The KV cache in 8, 4 and 2 bits: what a token sees depends on its position alone, and memory shrinks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.kv_groups import GROUP, Groups, decode, encode, kv_bytes, pack, unpack
from specdec.kv_quantized import SLACK, WINDOW, QuantizedKVCache, boundary, find_kv
from specdec.segments import first_tokens

HEADS, WIDTH = 2, 64
BITS = [8, 4, 2]


def entries(text: list[int], seed: int = 0) -> Tensor:
    """``[1, H, n, d]`` keys (values have another seed) that tell tokens and positions apart."""
    rows = []
    for position, token in enumerate(text):
        generator = torch.Generator().manual_seed(7919 * position + 31 * token + seed)
        rows.append(torch.randn(HEADS, WIDTH, generator=generator))
    return torch.stack(rows, 1).unsqueeze(0) if rows else torch.empty(1, HEADS, 0, WIDTH)


def append(cache: KVCache, text: list[int], known: int, step: int) -> None:
    """Cache a one-row text from ``known`` on, ``step`` tokens a pass."""
    keys, values = entries(text), entries(text, 1)
    for first in range(known, len(text), step):
        part = slice(first, min(first + step, len(text)))
        cache.reserve(part.stop)
        cache.write(0, keys[:, :, part], values[:, :, part], 0)
        cache.advance([part.stop - first])


def seen(cache: KVCache, position_offsets: list[int], parents: list[int], nodes: Tensor) -> list[Tensor]:
    """What each node of a one-row tree reads, ``[H, visible, 2 d]`` in order of position."""
    count = len(parents)
    ancestors = torch.eye(count, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    cache.reserve(cache.max_length + count)
    keys, values = cache.write(0, nodes, nodes + 1, 0)
    visible, places = cache.visibility(torch.tensor([position_offsets]), ancestors.unsqueeze(0))
    assert visible.shape == (1, count, keys.shape[2])
    assert places.shape == (1, keys.shape[2])
    both, found = torch.cat([keys, values], -1)[0], []
    for node in range(count):
        slots = visible[0, node].nonzero().flatten()
        slots = slots[places[0, slots].argsort(stable=True)]
        wanted = list(range(cache.row_lengths[0] + position_offsets[node] + 1))
        assert places[0, slots].tolist() == wanted  # every position before it, once
        found.append(both[:, slots])
    return found


@pytest.mark.parametrize("bits", BITS)
def test_numbers_move_by_half_a_level(bits: int) -> None:
    numbers = torch.randn(3, GROUP, WIDTH) * 5 + 2
    for dim in (-1, -2):
        codes, factors = encode(numbers, dim, bits)
        assert torch.equal(unpack(pack(codes, bits), bits), codes)
        step = (numbers.amax(dim, keepdim=True) - numbers.amin(dim, keepdim=True)) / (2**bits - 1)
        assert bool(((decode(codes, factors, dim, torch.float32) - numbers).abs() <= 0.5001 * step + 1e-5).all())


@pytest.mark.parametrize("value", [0.0, 3.0, -70000.0, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_vary_stays_finite_and_near(value: float, dtype: torch.dtype) -> None:
    numbers = torch.full((GROUP, WIDTH), value).to(dtype)
    got = decode(*encode(numbers, -1, 2), -1, dtype)
    assert bool(got.isfinite().all())
    limit = 65504.0 if dtype == torch.bfloat16 else float("inf")  # of float16 factors
    wanted = numbers.float().clamp(-limit, limit)
    assert bool(((got.float() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-7).all())


@pytest.mark.parametrize("width", [64, 24])
def test_keys_share_a_scale_by_channel_and_values_by_token(width: int) -> None:
    keys, values = torch.randn(1, HEADS, GROUP, width), torch.randn(1, HEADS, GROUP, width)
    keys[..., 3] *= 1000  # a channel of outliers leaves others as they are
    values[:, :, 5] *= 1000  # and so does such a token
    got = Groups.of(keys, values, 4).read(1, 4, torch.float32)
    others = torch.arange(width) != 3
    assert float((got[0] - keys)[..., others].abs().max()) < 0.3
    tokens = torch.arange(GROUP) != 5
    assert float((got[1] - values)[:, :, tokens].abs().max()) < 0.3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("steps", [1, 7, WINDOW])
def test_what_a_token_sees_does_not_depend_on_how_the_text_was_committed(bits: int, steps: int) -> None:
    text = [int(x) for x in torch.randint(0, 50, (WINDOW + 3 * GROUP + 5,), generator=torch.Generator().manual_seed(1))]
    node = entries([*text, 9])[:, :, -1:]
    reference = QuantizedKVCache(bits, 1, 1)
    append(reference, text, 0, 32)
    cache = QuantizedKVCache(bits, 1, 1)
    append(cache, text, 0, steps)
    cache.check_integrity()
    expected, got = (seen(each, [0], [-1], node)[0] for each in (reference, cache))
    assert torch.equal(got, expected)
    old = boundary(len(text))
    exact = torch.cat([entries(text), entries(text, 1)], -1)[0]
    assert torch.equal(got[:, old:-1], exact[:, old:])
    assert old >= 2 * GROUP
    assert not torch.equal(got[:, :old], exact[:, :old])
    error = (got[:, :old] - exact[:, :old]).abs().max()
    assert float(error) < {8: 0.02, 4: 0.3, 2: 1.5}[bits]


def test_nodes_of_a_tree_see_what_they_would_see_one_by_one() -> None:
    """A chain across a boundary, drafted in one pass, and beside it a branch."""
    length = WINDOW + 2 * GROUP - 4
    text = [position % 23 for position in range(length)]
    drafted = [5, 6, 7, 8, 9, 10, 11, 12]
    whole = text + drafted
    assert boundary(length) < boundary(length + 7)
    cache = QuantizedKVCache(4, 1, 1)
    append(cache, text, 0, 16)
    chain = entries(whole)[:, :, length:]
    branch = entries([*text, 5, 6, 40])[:, :, -1:]
    offsets, parents = [*range(8), 2], [*range(-1, 7), 1]
    got = seen(cache, offsets, parents, torch.cat([chain, branch], dim=2))
    for node in range(8):
        alone = QuantizedKVCache(4, 1, 1)
        append(alone, text, 0, 16)
        for position in range(length, length + node):
            alone.reserve(position + 1)
            place = chain[:, :, position - length : position - length + 1]
            alone.write(0, place, place + 1, 0)
            alone.advance([1])
        expected = seen(alone, [0], [-1], chain[:, :, node : node + 1])[0]
        assert torch.equal(got[node], expected)


def test_accepted_nodes_are_committed_wherever_they_stood() -> None:
    length = WINDOW + GROUP + 30
    text = [position % 19 for position in range(length)]
    cache = QuantizedKVCache(8, 1, 1)
    append(cache, text, 0, 64)
    nodes = torch.cat([entries([*text, token])[:, :, -1:] for token in (1, 2, 3, 4, 5)], 2)
    cache.reserve(length + 5)
    cache.write(0, nodes, nodes + 1, 0)
    cache.commit(torch.tensor([[0, 2, 4]]), [3])
    cache.check_integrity()
    straight = QuantizedKVCache(8, 1, 1)
    append(straight, text, 0, 64)
    for node in (0, 2, 4):
        straight.reserve(straight.max_length + 1)
        straight.write(0, nodes[:, :, node : node + 1], nodes[:, :, node : node + 1] + 1, 0)
        straight.advance([1])
    last = entries([9])
    assert torch.equal(seen(cache, [0], [-1], last)[0], seen(straight, [0], [-1], last)[0])


@pytest.mark.parametrize("back", [1, SLACK])
def test_a_row_goes_back_a_little(back: int) -> None:
    text = [position % 17 for position in range(WINDOW + 5 * GROUP + 1)]
    cache, shorter = QuantizedKVCache(4, 1, 1), QuantizedKVCache(4, 1, 1)
    append(cache, text, 0, 50)
    cache.truncate([len(text) - back])
    append(shorter, text[:-back], 0, 50)
    cache.check_integrity()
    node = entries([3])
    assert torch.equal(seen(cache, [0], [-1], node)[0], seen(shorter, [0], [-1], node)[0])
    again = [*text[:-back], *[1] * 70]
    append(cache, again, len(text) - back, 9)
    append(shorter, again, len(text) - back, 70)
    assert torch.equal(seen(cache, [0], [-1], node)[0], seen(shorter, [0], [-1], node)[0])


def test_a_row_that_cannot_go_back_forgets_its_text() -> None:
    text = [position % 17 for position in range(WINDOW + 5 * GROUP)]
    cache = QuantizedKVCache(4, 1, 1)
    append(cache, text, 0, 64)
    cache.truncate([GROUP])
    assert cache.row_lengths == [0]
    cache.check_integrity()
    with pytest.raises(ValueError, match="cannot truncate row 0"):
        cache.truncate([5])
    append(cache, text, 0, 64)
    fresh = QuantizedKVCache(4, 1, 1)
    append(fresh, text, 0, 64)
    node = entries([3])
    assert torch.equal(seen(cache, [0], [-1], node)[0], seen(fresh, [0], [-1], node)[0])


def test_rows_come_go_and_copy() -> None:
    lengths = [WINDOW + 3 * GROUP + 3, 5, WINDOW + GROUP]
    texts = [[(row * 7 + position) % 29 for position in range(length)] for row, length in enumerate(lengths)]
    cache = QuantizedKVCache(4, 1, 1)
    alone = []
    for text in texts:
        each = QuantizedKVCache(4, 1, 1)
        append(each, text, 0, 40)
        alone.append(each)
    cache.copy_row(0, _with_room(cache, lengths[0]) and alone[0], 0, lengths[0])
    cache.add_rows(2)
    cache.copy_row(2, alone[2], 0, lengths[2])
    cache.copy_row(1, alone[1], 0, lengths[1])
    cache.check_integrity()
    cache.keep_rows([2, 0, 1])
    assert cache.row_lengths == [lengths[2], lengths[0], lengths[1]]
    cache.check_integrity()
    for row, source in enumerate((2, 0, 1)):
        single = QuantizedKVCache(4, 1, cache.capacity)
        single.copy_row(0, cache, row, cache.row_lengths[row])
        node = entries([3])
        assert torch.equal(seen(single, [0], [-1], node)[0], seen(alone[source], [0], [-1], node)[0])


def _with_room(cache: KVCache, capacity: int) -> bool:
    cache.reserve(capacity)
    return True


def test_a_kept_text_is_cut_where_it_can_be() -> None:
    text = [position % 13 for position in range(WINDOW + 12 * GROUP)]
    cache = QuantizedKVCache(4, 1, 1)
    append(cache, text, 0, 64)
    kept = cache.give_away()[0]
    assert cache.row_lengths == [0]
    assert len(kept) == 1
    assert kept[0].segment.num_bytes < 0.6 * 2 * 4 * HEADS * WIDTH * len(text)
    for count, held in ((len(text), len(text)), (len(text) - SLACK, len(text) - SLACK), (GROUP, 0)):
        other = QuantizedKVCache(4, 1, len(text))
        other.share(0, first_tokens(kept, count))
        other.check_integrity()
        assert other.row_lengths == [held]
        append(other, text, held, 64)
        node, whole = entries([3]), QuantizedKVCache(4, 1, 1)
        append(whole, text, 0, 64)
        assert torch.equal(seen(other, [0], [-1], node)[0], seen(whole, [0], [-1], node)[0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_the_plan_says(bits: int, dtype: torch.dtype) -> None:
    length, element = 4096, dtype.itemsize
    cache, whole = QuantizedKVCache(bits, 2, length), KVCache(2, length)
    keys = torch.zeros(2, HEADS, WINDOW, WIDTH, dtype=dtype)
    for each in (cache, whole):
        for _ in range(length // WINDOW):
            each.write(0, keys, keys, 0)
            each.advance([WINDOW] * 2)
    full = 2 * 2 * HEADS * WIDTH * element
    packed = 2 * HEADS * length * kv_bytes(bits, WIDTH, element)
    # In full: the window, what is not a whole group, what can be taken back, a chunk of a prompt, and spare slots.
    assert packed <= cache.num_bytes <= packed + full * (WINDOW + GROUP + SLACK + WINDOW + 64 + GROUP)
    assert cache.num_bytes < whole.num_bytes * {8: 0.7, 4: 0.45, 2: 0.35}[bits]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="unknown precision of the KV cache 'int3'"):
        find_kv("int3")
    cache = QuantizedKVCache(4, 1, 4)
    with pytest.raises(ValueError, match="the cache has 4"):
        cache.write(0, torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8), 0)
    with pytest.raises(ValueError, match="takes rows of such caches alone"):
        cache.copy_row(0, KVCache(1, 4), 0, 0)
    deep = torch.arange(WINDOW + 2).unsqueeze(0)
    with pytest.raises(ValueError, match=f"a tree {WINDOW + 1} deep"):
        cache.visibility(deep, torch.ones(1, 1, WINDOW + 2, dtype=torch.bool))
