"""Kept prefixes: within a limit, in use or not, and looked up by one thread while others ask and evict."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from integration.counting import Counting
from unit_prefixes import prefix_target, run_of

from specdec import prefix_store
from specdec.prefix import prefill_shared
from specdec.prefix_store import PrefixStore
from specdec.target import HFTarget

TOKEN_BYTES = 2 * 2 * 32 * 4  # keys and values, layers, width, bytes of a float


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return prefix_target()


def test_a_kept_prefix_is_built_on_as_far_as_it_goes(target: HFTarget) -> None:
    counting = Counting(target.model)
    store = PrefixStore(counting, 2**20, TOKEN_BYTES)
    with store.hold(run_of(1, 40), ["last"]):
        counting.computed = 0
        prompts = [run_of(1, 44), run_of(1, 20) + run_of(5, 6), run_of(1, 40)]
        cache, output = prefill_shared(counting, prompts, 64, ["last"], store)
        assert counting.computed == 3 * 6  # rows are padded to the longest rest
    assert output is not None
    for row, prompt in enumerate(prompts):
        alone = target.new_cache(1, 64)
        expected = target.extend([prompt], alone, ["last"])
        torch.testing.assert_close(output.features["last"][row, : len(prompt)], expected.features["last"][0])
        torch.testing.assert_close(cache.entries(1, row)[0], alone.layers[1].keys[0, :, : len(prompt)])


def test_a_prefix_without_the_hidden_states_asked_for_is_computed_anew(target: HFTarget) -> None:
    store = PrefixStore(target, 2**20, TOKEN_BYTES)
    with store.hold(run_of(1, 20)):
        assert store.find(run_of(1, 25)) is not None
        assert store.find(run_of(1, 25), ["last"]) is None
        with store.hold(run_of(1, 20), ["last"]):
            assert store.find(run_of(1, 25), ["last"]) is not None
        with pytest.raises(ValueError, match="in use"):
            store.evict(run_of(1, 20))  # the outer block still holds it
    store.evict(run_of(1, 20))


def test_the_least_recently_used_goes_first(target: HFTarget) -> None:
    store = PrefixStore(target, 3 * 20 * TOKEN_BYTES, TOKEN_BYTES)
    first, second, third, fourth = (run_of(token, 20) for token in (1, 2, 3, 4))
    for tokens in (first, second, third):
        with store.hold(tokens):
            pass
    assert store.num_bytes == store.budget
    store.find((*first, 5))  # used again
    with store.hold(fourth):
        assert [tokens in store for tokens in (first, second, third, fourth)] == [True, False, True, True]


def test_prefixes_in_use_are_never_evicted(target: HFTarget) -> None:
    store = PrefixStore(target, 2 * 20 * TOKEN_BYTES, TOKEN_BYTES)
    with store.hold(run_of(1, 20)), store.hold(run_of(2, 15)):
        with pytest.raises(ValueError, match="prefixes in use"), store.hold(run_of(3, 20)):
            pass
        with pytest.raises(ValueError, match="in use: leave its with-block"):
            store.evict(run_of(1, 20))
        store.clear()
        assert len(store) == 2
    store.evict(run_of(1, 20))
    assert run_of(1, 20) not in store
    with pytest.raises(ValueError, match="no prefix of these 20 tokens"):
        store.evict(run_of(1, 20))


def test_a_prefix_larger_than_the_whole_store_is_refused_before_it_is_computed(target: HFTarget) -> None:
    counting = Counting(target.model)
    store = PrefixStore(counting, 20 * TOKEN_BYTES, TOKEN_BYTES)
    with pytest.raises(ValueError, match="prefixes may take"), store.hold(run_of(1, 21)):
        pass
    assert (counting.computed, len(store)) == (0, 0)
    with pytest.raises(ValueError, match="is the limit"), store.hold(run_of(1, 20), ["last"]):
        pass  # hidden states come on top
    assert len(store) == 0


def in_a_thread(work: Any) -> threading.Thread:
    """Run it in a thread of its own, which is given a moment to get through."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(0.2)
    return thread


def test_a_prefix_looked_up_by_another_thread_while_bytes_are_counted(
    target: HFTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrefixStore(target, 2**20, TOKEN_BYTES)
    for token in (1, 2):
        with store.hold(run_of(token, 20)):
            pass
    count = prefix_store.distinct
    finders: list[threading.Thread] = []
    found: list[Any] = []

    def interrupted(rows: Iterable[Any]) -> Any:
        def between() -> Iterator[Any]:
            for row in rows:
                yield row
                finders.append(in_a_thread(lambda: found.append(store.find(run_of(1, 20)))))

        return count(between())

    with monkeypatch.context() as patched:
        patched.setattr(prefix_store, "distinct", interrupted)
        assert store.num_bytes == 2 * 20 * TOKEN_BYTES
    for finder in finders:
        finder.join(10)
    assert [stretch.length for stretch in found] == [20, 20]


def test_a_prefix_forgotten_while_another_thread_looks_it_up(target: HFTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixStore(target, 2**20, TOKEN_BYTES)
    with store.hold(run_of(1, 20)):
        pass
    compare = prefix_store.common_prefix
    clearing: list[threading.Thread] = []

    def interrupted(left: Any, right: Any) -> int:
        clearing.append(in_a_thread(store.clear))
        assert run_of(1, 20) in store  # it is there for as long as somebody looks
        return compare(left, right)

    with monkeypatch.context() as patched:
        patched.setattr(prefix_store, "common_prefix", interrupted)
        stretch = store.find(run_of(1, 25))
    assert stretch is not None
    assert stretch.length == 20
    for thread in clearing:
        thread.join(10)
    assert len(store) == 0
